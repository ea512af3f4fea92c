"""Which conditions make runs comparable: the parts of a record's conditions, by name.

What is measured under them is `metrics.py`; how they came to be known is the bench's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from device_tests.results.record_fields import Record

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
_OF_EVERY_PASS = ("seed", "settings", "memory_limit_bytes", "memory_budget_bytes")
_REFERENCE = ("speed", "warm_up", "memory", "cold", "natural", "puzzles")
"""Passes in the order in which one stands for the workload of its configuration."""


def device_serial(serial: str) -> str:
    """The serial as an identity: a device on the network may have another port each time."""
    host, colon, port = serial.rpartition(":")
    return host if colon and port.isdigit() else serial


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
    device = dict(conditions["device"])
    device["serial"] = device_serial(device["serial"])
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

    Each pass has a workload of its own: the natural one its own prompt and no forced steps, the
    cold one no warm-up, that of puzzles their answers' length.
    """

    key: tuple[tuple[str, str], ...]
    versions: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def takes(self, record: Record) -> bool:
        """Whether a record with the same key belongs here."""
        return _agree(self.versions, record["conditions"]["versions"]) and all(
            _same_workload(record, other) for other in self.records
        )

    def add(self, record: Record) -> None:
        """Count a record in."""
        self.records.append(record)
        self.versions.update(record["conditions"]["versions"])

    @property
    def leaves(self) -> dict[str, Any]:
        """The conditions, of a run that went well if there is one; where another pass has another
        workload, also that, as `workload in the natural pass.prompt_text`."""
        by_pass: dict[str, Record] = {}
        for record in sorted(self.records, key=lambda record: record["status"] != "ok"):
            by_pass.setdefault(record["pass"], record)
        reference, *others = (by_pass[name] for name in _REFERENCE if name in by_pass)
        found = leaves(reference)
        for other in others:
            for name, known in other["conditions"]["workload"].items():
                if known != reference["conditions"]["workload"].get(name):
                    found[f"workload in the {other['pass']} pass.{name}"] = known
        return found

    @property
    def varied(self) -> dict[str, Counter[str]]:
        """The conditions that the device changed between the runs: leaf -> value -> runs."""
        counts: dict[str, Counter[str]] = {}
        for record in self.records:
            for leaf, found in leaves(record).items():
                if condition_of(leaf) in MAY_VARY:
                    counts.setdefault(leaf, Counter())[canonical(found)] += 1
        return {leaf: count for leaf, count in counts.items() if len(count) > 1}


def configurations(records: Iterable[Record]) -> list[Configuration]:
    """Sort records into configurations, in the order of their first runs.

    A run that failed before the runner stated its versions belongs to the first configuration
    that it does not contradict; a run that fits several belongs to that of its own bench.
    """
    found: list[Configuration] = []
    for record in records:
        key = _key(record)
        fitting = [each for each in found if each.key == key and each.takes(record)]
        own = [each for each in fitting if each.records[-1]["bench_id"] == record["bench_id"]]
        if own or fitting:
            configuration = (own or fitting)[0]
        else:
            configuration = Configuration(key)
            found.append(configuration)
        configuration.add(record)
    return found


def _key(record: Record) -> tuple[tuple[str, str], ...]:
    workload = record["conditions"]["workload"]
    return (
        *(
            (leaf, canonical(found))
            for leaf, found in sorted(leaves(record).items())
            if condition_of(leaf) not in MAY_VARY | {"versions", "workload"}
        ),
        *((name, canonical(workload.get(name))) for name in _OF_EVERY_PASS),
    )


def _same_workload(one: Record, other: Record) -> bool:
    """Whether two runs may be of one configuration: in one pass all must be the same, among the
    forced ones prompt and steps."""
    first, second = one["conditions"]["workload"], other["conditions"]["workload"]
    if one["pass"] == other["pass"]:
        return first == second
    if "puzzles" in (one["pass"], other["pass"]):
        return True
    if first["max_new_tokens"] != second["max_new_tokens"]:
        return False
    if "natural" in (one["pass"], other["pass"]):
        return True
    names = ("prompt_tokens", "prompt_text", "force_steps")
    return all(first[name] == second[name] for name in names)


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
