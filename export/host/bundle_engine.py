"""Loads a bundle's programs into ExecuTorch, as an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.contract.bundle import Bundle
from export.contract.manifest import Stage, TensorSpec
from export.host.engine import Engine, check_style, engine_of
from export.host.executorch_1_5_1 import SCALAR_TYPES, Bindings
from export.host.interfaces import check_interfaces
from export.host.process import captured_stderr
from export.host.stages import LoadedStage, LoadedStages, Run
from export.host.streaming.mapped_weights import MappedWeights, MemoryOptions, loading
from quantize.errors import BundleError


def open_engine(
    bundle: Bundle, threads: int | None = None, *, memory: MemoryOptions | None = None
) -> Engine:
    """Load every stage of a bundle with `threads` threads (None: as many as ExecuTorch chooses).

    memory: have packed weights mapped from a file, and a budget held; None: they are packed into
    memory. Raises InputError for a thread count or a budget that cannot be, BundleError for a style
    that is not run here and for a program that cannot be loaded, is not what the manifest says, or
    does not fit its style's loop, OutputError if packed weights cannot be written.
    """
    manifest = bundle.manifest
    check_style(bundle.folder, manifest.style, manifest.model, manifest.decoding)
    check_interfaces(bundle)
    bindings = Bindings(threads)
    with nullcontext() if memory is None else loading(bundle, memory) as weights:
        *layers, head = (
            _load(bindings, bundle, number, weights) for number in range(len(manifest.stages))
        )
    if weights is not None:
        weights.begin()
    stages = LoadedStages(
        manifest.model, layers, head, decoding=manifest.decoding, schedule=manifest.schedule
    )
    return engine_of(
        stages, manifest.style, manifest.sampler, manifest.special_tokens, bindings.threads, weights
    )


def load_stage(bundle: Bundle, stage: Stage) -> LoadedStage:
    """One stage by itself, as `open_engine` loads it; it takes memory while it is referred to."""
    return _load(Bindings(), bundle, bundle.manifest.stages.index(stage), None)


def _load(
    bindings: Bindings, bundle: Bundle, number: int, weights: MappedWeights | None
) -> LoadedStage:
    stage = bundle.manifest.stages[number]
    run = _load_method(bindings, bundle, stage, weights)

    def run_streamed(inputs: list[Tensor]) -> Sequence[Tensor]:
        assert weights is not None
        return weights.run(number, lambda: run(inputs))

    return LoadedStage(
        stage.name,
        tuple(spec.name for spec in stage.inputs),
        tuple(spec.name for spec in stage.outputs),
        run if weights is None else run_streamed,
    )


def _load_method(
    bindings: Bindings, bundle: Bundle, stage: Stage, weights: MappedWeights | None
) -> Run:
    path = bundle.path(stage.file)
    data = str(bundle.path(stage.data_file)) if stage.data_file else None
    with captured_stderr() as log:
        try:
            if weights is None:
                program = bindings.load_program(str(path), data)
            else:
                program = bindings.load_program_from_buffer(weights.program(stage))
            method = program.load_method(stage.method)
            meta = method.method_meta()
        except RuntimeError as error:
            reason = (log.text() or str(error)).strip().splitlines()[-1].rstrip(".")
            raise BundleError(
                f"{path} cannot be loaded by ExecuTorch ({reason}); export the bundle again"
            ) from error
    inputs = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
    outputs = [meta.output_tensor_meta(i) for i in range(meta.num_outputs())]
    _check_tensors(path, "inputs", stage.inputs, inputs)
    _check_tensors(path, "outputs", stage.outputs, outputs)

    def run(inputs: list[Tensor], _keep_alive: Any = program) -> Sequence[Tensor]:
        with single_torch_thread():
            return method(inputs)

    return run


def _check_tensors(
    path: Path, side: str, stated: Sequence[TensorSpec], found: Sequence[Any]
) -> None:
    program = [(SCALAR_TYPES.get(t.dtype(), str(t.dtype())), tuple(t.sizes())) for t in found]
    manifest = [(spec.dtype, spec.shape) for spec in stated]
    if program != manifest:
        raise BundleError(
            f"{path} has {side} {program}, and bundle.json says {manifest}; export it again"
        )


@contextmanager
def single_torch_thread() -> Iterator[None]:
    """Keep PyTorch's own thread pool out of ExecuTorch's way.

    Operators outside of the delegates run on it in the Python build, and its workers then spin for
    their next piece while the backend's want the cores: 50 ms a call were seen instead of 0.05.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
