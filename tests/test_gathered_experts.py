"""Gathered experts, lowered: exact for every routing, and only the rows that were routed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from export.models.diffusion_gemma import gelu_tanh
from export.models.experts import DenseExperts, Expert, GatheredExperts, chosen_rows
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
    """A module, its program in the runtime, and what its instructions call."""

    module: GatheredExperts
    method: Any
    kernels: Counter[str]
    delegates: int


def lower(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> tuple[Any, Any]:
    """Lower to XNNPACK and load; returns the method and its execution plan."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.runtime import Runtime

    from export.backends.dynamic_rows import DynamicRowsPass
    from export.backends.xnnpack_experts import ExpertsApart

    with torch.no_grad():
        apart = ExpertsApart(module)
        with apart.hidden():
            exported = torch.export.export(module, inputs, strict=False)
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        apart.insert(edge)
        config = ExecutorchBackendConfig(
            run_reinplace_pass=True,
            do_quant_fusion_and_const_prop=True,
            sym_shape_eval_pass=DynamicRowsPass(),
        )
        program = edge.to_executorch(config)
    path.write_bytes(program.buffer)
    method = Runtime.get().load_program(path).load_method("forward")
    return method, program.executorch_program.execution_plan[0]


@pytest.fixture(scope="module", params=["fp32, top-1", "int4, top-2"])
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """One program for all tests of a kind: lowering takes seconds."""
    int4 = request.param.startswith("int4")
    module = gathered(2 if int4 else 1, int4=int4)
    inputs = (torch.randn(TOKENS, HIDDEN), *routing("random", module.top_k))
    path = tmp_path_factory.mktemp("gathered") / "experts.pte"
    method, plan = lower(module, inputs, path)
    kernels, delegates = Counter[str](), 0
    for instruction in plan.chains[0].instructions:
        arguments = instruction.instr_args
        delegates += type(arguments).__name__ == "DelegateCall"
        if type(arguments).__name__ == "KernelCall":
            kernels[plan.operators[arguments.op_index].name] += 1
    return Lowered(module, method, kernels, delegates)


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
    assert not {name for name in lowered.kernels if name in slow or name.startswith("torchao::")}, (
        lowered.kernels
    )
    # One for each expert; the others prepare the rows and the router's weights.
    assert NUM_EXPERTS <= lowered.delegates <= NUM_EXPERTS + 3
    assert lowered.kernels["aten::nonzero"] == NUM_EXPERTS
    assert lowered.kernels["aten::index_put_"] == NUM_EXPERTS + 1


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


@pytest.mark.parametrize("int4", [False, True])
def test_an_expert_lowered_by_its_weights_is_the_one_lowered_in_full(int4: bool) -> None:
    """Byte for byte, with the packed weights and scales in their named data."""
    from export.backends.xnnpack_experts import _lower_in_full, _plain_tensors

    first, second, *_ = gathered(1, int4=int4).experts
    with torch.no_grad():
        by_weights = _lower_in_full(first, 5, HIDDEN).with_weights(_plain_tensors(second))
        in_full = _lower_in_full(second, 5, HIDDEN).with_weights(_plain_tensors(second))
    assert by_weights.processed_bytes == in_full.processed_bytes
    assert by_weights.named_data_store_output == in_full.named_data_store_output


class MixesRows(nn.Module):
    """A model error: a sum over an expert's rows."""

    def forward(self, weights: Tensor) -> Tensor:
        rows = chosen_rows(weights)[:, 0]
        picked = torch.index_select(weights, 0, rows)
        return picked.sum(dim=0)


def test_an_operator_that_mixes_rows_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"aten::sum"):
        lower(MixesRows(), (torch.rand(8, 1),), tmp_path / "x.pte")
