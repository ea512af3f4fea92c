"""Gathered experts, lowered: exact for every routing, and only the rows that were routed."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from export.backends import LoweredStage, lower_stage
from export.contract.manifest import Delegation
from export.models.blocks import gelu_tanh
from export.models.experts import DenseExperts, Expert, GatheredExperts, chosen_rows
from export.models.staging import StageModule
from quantize.errors import LoweringError

TOKENS, HIDDEN, EXPERT_SIZE, NUM_EXPERTS = 16, 64, 32, 4


def gathered(top_k: int, *, int4: bool) -> GatheredExperts:
    """Random gathered experts; their weights are slices of one tensor, as in a checkpoint."""
    torch.manual_seed(0)
    experts = [Expert(HIDDEN, EXPERT_SIZE, gelu_tanh) for _ in range(NUM_EXPERTS)]
    for name in ("gate_up_proj", "down_proj"):
        shape = getattr(experts[0], name).weight.shape
        stacked = torch.randn(NUM_EXPERTS, *shape) * HIDDEN**-0.5
        for expert, weight in zip(experts, stacked, strict=True):
            getattr(expert, name).weight = nn.Parameter(weight)
    module = GatheredExperts(experts, TOKENS, top_k, HIDDEN).eval()
    if int4:
        quantize(module)
    return module


def quantize(module: nn.Module) -> None:
    """Quantize every linear in place as the default recipe does."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,
        weight_granularity=PerGroup(32),
        weight_scale_dtype=torch.bfloat16,
    )
    quantize_(module, config)


