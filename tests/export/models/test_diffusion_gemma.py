"""The re-authored model against transformers in fp32: CPU only, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from export.families.diffusion_gemma import DiffusionGemmaConfig
from export.families.expert_choice import choose_expert_computation
from export.models import stage_model
from export.models.diffusion_gemma import DiffusionGemmaLayers, build_layers
from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.errors import CheckpointError
from tests.support import hf_reference

# fp32 reassociation over at most 6 layers of random weights stays near 1e-5 on logits of scale 3.
LOGIT_TOLERANCE = 1e-4

CASES = {
    "all_features": {},
    "top_k_1": {"top_k_experts": 1},
    "top_k_8_of_16": {"num_experts": 16, "top_k_experts": 8},
    "all_experts_chosen": {"num_experts": 4, "top_k_experts": 4},
    "window_shorter_than_canvas": {"sliding_window": 5},
    "window_longer_than_context": {"sliding_window": 512},
    "only_full_layers": {
        "layer_types": ["full_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "released_layer_pattern": {
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "num_hidden_layers": 6,
    },
    "many_kv_heads": {"num_key_value_heads": 4, "num_global_key_value_heads": 2},
    "kv_heads_not_overridden": {"num_global_key_value_heads": None},
    "other_rotary_and_soft_cap": {
        "final_logit_softcapping": 5.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "rope_theta": 2e4,
            },
        },
    },
    "attention_bias": {"attention_bias": True},
}
CANVAS, CONTEXT, PROMPT = 16, 96, 37


def build(
    checkpoint: Checkpoint, computation: Literal["dense", "gather"] = "dense"
) -> DiffusionGemmaLayers:
    """The layers of a checkpoint."""
    config = DiffusionGemmaConfig.from_checkpoint_config(checkpoint.config)
    return build_layers(checkpoint, config, maximum_context=CONTEXT, computation=computation)


def logits_of(model, hidden: torch.Tensor) -> torch.Tensor:
    """The reference's head on our hidden states: parity of the layers alone."""
    cap = model.final_logit_softcapping
    return torch.tanh(model.lm_head(hidden) / cap) * cap


