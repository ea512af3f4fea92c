"""Command line of the local device: start, stop, status, run."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from device_tests.local.adbd import cache_folder
from device_tests.local.device import LocalDevice, kept
from quantize.errors import DeviceError
from scripts.commands import run_command
from scripts.console import out_console

app = typer.Typer(
    help="A device that answers adb on this machine: Debian's adbd, listening on loopback only.",
    no_args_is_help=True,
    add_completion=False,
)

Folder = Annotated[
    Path,
    typer.Option(
        default_factory=lambda: cache_folder() / "device",
        show_default="in the user's cache",
        help="Where the device keeps its /data, its log and its state.",
    ),
]


@app.command()
def start(
    folder: Folder,
    port: Annotated[int, typer.Option(help="On loopback; 0: a free one.")] = 0,
) -> None:
    """Start the device and leave it running; prints its serial."""
    running = kept(folder) or LocalDevice(folder, port=port, keep=True).start()
    out_console().print(running.serial)


@app.command()
def stop(folder: Folder) -> None:
    """End the device and everything on it; its files stay."""
    running = kept(folder)
    if running is None:
        raise DeviceError(f"no local device runs in {str(folder)!r}")
    running.stop()


@app.command()
def status(folder: Folder) -> None:
    """Print the serial of the running device; exit code 1 if none runs."""
    running = kept(folder)
    if running is None:
        out_console().print(f"no local device runs in {str(folder)!r}", soft_wrap=True)
        raise typer.Exit(1)
    out_console().print(running.serial)


@app.command(context_settings={"ignore_unknown_options": True})
def run(command: list[str]) -> None:
    """Run COMMAND with ANDROID_SERIAL naming a fresh device, which ends with it."""
    with tempfile.TemporaryDirectory() as folder, LocalDevice(folder) as device:
        environment = os.environ | {"ANDROID_SERIAL": device.serial}
        raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    raise SystemExit(run_command(app, "local_device"))
