"""Sizes read out of a config.json, each refused in a sentence if it is not one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize.errors import CheckpointError

LARGEST = 2**31
"""No size of a model is as large; a config that says so is a mistake."""


def size(section: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number. Raises CheckpointError; `default` stands for a missing one."""
    value = section.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 0 < value < LARGEST:
        raise CheckpointError(f"config.json has {key} = {value!r}; it must be a positive number")
    return value


def count(section: Mapping[str, Any], key: str) -> int:
    """The same where 0 or nothing means that there is none."""
    return 0 if section.get(key) in (None, 0) else size(section, key)


def table(section: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object. Raises CheckpointError."""
    value = section.get(key)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config.json has {key} = {value!r}; it must be an object")
    return value


def layer_kinds(section: Mapping[str, Any], layers: int) -> list[str]:
    """`layer_types`, one of sliding or full attention for each layer. Raises CheckpointError."""
    kinds = section.get("layer_types")
    known = ("sliding_attention", "full_attention")
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in known for kind in kinds)
    ):
        raise CheckpointError(
            f"config.json lists layer_types {kinds!r} for {layers} layers; expected one of "
            f"{known[0]!r} or {known[1]!r} for each"
        )
    return kinds


def gemma_heads(
    section: Mapping[str, Any], layer: int, kind: str, *, global_kv_heads: bool
) -> tuple[int, int]:
    """Head size and KV heads of a layer of the Gemma families.

    transformers writes `per_layer_config`, the released files `global_head_dim` and
    `num_global_key_value_heads`; the latter is in force only with `global_kv_heads`.
    """
    head_dim, kv_heads = size(section, "head_dim"), size(section, "num_key_value_heads")
    overrides = section.get("per_layer_config")
    if isinstance(overrides, Mapping):
        own = overrides.get(str(layer)) or {}
        if not isinstance(own, Mapping):
            raise CheckpointError(
                f"config.json has per_layer_config for layer {layer} = {own!r}; it must be an "
                "object"
            )
        return size(own, "head_dim", head_dim), size(own, "num_key_value_heads", kv_heads)
    if kind == "full_attention":
        head_dim = size(section, "global_head_dim")
        if global_kv_heads:
            kv_heads = size(section, "num_global_key_value_heads", kv_heads)
    return head_dim, kv_heads


def divided(hidden: int, heads: int) -> int:
    """The head size where none is stated. Raises CheckpointError if it is not whole."""
    if hidden % heads:
        raise CheckpointError(
            f"config.json has a hidden size of {hidden} over {heads} heads and no head_dim; the "
            "heads must divide it"
        )
    return hidden // heads