def routing(kind: str, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and expert ids `[T, K]`: random, or all on the first or on the last experts."""
    chosen = {
        "random": torch.stack([torch.randperm(NUM_EXPERTS)[:top_k] for _ in range(TOKENS)]),
        "first": torch.arange(top_k).expand(TOKENS, top_k).contiguous(),
        "last": (NUM_EXPERTS - 1 - torch.arange(top_k)).expand(TOKENS, top_k).contiguous(),
    }[kind]
    return torch.rand(TOKENS, top_k), chosen


# Sizes grow and shrink between calls, so that a stale size or sum would show.
ROUTINGS = ("random", "first", "random", "last", "first", "random")


class Lowered(NamedTuple):
    """A module, its program in the runtime, and what was delegated."""

    module: GatheredExperts
    method: Any
    delegation: Delegation


def lower(module: nn.Module, *inputs: Tensor) -> LoweredStage:
    """Lower as the exporter does."""
    names = tuple(f"input_{i}" for i in range(len(inputs)))
    stage = StageModule(
        name="experts",
        role="layers",
        module=module,
        example_inputs=inputs,
        input_names=names,
        output_names=("mixed",),
        mutates_buffers=True,
    )
    return lower_stage(stage, "xnnpack")


@pytest.fixture(scope="module", params=["fp32, top-1", "int4, top-2"])
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """One program for all tests of a kind: lowering takes seconds."""
    from executorch.runtime import Runtime

    int4 = request.param.startswith("int4")
    module = gathered(2 if int4 else 1, int4=int4)
    stage = lower(module, torch.randn(TOKENS, HIDDEN), *routing("random", module.top_k))
    path = tmp_path_factory.mktemp("gathered") / "experts.pte"
    stage.write(path)
    method = Runtime.get().load_program(path).load_method("forward")
    return Lowered(module, method, stage.delegation)


def test_lowered_experts_equal_eager_ones_from_no_row_to_all_rows(lowered: Lowered) -> None:
    torch.manual_seed(1)
    seen: set[int] = set()
    for kind in ROUTINGS:
        x = torch.randn(TOKENS, HIDDEN)
        weights, index = routing(kind, lowered.module.top_k)
        seen.update(torch.bincount(index.flatten(), minlength=NUM_EXPERTS).tolist())
        with torch.no_grad():
            expected = lowered.module(x, weights, index)
        actual = lowered.method.execute((x, weights, index))[0]
        # Rounding of fp32 sums; integers of int8 activations are the same on these inputs.
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0.0)
    assert {0, TOKENS} <= seen and len(seen) > 2


def test_every_product_of_an_expert_is_delegated(lowered: Lowered) -> None:
    slow = {"aten::linear", "aten::mm", "aten::addmm", "aten::mul", "aten::sigmoid"}
    portable = lowered.delegation.portable
    assert not {name for name in portable if name in slow or name.startswith("torchao::")}
    # One for each expert; the others prepare the rows and the router's weights.
    assert NUM_EXPERTS <= lowered.delegation.delegates <= NUM_EXPERTS + 3
    assert portable["aten::nonzero"] == NUM_EXPERTS
    assert portable["aten::index_put_"] == NUM_EXPERTS + 1


def test_rows_that_no_expert_was_given_are_not_computed(lowered: Lowered) -> None:
    """A NaN in a row reaches that row only, and one nobody chose reaches nothing."""
    module = lowered.module
    weights, index = routing("first", module.top_k)
    x = torch.randn(TOKENS, HIDDEN)
    clean = lowered.method.execute((x, weights, index))[0].clone()
    x[3] = float("nan")
    dirty = lowered.method.execute((x, weights, index))[0]
    others = torch.arange(TOKENS) != 3
    torch.testing.assert_close(dirty[others], clean[others], atol=0.0, rtol=0.0)
    weights[3] = 0.0  # chosen by nobody
    silent = lowered.method.execute((x, weights, index))[0]
    assert torch.equal(silent[3], torch.zeros(HIDDEN))


@pytest.mark.parametrize("top_k", [1, 3, NUM_EXPERTS])
@pytest.mark.parametrize("int4", [False, True])
def test_gathered_and_dense_experts_are_the_same_function(top_k: int, int4: bool) -> None:
    module = gathered(top_k, int4=False)
    dense = DenseExperts(HIDDEN, EXPERT_SIZE, NUM_EXPERTS, gelu_tanh)
    stacked = torch.cat([expert.gate_up_proj.weight for expert in module.experts])
    dense.gate_up_proj.weight = nn.Parameter(stacked)
    for expert, down_proj in zip(module.experts, dense.down_proj, strict=True):
        down_proj.weight = nn.Parameter(expert.down_proj.weight.clone())
    if int4:
        quantize(module)
        quantize(dense)
    for kind in ROUTINGS:
        x = torch.randn(TOKENS, HIDDEN)
        weights, index = routing(kind, top_k)
        with torch.no_grad():
            # Each row has its own activation scales, so both quantize the same numbers.
            torch.testing.assert_close(
                module(x, weights, index), dense(x, weights, index), atol=1e-5, rtol=0.0
            )


@pytest.mark.slow
@pytest.mark.parametrize("int4", [False, True])
def test_an_expert_lowered_by_its_weights_is_the_one_lowered_in_full(int4: bool) -> None:
    """Byte for byte, with the packed weights and scales in their named data."""
    from export.backends.executorch_1_5_1 import exported_state
    from export.backends.xnnpack.experts import _lower_in_full

    first, second, *_ = gathered(1, int4=int4).experts
    tensors = exported_state(second, "expert")
    with torch.no_grad():
        by_weights = _lower_in_full(first, 5, HIDDEN).instantiate(tensors)
        in_full = _lower_in_full(second, 5, HIDDEN).instantiate(tensors)
    assert by_weights.processed_bytes == in_full.processed_bytes
    assert by_weights.named_data_store_output == in_full.named_data_store_output


class MixesRows(nn.Module):
    """A model error: a sum over an expert's rows."""

    def forward(self, weights: Tensor) -> Tensor:
        rows = chosen_rows(weights)[:, 0]
        picked = torch.index_select(weights, 0, rows)
        return picked.sum(dim=0)


def test_an_operator_that_mixes_rows_is_refused_by_name() -> None:
    with pytest.raises(LoweringError, match=r"aten::sum"):
        lower(MixesRows(), torch.rand(8, 1))
