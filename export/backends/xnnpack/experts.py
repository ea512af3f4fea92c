"""Lowers one expert of each kind in a mixture, and the others by exchanging its weights.

Tracing and rewriting an expert takes seconds, and the graphs of all experts are the same. So
gathered experts are opaque while the rest is lowered, one expert of each kind is lowered in full,
and the others' weights go through XNNPACK's serializer in that one's rewritten graph. Sound,
because the rewriting is of the graph: that it left the weights as they are is checked on the expert
it was made for, and what decides it (types, shapes, zero points) is the kind.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, EdgeProgramManager, to_edge_transform_and_lower
from executorch.exir.backend.partitioner import PartitionResult
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from export.backends.executorch_1_5_1 import (
    exported_state,
    replace_by_delegate,
    rewrite_for_xnnpack,
    xnnpack_delegate,
)
from export.models.experts import Expert, GatheredExperts, WeightedExpert
from quantize.errors import LoweringError

EXPERT_BODY = "expert_body"
# Operators that pick an expert's rows: cheap, and used by no other expert.
PREPARATION = ("chosen_rows", "aten.index_select", "aten.select_copy")


class SeparatelyLoweredExperts:
    """The gathered experts of a module, which are lowered separately from it.

    Usage: trace the module within `opaque()`, lower the trace, then `insert` the experts.
    """

    def __init__(self, module: nn.Module) -> None:
        self._blocks = [part for part in module.modules() if isinstance(part, GatheredExperts)]
        self._bodies: list[tuple[Expert, int, int]] = []  # with their rows and hidden size

    @contextmanager
    def opaque(self) -> Iterator[None]:
        """Replace each expert by an opaque operator while this is open."""
        with ExitStack() as stack:
            for block in self._blocks:
                experts = stack.enter_context(block.set_apart(first=len(self._bodies)))
                rows, hidden_size = block.mixed.shape
                self._bodies += [(expert, rows, hidden_size) for expert in experts]
            yield

    def insert(self, edge: EdgeProgramManager) -> None:
        """Put the lowered experts into the only method of a lowered program.

        Raises:
            LoweringError: XNNPACK does not take an expert as a whole.
        """
        if not self._bodies:
            return
        templates: dict[Hashable, _ExpertTemplate] = {}
        program = edge.exported_program()
        graph_module = program.graph_module
        graph = graph_module.graph
        for node in list(graph.nodes):
            if EXPERT_BODY not in str(node.target) or node.op != "call_function":
                continue
            *inputs, number = node.args
            expert, rows, hidden_size = self._bodies[number]
            tensors = exported_state(expert, "expert")
            key = (rows, hidden_size, expert.activation, *_describe(expert, tensors))
            if key not in templates:
                templates[key] = _lower_in_full(expert, rows, hidden_size)
            lowered = templates[key].instantiate(tensors)
            _prepare_late(node)
            arguments = dict(zip(("rows", "weights", "total"), inputs, strict=True))
            replace_by_delegate(edge, node, lowered, arguments)
        graph.lint()
        graph_module.recompile()


@dataclass
class _ExpertTemplate:
    """An expert's program before and after XNNPACK's rewriting."""

    program: ExportedProgram
    rewritten: ExportedProgram

    def instantiate(self, tensors: dict[str, Tensor]) -> LoweredBackendModule:
        """Serialize with other weights of the same kind."""
        for name, tensor in tensors.items():
            # A copy, because the serializer writes a view's storage from its start, and an expert's
            # weight may be a slice of all experts'.
            own = tensor.clone(memory_format=torch.contiguous_format)
            self.rewritten.state_dict[name] = nn.Parameter(own, requires_grad=False)
        return xnnpack_delegate(self.program, self.rewritten)


class _Body(WeightedExpert):
    """A delegate returns a sequence."""

    def forward(self, rows: Tensor, weights: Tensor, total: Tensor) -> tuple[Tensor]:
        return (super().forward(rows, weights, total),)


def _lower_in_full(expert: Expert, rows: int, hidden_size: int) -> _ExpertTemplate:
    body = _Body(expert).eval()
    inputs = (torch.zeros(rows, hidden_size), torch.zeros(rows, 1), torch.zeros(rows, hidden_size))
    edge = to_edge_transform_and_lower(
        torch.export.export(body, inputs, strict=False),
        partitioner=[_WholeProgramCheck()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    program = edge.exported_program()
    rewritten = rewrite_for_xnnpack(program)
    tensors, kept = exported_state(expert, "expert"), rewritten.state_dict
    # What else the state has are the activation's constants, the same for all experts of a kind.
    names = set(rewritten.graph_signature.parameters)
    if tensors.keys() != names or not all(torch.equal(tensors[n], kept[n]) for n in names):
        raise LoweringError(
            "XNNPACK's passes changed an expert's weights, which this version of the exporter does "
            "not know; install the pinned ExecuTorch, or compute the experts densely"
        )
    return _ExpertTemplate(program, rewritten)


class _WholeProgramCheck(XnnpackPartitioner):
    """Checks that XNNPACK would take all of a program, and leaves it as it is."""

    def __init__(self) -> None:
        super().__init__()
        self._checked = False

    def ops_to_not_decompose(self, ep: ExportedProgram) -> tuple[list[Any], Any]:
        """Afterwards nothing: undelegated operators are what this leaves."""
        return ([], None) if self._checked else super().ops_to_not_decompose(ep)

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag nothing, or raise LoweringError if XNNPACK would leave something."""
        result = super().partition(exported_program)
        calls = [node for node in exported_program.graph.nodes if node.op == "call_function"]
        left = sorted({str(node.target) for node in calls if "delegation_tag" not in node.meta})
        if left or len(result.partition_tags) != 1:
            raise LoweringError(
                f"an expert is not one XNNPACK graph: it is cut into {len(result.partition_tags)}, "
                f"leaving {', '.join(left) or 'no operator'}; compute the experts densely, and "
                "report this with the config"
            )
        for node in exported_program.graph.nodes:
            node.meta.pop("delegation_tag", None)
        self._checked = True
        return PartitionResult(exported_program, {})


def _describe(expert: Expert, tensors: dict[str, Tensor]) -> Iterator[Any]:
    """Everything but the weights' numbers that an expert's graph depends on."""
    for parameter in expert.parameters():
        yield type(parameter)
        if is_traceable_wrapper_subclass(parameter):
            names, context = parameter.__tensor_flatten__()
            yield tuple(names), repr(context)
            zero_point = getattr(parameter, "zero_point", None)
            if zero_point is not None:
                yield bool(zero_point.any())
    for name, tensor in tensors.items():
        yield name, tensor.dtype, tuple(tensor.shape)


def _prepare_late(node: Node) -> None:
    """Move the choice and the copies of an expert's rows to just before the expert.

    A partitioner moves what depends on no delegate to the front, where the rows of all experts
    would be held at once.
    """
    needed, queue = set(), list(node.all_input_nodes)
    while queue:
        candidate = queue.pop()
        if candidate not in needed and any(part in str(candidate.target) for part in PREPARATION):
            needed.add(candidate)
            queue += candidate.all_input_nodes
    for candidate in [other for other in node.graph.nodes if other in needed]:
        node.prepend(candidate)
