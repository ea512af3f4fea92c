"""Lets a lowered program compute only the rows that an expert was given, however many they are.

`GatheredExperts` is exported with static shapes: `chosen_rows` pretends to choose every row. That
keeps data-dependent sizes out of torch.export, torchao and the partitioner, none of which copes
with them unpatched and quickly. Just before memory planning the pass here puts `aten::nonzero` in
its place, and declares what is computed from it as dynamic up to the traced shape. Sound, because
each row of the static graph depends on its own row alone, which the pass checks operator by
operator, so leaving rows out changes no other; because kernels and XNNPACK take the size of what
they compute from their inputs at every call; and because the planner keeps the upper bound.

Written against ExecuTorch 1.5: the pass takes the place of `sym_shape_eval_pass` in
`ExecutorchBackendConfig`, which runs after specs are made and before they are planned.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from executorch.exir.dialects._ops import ops
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from executorch.exir.schema import TensorShapeDynamism
from executorch.exir.tensor import TensorSpec
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree

from export.backends.executorch_1_5_1 import operator_name
from quantize.errors import LoweringError

CHOSEN_ROWS = "pocket_diffusion::chosen_rows"
DELEGATE = "executorch_call_delegate"
WRITES = frozenset({"aten::index_put", "aten::index_put_"})
ELEMENTWISE = frozenset(
    {
        "aten::add",
        "aten::sub",
        "aten::mul",
        "aten::sigmoid",
        "aten::tanh",
        "aten::exp",
        "aten::clamp",
        "aten::hardtanh",
        "aten::relu",
        "aten::gelu",
        "aten::silu",
    }
)
# Products of rows with a weight, which comes second.
PRODUCTS = frozenset({"aten::linear", "aten::mm"})
# Where these have their block size, which must be one row, as they then have a scale for each row.
QUANTIZATION = {
    "torchao::choose_qparams_affine": 2,
    "torchao::quantize_affine": 1,
    "torchao::dequantize_affine": 1,
}
# Along another dimension than the rows.
ALONG_A_ROW = frozenset({"aten::slice_copy", "aten::select_copy"})

Origins = dict[Node, Node]
"""The `chosen_rows` that each row-dynamic node takes its row count from."""


class DynamicRowsPass(ConstraintBasedSymShapeEvalPass):
    """Replaces `chosen_rows` by `nonzero` and makes what follows dynamic.

    To be given as `sym_shape_eval_pass` of `ExecutorchBackendConfig`. It leaves a graph without
    `chosen_rows` as its base class does.

    Raises:
        LoweringError: an operator after `chosen_rows` that is not known to keep rows apart.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrite `graph_module` in place."""
        result = super().call(graph_module)
        origins: Origins = {}
        for node in graph_module.graph.nodes:
            if node.op == "output" and _origin(node.all_input_nodes, origins):
                raise _not_row_wise("output")
            if node.op != "call_function":
                continue
            name = operator_name(node)
            if name == CHOSEN_ROWS:
                node.target = ops.edge.aten.nonzero.default
                origins[node] = node
            elif name == DELEGATE:
                _mark_delegate(graph_module, node, origins)
            elif name in WRITES:
                _check_write(node, origins)
            elif node not in origins and (origin := _row_wise(node, name, origins)):
                origins[node] = origin
            if node in origins and name != DELEGATE:
                for spec in pytree.tree_leaves(node.meta.get("spec")):
                    _make_dynamic(spec)
        return result


def _mark_delegate(graph_module: GraphModule, node: Node, origins: Origins) -> None:
    """Follow dynamic arguments through a delegate to those of its results that they reach."""
    if not _origin(node.all_input_nodes, origins):
        return
    lowered = getattr(graph_module, str(node.args[0].target))
    graph = lowered.original_module.graph_module.graph
    signature = lowered.original_module.graph_signature
    argument_of = dict(zip(signature.user_inputs, node.args[1:], strict=True))
    inner: Origins = {}
    for inside in graph.nodes:
        origin = None
        if inside.op == "placeholder":
            origin = origins.get(argument_of.get(inside.name))
        elif inside.op == "call_function":
            origin = _row_wise(inside, operator_name(inside), inner)
        if origin is not None:
            inner[inside] = origin
    (output,) = (inside for inside in graph.nodes if inside.op == "output")
    results = pytree.tree_leaves(output.args[0])
    specs = pytree.tree_leaves(node.meta["spec"])
    for index, (result, spec) in enumerate(zip(results, specs, strict=True)):
        if result not in inner:
            continue
        _make_dynamic(spec)
        for user in node.users:
            if user.args[1] == index:
                origins[user] = inner[result]


def _row_wise(node: Node, name: str, origins: Origins) -> Node | None:
    """The origin of a node's rows if they are dynamic; raise if it may mix rows."""
    origin = _origin(node.all_input_nodes, origins)
    if origin is None or name == "getitem":
        return origin
    first = node.args[0]
    others = [item for item in pytree.tree_leaves(node.args[1:]) if item in origins]
    if name in ELEMENTWISE:
        keeps_rows = _broadcasts_row_by_row(node, origins)
    elif name in PRODUCTS:
        keeps_rows = not others
    elif name in QUANTIZATION:
        block_size = node.args[QUANTIZATION[name]]
        keeps_rows = first in origins and block_size[0] == 1
    elif name in ALONG_A_ROW:
        dimension = node.args[1] if len(node.args) > 1 else 0
        keeps_rows = not others and dimension % _rank(first) != 0
    elif name == "aten::index_select":
        keeps_rows = first not in origins and node.args[1] == 0
    else:
        keeps_rows = False
    if not keeps_rows:
        raise _not_row_wise(name)
    return origin


def _broadcasts_row_by_row(node: Node, origins: Origins) -> bool:
    """Whether no operand brings rows of its own: it is dynamic too, or is one row, or a scalar."""
    rank = _rank(node)
    return all(
        _rank(operand) == rank
        if operand in origins
        else _rank(operand) < rank or operand.meta["val"].shape[0] == 1
        for operand in node.all_input_nodes
    )


def _rank(node: Node) -> int:
    return node.meta["val"].dim()


def _check_write(node: Node, origins: Origins) -> None:
    """A write of dynamic rows goes to the chosen rows of something of a fixed size."""
    target, indices, values = node.args[:3]
    if not _origin(node.all_input_nodes, origins):
        return
    if target in origins or len(indices) != 1 or not {indices[0], values} <= origins.keys():
        raise _not_row_wise(operator_name(node))


def _origin(nodes: Iterable[Node], origins: Origins) -> Node | None:
    """The one `chosen_rows` behind `nodes`, None if there is none; raise if they differ."""
    found = {origins[node] for node in nodes if node in origins}
    if len(found) > 1:
        raise LoweringError(
            f"{len(found)} experts' rows meet in one operator, which has no common row count; "
            "this is a fault of the model's code, report it with the config"
        )
    return next(iter(found), None)


def _make_dynamic(spec: Any) -> None:
    if isinstance(spec, TensorSpec):
        spec.shape_dynamism = TensorShapeDynamism.DYNAMIC_BOUND


def _not_row_wise(name: str) -> LoweringError:
    return LoweringError(
        f"{name} is computed from an expert's rows and is not known to keep rows apart; "
        "compute the experts densely, and report this with the config"
    )
