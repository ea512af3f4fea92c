"""Tiny random Gemma 4 models of transformers, with every feature of the family."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)

VOCABULARY, WINDOW = 96, 6

COMMON = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
    "max_position_embeddings": 4096,
    "final_logit_softcapping": 30.0,
    "pad_token_id": 0,
    "eos_token_id": None,
}


# The 31B: keys are values in full layers, which have fewer KV heads of another size.
LARGE = COMMON | {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
}


# E2B and E4B: an embedding of the token for each layer, the last layers without K and V of their
# own and with an MLP of twice the width.
PHONE = COMMON | {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_key_value_heads": 1,
    "hidden_size_per_layer_input": 32,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
}


CASES = {
    "large": LARGE,
    "phone": PHONE,
    "phone_without_sharing": PHONE | {"num_kv_shared_layers": 0},
    "shared_by_layers_of_usual_width": PHONE | {"use_double_wide_mlp": False},
    "larger_per_layer_vocabulary": PHONE | {"vocab_size_per_layer_input": VOCABULARY + 8},
    "values_in_full_layers": LARGE | {"attention_k_eq_v": False},
    "keys_are_values_of_shared_layers": LARGE | {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 16,
    },
    "window_of_one": LARGE | {"sliding_window": 1},
    "window_longer_than_context": PHONE | {"sliding_window": 512},
    "many_kv_heads": LARGE | {"num_key_value_heads": 4, "num_global_key_value_heads": 2},
    "attention_bias": PHONE | {"attention_bias": True},
    "no_soft_cap": LARGE | {"final_logit_softcapping": None},
    "other_rotary": PHONE
    | {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "rope_theta": 2e4,
                "factor": 2.0,
            },
        },
    },
}  # fmt: skip


def random_model(case: dict[str, Any], seed: int = 3) -> Gemma4ForCausalLM:
    """A model whose every tensor is random, so that a term left out changes the result."""
    torch.manual_seed(seed)
    config = Gemma4TextConfig(**case, attn_implementation="eager")
    return randomize(Gemma4ForCausalLM(config).eval())


def randomize(model: torch.nn.Module) -> Any:
    """Give every tensor random values: transformers makes norms and layer scalars one."""
    tensors = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")
    }
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                # Scores are not scaled: gains near one would give near-argmax attention, in which
                # transformers' own fp32 is already 1e-4 from its fp64.
                tensor.uniform_(0.3, 0.9)
            elif tensor.dim() >= 2:
                tensor.normal_(std=tensor.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                tensor.normal_(std=0.1)
            else:
                tensor.uniform_(0.5, 1.2)
    return model


# Every feature in three layers, and in two: lowering is paid by the layer.
EVERYTHING = PHONE | {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 1,
    "attention_k_eq_v": True,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
}


TWO_LAYERS = EVERYTHING | {
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "full_attention"],
}
