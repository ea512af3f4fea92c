"""What a device is and at which clocks it may run: the commands that ask, their answers parsed.

The parsers are pure functions on text, for Android (`getprop`) and other Linux. What a device says
of itself is untrusted: it is kept as text of limited length and relied on nowhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from device_tests.adb.transport import Transport
from device_tests.remote.sensors import MAXIMUM_SENSORS, MAXIMUM_TEXT_CHARACTERS, clean, number
from device_tests.remote.shell import run_checked

MAXIMUM_VALUE_CHARACTERS = 200

_PROPERTIES = {
    "manufacturer": "ro.product.manufacturer",
    "model": "ro.product.model",
    "soc_maker": "ro.soc.manufacturer",
    "soc": "ro.soc.model",
    "platform": "ro.board.platform",
    "build": "ro.build.fingerprint",
    "abi": "ro.product.cpu.abi",
    "android_sdk": "ro.build.version.sdk",
}
_FILES = {
    "dmi_vendor": "/sys/class/dmi/id/sys_vendor",
    "dmi_product": "/sys/class/dmi/id/product_name",
    "tree_model": "/proc/device-tree/model",
    "memory": "/proc/meminfo",  # its first line is MemTotal
    "present": "/sys/devices/system/cpu/present",
}

DEVICE_COMMAND = "".join(
    [
        "if command -v getprop >/dev/null; then\n",
        *(f'echo "{key} $(getprop {name})"\n' for key, name in _PROPERTIES.items()),
        "fi\n",
        *(
            f'v=; {{ read -r v <{path}; }} 2>/dev/null; [ -z "$v" ] || echo "{key} $v"\n'
            for key, path in _FILES.items()
        ),
        'echo "kernel $(uname -r)"; echo "machine $(uname -m)"\n',
        "grep -m 1 '^model name' /proc/cpuinfo 2>/dev/null\n",
        "grep '^PRETTY_NAME=' /etc/os-release 2>/dev/null\n",
        ":\n",
    ]
)
"""Asks once a benchmark; a few processes."""

CLOCKS_COMMAND = r"""for c in /sys/devices/system/cpu/cpu[0-9]*; do
g= l= h=
{ read -r g <"$c/cpufreq/scaling_governor"; read -r l <"$c/cpufreq/scaling_min_freq"
read -r h <"$c/cpufreq/scaling_max_freq"; } 2>/dev/null
[ -n "$g$l$h" ] && echo "clock ${c##*/}|$g|$l|$h"
done
:
"""
"""Asks before each run: another governor or another limit makes runs incomparable."""


@dataclass(frozen=True)
class Device:
    """The device as it describes itself; None for what it does not say.

    build: Android's fingerprint, else the name of the distribution. abi: Android's name of it, else
    the machine of `uname`.
    """

    serial: str
    manufacturer: str | None = None
    model: str | None = None
    soc: str | None = None
    build: str | None = None
    kernel: str | None = None
    abi: str | None = None
    cores: int | None = None
    memory_bytes: int | None = None
    android_sdk: int | None = None


@dataclass(frozen=True)
class Clocks:
    """The clock regime: governor, and lowest and highest allowed clock, of each core; None where
    the device does not say."""

    governor: Mapping[str, str] | None = None
    limits_mhz: Mapping[str, tuple[float, float]] | None = None


def read_device(transport: Transport) -> Device:
    """Ask a device what it is. Raises a DeviceError if it cannot be asked."""
    return parse_device(run_checked(transport, DEVICE_COMMAND).text, transport.serial)


def parse_device(text: str, serial: str) -> Device:
    """The device by its answer to `DEVICE_COMMAND`; no answer raises."""
    said: dict[str, str] = {}
    for line in text[:MAXIMUM_TEXT_CHARACTERS].splitlines():
        if line.startswith("model name"):
            said.setdefault("processor", _text(line.partition(":")[2]))
        elif line.startswith("PRETTY_NAME="):
            said.setdefault("system", _text(line.partition("=")[2].strip("\"'")))
        else:
            key, _, value = line.partition(" ")
            said.setdefault(key, _text(value))
    soc = " ".join(part for part in (said.get("soc_maker"), said.get("soc")) if part)
    memory = re.fullmatch(r"MemTotal: (\d{1,15}) kB", said.get("memory", ""), re.ASCII)
    return Device(
        serial=_text(serial),
        manufacturer=said.get("manufacturer") or said.get("dmi_vendor") or None,
        model=said.get("model") or said.get("dmi_product") or said.get("tree_model") or None,
        soc=soc or said.get("platform") or said.get("processor") or None,
        build=said.get("build") or said.get("system") or None,
        kernel=said.get("kernel") or None,
        abi=said.get("abi") or said.get("machine") or None,
        cores=_cores(said.get("present", "")),
        memory_bytes=int(memory[1]) * 1024 if memory else None,
        android_sdk=_whole(said.get("android_sdk", "")),
    )


def parse_clocks(text: str) -> Clocks:
    """The clock regime by the answer to `CLOCKS_COMMAND`; no answer raises."""
    governor: dict[str, str] = {}
    limits: dict[str, tuple[float, float]] = {}
    for line in text[:MAXIMUM_TEXT_CHARACTERS].splitlines()[:MAXIMUM_SENSORS]:
        tag, _, rest = line.partition(" ")
        name, *values = rest.split("|")
        if tag != "clock" or len(values) != 3 or not re.fullmatch(r"cpu\d{1,4}", name, re.ASCII):
            continue
        if kind := clean(values[0]):
            governor[name] = kind
        low, high = number(values[1]), number(values[2])
        if low is not None and high is not None:
            limits[name] = (low / 1000, high / 1000)
    return Clocks(governor or None, limits or None)


def _text(value: str) -> str:
    return clean(value.replace("\0", " "), MAXIMUM_VALUE_CHARACTERS)


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\d{1,6}", text, re.ASCII) else None


def _cores(present: str) -> int | None:
    """The number of cores in a list as `0-3,6`."""
    count = 0
    for part in present.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part, re.ASCII)
        if match is None:
            return None
        count += int(match[2] or match[1]) - int(match[1]) + 1
    return count if count > 0 else None
