"""Devices with the shells and tools of small systems: Android's, and busybox."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.folder_transport import FolderTransport

SMALL_SYSTEMS = ("toybox with mksh", "busybox")


def small_system(name: str, packages: tuple[str, ...], folder: Path) -> Path:
    """The unpacked Debian packages, fetched to `folder`; skips where that is not possible."""
    try:
        for command in (
            ["apt-get", "download", *packages],
            *(["sh", "-c", f"dpkg -x {package}_*.deb ."] for package in packages),
        ):
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{name} cannot be fetched as a Debian package: {error}")
    return folder


def small_device(name: str, folder: Path) -> FolderTransport:
    """Commands by the shell and the tools of Android (without `dd`, which Debian leaves out of
    toybox), or by those of busybox; fetched to `folder`, which is empty."""
    tools = folder / "tools"
    tools.mkdir()
    packages = ("busybox",) if name == "busybox" else ("busybox", "toybox", "mksh")
    small_system(name, packages, folder)
    busybox, toybox = folder / "bin" / "busybox", folder / "bin" / "toybox"
    if name == "busybox":
        main, names, shell = busybox, [str(busybox), "--list"], (str(busybox), "sh")
    else:
        main, names, shell = toybox, [str(toybox)], (str(folder / "bin" / "mksh"),)
    for tool in subprocess.run(names, check=True, capture_output=True, text=True).stdout.split():
        (tools / tool).symlink_to(main)
    if not (tools / "sh").exists():
        (tools / "sh").symlink_to(shell[0])
    if not (tools / "dd").exists():
        (tools / "dd").symlink_to(busybox)
    return FolderTransport(path=str(tools), shell=shell)
