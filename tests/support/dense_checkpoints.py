"""Tiny random checkpoints in the public formats of the dense decoders, with their references.

Each folder has the keys and the tensor names of the released checkpoints; the weights are those of
a transformers model of the same shape, which is the reference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 96
MASK, END, PAD = 90, 91, 92
SPECIAL_TEXTS = {END: "<|im_end|>", PAD: "<|endoftext|>"}

_REFERENCES: dict[str, tuple[type, type]] = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
REFERENCE_OF = {
    "qwen3": "qwen3", "qwen2": "qwen2", "llama": "llama", "a2d-qwen3": "qwen3",
    "a2d-qwen2": "qwen2", "a2d-llama": "llama", "sdar": "qwen3", "Fast_dLLM_Qwen": "qwen2",
    "Dream": "qwen2", "llada": "llama",
}  # fmt: skip
"""Which model of transformers has the same layers."""

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
# As the released config.json files have them, beside the shape.
_QWEN = {
    "attention_dropout": 0.0,
    "bos_token_id": PAD,
    "eos_token_id": PAD,
    "initializer_range": 0.02,
    "max_window_layers": 2,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "use_sliding_window": False,
}
_OWN: dict[str, dict[str, Any]] = {
    "qwen3": _QWEN | {"head_dim": 32, "attention_bias": False, "tie_word_embeddings": True},
    "qwen2": _QWEN | {"tie_word_embeddings": True},
    "llama": {
        "attention_bias": False,
        "bos_token_id": PAD,
        "eos_token_id": [PAD, END],
        "head_dim": 16,
        "mlp_bias": False,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "a2d-qwen3": _QWEN
    | {
        "architectures": ["A2DQwen3LMHeadModel"],
        "head_dim": 32,
        "attention_bias": False,
        "layer_types": ["full_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "a2d-qwen2": _QWEN | {"tie_word_embeddings": True},
    "a2d-llama": {"rope_theta": 500000.0, "head_dim": 16, "tie_word_embeddings": True},
    "sdar": _QWEN
    | {
        "architectures": ["SDARForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "attention_bias": False,
        "block_size": 4,
        "fuse_cross_entropy": True,
        "head_dim": 32,
        "mask_token_id": MASK,
    },
    "Fast_dLLM_Qwen": _QWEN
    | {
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM"},
        "bd_size": 32,
        "conplemenrary_mask": True,
        "eos_token_id": END,
        "layer_types": ["full_attention", "full_attention"],
        "pad_token_id": END,
    },
    "Dream": _QWEN
    | {
        "architectures": ["DreamModel"],
        "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
        "mask_token_id": MASK,
        "pad_token_id": PAD,
    },
}
_LLADA = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_size": VOCABULARY,
    "eos_token_id": PAD,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_device": "meta",
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": MASK,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "pad_token_id": PAD,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": VOCABULARY,
    "weight_tying": False,
}
# The mask's text, and whether the tokenizer calls it its mask; the others are as a2d's.
_MASK_TEXTS = {"sdar": ("<|MASK|>", True), "Fast_dLLM_Qwen": ("|<MASK>|", False)}
# Keys of transformers' Llama -> LLaDA's.
_LLADA_KEYS = {
    "hidden_size": "d_model",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "num_hidden_layers": "n_layers",
    "intermediate_size": "mlp_hidden_size",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
_LLADA_NAMES = {
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}


def write(
    folder: Path,
    model_type: str,
    *,
    seed: int = 1,
    vocabulary: int = VOCABULARY,
    changes: dict[str, Any] | None = None,
    shape: dict[str, Any] | None = None,
    tokenizer: bool = True,
) -> PreTrainedModel:
    """Write a checkpoint folder; `shape` is in transformers' keys, `changes` go into config.json.

    A change to None leaves the key out. Returns the reference: a model of transformers with the
    same weights, in eval mode and with attention computed plainly.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = _SHAPE | {"vocab_size": vocabulary} | (shape or {})
    if model_type == "llada":
        sizes |= {"rms_norm_eps": _LLADA["rms_norm_eps"], "rope_theta": _LLADA["rope_theta"]}
        config = _LLADA | {"vocab_size": vocabulary, "embedding_size": vocabulary}
        config |= {theirs: sizes[ours] for ours, theirs in _LLADA_KEYS.items() if ours in sizes}
        fields = sizes | {"tie_word_embeddings": False}
    else:
        config = {"model_type": model_type, **_OWN[model_type], **sizes}
        if "layer_types" in config:
            config["layer_types"] = ["full_attention"] * sizes["num_hidden_layers"]
        fields = {k: v for k, v in config.items() if k not in {"model_type", "auto_map"}}
    reference = random_reference(REFERENCE_OF[model_type], fields, seed)
    weights = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    if reference.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    if model_type == "llada":
        weights = {_llada_name(name): tensor for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config |= changes or {}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        write_tokenizer(folder, vocabulary, *_MASK_TEXTS.get(model_type, ("<|mask|>", True)))
    return reference


def random_reference(kind: str, fields: dict[str, Any], seed: int) -> PreTrainedModel:
    """A model whose every tensor is random: norms of ones and biases of zeros would hide errors."""
    config_class, model_class = _REFERENCES[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**fields, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        if not fields["tie_word_embeddings"]:
            model.model.embed_tokens.weight.normal_(std=1.0)
    return model


def write_tokenizer(
    folder: Path, vocabulary: int = VOCABULARY, mask: str = "<|mask|>", names_mask: bool = True
) -> None:
    """A character tokenizer with `mask` among its added tokens."""
    special = SPECIAL_TEXTS | {MASK: mask}
    texts = [special.get(i, chr(0x20 + i)) for i in range(vocabulary)]
    added = [
        {"id": i, "content": text, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i, text in sorted(special.items())
    ]  # fmt: skip
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\s\\S]"},
                          "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(texts)},
                  "unk_token": "<none>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "added_tokens_decoder": {str(e["id"]): {"content": e["content"]} for e in added},
                "eos_token": SPECIAL_TEXTS[END],
                "pad_token": SPECIAL_TEXTS[PAD],
                **({"mask_token": mask} if names_mask else {}),
            }
        )
    )


def _llada_name(name: str) -> str:
    if name == "lm_head.weight":
        return "model.transformer.ff_out.weight"
    for ours, theirs in {"model.embed_tokens.": "wte.", "model.norm.": "ln_f."}.items():
        if name.startswith(ours):
            return f"model.transformer.{theirs}{name.removeprefix(ours)}"
    name = name.replace("model.layers.", "model.transformer.blocks.")
    for ours, theirs in _LLADA_NAMES.items():
        name = name.replace(ours, theirs)
    return name
