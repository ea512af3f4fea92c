"""Temperatures, clocks and battery of a device: the command that reads them, its answer parsed.

Pure functions on text; when to read and what to wait for is decided elsewhere. The command is one
`sh` invocation of builtins (a read per file, no process of its own), so that it may be asked once
a second in the middle of a measurement; it starts processes only where sysfs says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

MAXIMUM_SENSORS = 512
"""Zones, and clocks, that are taken from one answer at most."""

MAXIMUM_NAME_CHARACTERS = 64
MAXIMUM_TEXT_CHARACTERS = 2**20

_PLAUSIBLE_C = (-40.0, 150.0)
"""Outside, exclusive, a value is no temperature: a sensor that is switched off (-273), a dead one
(0 is dropped as well), or a zone that gives millivolts or per cent."""

_ZONES = r"""n=
for z in /sys/class/thermal/thermal_zone*; do
t= v=
{ read -r t <"$z/type"; read -r v <"$z/temp"; } 2>/dev/null
[ -n "$v" ] && n=1 && echo "zone ${z##*zone} $v $t"
done
"""
_ZONES_OF_ANDROID = r"""[ -n "$n" ] ||
{ command -v dumpsys >/dev/null && dumpsys thermalservice; } 2>/dev/null
"""
_CLOCKS = r"""n=
for c in /sys/devices/system/cpu/cpu[0-9]*; do
f=
{ read -r f <"$c/cpufreq/scaling_cur_freq"; } 2>/dev/null
[ -n "$f" ] && n=1 && echo "khz ${c##*/} $f"
done
[ -n "$n" ] || grep '^cpu MHz' /proc/cpuinfo 2>/dev/null
"""
_LOAD = r"""v=
{ read -r v </proc/loadavg; } 2>/dev/null
[ -n "$v" ] && echo "load $v"
"""
_POWER = r"""n=
for p in /sys/class/power_supply/*; do
t= l= i= c= s= o=
{ read -r t <"$p/type"; read -r l <"$p/capacity"; read -r i <"$p/current_now"
read -r c <"$p/temp"; read -r s <"$p/status"; read -r o <"$p/online"; } 2>/dev/null
[ -n "$t" ] && n=1 && echo "power $t|$l|$i|$c|$s|$o"
done
"""
_POWER_OF_ANDROID = r"""[ -n "$n" ] ||
{ command -v dumpsys >/dev/null && dumpsys battery; } 2>/dev/null
"""

COMMAND = _ZONES + _ZONES_OF_ANDROID + _CLOCKS + _LOAD + _POWER + _POWER_OF_ANDROID + ":\n"
"""Reads everything; before and after a run."""

POLL_COMMAND = _ZONES + _ZONES_OF_ANDROID + _CLOCKS + _POWER + ":\n"
"""Reads the same during a run, but not the load, which is then the run's own, and asks no Android
service for the battery: a process and a call into the system server, each second, for a value that
hardly moves. (Without readable zones it does so for the temperatures, which would be missed.)"""

_CPU = re.compile(
    r"""cpu | tsens | x86_pkg_temp | coretemp | k10temp | zenpower | ^apc | soc[-_]thermal
    | ^acpitz$ | bigcore | littlecore | package[-_]thermal
    | (?<![a-z]) (?: little | mid | big | prime | gold | silver ) (?![a-z])""",
    re.VERBOSE,
)
_NOT_CPU = re.compile(r"gpu|batt|skin|charg|usb|pmic|modem|cdsp|npu|ddr|wlan|wifi|quiet|hotplug")
_NOT_TEMPERATURE = re.compile(r"bcl|vbat|ibat|^soc$|[-_]lvl")

_HAL_TEMPERATURE = re.compile(
    r"\bTemperature\{mValue=(-?\d{1,6}(?:\.\d{1,9})?), ?mType=(-?\d{1,3}), ?mName=([^,}\n]{1,200})"
)
_HAL_CURRENT = "Current temperatures from HAL"
_HAL_CPU = 0

_BATTERY_STATUS = {1: "Unknown", 2: "Charging", 3: "Discharging", 4: "Not charging", 5: "Full"}
"""android.os.BatteryManager's numbers, in the words of sysfs."""


@dataclass(frozen=True)
class Battery:
    """The battery as the device describes it; `current_ma` in the device's own sign."""

    level_percent: float | None = None
    current_ma: float | None = None
    temperature_c: float | None = None
    status: str | None = None


@dataclass(frozen=True)
class Reading:
    """One look at all sensors; `cpu_sensors` are the names that measure the processor, `load_1m` is
    the load average of the last minute (proc_loadavg(5))."""

    temperature_c: Mapping[str, float] = field(default_factory=dict)
    cpu_sensors: frozenset[str] = frozenset()
    cpu_mhz: Mapping[str, float] = field(default_factory=dict)
    battery: Battery | None = None
    charging: bool | None = None
    load_1m: float | None = None

    @property
    def hottest(self) -> tuple[str, float] | None:
        """Name and °C of the hottest CPU sensor, else of the hottest zone, None without any."""
        names = self.cpu_sensors or self.temperature_c.keys()
        return max(((n, self.temperature_c[n]) for n in names), key=lambda p: p[1], default=None)


def is_cpu_sensor(name: str) -> bool:
    """Whether a thermal zone of this type measures the processor, as far as names tell."""
    folded = name.lower()
    return bool(_CPU.search(folded)) and not _NOT_CPU.search(folded)


def parse(text: str) -> Reading:
    """The sensors by the answer to `COMMAND` or `POLL_COMMAND`; what is malformed is left out.

    Sizes are bounded, names printable; no answer raises.
    """
    text = text[:MAXIMUM_TEXT_CHARACTERS]
    zones: list[tuple[str, str, float]] = []
    clocks: dict[str, float] = {}
    supplies: list[list[str]] = []
    load: float | None = None
    for line in text.splitlines():
        tag, _, rest = line.partition(" ")
        if tag == "zone" and len(zones) < MAXIMUM_SENSORS:
            zones += _zone(rest)
        elif tag == "khz" and len(clocks) < MAXIMUM_SENSORS:
            clocks |= _clock(rest)
        elif line.startswith("cpu MHz") and len(clocks) < MAXIMUM_SENSORS:
            mhz = number(line.partition(":")[2])
            if mhz is not None:
                clocks[f"cpu{len(clocks)}"] = mhz
        elif tag == "load" and load is None:
            load = number(rest.partition(" ")[0])
        elif tag == "power" and len(supplies) < MAXIMUM_SENSORS:
            supplies.append([*(part.strip() for part in rest.split("|")), *[""] * 6][:6])
    if zones:
        temperatures = _named(zones)
        cpu = frozenset(name for name in temperatures if is_cpu_sensor(name))
    else:
        temperatures, cpu = _hal_temperatures(text)
    battery, charging = _power(supplies) if supplies else _battery_service(text)
    return Reading(temperatures, cpu, clocks, battery, charging, load)


def number(text: str) -> float | None:
    """The finite number that `text` is, of at most 20 characters, else None."""
    text = text.strip()
    if not re.fullmatch(r"[+-]?\d{1,18}(\.\d{1,9})?", text, re.ASCII):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def clean(text: str, limit: int = MAXIMUM_NAME_CHARACTERS) -> str:
    """What a device calls something: one printable line of at most `limit` characters."""
    line = " ".join(text[: 4 * limit].split())
    return "".join(c if c.isprintable() else "\ufffd" for c in line)[:limit]


def _zone(rest: str) -> list[tuple[str, str, float]]:
    index, _, rest = rest.partition(" ")
    value, _, name = rest.partition(" ")
    raw, name = number(value), clean(name) or f"zone{clean(index, 8)}"
    if raw is None or _NOT_TEMPERATURE.search(name.lower()):
        return []
    # Documentation/ABI/testing/sysfs-class-thermal says millidegrees; old vendor kernels give
    # degrees or their tenths.
    scale = 1000 if abs(raw) >= 1000 else 10 if abs(raw) > 150 else 1
    celsius = raw / scale
    return [(clean(index, 8), name, celsius)] if _plausible(celsius) else []


def _clock(rest: str) -> dict[str, float]:
    name, _, value = rest.partition(" ")
    khz = number(value)
    known = re.fullmatch(r"cpu\d{1,4}", name, re.ASCII)
    return {name: khz / 1000} if known and khz is not None and khz > 0 else {}


def _named(zones: list[tuple[str, str, float]]) -> dict[str, float]:
    """Zones by type; where several have one type, each with its index."""
    names = [name for _, name, _ in zones]
    return {
        (name if names.count(name) == 1 else f"{name}:{index}"): celsius
        for index, name, celsius in zones
    }


def _hal_temperatures(text: str) -> tuple[dict[str, float], frozenset[str]]:
    """`dumpsys thermalservice`: what the HAL says now if it is there, else what is cached."""
    begin = text.find(_HAL_CURRENT)
    found: dict[str, float] = {}
    cpu: set[str] = set()
    for match in _HAL_TEMPERATURE.finditer(text, max(begin, 0)):
        celsius, name = float(match[1]), clean(match[3])
        if len(found) < MAXIMUM_SENSORS and name and _plausible(celsius):
            found[name] = celsius
            if int(match[2]) == _HAL_CPU:
                cpu.add(name)
    return found, frozenset(cpu)


def _power(supplies: list[list[str]]) -> tuple[Battery | None, bool | None]:
    battery: Battery | None = None
    online: list[bool] = []
    for kind, level, current, temperature, status, on in supplies:
        if kind == "Battery" and battery is None:
            microampere, tenths = number(current), number(temperature)
            battery = Battery(
                level_percent=_percent(level),
                current_ma=None if microampere is None else microampere / 1000,
                temperature_c=None if tenths is None else tenths / 10,
                status=clean(status) or None,
            )
        elif on in ("0", "1"):
            online.append(on == "1")
    return battery, _charging(battery, online)


def _battery_service(text: str) -> tuple[Battery | None, bool | None]:
    """`dumpsys battery`; its temperature is in tenths of a degree."""
    begin = text.find("Current Battery Service state")
    if begin < 0:
        return None, None
    said: dict[str, str] = {}
    for line in text[begin:].splitlines()[1:100]:
        key, colon, value = line.partition(":")
        if colon:
            said.setdefault(key.strip().lower(), value.strip())
    status, tenths = number(said.get("status", "")), number(said.get("temperature", ""))
    battery = Battery(
        level_percent=_percent(said.get("level", "")),
        temperature_c=None if tenths is None else tenths / 10,
        status=None if status is None else _BATTERY_STATUS.get(int(status), "Unknown"),
    )
    powered = [value == "true" for key, value in said.items() if key.endswith(" powered")]
    return battery, _charging(battery, powered)


def _charging(battery: Battery | None, online: list[bool]) -> bool | None:
    """Whether power flows in: a supply is on, or the battery says that it charges."""
    status = battery.status if battery else None
    if any(online) or status == "Charging":
        return True
    return False if online or status in ("Discharging", "Not charging") else None


def _percent(text: str) -> float | None:
    value = number(text)
    return value if value is not None and 0 <= value <= 100 else None


def _plausible(celsius: float) -> bool:
    return _PLAUSIBLE_C[0] < celsius < _PLAUSIBLE_C[1] and celsius != 0