def encode(layers, tokens: torch.Tensor, start: int) -> torch.Tensor:
    """Encode `[1, N]` in padded canvas-length chunks, as a host does."""
    outputs = []
    for offset in range(0, tokens.shape[1], CANVAS):
        chunk = tokens[:, offset : offset + CANVAS]
        padded = torch.nn.functional.pad(chunk, (0, CANVAS - chunk.shape[1]), value=7)
        hidden = layers(
            padded,
            torch.tensor([start + offset]),
            torch.tensor([0]),
            torch.randn(1, CANVAS, layers.config.hidden_size),  # must be ignored in encoder mode
        )
        outputs.append(hidden[:, : chunk.shape[1]])
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("computation", ["dense", "gather"])
@pytest.mark.parametrize("case", CASES)
def test_hidden_states_give_the_logits_of_transformers(
    case: str, computation: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    reference = hf_reference.random_model(hf_reference.tiny_config(CANVAS, **CASES[case]), seed=3)
    checkpoint = open_checkpoint(hf_reference.save(reference, tmp_path / "hf"))
    layers = build(checkpoint, computation)
    assert any("vision" in note for note in stage_model(checkpoint, experts="dense").notes)
    vocabulary, hidden_size = layers.config.vocabulary_size, layers.config.hidden_size
    prompt = torch.randint(0, vocabulary, (1, PROMPT))
    worst = 0.0
    with torch.no_grad():
        encoded = reference.model.encoder(input_ids=prompt)
        cache = encoded.past_key_values
        expected = logits_of(reference, encoded.last_hidden_state)
        ours = logits_of(reference, encode(layers, prompt, 0))
        worst = max(worst, (ours - expected).abs().max().item())
        start = PROMPT
        for _canvas in range(2):
            signal, previous_logits = torch.zeros(1, CANVAS, hidden_size), None
            for _step in range(3):
                canvas = torch.randint(0, vocabulary, (1, CANVAS))
                expected = reference(
                    decoder_input_ids=canvas,
                    past_key_values=cache,
                    self_conditioning_logits=previous_logits,
                    decoder_position_ids=torch.arange(start, start + CANVAS)[None],
                ).logits
                hidden = layers(canvas, torch.tensor([start]), torch.tensor([1]), signal)
                ours = logits_of(reference, hidden)
                worst = max(worst, (ours - expected).abs().max().item())
                previous_logits = expected / 0.6
                table = reference.model.decoder.embed_tokens.weight
                signal = previous_logits.softmax(-1) @ table * hidden_size**0.5
            committed = torch.randint(0, vocabulary, (1, CANVAS))
            encoded = reference.model.encoder(
                input_ids=committed,
                past_key_values=cache,
                position_ids=torch.arange(start, start + CANVAS)[None],
            )
            expected = logits_of(reference, encoded.last_hidden_state)
            ours = logits_of(reference, encode(layers, committed, start))
            worst = max(worst, (ours - expected).abs().max().item())
            start += CANVAS
    assert worst <= LOGIT_TOLERANCE


def test_every_tensor_changes_the_result(tmp_path: Path) -> None:
    """A tensor that could be dropped without notice would make the parity test blind to it."""
    reference = hf_reference.random_model(hf_reference.tiny_config(CANVAS), seed=5)
    checkpoint = open_checkpoint(hf_reference.save(reference, tmp_path / "hf"))
    layers = build(checkpoint)
    prompt = torch.randint(0, layers.config.vocabulary_size, (1, CANVAS))
    signal = torch.randn(1, CANVAS, layers.config.hidden_size)

    def run() -> torch.Tensor:
        with torch.no_grad():
            first = layers(prompt, torch.tensor([0]), torch.tensor([0]), signal)
            second = layers(prompt, torch.tensor([CANVAS]), torch.tensor([1]), signal)
        return torch.cat([first, second])

    before = run()
    tensors = dict(layers.named_parameters()) | {
        name: buffer for name, buffer in layers.named_buffers() if name.endswith("layer_scalar")
    }
    del tensors[f"layers.{len(layers.layers) - 1}.layer_scalar"]  # the final norm divides it out
    for name, tensor in tensors.items():
        saved = tensor.clone()
        with torch.no_grad():
            tensor.add_(torch.rand_like(tensor))
            changed = (run() - before).abs().max().item()
            tensor.copy_(saved)
        assert changed > 1e-6, name


def test_experts_are_chosen_by_estimated_time() -> None:
    few = choose_expert_computation(
        tokens=24, hidden_size=128, expert_size=64, num_experts=8, top_k=2
    )
    released = choose_expert_computation(
        tokens=256, hidden_size=2816, expert_size=704, num_experts=128, top_k=8
    )
    assert (few.computation, released.computation) == ("dense", "gather")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"canvas_length": None}, "canvas_length = None"),
        ({"text_config.hidden_size": None}, "text_config.hidden_size = None"),
        ({"text_config.hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ({"text_config.hidden_size": 32}, "does not fit"),
        ({"text_config.use_bidirectional_attention": "all"}, "'all'"),
        ({"text_config.layer_types": ["full_attention"]}, "layer_types"),
        ({"text_config.top_k_experts": 9}, "top_k_experts 9"),
        ({"text_config.rope_parameters": {}}, "rope_parameters"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(
    change: dict, sentence: str, tmp_path: Path
) -> None:
    reference = hf_reference.random_model(hf_reference.tiny_config(CANVAS), seed=0)
    checkpoint = open_checkpoint(hf_reference.save(reference, tmp_path / "hf"))
    for path, value in change.items():
        *section, leaf = path.split(".")
        target = checkpoint.config[section[0]] if section else checkpoint.config
        target[leaf] = value
    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        build(checkpoint)
    assert sentence in str(error.value)
