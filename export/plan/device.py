"""Devices as data: what a TOML file says of one, every number with its source.

The files that come with the project are in `export/plan/devices`; `pocketdiff plan --measure`
writes others. What the numbers mean for a model is not known here.
"""

from __future__ import annotations

import json
import tomllib
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import exp, isfinite, log
from pathlib import Path
from typing import Any

from quantize.errors import InputError

FOLDER = Path(__file__).with_name("devices")

FIGURES: dict[str, str] = {
    "ram_gib": "memory that the device has, GiB",
    "app_share": "share of it that one app can have before the system kills it",
    "memory_gb_s": "memory bandwidth, GB/s",
    "int8_gops": "peak int8 multiplications and additions of the cores used, Gop/s",
    "fp32_gflops": "peak fp32 operations of the cores used, Gop/s",
    "flash_read_mb_s": "sequential read of the flash storage, MB/s",
    "npu_int8_gops": "peak int8 operations of the NPU, Gop/s",
    "runtime_anonymous_mib": "anonymous memory of the process without a model, MiB",
    "runtime_file_mib": "file-backed memory of the process without a model, MiB",
    "simple_gvalues_s": "fp32 values that simple operators of the backend go through, 10^9/s",
    "softmax_gvalues_s": "fp32 scores masked and softmaxed, 10^9/s",
    "copy_gb_s": "rows copied by index, GB/s read and written",
    "operator_us": "what a call of an operator costs beside its values, microseconds",
    "call_us": "what a call of a program costs beside its operators, microseconds",
}
"""Figures that a device may have; a unit is part of the name."""

PRICE_CLASSES = ("flagship", "middle", "budget", "board", "computer")


@dataclass(frozen=True)
class Figure:
    """A number and where it is from. value: None where it is unknown, and `source` says why."""

    value: float | None
    source: str


@dataclass(frozen=True)
class Rate:
    """Measured rate of products of one arithmetic (`int4`, `int8`, `fp32`): points (rows, Gop/s).

    Between points log-log interpolation, beyond them the nearest.
    """

    arithmetic: str
    points: tuple[tuple[float, float], ...]

    def gops(self, rows: float) -> float:
        """At so many rows multiplied at once, Gop/s."""
        sizes = [size for size, _ in self.points]
        at = bisect_left(sizes, rows)
        if at == 0:
            return self.points[0][1] * min(1.0, rows / sizes[0])
        if at == len(sizes):
            return self.points[-1][1]
        (low, slow), (high, fast) = self.points[at - 1], self.points[at]
        share = (log(rows) - log(low)) / (log(high) - log(low))
        return exp(log(slow) + share * (log(fast) - log(slow)))


@dataclass(frozen=True)
class Device:
    """A phone, board or computer; `name` is what its file is called.

    rates: measured, empty where nothing was. cores: which the peak is of, in words.
    """

    name: str
    title: str
    price_class: str
    processor: str
    cores: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    rates: Mapping[str, Rate] = field(default_factory=dict)
    measured: str | None = None

    def value(self, name: str) -> float | None:
        """A figure's number, None if it is unknown or absent."""
        figure = self.figures.get(name)
        return None if figure is None else figure.value

    @property
    def app_bytes(self) -> int | None:
        """What one app can have, bytes."""
        ram, share = self.value("ram_gib"), self.value("app_share")
        return None if ram is None or share is None else int(ram * share * 2**30)

    @property
    def is_measured(self) -> bool:
        """Whether rates were measured, so that a time can be expected and not only bounded."""
        return bool(self.rates)

    def peak_gops(self, arithmetic: str) -> float | None:
        """The most operations a second: published peak, or the best rate measured. int4 weights
        are multiplied in int8."""
        known = self.value("fp32_gflops" if arithmetic == "fp32" else "int8_gops")
        if known is None and (rate := self.rates.get(arithmetic)) is not None:
            return max(gops for _, gops in rate.points)
        return known


def on_npu(device: Device) -> Device:
    """The same device with its NPU in the place of its cores: peaks of the NPU, memory as it is,
    nothing measured. Scores of attention are taken at half the int8 rate, as 16-bit products; that
    is an assumption. Raises InputError where no figure of the NPU is known."""
    npu = device.figures.get("npu_int8_gops")
    if npu is None or npu.value is None:
        said = "nothing is said of it" if npu is None else npu.source
        raise InputError(
            f"the NPU of {device.name} has no known peak ({said}); leave out --processor npu, or "
            "give a device's file with npu_int8_gops"
        )
    peaks = {
        "int8_gops": npu,
        "fp32_gflops": Figure(npu.value / 2, "assumption: 16-bit products at half the int8 rate"),
    }
    return replace(
        device, name=f"{device.name} (NPU)", figures={**device.figures, **peaks}, rates={}
    )


