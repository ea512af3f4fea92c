"""The local device: Debian's real `adbd` on this machine, in namespaces and a folder of its own.

Stands in for a phone where there is none; it looks like one to adb (its own /data, processes that
outlive the connection, a reboot with another boot id), and shows this machine's other files
read-only, so that the Linux runner is there. It asks no key: whoever can open a socket on this
machine's loopback can use it, with the rights of the user who started it. Its tree is laid out by
`init`.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from device_tests.errors import DeviceNotFound
from device_tests.local.adbd import Adbd, LocalDeviceUnavailable, adbd
from device_tests.local.memory_limit import make_cgroup, remove_cgroup
from device_tests.processes import start_ticks
from quantize.errors import DeviceError

STATE_FILE = "device.json"
_HERE = Path(__file__).parent
_REPOSITORY = _HERE.parents[1]
_START_S = 20.0
_STOP_S = 10.0
_PORT_ATTEMPTS = 5


class LocalDevice:
    """A device in `folder`, which is made; everything on it ends with `stop` or this process.

    port: on loopback, 0 for a free one. data_bytes: /data is a file system in memory of this size,
    empty at each start; else it is the folder `data` in `folder` and persists. binds: host path ->
    path on the device, laid over what is there (folder over folder, file over file), writable.
    memory_bytes: limit of all its processes together, beyond which the kernel kills the largest;
    needs root and a memory cgroup. keep: it outlives this process, until somebody calls `stop`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        port: int = 0,
        data_bytes: int | None = None,
        memory_bytes: int | None = None,
        binds: Mapping[str | Path, str] | None = None,
        keep: bool = False,
    ) -> None:
        self.folder = Path(folder).resolve()
        self.port = port
        self._any_port = port == 0
        self._data_bytes = data_bytes
        self._memory_bytes = memory_bytes
        self._binds = {str(Path(host).resolve()): at for host, at in (binds or {}).items()}
        self._keep = keep
        self._process: subprocess.Popen[bytes] | None = None
        self._cgroup: Path | None = None

    @property
    def serial(self) -> str:
        """As adb names it once connected: `127.0.0.1:PORT`."""
        return f"127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        """Whether it was started here and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process outside that holds the device; with its end the device ends."""
        if self._process is None:
            raise DeviceNotFound("the local device is not running; start it first")
        return self._process.pid

    def path(self, remote: str) -> Path:
        """Where this machine has the file `remote` of the device; only what is below /data."""
        if self._data_bytes is not None or not remote.startswith("/data/"):
            raise ValueError(f"{remote!r} of the local device has no path on this machine")
        return self.folder / remote.lstrip("/")

    def start(self) -> LocalDevice:
        """Start it and wait until it listens. Raises LocalDeviceUnavailable."""
        program = adbd()
        for attempt in range(_PORT_ATTEMPTS):
            if self._any_port and (attempt > 0 or self.port == 0):
                self.port = _free_port()
            if _answers(self.port):
                if self._any_port:
                    continue
                raise LocalDeviceUnavailable(
                    f"port {self.port} is taken by another process; choose another port"
                )
            self._launch(program)
            if self._listening():
                if self._keep:
                    self._note_kept()
                return self
            said = self._log_tail()
            self.stop()
            if not (self._any_port and "Address already in use" in said):
                break
        raise LocalDeviceUnavailable(
            f"the local device did not start ({said}); it needs user namespaces, which some "
            "systems and containers forbid, and Linux 5.12"
        )

    def stop(self) -> None:
        """End everything that runs on it, as if the battery were pulled. /data stays."""
        process, self._process = self._process, None
        if process is not None:
            _end(process.pid)
            if process.stdin is not None:
                process.stdin.close()
            process.wait(_STOP_S)
        if self._cgroup is not None:
            remove_cgroup(self._cgroup)
            self._cgroup = None

    def restart(self) -> None:
        """Reboot: everything that runs ends; the same port and /data, another boot id."""
        self.stop()
        self._any_port = False
        self.start()

    def __enter__(self) -> LocalDevice:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _take_folder(self) -> int:
        """Make the folder, and lock it by a descriptor that the device's processes inherit."""
        for name in ("data", "root"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise LocalDeviceUnavailable(
                f"another local device runs in {str(self.folder)!r}; stop it or choose another "
                "folder"
            ) from None
        return lock

    def _launch(self, program: Adbd) -> None:
        lock = self._take_folder()
        try:
            self._launch_locked(program, lock)
        finally:
            os.close(lock)

    def _launch_locked(self, program: Adbd, lock: int) -> None:
        (self.folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
        settings = {
            "root": str(self.folder / "root"),
            "data": str(self.folder / "data"),
            "data_bytes": self._data_bytes,
            "boot_id": str(self.folder / "boot_id"),
            "binds": self._binds,
            "shown": _hidden_by_own_folders(),
            "adbd_folder": str(program.folder),
            "adbd": program.command(Path("/adbd")),
            "lifeline": not self._keep,
            "environment": {
                "ADBD_PORT": str(self.port),
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": "/data/local/tmp",
                "TMPDIR": "/data/local/tmp",
                "LC_ALL": "C.UTF-8",
            },
        }
        command = [
            *("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child"),
            *(sys.executable, "-I", "-S", str(_HERE / "init.py"), json.dumps(settings)),
        ]
        if self._memory_bytes is not None:
            self._cgroup = make_cgroup(self._memory_bytes)
            # The shell enters the group before anything of the device exists.
            enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
            command = ["sh", "-c", enter, str(self._cgroup), *command]
        with (self.folder / "adbd.log").open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL if self._keep else subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=[lock],
                )
            except FileNotFoundError:
                raise LocalDeviceUnavailable(
                    "the local device needs unshare (util-linux), and this machine has none"
                ) from None

    def _listening(self) -> bool:
        give_up = time.monotonic() + _START_S
        while time.monotonic() < give_up and self.running:
            if _answers(self.port):
                return self.running
            time.sleep(0.01)
        return False

    def _note_kept(self) -> None:
        state = {"pid": self.pid, "started": start_ticks(self.pid), "port": self.port}
        (self.folder / STATE_FILE).write_text(json.dumps(state))

    def _log_tail(self) -> str:
        lines = (self.folder / "adbd.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


@dataclass(frozen=True)
class KeptDevice:
    """A local device that some earlier process started with `keep`, and that is still running."""

    pid: int
    port: int

    @property
    def serial(self) -> str:
        """As adb names it once connected."""
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        """End it."""
        _end(self.pid)
        give_up = time.monotonic() + _STOP_S
        while start_ticks(self.pid) is not None:
            if time.monotonic() > give_up:
                raise DeviceError(f"the local device (process {self.pid}) did not end; kill it")
            time.sleep(0.01)


def kept(folder: str | Path) -> KeptDevice | None:
    """The device kept in `folder`, or None if none runs."""
    try:
        state = json.loads((Path(folder) / STATE_FILE).read_bytes())
        running = start_ticks(state["pid"])
        same = running is not None and running == state["started"]
        return KeptDevice(state["pid"], state["port"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _hidden_by_own_folders() -> list[str]:
    """Folders of Python and of this repository that the device's own /tmp or /data would hide."""
    needed = {str(Path(p).resolve()) for p in (_REPOSITORY, sys.prefix, sys.base_prefix)}
    return sorted(p for p in needed if p.startswith(("/tmp/", "/data/")))


def _end(pid: int) -> None:
    """Kill the device held by `pid`: its first process, with which all of its processes die."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        if not children:
            os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        pass
