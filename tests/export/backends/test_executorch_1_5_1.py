"""Canaries of ExecuTorch's and torch's inside: each fails when it changed or no longer needs us."""

from __future__ import annotations

import copy
import importlib.metadata
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    to_edge,
    to_edge_transform_and_lower,
)
from executorch.exir.backend.canonical_partitioners import group_partitioner
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch import nn
from torch.fx.passes.operator_support import OperatorSupport
from torch.fx.traceback import NodeSource
from torchao.quantization import IntxUnpackedToInt8Tensor

from export.backends import executorch_1_5_1 as internals
from export.heads.vocabulary import Linear
from export.host.program_file import read_program_layout
from quantize.checkpoint import PackedIntegers
from quantize.errors import LoweringError
from quantize.packing import pack_int4

HIDDEN = 64


class Products(nn.Module):
    """A plain product, one in int4 groups and one in int8 rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, dtype, group in (("four", torch.int4, 32), ("eight", torch.int8, HIDDEN)):
            weight = IntxUnpackedToInt8Tensor.from_hp(
                torch.randn(HIDDEN, HIDDEN), (1, group), dtype,
                activation_quantization="int8_asym_per_token",
            )  # fmt: skip
            if dtype == torch.int4:
                weight.scale = weight.scale.to(torch.bfloat16)  # as recipes store those of groups
            setattr(self, name, Linear(weight, None))
        self.plain = Linear(torch.randn(HIDDEN, HIDDEN), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.eight(self.four(self.plain(x)))


@pytest.fixture(scope="module")
def products() -> Products:
    return Products()


@pytest.fixture(scope="module")
def exported(products: Products) -> torch.export.ExportedProgram:
    return torch.export.export(products, (torch.zeros(4, HIDDEN),), strict=False)


class RecordingPass(ConstraintBasedSymShapeEvalPass):
    """Notes of each node's outputs whether memory was planned for them when the pass ran."""

    def __init__(self) -> None:
        super().__init__()
        self.planned: list[bool] = []

    def call(self, graph_module: torch.fx.GraphModule) -> Any:
        specs = [node.meta.get("spec") for node in graph_module.graph.nodes]
        self.planned += [
            spec.mem_offset is not None for spec in specs if hasattr(spec, "mem_offset")
        ]
        return super().call(graph_module)


@pytest.fixture(scope="module")
def lowered(exported: torch.export.ExportedProgram, tmp_path_factory: pytest.TempPathFactory):
    """By ExecuTorch's own way: the edge program, the program's file, and the recording pass."""
    edge = to_edge_transform_and_lower(
        copy.deepcopy(exported),
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    recording = RecordingPass()
    program = edge.to_executorch(
        ExecutorchBackendConfig(extract_delegate_segments=True, sym_shape_eval_pass=recording)
    )
    file = tmp_path_factory.mktemp("canary") / "products.pte"
    with file.open("wb") as target:
        program.write_to_file(target)
    return edge, file, recording


def only_delegate(edge: Any) -> Any:
    graph_module = edge.exported_program().graph_module
    (node,) = (node for node in graph_module.graph.nodes if node.op == "get_attr")
    return getattr(graph_module, str(node.target))


@pytest.mark.parametrize("name", list(internals.PINNED))
def test_another_version_is_refused_in_one_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    internals.check_versions()
    found = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda asked: "9.0" if asked == name else found(asked)
    )
    with pytest.raises(LoweringError, match=rf"^{name} 9\.0 is installed, .* install {name}==.*"):
        internals.check_versions()


def test_provenance_is_copied_without_the_patch_and_shared_with_it() -> None:
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    source = NodeSource(node)
    node.meta["from_node"] = [source]
    assert NodeSource(node).from_node[0] is not source
    with internals.shared_provenance():
        assert NodeSource(node).from_node[0] is source
        assert copy.deepcopy(node.meta)["from_node"][0] is source
    assert NodeSource(node).from_node[0] is not source


class _Chain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.add(torch.relu(torch.add(x, x)), x)


class _AddOnly(OperatorSupport):
    def is_node_supported(self, submodules: Any, node: torch.fx.Node) -> bool:
        return node.target is torch.add


