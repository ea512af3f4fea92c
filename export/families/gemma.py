"""What the config.json of the Gemma families has in common: layers of two kinds, heads, rotary."""

from __future__ import annotations

from dataclasses import dataclass

from export.families.fields import Section, check_heads
from export.families.weights import Weight, linear, norms

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class RotaryConfig:
    """One rotary scheme: the first `fraction` of the pairs is rotated."""

    theta: float
    fraction: float
    factor: float


def layer_kinds(text: Section) -> list[str]:
    """`layer_types`, one of `SLIDING` or `FULL` for each layer. Raises CheckpointError."""
    kinds, layers = text.get("layer_types"), text.layers("num_hidden_layers")
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in (SLIDING, FULL) for kind in kinds)
        or kinds[-1] != FULL
    ):
        raise text.refusal(
            "layer_types",
            f"expected one of {SLIDING!r} or {FULL!r} for each of {layers} layers, the last full",
        )
    return kinds


def heads_of(text: Section, layer: int, kind: str, *, global_kv_heads: bool) -> tuple[int, int]:
    """Head size and KV heads of a layer. Raises CheckpointError.

    transformers writes `per_layer_config`, the released files `global_head_dim` and
    `num_global_key_value_heads`; the latter is in force only with `global_kv_heads`.
    """
    head_dim, kv_heads = text.size("head_dim"), text.size("num_key_value_heads")
    if text.get("per_layer_config") is None:
        if kind == FULL:
            head_dim = text.size("global_head_dim")
            if global_kv_heads:
                kv_heads = text.size("num_global_key_value_heads", kv_heads)
    elif str(layer) in (overrides := text.section("per_layer_config")).entries:
        own = overrides.section(str(layer))
        if set(own.entries) - {"head_dim", "num_key_value_heads"}:
            raise overrides.refusal(str(layer), "expected head_dim and num_key_value_heads at most")
        head_dim = own.size("head_dim", head_dim)
        kv_heads = own.size("num_key_value_heads", kv_heads)
    check_heads(f"layer {layer} ", text.size("num_attention_heads"), kv_heads, head_dim)
    return head_dim, kv_heads


def attention_weights(
    at: str, kind: str, hidden: int, query: int, kv: int, head_dim: int, *,
    owns_cache: bool = True, has_values: bool, bias: bool,
) -> list[Weight]:  # fmt: skip
    """The weights of a layer's attention; one that reads another's cache has no keys or values."""
    parts = [("q_proj", (query, hidden)), ("o_proj", (hidden, query))]
    if owns_cache:
        parts += [("k_proj", (kv, hidden))] + [("v_proj", (kv, hidden))] * has_values
    found: list[Weight] = []
    for name, shape in parts:
        found += linear(f"{at}self_attn.{name}", shape, "attention", kind, bias=bias)
    head_norms = ("q_norm", "k_norm") if owns_cache else ("q_norm",)
    return found + norms(f"{at}self_attn.", head_norms, head_dim, kind, "attention")


def rotary_of(text: Section, kinds: list[str]) -> dict[str, RotaryConfig]:
    """The rotary scheme of each kind of layer that there is, sorted. Raises CheckpointError."""
    ropes = text.section("rope_parameters")
    return {kind: _rotary(ropes, kind) for kind in sorted(set(kinds))}


def _rotary(ropes: Section, kind: str) -> RotaryConfig:
    rope = ropes.section(kind)
    rope.only("rope_type", "default", "proportional")
    is_default = rope.get("rope_type") == "default"
    fraction = rope.number("partial_rotary_factor", 1.0)
    if fraction > 1.0 or (is_default and fraction != 1.0):
        raise rope.refusal(
            "partial_rotary_factor", "only 'proportional' rotary takes one, of at most 1"
        )
    factor = 1.0 if is_default else rope.number("factor", 1.0)
    return RotaryConfig(rope.number("rope_theta"), fraction, factor)
