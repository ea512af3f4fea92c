"""The dense decoder and its public formats against transformers: CPU only, tiny random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from export.models.dense_decoder import DenseConfig, DenseLayers, build_layers
from export.models.dense_stages import layers_stage
from quantize.checkpoint import open_checkpoint
from quantize.quantizer import quantize_checkpoint
from quantize.recipe import preset
from tests import dense_checkpoints
from tests.dense_checkpoints import MASK

# fp32 reassociation over two or three layers stays near 1e-6 on logits of scale 1.
TOLERANCE = 1e-4
CONTEXT, PREFILL = 64, 24


def make_layers(folder: Path, prefill_length: int = PREFILL) -> DenseLayers:
    checkpoint = open_checkpoint(folder)
    config = DenseConfig.from_checkpoint_config(checkpoint.config)
    layers, notes = build_layers(
        checkpoint, config, maximum_context=CONTEXT, prefill_length=prefill_length
    )
    assert notes == []
    return layers


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

    lowered = lower_stage(layers_stage(layers, layers.prefill_length), "xnnpack")
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


def test_the_lowered_program_equals_pytorch_for_any_number_of_rows(tmp_path: Path) -> None:
    dense_checkpoints.write(tmp_path, "qwen2")
    layers = make_layers(tmp_path)
    program = lower(layers, tmp_path / "layers.pte")
    for seed, (start, rows, block) in enumerate(CALLS):
        tokens = random_tokens(rows, seed)
        torch.testing.assert_close(
            program(tokens, start, block), run(layers, tokens, start, block), atol=1e-4, rtol=0
        )


def test_the_lowered_int4_program_is_near_pytorch(tmp_path: Path) -> None:
    """By quantiles: dynamic int8 activations turn rounding into single larger differences."""
    dense_checkpoints.write(tmp_path / "plain", "sdar")
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