def test_partitions_that_would_make_a_cycle_stay_apart_with_one_search_as_with_two() -> None:
    """Two additions with a relu between them."""
    graph_module = torch.fx.symbolic_trace(_Chain())
    first, _, second = (n for n in graph_module.graph.nodes if n.op == "call_function")

    def partitions() -> list[set[torch.fx.Node]]:
        partitioner = group_partitioner.GroupBasedPartitioner(
            graph_module, _AddOnly(), allows_single_node_partition=True
        )
        return sorted((set(p.nodes) for p in partitioner.propose_partitions()), key=str)

    # The search that is left out is still made, of all that lies behind a node.
    assert second in group_partitioner._DependencyViewer(graph_module).downstreams_of(first)
    expected = partitions()
    with internals.one_search_for_cycles():
        assert not group_partitioner._DependencyViewer(graph_module).downstreams_of(first)
        assert partitions() == expected == sorted([{first}, {second}], key=str)


def test_operators_have_the_names_of_their_schemas(lowered: Any) -> None:
    edge, _, _ = lowered
    outside = edge.exported_program().graph_module.graph.nodes
    assert "executorch_call_delegate" in [internals.operator_name(node) for node in outside]
    inside = only_delegate(edge).original_module.graph_module.graph.nodes
    names = [internals.operator_name(node) for node in inside]
    assert names.count("aten::linear") == 3
    assert "torchao::dequantize_affine" in names
    plain = torch.export.export(nn.ReLU(), (torch.zeros(2),))
    nodes = to_edge(plain).exported_program().graph.nodes
    assert "aten::relu" in [internals.operator_name(node) for node in nodes]


def test_the_parts_of_weights_have_the_names_of_an_edge_program(
    products: Products, exported: torch.export.ExportedProgram
) -> None:
    ours = {}
    for name, linear in products.named_children():
        ours |= internals.exported_state(linear, name)
    state = to_edge_transform_and_lower(copy.deepcopy(exported)).exported_program().state_dict
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name]) for name in ours)


def test_a_forged_delegate_is_the_one_that_the_partitioner_makes(lowered: Any) -> None:
    """All that a delegate has; and preprocessing still runs the passes whose result is replaced."""
    made = only_delegate(lowered[0])
    inside = made.original_module
    forged = internals.xnnpack_delegate(inside, internals.rewrite_for_xnnpack(inside))
    assert forged.processed_bytes == made.processed_bytes
    assert forged.backend_id == made.backend_id
    assert forged.compile_specs == made.compile_specs
    assert forged.meta.keys() == made.meta.keys()
    assert forged.named_data_store_output == made.named_data_store_output
    assert vars(forged).keys() == vars(made).keys()


def test_weights_lie_in_the_file_under_the_keys_that_are_assumed(
    products: Products, lowered: Any
) -> None:
    """Each part of each weight is found by its key; of the two kinds of scales there is one."""
    _, file, _ = lowered
    layout, content = read_program_layout(file), file.read_bytes()
    plain, four, eight = (getattr(products, name).weight for name in ("plain", "four", "eight"))
    for weight in (
        plain,
        PackedIntegers(4, pack_int4(four.qdata), four.scale),
        PackedIntegers(8, eight.qdata, eight.scale),
    ):
        found = []
        for part, data in internals.serialized_parts(weight).items():
            key = internals.data_key(data, part)
            assert internals.DIGEST.fullmatch(internals.digest_of_key(key))
            if key in layout.named:
                extent = layout.named[key]
                assert content[extent.start : extent.start + extent.size] == data
                found.append(part.removeprefix("fp32 "))
                # The delegate's graph, by which names are exchanged, calls it so.
                graphs = [content[e.start : e.start + e.size] for e in layout.delegates]
                assert any(internals.digest_of_key(key) in graph for graph in graphs)
        assert found == (["plain"] if weight is plain else ["integers", "scales"])


def test_a_pass_in_place_of_shape_evaluation_runs_before_memory_is_planned(lowered: Any) -> None:
    """When `DynamicRowsPass` runs, outputs have specs, whose memory is planned afterwards."""
    _, _, recording = lowered
    assert recording.planned and not any(recording.planned)


def test_equal_bytes_get_keys_of_their_own_where_taken_ones_are_given() -> None:
    taken: set[str] = set()
    keys = [internals.data_key(b"same", "fp32 scales", taken) for _ in range(3)]
    assert keys[0] == internals.data_key(b"same", "scales")
    assert set(keys) == taken and len(taken) == 3
    assert all(key.startswith("scale_") for key in keys)