def names() -> tuple[str, ...]:
    """Of the devices that come with the project."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def open_device(name: str) -> Device:
    """A device by name, or by the path of its file.

    Raises InputError for a name that there is not, and for a file that breaks the format.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = FOLDER / f"{name}.toml"
        if name not in names():
            raise InputError(
                f"there is no device {name!r}; give a TOML file, or one of {', '.join(names())}"
            )
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; give a device's name or its TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no valid TOML ({error}); correct it") from error
    return parse_device(path.stem, document)


def parse_device(name: str, document: Mapping[str, Any]) -> Device:
    """A device from a TOML document. Raises InputError, naming what is wrong."""
    known = {"title", "price_class", "processor", "cores", "figures", "rates", "measured"}
    if strange := sorted(set(document) - known):
        raise InputError(
            f"device {name} has {strange[0]!r}, which is not known; known are "
            f"{', '.join(sorted(known))}"
        )
    price_class = document.get("price_class")
    if price_class not in PRICE_CLASSES:
        raise InputError(
            f"device {name} has price_class {price_class!r}; choose one of "
            f"{', '.join(PRICE_CLASSES)}"
        )
    texts = {key: document.get(key, "") for key in ("title", "processor", "cores")}
    for key, text in texts.items():
        if not isinstance(text, str) or (key == "title" and not text):
            raise InputError(f"device {name} has {key} {text!r}; give a text")
    return Device(
        name=name,
        price_class=price_class,
        figures=_figures(name, document.get("figures", {})),
        rates=_rates(name, document.get("rates", {})),
        measured=document.get("measured"),
        **texts,
    )


def _figures(name: str, section: Any) -> dict[str, Figure]:
    found = {}
    for key, entry in section.items() if isinstance(section, Mapping) else ():
        if key not in FIGURES:
            raise InputError(
                f"device {name} has the figure {key!r}, which is not known; known are "
                f"{', '.join(FIGURES)}"
            )
        if not isinstance(entry, Mapping) or not isinstance(entry.get("source"), str):
            raise InputError(f"device {name} gives {key} without a source; add where it is from")
        value = entry.get("value")
        if value is not None and (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (isfinite(value) and value > 0)
        ):
            raise InputError(f"device {name} has {key} = {value!r}; it must be positive")
        found[key] = Figure(None if value is None else float(value), entry["source"])
    return found


def _rates(name: str, section: Any) -> dict[str, Rate]:
    found = {}
    for arithmetic, points in section.items() if isinstance(section, Mapping) else ():
        ok = arithmetic in ("int4", "int8", "fp32") and isinstance(points, list) and points
        if not ok or not all(
            isinstance(point, list)
            and len(point) == 2
            and all(isinstance(v, int | float) and v > 0 for v in point)
            for point in points
        ):
            raise InputError(
                f"device {name} has rates.{arithmetic} = {points!r}; give lists of [rows, Gop/s]"
            )
        found[arithmetic] = Rate(arithmetic, tuple(sorted((float(r), float(g)) for r, g in points)))
    return found


def write_device(path: Path, device: Device) -> None:
    """A device as a TOML file that `open_device` reads back equal."""
    quote = json.dumps  # a basic string of TOML is one of JSON, for what is printable
    lines = [
        f"title = {quote(device.title)}",
        f"price_class = {quote(device.price_class)}",
        f"processor = {quote(device.processor)}",
        f"cores = {quote(device.cores)}",
    ]
    if device.measured is not None:
        lines.append(f"measured = {quote(device.measured)}")
    for key, figure in device.figures.items():
        lines += ["", f"[figures.{key}]"]
        if figure.value is not None:
            lines.append(f"value = {figure.value:.6g}")
        lines.append(f"source = {quote(figure.source)}")
    if device.rates:
        lines += ["", "[rates]", "# rows multiplied at once, Gop/s"]
        for arithmetic, rate in device.rates.items():
            points = ", ".join(f"[{rows:g}, {gops:.6g}]" for rows, gops in rate.points)
            lines.append(f"{arithmetic} = [{points}]")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
