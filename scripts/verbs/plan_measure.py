"""Measures this machine, or one over adb, and writes what was found as a device's description."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from export.plan.device import Device, Figure, Rate
from quantize.errors import DeviceError

ROOT = Path(__file__).parents[2]
APP_SHARE = 0.8
"""Of a machine that runs Linux without a desktop; as of the boards that come with the project."""
TIMEOUT_S = 540.0
"""Shorter than what makes the lock of a device stale: no heartbeat is sent meanwhile."""
REMOTE = "measure"


def measured_device(
    name: str,
    *,
    serial: str | None,
    via: str,
    local: bool,
    threads: int | None,
    say: Callable[[str], None],
) -> Device:
    """Lower the programs here, run them there, describe the device.

    Raises DeviceError if a device cannot be reached, runs no Linux runtime, or fails.
    """
    from export.measurement.programs import write_programs

    with tempfile.TemporaryDirectory(prefix="pocketdiff-measure-") as temporary:
        folder = Path(temporary)
        if serial is None and not local:
            write_programs(folder, say)
            say("measuring this machine")
            found, title, how = _here(folder, threads), "", "on this machine"
        else:
            found, title, how = _there(folder, serial, via, local, threads, say)
    return described(name, found, title, how)


def described(name: str, found: dict[str, Any], title: str, how: str) -> Device:
    """The device of a measurement's document."""
    when = datetime.now(UTC).strftime("%Y-%m-%d")
    threads = found["threads"]
    source = f"measured {when} {how}, {threads} threads, XNNPACK through ExecuTorch"
    units = {
        "memory_gb_s": "fp32 matrix-vector products over 134 MB of weights",
        "simple_gvalues_s": "sigmoid, product and sum over 64 x 2048 values",
        "softmax_gvalues_s": "attention with mask and softmax against without, 8 heads, 512 keys",
        "copy_gb_s": "index_select of rows of 64 numbers",
        "operator_us": "operators on 16 values in one delegate",
        "call_us": "a program of three operators on 16 values",
    }
    figures = {
        "ram_gib": Figure((found["ram_bytes"] or 0) / 2**30 or None, f"read {when} {how}"),
        "app_share": Figure(
            APP_SHARE, "assumption of this project: Linux without a desktop keeps a fifth"
        ),
        **{key: Figure(found[key] or None, f"{source}: {what}") for key, what in units.items()},
        "flash_read_mb_s": Figure(
            found["flash_read_mb_s"],
            f"measured {when} {how}: files dropped from the page cache, read in order"
            if found["flash_read_mb_s"]
            else "unknown: the page cache did not drop the files",
        ),
        "npu_int8_gops": Figure(None, "absent, or not measured"),
        "runtime_anonymous_mib": Figure(
            found["runtime_anonymous_bytes"] / 2**20,
            f"measured {when} {how}: the Linux runner with its libraries after a call, no bundle",
        ),
        "runtime_file_mib": Figure(
            found["runtime_file_bytes"] / 2**20,
            f"measured {when} {how}: the Linux runner with its libraries after a call, no bundle",
        ),
    }
    rates = {
        key: Rate(key, tuple((float(rows), float(gops)) for rows, gops in points))
        for key, points in found["rates"].items()
    }
    return Device(
        name=name,
        title=title or found["processor"],
        price_class="computer",
        processor=found["processor"],
        cores=f"{threads} threads",
        figures=figures,
        rates=rates,
        measured=f"{when} {how} by `pocketdiff plan --measure`, with {threads} threads: products "
        "of 2048 x 2048 weights in chains larger than the caches (int4 in groups of 32, int8), "
        "attention products of 8 heads of 64 over 512 keys (fp32); of each the fastest of three "
        "rounds, medians in a round",
    )


def _here(folder: Path, threads: int | None) -> dict[str, Any]:
    words = [sys.executable, "-P", "-m", "export.measurement.measure", str(folder)]
    words += [] if threads is None else [str(threads)]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        env=_environment(),
    )  # fmt: skip
    if done.returncode != 0:
        raise DeviceError(
            f"the measurement ended with {done.returncode} ({done.stderr.strip()[-300:]}); set the "
            "environment up again"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(ROOT)}


def _there(
    folder: Path,
    serial: str | None,
    via: str,
    local: bool,
    threads: int | None,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], str, str]:
    """Lower the programs, push them, measure as the only one there, take them away again."""
    from device_tests.bench import device_lock
    from device_tests.bench.runner import choose_runner
    from device_tests.errors import DeviceBusy
    from device_tests.remote import conditions
    from device_tests.remote import files as remote_files
    from device_tests.remote.shell import DEVICE_ROOT, run_checked
    from device_tests.results.plain_text import plain
    from export.measurement.programs import write_programs
    from scripts.verbs.device_verbs import _device

    lock_name = f"plan-measure-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    with _device(serial, via, local) as transport:
        device = conditions.read_device(transport)
        runner = choose_runner(device.android_sdk)
        remote = f"{DEVICE_ROOT}/{REMOTE}"
        run = lambda command, timeout_s=30.0: run_checked(transport, command, timeout_s)  # noqa: E731
        if (holder := device_lock.holder(transport)) is not None:  # before lowering, which is long
            raise DeviceBusy(
                f"the device {transport.serial} is taken by {holder}; wait for its end, or choose "
                "another device"
            )
        write_programs(folder, say)
        with device_lock.DeviceLock(transport, lock_name) as lock:
            if lock.note is not None:
                say(f"note: {plain(lock.note)}")
            remote_files.remove(run, [remote])
            remote_files.make_folders(run, [remote])
            try:
                for path in sorted(folder.iterdir()):
                    say(f"sending {path.name}")
                    with path.open("rb") as source:
                        transport.push(source, f"{remote}/{path.name}", path.stat().st_size)
                    lock.beat()
                say(f"measuring {transport.serial}")
                words = [remote] if threads is None else [remote, str(threads)]
                command = runner.module_command("export.measurement.measure", *words)
                answer = run_checked(transport, command, TIMEOUT_S)
            finally:
                remote_files.remove(run, [remote])
        model = " ".join(part for part in (device.manufacturer, device.model) if part)
        how = f"over adb ({transport.kind}) by the Linux runtime there"
        return _parsed(answer.text), model, how


def _parsed(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text.strip().splitlines()[-1])
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except (ValueError, IndexError) as error:
        raise DeviceError(
            f"the device answered the measurement with {text.strip()[-200:]!r}; look at its runtime"
        ) from error
