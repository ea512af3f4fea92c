"""What a run needs of the machine: versions, temperatures, its memory limited and sampled."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

from export.contract.validation import sentence
from export.host import memory_sampler
from export.host.runner.files import EventsFile

THERMAL_FOLDER = Path("/sys/class/thermal")
_LIBRARIES = ("pocket-diffusion", "executorch", "torch", "numpy", "tokenizers")


def version_of(distribution: str) -> str | None:
    """The version of an installed package; None in a checkout that is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python and the libraries that are installed."""
    found = {name.replace("-", "_"): version_of(name) for name in _LIBRARIES}
    known = {name: version for name, version in found.items() if version is not None}
    return {"python": platform.python_version()} | known


def process_began_s() -> float:
    """When the system made this process, on the clock of time.monotonic; to 10 ms."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    began_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - began_s
    return time.monotonic() - max(age_s, 0.0)


def limit_memory(limit_bytes: int) -> None:
    """Limit this process's address space, from now on."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, hard))


def start_memory_sampler(events: EventsFile, interval_ms: int) -> subprocess.Popen[bytes]:
    """A process that appends this one's memory to the events until it ends."""
    arguments = (os.getpid(), events.began_s, interval_ms, events.path)
    return subprocess.Popen(
        [sys.executable, "-I", "-S", memory_sampler.__file__, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def read_temperatures(folder: Path = THERMAL_FOLDER) -> dict[str, float]:
    """Degrees Celsius of the thermal zones that can be read, by type.

    Zones of one type are told apart by their folder's name. Zones without a sensor state
    impossible values, so what is not between -50 and 200 is left out.
    """
    zones: dict[str, float] = {}
    for zone in sorted(folder.glob("thermal_zone*")):
        try:
            name = sentence((zone / "type").read_text(encoding="utf-8", errors="replace"))[:100]
            celsius = int((zone / "temp").read_text(encoding="ascii")) / 1000
        except (OSError, ValueError):
            continue
        if -50 <= celsius <= 200:
            zones[f"{name} ({zone.name})" if name in zones else name] = celsius
    return zones
