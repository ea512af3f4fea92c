"""Canaries of ExecuTorch's private parts that the host uses: they do what is relied on, or fail."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest
import torch

from export.contract.styles.uniform_diffusion import UniformDiffusion
from export.host import executorch_1_5_1
from export.host.executorch_1_5_1 import SCALAR_TYPES, Bindings
from quantize.errors import InputError
from tests.support import toy_model


def test_a_program_from_its_file_and_one_from_memory_compute_the_same(
    toy_programs: dict[str, bytes], tmp_path: Path
) -> None:
    bindings = Bindings(1)
    (tmp_path / "layers.pte").write_bytes(toy_programs["layers.pte"])
    inputs = toy_model.example_inputs(UniformDiffusion.layers_inputs)
    expected = toy_model.ToyLayers()(*inputs)
    for program in (
        bindings.load_program(str(tmp_path / "layers.pte")),
        bindings.load_program_from_buffer(toy_programs["layers.pte"]),
    ):
        method = program.load_method("forward")
        meta = method.method_meta()
        found = [SCALAR_TYPES[meta.input_tensor_meta(i).dtype()] for i in range(meta.num_inputs())]
        assert found == [str(tensor.dtype).removeprefix("torch.") for tensor in inputs]
        assert list(meta.output_tensor_meta(0).sizes()) == list(expected.shape)
        assert torch.allclose(method(list(inputs))[0], expected, atol=1e-5)


def test_the_thread_pool_has_the_size_that_was_asked_for() -> None:
    usable = len(os.sched_getaffinity(0))
    for threads in (2, 1, 10_000):
        assert Bindings(threads).threads == min(threads, usable)
    assert Bindings(1).threads == Bindings().threads == 1


def test_the_scalar_types_are_those_of_the_programs_schema() -> None:
    """As in the schema of programs, which the runtime reads."""
    from executorch.exir.schema import ScalarType

    names = {
        "uint8": "BYTE", "int8": "CHAR", "int32": "INT", "int64": "LONG", "float16": "HALF",
        "float32": "FLOAT", "bool": "BOOL", "bfloat16": "BFLOAT16",
    }  # fmt: skip
    assert {number: names[dtype] for number, dtype in SCALAR_TYPES.items()} == {
        member.value: member.name for member in ScalarType if member.name in names.values()
    }


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.metadata.version("executorch") == executorch_1_5_1.VERSION
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.6.0")
    with pytest.raises(InputError, match=r"has the version 1\.6\.0.*made for 1\.5\.1"):
        Bindings()


@pytest.mark.parametrize("threads", [0, -1])
def test_less_than_one_thread_is_refused(threads: int) -> None:
    with pytest.raises(InputError, match=f"threads is {threads}"):
        Bindings(threads)
