"""Names and shapes of the vision tower that DiffusionGemma checkpoints have beside the text model.

As `Gemma4VisionModel` and `Gemma4MultimodalEmbedder` of transformers
(models/gemma4/modeling_gemma4.py) have them, without clipping and without standardization.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.families.fields import Section, divided


def vision_weights(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by name; none for a config.json without `vision_config`. Raises CheckpointError."""
    if config.get("vision_config") is None:
        return {}
    vision = Section(config).section("vision_config")
    for key in ("use_clipped_linears", "standardize", "attention_bias"):
        if vision.get(key):
            raise vision.refusal(key, "its weights are not known here; set it to false")
    hidden, inner = vision.size("hidden_size"), vision.size("intermediate_size")
    heads = vision.size("num_attention_heads")
    head_dim = vision.size(
        "head_dim", None if "head_dim" in vision.entries else divided(hidden, heads)
    )
    query, kv = heads * head_dim, vision.size("num_key_value_heads", heads) * head_dim
    tower = "model.encoder.vision_tower."
    found: dict[str, tuple[int, ...]] = {
        f"{tower}patch_embedder.position_embedding_table": (
            2, vision.size("position_embedding_size"), hidden,
        ),
        f"{tower}patch_embedder.input_proj.weight": (hidden, 3 * vision.size("patch_size") ** 2),
    }  # fmt: skip
    for layer in range(vision.size("num_hidden_layers")):
        at = f"{tower}encoder.layers.{layer}."
        found |= {
            f"{at}{name}.linear.weight": shape
            for name, shape in {
                "self_attn.q_proj": (query, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, query),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }.items()
        }
        found |= {f"{at}self_attn.{name}.weight": (head_dim,) for name in ("q_norm", "k_norm")}
        found |= {
            f"{at}{name}.weight": (hidden,)
            for name in (
                "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            )
        }  # fmt: skip
    text_hidden = Section(config).section("text_config").size("hidden_size")
    found["model.encoder.embed_vision.embedding_projection.weight"] = (text_hidden, hidden)
    return found
