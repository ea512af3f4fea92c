"""Entries of a config.json, each refused in a sentence that names it if it cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from quantize.errors import CheckpointError

LARGEST = 2**31
"""No size of a model is as large; a config that says so is a mistake."""
MOST_LAYERS = 10_000
"""The same of layers, of which descriptions and graphs have an entry each."""


class Section:
    """config.json, or an object in it; every method raises CheckpointError for a bad entry.

    path: in front of each key in a refusal, such as `text_config.`.
    """

    def __init__(self, entries: Mapping[str, Any], path: str = "") -> None:
        self.entries, self.path = entries, path

    def get(self, key: str) -> Any:
        """The entry as it is; None where it is missing."""
        return self.entries.get(key)

    def refusal(self, key: str, expected: str) -> CheckpointError:
        """The error for an entry that is not as `expected`."""
        return CheckpointError(f"config.json has {self.path}{key} = {self.get(key)!r}; {expected}")

    def _typed(self, key: str, kind: type | tuple[type, ...]) -> Any:
        value = self.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.refusal(key, "a checkpoint of this model must state it")
        return value

    def section(self, key: str) -> Section:
        """An object."""
        return Section(self._typed(key, Mapping), f"{self.path}{key}.")

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number; `default` stands for a missing one."""
        if default is not None and self.get(key) is None:
            return default
        value: int = self._typed(key, int)
        if not 0 < value < LARGEST:
            raise self.refusal(key, "it must be positive and a size that a model can have")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """The same where 0 means that there is none."""
        return 0 if self.get(key) == 0 else self.size(key, default)

    def layers(self, key: str, default: int | None = None) -> int:
        """A number of layers."""
        value = self.size(key, default)
        if value > MOST_LAYERS:
            raise self.refusal(key, f"at most {MOST_LAYERS} layers are supported")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number that need not be whole."""
        if default is not None and self.get(key) is None:
            return default
        value = self._typed(key, (int, float))
        if not 0 < value < math.inf:
            raise self.refusal(key, "it must be positive")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refusal(key, "it must be true or false")
        return value

    def only(self, key: str, *allowed: Any, default: Any = None) -> None:
        """Refuse a variant that no graph has; `default` is what a missing entry means."""
        value = self.entries.get(key, default)
        if isinstance(value, list | dict) or value not in allowed:
            raise CheckpointError(
                f"config.json has {self.path}{key} = {value!r}; supported: "
                f"{', '.join(map(repr, allowed))}"
            )


def model_type_of(config: Mapping[str, Any], known: Iterable[str]) -> str:
    """The model_type; raises CheckpointError for one that is not `known`."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        code = " and brings Python code (auto_map), which is never run"
        raise CheckpointError(
            f"config.json has model_type {kind!r}{code if config.get('auto_map') else ''}; "
            f"supported: {', '.join(sorted(known))}"
        )
    return kind


def divided(hidden: int, heads: int) -> int:
    """The head size where none is stated. Raises CheckpointError if it is not whole."""
    if hidden % heads:
        raise CheckpointError(
            f"config.json has a hidden size of {hidden} over {heads} heads and no head_dim; the "
            "heads must divide it"
        )
    return hidden // heads


def check_heads(what: str, heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise CheckpointError for heads that grouped attention with rotary embedding cannot have."""
    if heads % kv_heads or head_dim % 2:
        raise CheckpointError(
            f"config.json gives {what}{heads} heads over {kv_heads} KV heads of {head_dim}; heads "
            "must divide evenly and the head size be even"
        )
