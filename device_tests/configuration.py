"""Which conditions make runs comparable: the parts of a record's conditions, by name.

What is measured under them is `metrics.py`; how they came to be known is the bench's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Record = Mapping[str, Any]

CONDITIONS: dict[str, str] = {
    "device": "the device: serial, model, processor, cores, memory",
    "build": "the system on it: build, kernel, Android version",
    "clocks": "the clock regime: governor and lowest and highest clock of each core",
    "charging": "whether the battery is being charged",
    "transport": "how the device is reached",
    "polling": "how often the device is asked during a run",
    "threads": "threads of the run",
    "bundle": "the bundle, by its hash, and what it says of itself",
    "workload": "prompt, new tokens, seed, forced steps, sampler settings, warm-up",
    "gate": "the temperature under which a run may begin",
    "versions": "versions of the programs on both sides",
}
"""Every condition by the name that `across` takes."""

MAY_VARY = frozenset({"charging", "clocks"})
"""Conditions that a device changes by itself: they do not split a configuration, they are named."""

_SYSTEM = frozenset({"build", "kernel", "android_sdk"})
_BY_PASS = frozenset({"workload.force_steps", "workload.warmup_steps"})
_LOOPBACK = re.compile(r"^(127\.\d+\.\d+\.\d+|localhost|\[::1\]):\d+$")


def loopback_serial(serial: str) -> str:
    """The serial as an identity: a device on loopback has another port each time it is started."""
    return "loopback" if _LOOPBACK.match(serial) else serial


def leaves(record: Record) -> dict[str, Any]:
    """The conditions of a record as `condition.field` -> value, every value plain JSON."""
    found: dict[str, Any] = {}
    for name, part in _parts(record):
        if isinstance(part, Mapping) and part:
            found.update({f"{name}.{key}": part[key] for key in sorted(part)})
        else:
            found[name] = part
    return found


def condition_of(leaf: str) -> str:
    """The condition a leaf belongs to."""
    return leaf.partition(".")[0]


def _parts(record: Record) -> Iterator[tuple[str, Any]]:
    conditions = record["conditions"]
    device = dict(conditions["device"]) | {
        "serial": loopback_serial(conditions["device"]["serial"])
    }
    yield "device", {key: value for key, value in device.items() if key not in _SYSTEM}
    yield "build", {key: value for key, value in device.items() if key in _SYSTEM}
    for name in ("clocks", "charging", "transport"):
        yield name, conditions[name]
    yield "polling", {"poll_s": conditions["poll_s"]}
    for name in ("threads", "bundle", "workload"):
        yield name, conditions[name]
    yield "gate", {"threshold_c": record["gate"]["threshold_c"]}
    yield "versions", conditions["versions"]


def canonical(value: Any) -> str:
    """A value as text that is equal exactly where the values are."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


@dataclass
class Configuration:
    """Runs under the same conditions, in the order in which they were made.

    `varied` has the conditions that the device changed between them: leaf -> value -> runs.
    """

    key: tuple[tuple[str, str], ...]
    versions: dict[str, Any]
    records: list[Record] = field(default_factory=list)

    @property
    def leaves(self) -> dict[str, Any]:
        """The conditions: of the first run that went well if there is one, else of the first;
        forced steps of the first run that has them."""
        first = next((r for r in self.records if r["status"] == "ok"), self.records[0])
        found = leaves(first)
        for leaf in _BY_PASS:
            values = [leaves(record)[leaf] for record in self.records]
            found[leaf] = next((value for value in values if value is not None), None)
        return found

    @property
    def varied(self) -> dict[str, Counter[str]]:
        """The conditions that are not the same in all runs."""
        counts: dict[str, Counter[str]] = {}
        for record in self.records:
            for leaf, value in leaves(record).items():
                if condition_of(leaf) in MAY_VARY:
                    counts.setdefault(leaf, Counter())[canonical(value)] += 1
        return {leaf: count for leaf, count in counts.items() if len(count) > 1}


def configurations(records: Iterable[Record]) -> list[Configuration]:
    """Sort records into configurations, in the order of their first runs.

    A run that failed before it could tell the runner's versions belongs to the first configuration
    that it does not contradict. The passes of one bench differ in forced steps and warm-up; these
    split a configuration only where two different numbers of forced steps were asked for.
    """
    records = list(records)
    forced: dict[tuple[tuple[str, str], ...], set[int]] = {}
    for record in records:
        steps = record["conditions"]["workload"]["force_steps"]
        if steps is not None:
            forced.setdefault(_key(record), set()).add(steps)
    found: list[Configuration] = []
    for record in records:
        key = _key(record)
        if len(forced.get(key, ())) > 1:
            steps = record["conditions"]["workload"]["force_steps"]
            key = (*key, ("workload.force_steps", canonical(steps)))
        versions = record["conditions"]["versions"]
        for configuration in found:
            if configuration.key == key and _agree(configuration.versions, versions):
                break
        else:
            configuration = Configuration(key, {})
            found.append(configuration)
        configuration.records.append(record)
        configuration.versions.update(versions)
    return found


def _key(record: Record) -> tuple[tuple[str, str], ...]:
    return tuple(
        (leaf, canonical(value))
        for leaf, value in sorted(leaves(record).items())
        if condition_of(leaf) not in MAY_VARY | {"versions"} and leaf not in _BY_PASS
    )


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[name] == other[name] for name in one.keys() & other.keys())


def select(
    records: Iterable[Record], *, threads: int | None = None, bundle: str | None = None
) -> list[Record]:
    """The records with `threads` threads, and of the bundle whose hash begins with `bundle`."""
    return [
        record
        for record in records
        if (threads is None or record["conditions"]["threads"] == threads)
        and (bundle is None or record["conditions"]["bundle"]["sha256"].startswith(bundle))
    ]
