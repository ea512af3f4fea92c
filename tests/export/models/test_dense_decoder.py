"""The dense decoder and its public formats against transformers: CPU only, tiny random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from export.contract.manifest import Decoding, SpecialTokens
from export.contract.styles.masked_diffusion import MaskedDiffusionSettings
from export.families import FAMILIES
from export.families.dense import DenseConfig
from export.host.eager import eager_engine
from export.models import stage_model
from export.models.dense_decoder import DenseLayers, build_layers
from export.models.staging import StagedModel, block_layers_stage
from quantize.checkpoint import open_checkpoint
from quantize.errors import CheckpointError, InputError
from quantize.quantizer import quantize_checkpoint
from quantize.recipe import preset
from tests.support import dense_checkpoints
from tests.support.clear_choices import greedy
from tests.support.dense_checkpoints import END, MASK, PAD

# fp32 reassociation over two or three layers stays near 1e-6 on logits of scale 1.
TOLERANCE = 1e-4
CONTEXT, PREFILL = 64, 24


def make_layers(folder: Path, prefill_length: int = PREFILL) -> DenseLayers:
    checkpoint = open_checkpoint(folder)
    config = DenseConfig.from_checkpoint_config(checkpoint.config)
    return build_layers(checkpoint, config, maximum_context=CONTEXT, prefill_length=prefill_length)


def run(layers: Any, tokens: Tensor, start: int, block_length: int) -> Tensor:
    with torch.no_grad():
        return layers(tokens.view(1, -1), torch.tensor([start]), torch.tensor([block_length]))[0]


def expected(reference: PreTrainedModel, tokens: Tensor, block_length: int) -> Tensor:
    """The reference's logits `[N, V]` of all positions at once, under an explicit 4-D mask."""
    block = torch.arange(len(tokens)) // block_length
    visible = block.unsqueeze(0) <= block.unsqueeze(1)
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        return reference(tokens.view(1, -1), attention_mask=mask).logits[0]


def assert_same_logits(reference: PreTrainedModel, hidden: Tensor, logits: Tensor) -> None:
    with torch.no_grad():
        found = reference.lm_head(hidden)
    assert logits.std() > 0.3, "the reference is too flat to show a difference"
    torch.testing.assert_close(found, logits, atol=TOLERANCE, rtol=0)


def random_tokens(count: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, MASK, (count,), generator=generator)


