"""Lowers a stage through torch.export and ExecuTorch to XNNPACK, and checks what was delegated."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    to_edge_transform_and_lower,
)
from torch.utils._sympy.value_ranges import bound_sympy

from export.backends import LoweredStage, tensor_spec
from export.backends.executorch_1_5_1 import (
    one_search_for_cycles,
    operator_name,
    shared_provenance,
)
from export.backends.xnnpack.dynamic_rows import DynamicRowsPass
from export.backends.xnnpack.experts import SeparatelyLoweredExperts
from export.contract.manifest import Delegation, TensorSpec
from export.models.staging import StageModule
from quantize.errors import LoweringError

# Products and the quantization around them: in ExecuTorch's portable kernels they are orders of
# magnitude slower, and nothing but the time would tell.
MUST_BE_DELEGATED = (
    "aten::linear",
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::matmul",
    "aten::convolution",
    "torchao::quantize_affine",
    "torchao::dequantize_affine",
    "torchao::choose_qparams_affine",
)
QUANTIZED_LINEAR = "int8 dynamic x integer linear"


def lower_stage(stage: StageModule) -> LoweredStage:
    """Lower one stage; see `Backend.lower`."""
    module = stage.load()
    experts = SeparatelyLoweredExperts(module)
    with (
        _quiet(),
        shared_provenance(),
        one_search_for_cycles(),
        _rare_collections(),
        torch.no_grad(),
    ):
        # Cloned: one tensor given for two inputs would be traced as one input used twice.
        inputs = tuple(tensor.clone() for tensor in stage.example_inputs)
        with experts.opaque():
            exported = torch.export.export(
                module, inputs, dynamic_shapes=_dynamic_shapes(stage), strict=False
            )
        outputs, expected = _outputs(exported, stage.output_names), _dynamically_quantized(module)
        # Tracing left copies of the weights in cycles of references, and neither these nor the
        # module are needed any more: they would be a third of the memory at its peak.
        del module
        gc.collect()
        # The plain partitioner takes dynamically quantized linears, too. With the one made for
        # them in front, each linear becomes a delegate of its own (seven times as many), and the
        # head's chunks become one delegate that holds a whole canvas of logits.
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            # `index_put` with a None index is outside of the edge dialect's verifier.
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        experts.insert(edge)
        delegated = _delegated_operators(edge.exported_program().graph_module)
        _check_linears(stage.name, expected, delegated[QUANTIZED_LINEAR])
        del exported
        gc.collect()
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                # Keeps the KV cache's writes in place. Numerically wrong on temporaries, so every
                # in-place write in our graphs goes to a registered buffer.
                run_reinplace_pass=stage.mutates_buffers,
                do_quant_fusion_and_const_prop=True,
                extract_delegate_segments=True,
                sym_shape_eval_pass=DynamicRowsPass(),
            )
        )
    plan = program.executorch_program.execution_plan[0]
    delegates, portable = _instructions(plan)
    _check_portable(stage, portable)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            program.write_to_file(file)

    return LoweredStage(
        write=write,
        outputs=outputs,
        delegation=Delegation(delegates, dict(delegated), dict(portable)),
    )


def _delegated_operators(graph_module: torch.fx.GraphModule) -> Counter[str]:
    """Operators inside of the delegates, by name; quantized linears have a name of their own."""
    counts: Counter[str] = Counter()
    for node in graph_module.graph.nodes:
        if node.op != "get_attr":
            continue
        lowered = getattr(graph_module, str(node.target), None)
        original = getattr(lowered, "original_module", None)
        if original is None:
            continue
        for inner in original.graph_module.graph.nodes:
            if inner.op != "call_function":
                continue
            name = operator_name(inner)
            operands = {operator_name(argument) for argument in inner.args[:2]}
            if name == "aten::linear" and operands == {"torchao::dequantize_affine"}:
                name = QUANTIZED_LINEAR
            if name not in {"getitem", "alloc"}:
                counts[name] += 1
    return counts


def _instructions(plan: Any) -> tuple[int, Counter[str]]:
    """How many delegates a program calls, and its calls outside of them by operator."""
    delegates, portable = 0, Counter[str]()
    for chain in plan.chains:
        for instruction in chain.instructions:
            arguments = instruction.instr_args
            kind = type(arguments).__name__
            if kind == "DelegateCall":
                delegates += 1
            elif kind == "KernelCall":
                portable[plan.operators[arguments.op_index].name] += 1
    return delegates, portable


def _check_linears(stage: str, expected: int, found: int) -> None:
    if found != expected:
        raise LoweringError(
            f"stage {stage}: {found} of {expected} quantized linears reached XNNPACK as "
            "int8-dynamic products; this is a fault of the exporter, report it with the config"
        )


def _dynamic_shapes(stage: StageModule) -> tuple[dict[int, torch.export.Dim], ...] | None:
    """The stage's dynamic axes as torch.export takes them."""
    if not stage.dynamic:
        return None
    examples = dict(zip(stage.input_names, stage.example_inputs, strict=True))
    lengths = {
        name: torch.export.Dim(name, min=1, max=examples[tensor].shape[axis])
        for tensor, axes in stage.dynamic.items()
        for axis, name in axes.items()
        if "*" not in name
    }

    def length(name: str) -> Any:
        times, _, single = name.rpartition("*")
        return int(times) * lengths[single] if int(times or 1) > 1 else lengths[single]

    return tuple(
        {axis: length(name) for axis, name in stage.dynamic.get(tensor, {}).items()}
        for tensor in stage.input_names
    )


def _outputs(
    exported: torch.export.ExportedProgram, names: tuple[str, ...]
) -> tuple[TensorSpec, ...]:
    """What the traced module returns, in shapes at the largest lengths."""
    nodes = {node.name: node for node in exported.graph.nodes}
    values = [nodes[name].meta["val"] for name in exported.graph_signature.user_outputs]

    def largest(size: int | torch.SymInt) -> int:
        if isinstance(size, int):
            return size
        return int(bound_sympy(size.node.expr, exported.range_constraints).upper)

    return tuple(
        tensor_spec(
            name,
            value.dtype,
            [largest(size) for size in value.shape],
            (axis for axis, size in enumerate(value.shape) if not isinstance(size, int)),
        )
        for name, value in zip(names, values, strict=True)
    )


def _dynamically_quantized(module: torch.nn.Module) -> int:
    """How many weights are multiplied by activations that are quantized as they come."""
    return sum(
        getattr(weight, "activation_quantization", None) is not None
        for weight in module.parameters()
    )


def _check_portable(stage: StageModule, portable: Counter[str]) -> None:
    slow = {name: count for name, count in portable.items() if name in MUST_BE_DELEGATED}
    if slow:
        listed = ", ".join(f"{name} ({count} times)" for name, count in sorted(slow.items()))
        raise LoweringError(
            f"stage {stage.name}: {listed} would run outside of XNNPACK in slow kernels; "
            "this is a fault of the exporter, report it with the config"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of the tool chain that no user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for unreachable cycles a hundred times less often.

    The graphs of a lowering are millions of objects that all stay; walking them again and again
    took a tenth of its time.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
