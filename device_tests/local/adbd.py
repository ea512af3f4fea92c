"""Debian's adbd on this machine: fetched through apt, its signatures verified, and kept."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import DeviceError
from quantize.files.durable import sha256_of

CACHE_VARIABLE = "POCKETDIFF_CACHE"
DEBIAN_SUITE = "trixie"
"""The first Debian release with a package `adbd`; its C library comes with it."""

_LOOPBACK_SOURCE = Path(__file__).with_name("bind_loopback.c")


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
            *("-o", str(made), str(_LOOPBACK_SOURCE)),
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
        preload = folder / f"bind_loopback-{sha256_of(_LOOPBACK_SOURCE)[:16]}.so"
        if not preload.exists():
            _compile(preload)
    except OSError as error:
        raise LocalDeviceUnavailable(
            f"the download of the local device cannot be kept in {folder}: {error}; set "
            f"{CACHE_VARIABLE} to a folder that can be written"
        ) from error
    return Adbd(folder, preload)
