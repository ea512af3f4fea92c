"""`plan --measure` of a device over adb: what it writes, what it leaves there, when it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from device_tests.adb.direct import open_tcp
from device_tests.bench.device_lock import LOCK_FOLDER, DeviceLock
from device_tests.local.device import LocalDevice
from device_tests.remote.shell import DEVICE_ROOT
from export.families import read_shape
from export.measurement import programs as measure_programs
from export.plan.device import open_device
from export.plan.presets import read_config
from export.plan.roofline import time_of
from export.plan.work import step_pass
from quantize.recipe import preset
from scripts.device_measurement import REMOTE
from scripts.pocketdiff import run

# No adb server of this machine, and no serial of its user, has a say here.
pytestmark = pytest.mark.usefixtures("no_server")


@pytest.mark.slow
def test_a_device_is_measured_over_adb_and_left_as_it_was(
    local_device: LocalDevice,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # Rates in the caches are no rates of a device; what is tested here is how they come back.
    monkeypatch.setattr(measure_programs, "INT4_LAYERS", 1)
    monkeypatch.setattr(measure_programs, "INT8_LAYERS", 1)
    monkeypatch.setattr(measure_programs, "FP32_WIDTH", 512)
    target = tmp_path / "found.toml"
    words = ["plan", "--measure", str(target), "--serial", local_device.serial, "--threads", "1"]
    assert run(words) == 0, capfd.readouterr().err

    device = open_device(str(target))
    assert device.is_measured and "over adb (tcp)" in device.measured
    assert device.cores == "1 threads"
    # The local device is this machine.
    ram_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert device.value("ram_gib") == pytest.approx(ram_bytes / 2**30, rel=1e-3)
    assert set(device.rates) == {"int4", "int8", "fp32"}
    for rate in device.rates.values():
        assert [rows for rows, _ in rate.points] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
        assert all(gops > 0 for _, gops in rate.points)
    step = step_pass(read_shape(read_config("qwen3-0.6b-bd3lm")[1]), preset(), context=512)
    time = time_of(step, device)
    assert time.expected_ms is not None and time.expected_ms > 0

    host, port = local_device.serial.split(":")
    with open_tcp(host, int(port)) as transport:
        for left in (f"{DEVICE_ROOT}/{REMOTE}", LOCK_FOLDER):
            assert transport.shell(f"ls -d {left}").exit_code != 0


def test_a_device_that_is_being_measured_is_not_measured_by_another(
    local_device: LocalDevice, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "found.toml"
    host, port = local_device.serial.split(":")
    with open_tcp(host, int(port)) as transport, DeviceLock(transport, "the-first"):
        assert run(["plan", "--measure", str(target), "--serial", local_device.serial]) == 2
        said = capfd.readouterr().err
    assert "the-first" in said and "lowering" not in said
    assert not target.exists()
