"""The first process of the local device: lays out its file system, starts adbd, reaps the dead.

Runs as process 1 of a fresh user, mount and process namespace, which `local_device` makes; it is a
script of its own without imports of this project, so that it starts in an instant.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
import sys
import threading
from pathlib import Path
from typing import Any

# From <sys/mount.h>, <linux/mount.h>; mount_setattr has one number everywhere, pivot_root that of
# the generic table but on x86-64.
MS_BIND, MS_REC, MS_UNBINDABLE, MS_NOSUID, MS_NODEV = 0x1000, 0x4000, 0x20000, 0x2, 0x4
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY = 1
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155}.get(os.uname().machine, 41)

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def mount(source: str, target: Path, kind: str | None, flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    _check(
        _libc.mount(
            source.encode(),
            bytes(target),
            kind.encode() if kind else None,
            ctypes.c_ulong(flags),
            options.encode() or None,
        ),
        f"mount of {source} on {target}",
    )


def read_only(target: Path) -> None:
    """Make the mount at `target`, and those below it, read-only. Linux 5.12 or newer."""
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(SYS_MOUNT_SETATTR),
        ctypes.c_int(AT_FDCWD),
        ctypes.c_char_p(bytes(target)),
        ctypes.c_uint(AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )
    _check(result, f"read-only {target}")


def bind(source: Path, target: Path) -> None:
    """Show the file or folder `source` also at `target`, which is made if it is not there.

    Where the target's folder cannot be written (sysfs), a tmpfs with everything that was in it is
    laid over it first.
    """
    if not os.path.lexists(target):
        _make_place(target, folder=source.is_dir())
    mount(str(source), target, None, MS_BIND | MS_REC)


def _make_place(target: Path, *, folder: bool) -> None:
    parent = target.parent
    if not os.path.lexists(parent):
        _make_place(parent, folder=True)
    try:
        _make(target, folder)
    except OSError:
        _mirror(parent)
        _make(target, folder)


def _make(target: Path, folder: bool) -> None:
    if folder:
        target.mkdir()
    else:
        target.touch(exist_ok=False)


def _mirror(folder: Path) -> None:
    """Lay a tmpfs over `folder` that shows the same entries and takes new ones."""
    below = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    mount("device", folder, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    for entry in sorted(Path(f"/proc/self/fd/{below}").iterdir()):
        _show(entry, folder / entry.name)
    os.close(below)


def _show(entry: Path, place: Path) -> None:
    """The file, folder or link `entry` also at `place`, which is not there yet."""
    mode = entry.lstat().st_mode
    if stat.S_ISLNK(mode):
        place.symlink_to(os.readlink(entry))
        return
    _make(place, stat.S_ISDIR(mode))
    mount(str(entry), place, None, MS_BIND | MS_REC)


def build_root(root: Path, settings: dict[str, Any]) -> None:
    """The device's tree at `root`: the host's read-only, but /data, /tmp, /dev and /proc its own.

    It is unbindable, so that a copy of the host's folder which holds `root` does not hold it again.
    """
    mount("device", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=16m")
    mount("none", root, None, MS_UNBINDABLE)
    own = {"proc", "tmp", "data", "dev", "adbd"}
    for entry in sorted(Path("/").iterdir()):
        if entry.name not in own:
            _show(entry, root / entry.name)
            if not entry.is_symlink():
                read_only(root / entry.name)
    for name in sorted(own):
        (root / name).mkdir()
    mount("proc", root / "proc", "proc")
    mount("device", root / "tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    _make_devices(root / "dev")
    bind(Path(settings["adbd_folder"]), root / "adbd")
    read_only(root / "adbd")
    if settings["data_bytes"] is None:
        bind(Path(settings["data"]), root / "data")
    else:
        mount("device", root / "data", "tmpfs", 0, f"mode=755,size={settings['data_bytes']}")
    (root / "data/local/tmp").mkdir(parents=True, exist_ok=True)
    for folder in settings["shown"]:
        bind(Path(folder), root / folder.lstrip("/"))
        read_only(root / folder.lstrip("/"))
    bind(Path(settings["boot_id"]), root / "proc/sys/kernel/random/boot_id")
    for source, target in settings["binds"].items():
        bind(Path(source), root / target.lstrip("/"))


def _make_devices(dev: Path) -> None:
    """The harmless device nodes only: none of the host's disks, and nothing of its to remove."""
    mount("device", dev, "tmpfs", MS_NOSUID, "mode=755,size=1m")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        bind(Path("/dev") / name, dev / name)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        (dev / name).symlink_to(f"/proc/self/{target}")
    for name in ("shm", "pts"):
        (dev / name).mkdir()
    mount("device", dev / "shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    mount("device", dev / "pts", "devpts", MS_NOSUID, "newinstance,ptmxmode=0666,mode=620")
    (dev / "ptmx").symlink_to("pts/ptmx")


def enter_root(root: Path) -> None:
    """Make `root` the root, and let go of the host's."""
    os.chdir(root)
    _check(_libc.syscall(ctypes.c_long(SYS_PIVOT_ROOT), b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount of the host's root")
    os.chdir("/")


def _end_with_stdin() -> None:
    """End, and with this process the whole device, when its starter is gone."""
    while os.read(0, 1):
        pass
    os._exit(0)


def main() -> None:
    """Never returns: ends when adbd does, or with its lifeline."""
    settings = json.loads(sys.argv[1])
    root = Path(settings["root"])
    build_root(root, settings)
    enter_root(root)
    adbd = os.fork()
    if adbd == 0:
        os.setsid()
        silence = os.open("/dev/null", os.O_RDWR)
        os.dup2(silence, 0)
        os.execve(settings["adbd"][0], settings["adbd"], settings["environment"])
    if settings["lifeline"]:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    while True:
        dead, status = os.wait()
        if dead == adbd:
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


if __name__ == "__main__":
    main()
