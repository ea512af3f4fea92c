"""Measures this machine, or one over adb, and writes what was found as a device's description."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from export.plan.device import Device, Figure, Rate
from quantize.errors import DeviceError
from scripts.device_access import check_unlocked, connected_device

if TYPE_CHECKING:
    from device_tests.adb.transport import ShellResult

Via = Literal["auto", "server", "direct"]

ROOT = Path(__file__).parents[1]
APP_SHARE = 0.8
"""Of a machine that runs Linux without a desktop; as of the boards that come with the project."""
TIMEOUT_S = 540.0
"""Shorter than what makes the lock of a device stale, which is not renewed meanwhile."""
REMOTE = "measure"
MODULE = "export.measurement.measure"


def measured_device(
    name: str,
    *,
    serial: str | None,
    via: Via,
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
            found, title, how = _on_device(folder, serial, via, local, threads, say)
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
        **{
            f"runtime_{kind}_mib": Figure(
                found[f"runtime_{kind}_bytes"] / 2**20,
                f"measured {when} {how}: the Linux runner with its libraries after a call, no "
                "bundle",
            )
            for kind in ("anonymous", "file")
        },
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
    done = subprocess.run(
        [sys.executable, "-P", "-m", MODULE, *_arguments(str(folder), threads)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode != 0:
        raise DeviceError(
            f"the measurement ended with {done.returncode} ({done.stderr.strip()[-300:]}); set the "
            "environment up again"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _arguments(folder: str, threads: int | None) -> list[str]:
    return [folder] if threads is None else [folder, str(threads)]


def _on_device(
    folder: Path,
    serial: str | None,
    via: Via,
    local: bool,
    threads: int | None,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], str, str]:
    """Lower the programs, push them, measure as the only one there, remove them again."""
    from device_tests.bench import device_lock
    from device_tests.bench.runner import choose_runner
    from device_tests.remote import conditions
    from device_tests.remote import files as remote_files
    from device_tests.remote.shell import DEVICE_ROOT, run_checked
    from device_tests.results.plain_text import plain
    from export.measurement.programs import write_programs

    lock_name = f"plan-measure-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    with connected_device(serial, via, local) as transport:
        device = conditions.read_device(transport)
        runner = choose_runner(device.android_sdk)
        remote = f"{DEVICE_ROOT}/{REMOTE}"

        def run(command: str, timeout_s: float = 30.0) -> ShellResult:
            return run_checked(transport, command, timeout_s)

        check_unlocked(transport)  # before lowering, which is long
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
                command = runner.module_command(MODULE, *_arguments(remote, threads))
                answer = run(command, TIMEOUT_S)
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