SHAPES: dict[str, dict[str, Any]] = {
    "grouped_heads": {},
    "as_many_kv_heads": {"num_key_value_heads": 4},
    "one_kv_head_and_three_layers": {"num_key_value_heads": 1, "num_hidden_layers": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("model_type", sorted(dense_checkpoints.REFERENCE_OF))
def test_logits_are_those_of_transformers(model_type: str, shape: str, tmp_path: Path) -> None:
    """Causal in chunks, blockwise in chunks and steps, and everything at once."""
    reference = dense_checkpoints.write(tmp_path, model_type, shape=SHAPES[shape])
    layers = make_layers(tmp_path, prefill_length=CONTEXT)
    tokens = random_tokens(43)

    chunks = [run(layers, tokens[a:b], a, 1) for a, b in ((0, 20), (20, 41), (41, 42), (42, 43))]
    assert_same_logits(reference, torch.cat(chunks), expected(reference, tokens, 1))

    block = 8
    committed = [run(layers, tokens[a:b], a, block) for a, b in ((0, 16), (16, 32))]
    noisy = tokens[:40].clone()
    noisy[33:37] = MASK
    step = run(layers, noisy[32:40], 32, block)
    commit = run(layers, tokens[32:40], 32, block)
    want = expected(reference, tokens[:40], block)
    assert_same_logits(reference, step, expected(reference, noisy, block)[32:])
    assert_same_logits(reference, torch.cat([*committed, commit]), want)
    # With a token shift, a step runs the last row of the block before once more.
    shifted = run(layers, noisy[31:40], 31, block)
    assert_same_logits(reference, shifted, expected(reference, noisy, block)[31:])

    everything = run(layers, tokens, 0, CONTEXT)
    assert_same_logits(reference, everything, expected(reference, tokens, CONTEXT))


def test_a_short_last_block_sees_only_what_is_there(tmp_path: Path) -> None:
    reference = dense_checkpoints.write(tmp_path, "qwen3")
    layers = make_layers(tmp_path)
    tokens = random_tokens(21)
    run(layers, random_tokens(24, seed=9), 0, 1)  # what an earlier turn left in the cache
    hidden = torch.cat([run(layers, tokens[:16], 0, 8), run(layers, tokens[16:], 16, 8)])
    assert_same_logits(reference, hidden, expected(reference, tokens, 8))


def test_later_rows_see_earlier_keys_of_a_model_that_sees_everything(tmp_path: Path) -> None:
    """Rows run again over a cache that is up to date give what the run of all rows gave."""
    dense_checkpoints.write(tmp_path, "llada")
    layers = make_layers(tmp_path)
    tokens = random_tokens(24)
    everything = run(layers, tokens, 0, CONTEXT)
    again = run(layers, tokens[16:], 16, CONTEXT)
    torch.testing.assert_close(again, everything[16:], atol=1e-5, rtol=0)


# --- lowered ------------------------------------------------------------------------------------


def lower(layers: DenseLayers, path: Path) -> Callable[[Tensor, int, int], Tensor]:
    """The layers as an XNNPACK program; its runner."""
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.pybindings import _C

    from export.backends import lower_stage

    lowered = lower_stage(block_layers_stage(layers, layers.prefill_length), "xnnpack")
    assert [(out.shape, out.dynamic) for out in lowered.outputs] == [
        ((1, layers.prefill_length, layers.config.hidden_size), (1,))
    ]
    lowered.write(path)
    program = _C._load_program(str(path))
    method = program.load_method("forward")

    def call(tokens: Tensor, start: int, block_length: int, _program: Any = program) -> Tensor:
        inputs = [tokens.view(1, -1), torch.tensor([start]), torch.tensor([block_length])]
        return method(inputs)[0][0].clone()

    return call


# Start, rows, block length: a chunk of the largest size, single tokens, then short ones.
CALLS = ((0, PREFILL, 8), (24, 1, 1), (25, 5, 1), (24, 8, 8), (24, 8, 8), (0, 5, CONTEXT))


@pytest.mark.slow
def test_the_lowered_program_equals_pytorch_for_any_number_of_rows(tmp_path: Path) -> None:
    dense_checkpoints.write(tmp_path, "qwen2")
    layers = make_layers(tmp_path)
    program = lower(layers, tmp_path / "layers.pte")
    for seed, (start, rows, block) in enumerate(CALLS):
        tokens = random_tokens(rows, seed)
        torch.testing.assert_close(
            program(tokens, start, block), run(layers, tokens, start, block), atol=1e-4, rtol=0
        )


@pytest.mark.slow
def test_the_lowered_int4_program_is_near_pytorch(tmp_path: Path) -> None:
    """By quantiles: dynamic int8 activations turn rounding into single larger differences."""
    dense_checkpoints.write(tmp_path / "plain", "qwen2", shape={"num_hidden_layers": 1})
    quantize_checkpoint(tmp_path / "plain", tmp_path / "int4", preset())
    layers = make_layers(tmp_path / "int4")
    program = lower(layers, tmp_path / "layers.pte")
    differences = []
    for seed, (start, rows, block) in enumerate(CALLS):
        tokens = random_tokens(rows, seed)
        difference = program(tokens, start, block) - run(layers, tokens, start, block)
        differences.append(difference.abs().flatten())
    together = torch.cat(differences)
    # Hidden states are of scale 1.
    assert together.median() < 1e-4, together.median()
    assert together.quantile(0.9) < 0.05, together.quantile(0.9)


# --- the formats ---------------------------------------------------------------------------------


def stages_of(folder: Path, maximum_context: int | None = None) -> StagedModel:
    return stage_model(open_checkpoint(folder), maximum_context=maximum_context)


# Model type, folder name, changes to config.json -> decoding, canvas, what differs in the settings.
FORMATS: dict[str, tuple[str, str, dict[str, Any], Decoding, int, dict[str, float]]] = {
    "bd3lm_by_its_name": (
        "a2d-qwen3", "Qwen3-0.6B-diffusion-bd3lm-v0.1", {}, Decoding(256, 32, 0, MASK), 32, {},
    ),
    "bd3lm_by_its_block_size": (
        "a2d-qwen2", "model", {"block_size": 16}, Decoding(256, 16, 0, MASK), 16, {},
    ),
    "mdlm_by_its_name": (
        "a2d-qwen3", "Qwen3-0.6B-diffusion-mdlm-v0.1", {}, Decoding(256, 0, 0, MASK), 32, {},
    ),
    "sdar": ("sdar", "model", {}, Decoding(256, 4, 0, MASK), 4, {"threshold": 0.9}),
    "sdar_of_another_block": (
        "sdar", "model", {"block_size": 64}, Decoding(256, 64, 0, MASK), 64, {"threshold": 0.9},
    ),
    "sdar_that_states_no_block": (
        "sdar", "model", {"block_size": None}, Decoding(256, 4, 0, MASK), 4, {"threshold": 0.9},
    ),
    "fast_dllm_v2": (
        "Fast_dLLM_Qwen", "model", {}, Decoding(256, 32, 1, MASK), 8, {"threshold": 0.9},
    ),
    "dream": (
        "Dream", "model", {"max_position_embeddings": 2048}, Decoding(1024, 0, 1, MASK), 256,
        {"temperature": 0.2, "top_p": 0.95, "order": 1},
    ),
    "llada": ("llada", "model", {}, Decoding(256, 0, 0, MASK), 32, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMATS)
def test_a_public_format_is_read_with_its_own_rules(case: str, tmp_path: Path) -> None:
    model_type, name, changes, decoding, canvas, differs = FORMATS[case]
    dense_checkpoints.write(tmp_path / name, model_type, changes=changes)
    model = stages_of(tmp_path / name)
    assert (model.style, model.info.family) == ("masked_diffusion", model_type)
    assert (model.decoding, model.info.canvas_length) == (decoding, canvas)
    assert model.sampler.name == "masked"
    plain = MaskedDiffusionSettings(steps_per_canvas=canvas)
    assert MaskedDiffusionSettings(**model.sampler.settings) == replace(plain, **differs)
    expected_cache = "exact" if decoding.block_length else "approximation"
    assert expected_cache in model.notes[0]
    assert END in model.special_tokens.eos or model_type == "llada"
    assert model.special_tokens.pad == (END if model_type == "Fast_dLLM_Qwen" else PAD)
    assert [stage.role for stage in model.stages] == ["layers", "head"]


def test_a_shifted_block_longer_than_a_prefill_chunk_still_fits_in_one_call(tmp_path: Path) -> None:
    changes = {"bd_size": 512, "max_position_embeddings": 4096}
    dense_checkpoints.write(tmp_path, "Fast_dLLM_Qwen", changes=changes)
    decoding = stages_of(tmp_path).decoding
    assert decoding is not None and decoding.prefill_length == 513


def test_the_mask_of_fast_dllm_v2_needs_no_file_that_names_it(tmp_path: Path) -> None:
    dense_checkpoints.write(
        tmp_path, "Fast_dLLM_Qwen", vocabulary=151_666, tokenizer=False,
        shape={"hidden_size": 16, "intermediate_size": 16},
    )  # fmt: skip
    decoding = stages_of(tmp_path).decoding
    assert decoding is not None and decoding.mask_token == 151_665


def test_the_mask_of_sdar_may_be_stated_by_the_tokenizer_alone(tmp_path: Path) -> None:
    dense_checkpoints.write(tmp_path, "sdar", changes={"mask_token_id": None})
    decoding = stages_of(tmp_path).decoding
    assert decoding is not None and decoding.mask_token == MASK


def test_remote_code_is_named_and_not_run(tmp_path: Path) -> None:
    dense_checkpoints.write(tmp_path, "sdar")
    (tmp_path / "modeling_sdar.py").write_text("raise SystemExit('remote code was run')")
    assert "not run" in stages_of(tmp_path).notes[-1]


def test_a_tokenizer_in_the_older_form_is_named(tmp_path: Path) -> None:
    dense_checkpoints.write(tmp_path, "Dream", tokenizer=False)
    (tmp_path / "vocab.json").write_text("{}")
    assert any("vocab.json" in note for note in stages_of(tmp_path).notes)


def test_sampling_of_an_autoregressive_checkpoint_is_what_it_asks_for(tmp_path: Path) -> None:
    dense_checkpoints.write(tmp_path, "qwen3")
    assert stages_of(tmp_path).sampler.settings == {"temperature": 0.0}
    asked = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    generation = {"do_sample": True, "eos_token_id": [END, PAD], **asked}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model = stages_of(tmp_path)
    assert (model.sampler.settings, model.special_tokens.eos) == (asked, (END, PAD))


@pytest.mark.parametrize("model_type", ["qwen3", "sdar"])
def test_truncation_is_in_the_graph_and_among_the_settings_or_in_neither(
    model_type: str, tmp_path: Path
) -> None:
    dense_checkpoints.write(tmp_path, model_type)
    checkpoint = open_checkpoint(tmp_path)
    for truncation in (None, False, True):
        staged = stage_model(checkpoint, truncation=truncation)
        (head,) = (stage.module for stage in staged.stages if stage.name == "head")
        assert head.truncation == bool(truncation)
        engine = eager_engine(staged)
        if truncation:
            assert engine.settings_with({"top_p": 0.5}).top_p == 0.5
        else:
            with pytest.raises(InputError, match=r"no setting top_p.*export it with --truncation"):
                engine.settings_with({"top_p": 0.5})


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_greedy_text_is_that_of_transformers_token_for_token(
    model_type: str, tmp_path: Path
) -> None:
    reference = dense_checkpoints.write(tmp_path, model_type)
    prompt = random_tokens(41)
    want = greedy(reference, prompt.view(1, -1), 24, eos_token_id=None)
    session = eager_engine(replace(stages_of(tmp_path), special_tokens=SpecialTokens())).session()
    assert session.generate(prompt.tolist(), 24).tokens == tuple(want)


BAD: dict[str, tuple[str, dict[str, Any], int | None, str]] = {
    "no mask token": ("sdar", {"mask_token_id": None}, None, "which token is the mask"),
    "a mask outside of the vocabulary": ("sdar", {"mask_token_id": 96}, None, "has 96 tokens"),
    "a mask that is no number": ("Dream", {"mask_token_id": "x"}, None, "config.json is 'x'"),
    "an end outside of the vocabulary": ("qwen2", {"eos_token_id": [1, 200]}, None, "is 200"),
    "padding outside of the vocabulary": ("llada", {"pad_token_id": -1}, None, "is -1"),
    "a context of broken blocks": ("sdar", {}, 66, "whole number of blocks of 4"),
    "a context over the model's": ("Dream", {}, 257, "exceeds the 256 positions"),
    "a block over the model's positions": ("sdar", {"block_size": 512}, None, "block of 512"),
    "a block of nothing": ("sdar", {"block_size": 0}, None, "block_size = 0"),
    "a kind of visibility not stated": ("a2d-qwen3", {}, None, '"block_size": 32'),
    "a blockwise dream": ("Dream", {"block_size": 32}, None, "blockwise variant"),
    "a vocabulary of another model": ("qwen3", {"vocab_size": 128}, None, "has 96 rows"),
    "sizes of another model": ("llama", {"intermediate_size": 128}, None, "does not fit"),
    "a stretched rotary": (
        "qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, None, "'yarn'; supported",
    ),
    "a sliding window": ("qwen2", {"use_sliding_window": True}, None, "use_sliding_window = True"),
    "sliding layers": ("qwen3", {"layer_types": ["sliding_attention"] * 2}, None, "layer_types"),
    "kinds of layers that are no list": ("qwen3", {"layer_types": 5}, None, "layer_types = 5"),
    "biases everywhere": ("qwen3", {"attention_bias": True}, None, "attention_bias = True"),
    "another activation": ("llama", {"hidden_act": "gelu"}, None, "hidden_act = 'gelu'"),
    "another block of llada": ("llada", {"block_type": "sequential"}, None, "block_type"),
    "llada with alibi": ("llada", {"alibi": True}, None, "alibi = True"),
    "heads that do not divide": ("qwen2", {"num_key_value_heads": 3}, None, "divide evenly"),
    "no number of layers": ("llama", {"num_hidden_layers": None}, None, "num_hidden_layers = None"),
    "biases that the type has not": ("llama", {"model_type": "llama"}, None, "biases"),
    "a head that is not there": ("qwen2", {"tie_word_embeddings": False}, None, "lm_head.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_checkpoint_that_cannot_be_used_is_refused_in_one_sentence(
    case: str, tmp_path: Path
) -> None:
    model_type, changes, maximum_context, says = BAD[case]
    written = "qwen2" if case.startswith("biases that") else model_type
    plain = case.startswith("no mask")
    if written != model_type:
        changes = changes | {"rope_scaling": None}
    dense_checkpoints.write(tmp_path, written, changes=changes, tokenizer=not plain)
    with pytest.raises(CheckpointError) as refusal:
        stages_of(tmp_path, maximum_context)
    assert says in str(refusal.value), refusal.value
    assert "\n" not in str(refusal.value)


def test_an_alg_that_is_not_built_is_refused(tmp_path: Path) -> None:
    dense_checkpoints.write(tmp_path, "Dream")
    (tmp_path / "generation_config.json").write_text(json.dumps({"alg": "origin"}))
    with pytest.raises(CheckpointError, match="'origin'; supported: 'entropy'"):
        stages_of(tmp_path)


def test_a_model_type_that_is_no_text_is_refused(tmp_path: Path) -> None:
    dense_checkpoints.write(tmp_path, "qwen3", changes={"model_type": ["qwen3"]})
    with pytest.raises(CheckpointError, match="supported: "):
        stages_of(tmp_path)


def test_an_unknown_model_type_is_told_what_is_supported(tmp_path: Path) -> None:
    dense_checkpoints.write(tmp_path, "qwen3", changes={"model_type": "mistral"})
    with pytest.raises(CheckpointError) as refusal:
        stages_of(tmp_path)
    assert "'mistral'" in str(refusal.value)
    assert all(name in str(refusal.value) for name in FAMILIES)
