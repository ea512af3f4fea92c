"""The local device: Debian's real `adbd` on this machine, in namespaces and a folder of its own.

Stands in for a phone where there is none; it looks like one to adb (its own /data, processes that
outlive the connection, a reboot with another boot id), and shows this machine's other files
read-only, so that the Linux runner is there. It asks no key: whoever can open a socket on this
machine's loopback can use it, with the rights of the user who started it. Its tree is laid out by
`local_init`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from device_tests.errors import DeviceNotFound
from quantize.errors import DeviceError

CACHE_VARIABLE = "POCKETDIFF_CACHE"
REQUIRE_VARIABLE = "POCKETDIFF_REQUIRE_DEVICE"
STATE_FILE = "device.json"
DEBIAN_SUITE = "trixie"
"""The first Debian release with a package `adbd`; its C library comes with it."""

_HERE = Path(__file__).parent
_REPOSITORY = _HERE.parents[1]
_START_S = 20.0
_STOP_S = 10.0
_PORT_ATTEMPTS = 5


class LocalDeviceUnavailable(DeviceError):
    """This machine cannot run the local device, or not without a download that failed."""


def cache_folder() -> Path:
    """Where the download is kept: $POCKETDIFF_CACHE, else pocket-diffusion in the user's cache."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pocket-diffusion"


@dataclass(frozen=True)
class Adbd:
    """The unpacked packages and the library to preload."""

    folder: Path
    preload: Path

    def command(self, at: Path) -> list[str]:
        """How to start it when `folder` is visible as `at`."""
        loader = _only(self.folder, ("usr/lib*/ld-linux*.so.*", "usr/lib/*/ld-linux*.so.*"))
        android = _only(self.folder, ("usr/lib/*/android",))
        program = "usr/lib/android-sdk/platform-tools/adbd"
        libraries = [
            at / android.parent.relative_to(self.folder),
            at / android.relative_to(self.folder),
        ]
        return [
            str(at / loader.relative_to(self.folder)),
            *("--preload", str(at / self.preload.relative_to(self.folder))),
            *("--library-path", ":".join(map(str, libraries))),
            str(at / program),
        ]


def _only(folder: Path, patterns: Sequence[str]) -> Path:
    for pattern in patterns:
        for found in sorted(folder.glob(pattern)):
            return found
    raise LocalDeviceUnavailable(
        f"the packages of adbd in {folder} have no {patterns[0]}; remove that folder and try again"
    )


def _run(command: Sequence[str], what: str, **options: object) -> str:
    """Standard output of a host command; its failure is a sentence with the last line it said."""
    try:
        done = subprocess.run(  # type: ignore[call-overload]
            command, capture_output=True, text=True, timeout=600, check=False, **options
        )
    except FileNotFoundError:
        raise LocalDeviceUnavailable(
            f"the local device needs {command[0]} to {what}, and this machine has none"
        ) from None
    except subprocess.TimeoutExpired:
        raise LocalDeviceUnavailable(
            f"{command[0]} did not {what} within 10 minutes; look at the network and try again"
        ) from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        raise LocalDeviceUnavailable(f"{command[0]} could not {what}: {said[-1].strip()}")
    return done.stdout


@dataclass(frozen=True)
class _Source:
    """A repository of signed packages that has adbd."""

    uri: str
    suite: str
    components: str
    keyring: str


