"""Devices with the shells and tools of small systems: Android's, and busybox."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.support.folder_transport import FolderTransport

SMALL_SYSTEMS = ("toybox with mksh", "busybox")


def small_system(name: str, packages: tuple[str, ...], folder: Path) -> Path:
    """The unpacked Debian packages in `folder`; skips where they cannot be fetched."""
    unpacked = _fetched(packages)
    if isinstance(unpacked, Exception):
        pytest.skip(f"{name} cannot be fetched as a Debian package: {unpacked}")
    shutil.copytree(unpacked.name, folder, symlinks=True, dirs_exist_ok=True)
    return folder


@functools.cache
def _fetched(packages: tuple[str, ...]) -> tempfile.TemporaryDirectory[str] | Exception:
    """The packages unpacked, once a session, or why they cannot be had."""
    folder = tempfile.TemporaryDirectory(prefix="small-system-")
    try:
        for command in (
            ["apt-get", "download", *packages],
            *(["sh", "-c", f"dpkg -x {package}_*.deb ."] for package in packages),
        ):
            subprocess.run(command, cwd=folder.name, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return error
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
