"""Random small DiffusionGemma models made by transformers: the reference of the parity tests."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 8,
}
TINY_TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 4096,
}


def tiny_config(canvas_length: int = 16, **text: object) -> DiffusionGemmaConfig:
    """A config of the architecture with every feature on; `text` overrides the text part."""
    return DiffusionGemmaConfig(
        text_config=TINY_TEXT | text,
        vision_config=TINY_VISION,
        canvas_length=canvas_length,
        image_token_id=100_000,  # outside of the vocabulary: no text token is taken for an image
        boi_token_id=100_001,
        eoi_token_id=100_002,
    )


def two_equal_layers() -> DiffusionGemmaConfig:
    """Two layers of one graph, which the cutting of a model lowers once."""
    return tiny_config(
        16,
        num_hidden_layers=2,
        layer_types=["full_attention", "full_attention"],
        num_experts=2,
        moe_intermediate_size=64,
    )


def random_model(config: DiffusionGemmaConfig, seed: int) -> DiffusionGemmaForBlockDiffusion:
    """A model whose every tensor is random, so that a term left out changes the result.

    transformers initializes norms, scales and layer scalars to one, which would hide them.
    """
    torch.manual_seed(seed)
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    decoder = model.model.decoder
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                # Scores are not scaled: gains near one would give near-argmax attention, in which
                # transformers' own fp32 is already 1e-4 from its fp64.
                parameter.uniform_(0.3, 0.9)
            elif name.endswith(("norm.weight", "scale")) or "layernorm" in name:
                parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            elif parameter.dim() >= 2:
                fan_in = parameter.shape[-1]
                parameter.normal_(std=fan_in**-0.5)
        layers = zip(model.model.encoder.language_model.layers, decoder.layers, strict=True)
        for encoder_layer, decoder_layer in layers:
            encoder_layer.layer_scalar.uniform_(0.4, 1.2)
            decoder_layer.layer_scalar.uniform_(0.4, 1.2)
    return model


def save(model: DiffusionGemmaForBlockDiffusion, folder: Path) -> Path:
    """Write the Hugging Face folder that our loader reads."""
    model.save_pretrained(folder)
    return folder