def _source() -> _Source:
    """The mirror that this system's own apt takes, with the suite that has adbd."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise LocalDeviceUnavailable(
            "the local device takes Debian's adbd through apt, and this system has no apt; use a "
            "Debian or Ubuntu system, or a real device"
        )
    listed = _run(
        [
            *("apt-get", "indextargets", "--no-release-info", "Created-By: Packages"),
            *("--format", "$(REPO_URI)|$(RELEASE)"),
        ],
        "list its repositories",
    )
    system = platform.freedesktop_os_release().get("ID", "?")
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "?")
    suites = {"debian": (DEBIAN_SUITE, "main"), "ubuntu": (codename, "main universe")}
    if system not in suites:
        raise LocalDeviceUnavailable(
            f"the local device takes adbd from Debian or Ubuntu, and this system is {system!r}"
        )
    suite, components = suites[system]
    keyring = f"/usr/share/keyrings/{system}-archive-keyring.gpg"
    for line in listed.splitlines():
        uri, _, release = line.partition("|")
        if release == codename and Path(keyring).exists():
            return _Source(uri, suite, components, keyring)
    raise LocalDeviceUnavailable(
        f"apt lists no repository of {codename!r} with a keyring {keyring}; the local device needs "
        "both to fetch adbd"
    )


def _apt_configuration(folder: Path, source: _Source, architecture: str) -> Path:
    """An apt of its own in `folder`: knows only `source`, and no installed package."""
    for name in ("etc", "lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    (folder / "sources.list").write_text(
        f"deb [signed-by={source.keyring}] {source.uri} {source.suite} {source.components}\n"
    )
    network = ("Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries")
    dump = _run(["apt-config", "dump", "Acquire"], "say its settings")
    lines = [line for line in dump.splitlines() if line.startswith(network)]
    lines += [
        f'Dir::State "{folder}";',
        f'Dir::State::lists "{folder}/lists";',
        f'Dir::State::status "{folder}/status";',
        f'Dir::Cache "{folder}";',
        f'Dir::Cache::archives "{folder}/archives";',
        f'Dir::Etc::sourcelist "{folder}/sources.list";',
        'Dir::Etc::sourceparts "-";',
        f'Dir::Etc::parts "{folder}/etc";',
        'Dir::Etc::preferences "-";',
        'Dir::Etc::preferencesparts "-";',
        f'APT::Architecture "{architecture}";',
        f'APT::Architectures {{ "{architecture}"; }};',
        'APT::Install-Recommends "false";',
        'APT::Sandbox::User "";',
        'Acquire::Languages "none";',
        'Acquire::AllowInsecureRepositories "false";',
    ]
    path = folder / "apt.conf"
    path.write_text("\n".join(lines) + "\n")
    return path


def _download(destination: Path) -> None:
    """Fetch adbd and what it needs, signatures verified by apt, and unpack it as `destination`."""
    source = _source()
    architecture = _run(["dpkg", "--print-architecture"], "say the architecture").strip()
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix="adbd-") as work:
        configuration = _apt_configuration(Path(work) / "apt", source, architecture)
        environment = os.environ | {"APT_CONFIG": str(configuration), "LC_ALL": "C"}
        where = f"fetch adbd of {source.suite} from {source.uri}"
        _run(["apt-get", "-q", "update"], where, env=environment)
        _run(["apt-get", "-qy", "install", "--download-only", "adbd"], where, env=environment)
        unpacked = Path(work) / "unpacked"
        for package in sorted((Path(work) / "apt/archives").glob("*.deb")):
            _run(["dpkg-deb", "-x", str(package), str(unpacked)], "unpack a package")
        _take_place(unpacked, destination)


def _take_place(made: Path, destination: Path) -> None:
    """Rename; another process that was faster has made the same."""
    try:
        made.rename(destination)
    except OSError:
        if not destination.exists():
            raise


def _compile(destination: Path) -> None:
    """Build the library that keeps adbd on loopback."""
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        raise LocalDeviceUnavailable(
            "the local device needs a C compiler (cc, gcc or clang), and this machine has none"
        )
    made = destination.with_suffix(f".{os.getpid()}")
    _run(
        [
            *(compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Werror"),
            *("-o", str(made), str(_HERE / "bind_loopback.c")),
        ],
        "build the library that keeps adbd on loopback",
    )
    made.replace(destination)


def adbd() -> Adbd:
    """The program, from the cache or fetched (8 MB) into it.

    Raises LocalDeviceUnavailable with what is missing.
    """
    if sys.platform != "linux":
        raise LocalDeviceUnavailable(f"the local device needs Linux, and this is {sys.platform}")
    folder = cache_folder() / f"adbd-{DEBIAN_SUITE}-{platform.machine()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.exists():
            _download(folder)
        source = hashlib.sha256((_HERE / "bind_loopback.c").read_bytes()).hexdigest()
        preload = folder / f"bind_loopback-{source[:16]}.so"
        if not preload.exists():
            _compile(preload)
    except OSError as error:
        raise LocalDeviceUnavailable(
            f"the download of the local device cannot be kept in {folder}: {error}; set "
            f"{CACHE_VARIABLE} to a folder that can be written"
        ) from error
    return Adbd(folder, preload)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


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
            _remove_cgroup(self._cgroup)
            self._cgroup = None

    def restart(self) -> None:
        """Reboot: everything that runs ends; the same port and /data, another boot id."""
        self.stop()
        self._any_port = False
        self.start()

    def __enter__(self) -> LocalDevice:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            self._cgroup = _make_cgroup(self._memory_bytes)
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
        state = {"pid": self.pid, "started": _start_ticks(self.pid), "port": self.port}
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
        while _start_ticks(self.pid) is not None:
            if time.monotonic() > give_up:
                raise DeviceError(f"the local device (process {self.pid}) did not end; kill it")
            time.sleep(0.01)


def kept(folder: str | Path) -> KeptDevice | None:
    """The device kept in `folder`, or None if none runs."""
    try:
        state = json.loads((Path(folder) / STATE_FILE).read_bytes())
        running = _start_ticks(state["pid"])
        same = running is not None and running == state["started"]
        return KeptDevice(state["pid"], state["port"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _start_ticks(pid: int) -> int | None:
    """When the process `pid` began, in clock ticks; None if it is not there or dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])


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


def _memory_cgroup() -> Path:
    """The folder of this process's memory cgroup, version 1."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            for mount in Path("/proc/self/mountinfo").read_text().splitlines():
                fields = mount.split()
                kind, _, options = fields[fields.index("-") + 1 :]
                if kind == "cgroup" and "memory" in options.split(","):
                    return Path(fields[4]) / group.lstrip("/")
    raise LocalDeviceUnavailable(
        "a memory limit of the local device needs a memory cgroup of version 1, and this system "
        "has none; leave memory_bytes out"
    )


def _make_cgroup(limit_bytes: int) -> Path:
    folder = _memory_cgroup() / f"pocketdiff-{uuid.uuid4().hex[:12]}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError as error:
        raise LocalDeviceUnavailable(
            f"the memory limit of the local device cannot be set in {folder}: {error.strerror}; be "
            "root or leave memory_bytes out"
        ) from error
    return folder


def _remove_cgroup(folder: Path) -> None:
    """The group empties when the last process is gone, a moment after the first."""
    give_up = time.monotonic() + _STOP_S
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.01)
