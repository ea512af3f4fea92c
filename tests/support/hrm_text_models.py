"""Tiny random HRM-Text models of transformers."""

from __future__ import annotations

import torch
from transformers import HrmTextConfig, HrmTextForCausalLM

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "eos_token_id": None,
}


CASES = {
    "released_cycles": {},
    "one_cycle_of_each": {"H_cycles": 1, "L_cycles": 1},
    "more_high_cycles": {"H_cycles": 3, "L_cycles": 2, "num_hidden_layers": 1},
    "heads_narrower_than_hidden": {"head_dim": 8, "num_attention_heads": 4},
    "heads_wider_than_hidden": {"head_dim": 24},
    "other_rotary_and_scale": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "embedding_scale": 3.0,
    },
    "tied_head": {"tie_word_embeddings": True},
    "causal_prompt": {"prefix_lm": False},
}


def random_model(seed: int = 0, **changes: object) -> HrmTextForCausalLM:
    """A model whose every tensor is random and large enough that leaving it out would show."""
    torch.manual_seed(seed)
    model = HrmTextForCausalLM(HrmTextConfig(**TINY | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(std=0.05)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.model.z_L_init.normal_()
    return model
