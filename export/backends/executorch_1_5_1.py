"""What is patched, forged or assumed of the inside of ExecuTorch 1.5.1 and its torch 2.13.0.

Nothing else here reaches into their private parts, and nothing here knows what it is used for. Each
part has a canary in `tests/export/backends/test_executorch_1_5_1.py`, which fails when what it is
about has changed or is no longer needed. Importing it raises LoweringError for other versions.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from unittest import mock

import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.exir import EdgeProgramManager
from executorch.exir.backend.canonical_partitioners.group_partitioner import _DependencyViewer
from executorch.exir.delegate import executorch_call_delegate, get_lowered_module_name
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.traceback import NodeSource
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quantize.checkpoint import PackedIntegers
from quantize.errors import LoweringError

PINNED = {"executorch": "1.5.1", "torch": "2.13.0"}

Part = Literal["integers", "scales", "fp32 scales", "plain"]
"""What of a weight; scales are bf16 where rows have groups, fp32 where they are of whole rows."""


def check_versions() -> None:
    """Raise LoweringError if another version is installed than this file was written for."""
    for name, pinned in PINNED.items():
        found = importlib.metadata.version(name)
        if found.partition("+")[0] != pinned:
            raise LoweringError(
                f"{name} {found} is installed, and programs can be lowered with {pinned} alone; "
                f"install {name}=={pinned}"
            )


check_versions()


# Patches that save time.


@contextmanager
def shared_provenance() -> Iterator[None]:
    """Share the records of where a node came from instead of copying them at every pass.

    They are never changed once made, and copying their growing chains deeply took a fifth of the
    lowering time.
    """
    with mock.patch.object(NodeSource, "__deepcopy__", lambda self, memo: self, create=True):
        yield


@contextmanager
def one_search_for_cycles() -> Iterator[None]:
    """Let the partitioner search for cycles once, not twice, whenever it joins two partitions.

    Its own search goes through all that lies behind each user of the two, which takes half of the
    lowering time of a layer of 128 experts; then it has `validate_partition` walk the graph, which
    finds every cycle, and alone decides here.
    """
    with mock.patch.multiple(
        _DependencyViewer,
        __init__=lambda self, graph_module: None,
        downstreams_of=lambda self, node: (),
    ):
        yield


# Names and delegates of a lowered graph.


def operator_name(node: Any) -> str:
    """`namespace::operator` of a call without the overload, else the function's or node's name."""
    target = getattr(node, "target", None)
    schema = getattr(getattr(target, "_op", target), "_schema", None)
    return schema.name if schema is not None else getattr(target, "__name__", str(target))


def exported_state(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return a module's weights under the names that an edge program's state dict has for them.

    The parts of a quantized weight are tensors of their own there.
    """
    tensors: dict[str, Tensor] = {}
    for path, parameter in module.named_parameters(prefix=prefix):
        if not is_traceable_wrapper_subclass(parameter):
            tensors[path] = parameter.detach()
            continue
        owner, _, leaf = path.rpartition(".")
        names, _ = parameter.__tensor_flatten__()
        for i, name in enumerate(names):
            tensors[f"{owner}.parametrizations.{leaf}.original{i}"] = getattr(parameter, name)
    return tensors


def rewrite_for_xnnpack(program: ExportedProgram) -> ExportedProgram:
    """Return the program after the passes that XNNPACK runs before it serializes."""
    return xnnpack_preprocess.XNNPACKPassManager(program).transform()


def xnnpack_delegate(program: ExportedProgram, rewritten: ExportedProgram) -> LoweredBackendModule:
    """Return XNNPACK's delegate for all of `program`, serialized from `rewritten`.

    Forged, because `to_backend` would run the passes for every program anew.
    """
    manager = xnnpack_preprocess.XNNPACKPassManager
    with mock.patch.object(manager, "transform", lambda _: rewritten):
        result = xnnpack_preprocess.XnnpackBackend.preprocess(program, [])
    lowered = LoweredBackendModule(
        edge_program=program,
        backend_id=xnnpack_preprocess.XnnpackBackend.__name__,
        processed_bytes=result.processed_bytes,
        compile_specs=[],
        named_data_store_output=result.data_store_output,
    )
    lowered.meta = {"debug_handle_map": result.debug_handle_map}
    return lowered


def replace_by_delegate(
    edge: EdgeProgramManager,
    node: Node,
    lowered: LoweredBackendModule,
    arguments: Mapping[str, Node],
) -> None:
    """Put a delegate with one output in the place of a node of a lowered program.

    arguments: for each input of the delegate's program the node that it takes.
    """
    edge._named_data_store.merge_named_data_store(lowered.named_data_store_output)
    graph = node.graph
    names: Sequence[str] = lowered.original_module.graph_signature.user_inputs
    with graph.inserting_before(node):
        name = get_lowered_module_name(graph.owning_module, lowered)
        called = graph.call_function(
            executorch_call_delegate, (graph.get_attr(name), *(arguments[n] for n in names))
        )
        called.meta.update(val=[node.meta["val"]], debug_handle=node.meta.get("debug_handle", 0))
        result = graph.call_function(operator.getitem, (called, 0))
        result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


# Bytes that XNNPACK's serializer writes (`backends/xnnpack/operators/node_visitor.py`).

DIGEST = re.compile(rb"[0-9a-f]{64}")
"""The SHA-256 in a key by which a delegate's graph calls a weight."""

_SCALES = "scale_"


def serialized_parts(weight: Tensor | PackedIntegers) -> dict[Part, bytes]:
    """A weight's bytes as they are written; of the two kinds of scales, a program has one."""
    if not isinstance(weight, PackedIntegers):
        return {"plain": raw_bytes(weight.to(torch.float32))}
    integers = weight.qdata
    if weight.bits == 4:
        integers = integers ^ 0x88  # counted from -8 there, two's complement here
    return {
        "integers": raw_bytes(integers),
        "scales": raw_bytes(weight.scale.to(torch.bfloat16)),
        "fp32 scales": raw_bytes(weight.scale.to(torch.float32)),
    }


def raw_bytes(tensor: Tensor) -> bytes:
    """A tensor's elements in memory order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def data_key(data: bytes, part: Part, taken: set[str] | None = None) -> str:
    """The key of some bytes; with `taken` another one than those, and it is added to them.

    Equal bytes have one key where the serializer makes it, and so are written once.
    """
    key = _key(data, part)
    number = 0
    while taken is not None and key in taken:
        number += 1
        key = _key(data + number.to_bytes(4, "little"), part)
    if taken is not None:
        taken.add(key)
    return key


def digest_of_key(key: str) -> bytes:
    """What `DIGEST` finds of a key."""
    return key.removeprefix(_SCALES).encode()


def _key(data: bytes, part: Part) -> str:
    digest = hashlib.sha256(data).hexdigest()
    return _SCALES + digest if part.endswith("scales") else digest
