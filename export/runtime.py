"""Runs a model's stages for the host's loop: a bundle's programs in ExecuTorch, or eager modules.

The loops are sessions of `export.generation`; which session serves which style is the table
`SESSIONS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.bundle import Bundle, ModelInfo, Sampler, SpecialTokens, Stage, TensorSpec
from export.process import captured_stderr
from export.staging import StagedModel
from export.uniform_diffusion import (
    HeadOutput,
    UniformDiffusionSession,
    UniformDiffusionSettings,
)
from quantize.errors import BundleError, InputError

# ExecuTorch's ScalarType (runtime/core/portable_type/scalar_type.h).
_SCALAR_TYPES = {
    0: "uint8", 1: "int8", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 11: "bool",
    15: "bfloat16",
}  # fmt: skip

# What the stages of uniform diffusion take from the loop, and what they must give back.
LAYERS_INPUTS = ("tokens", "start", "denoise", "signal")
LAYERS_OUTPUTS = ("hidden",)
HEAD_INPUTS = (
    "hidden",
    "canvas",
    "previous_argmax",
    "stable_steps",
    "step",
    "settings",
    "uniform",
    "random_tokens",
    "targets",
)
HEAD_OUTPUTS = (
    "next_canvas",
    "argmax",
    "entropy",
    "accepted",
    "stable_steps",
    "finished",
    "target_log_prob",
    "signal",
)


@dataclass(frozen=True)
class _LoadedStage:
    """A stage that can be run: `run` takes and gives tensors in the order of the names."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[[list[Tensor]], Sequence[Tensor]]

    def __call__(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = self.run([named[name] for name in self.inputs])
        return dict(zip(self.outputs, values, strict=True))


class _TensorModel:
    """Between the loop's arrays `[T]` and the stages' tensors `[1, T]`, which pass by name."""

    def __init__(self, info: ModelInfo, layers: Sequence[_LoadedStage], head: _LoadedStage) -> None:
        self.info = info
        self._layers = tuple(layers)
        self._head = head

    def zero_signal(self) -> Tensor:
        """Zeros `[1, T, H]` fp32."""
        return torch.zeros(1, self.info.canvas_length, self.info.hidden_size)

    def layers(self, tokens: np.ndarray, start: int, denoise: bool, signal: Tensor) -> Tensor:
        """See `UniformDiffusionModel`; returns hidden states `[1, T, H]`."""
        return self.run_layers(
            torch.from_numpy(tokens).unsqueeze(0),
            torch.tensor([start]),
            torch.tensor([int(denoise)]),
            signal,
        )

    def head(
        self,
        hidden: Tensor,
        canvas: np.ndarray,
        previous_argmax: np.ndarray,
        stable_steps: int,
        step: int,
        settings: np.ndarray,
        uniform: np.ndarray,
        random_tokens: np.ndarray,
        targets: np.ndarray,
    ) -> HeadOutput:
        """See `UniformDiffusionModel`."""
        named = self.run_head(
            hidden,
            torch.from_numpy(canvas).unsqueeze(0),
            torch.from_numpy(previous_argmax).unsqueeze(0),
            torch.tensor([stable_steps]),
            torch.tensor([step]),
            torch.from_numpy(settings),
            torch.from_numpy(uniform).unsqueeze(0),
            torch.from_numpy(random_tokens).unsqueeze(0),
            torch.from_numpy(targets).unsqueeze(0),
        )
        return HeadOutput(
            next_canvas=named["next_canvas"].squeeze(0).numpy(),
            argmax=named["argmax"].squeeze(0).numpy(),
            entropy=named["entropy"].squeeze(0).numpy(),
            accepted=named["accepted"].squeeze(0).numpy().astype(bool),
            stable_steps=int(named["stable_steps"]),
            finished=bool(named["finished"]),
            target_log_prob=named["target_log_prob"].squeeze(0).numpy(),
            signal=named["signal"],
        )

    def run_layers(self, *inputs: Tensor) -> Tensor:
        """All layer stages on the tensors of LAYERS_INPUTS; returns hidden states `[1, T, H]`."""
        named = dict(zip(LAYERS_INPUTS, inputs, strict=True))
        for stage in self._layers:
            named |= stage(named)
        return named["hidden"]

    def run_head(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The head on the tensors of HEAD_INPUTS; returns those of HEAD_OUTPUTS by name."""
        return self._head(dict(zip(HEAD_INPUTS, inputs, strict=True)))


class EagerModel(_TensorModel):
    """The reference: modules with the stages' signatures, run by PyTorch."""

    def __init__(
        self, layers_module: torch.nn.Module, head_module: torch.nn.Module, info: ModelInfo
    ) -> None:
        super().__init__(
            info,
            [_LoadedStage("layers", LAYERS_INPUTS, LAYERS_OUTPUTS, _eager(layers_module))],
            _LoadedStage("head", HEAD_INPUTS, HEAD_OUTPUTS, _eager(head_module)),
        )

    @classmethod
    def from_stages(cls, staged: StagedModel) -> EagerModel:
        """A model as its family builds it for lowering, without lowering it."""
        model = cls.__new__(cls)
        loaded = [
            _LoadedStage(stage.name, stage.input_names, stage.output_names, _eager(stage.module))
            for stage in staged.stages
        ]
        _TensorModel.__init__(model, staged.info, loaded[:-1], loaded[-1])
        return model


def _eager(module: torch.nn.Module) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    def run(inputs: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            outputs = module(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return run


class BundleModel(_TensorModel):
    """The stages of a bundle, each a loaded ExecuTorch method, layers in order and then the head.

    Memory and weights are taken when it is made; it holds the one KV cache of its programs.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Load every stage with `threads` threads (None: as many as ExecuTorch chooses).

        Raises InputError for a thread count that cannot be, BundleError for a program that cannot
        be loaded or is not what the manifest says.
        """
        stages = bundle.manifest.stages
        _check_interfaces(bundle)
        runtime = _load_executorch(threads)
        self.threads: int = runtime._threadpool_get_thread_count()
        loaded = [
            _LoadedStage(
                stage.name,
                tuple(spec.name for spec in stage.inputs),
                tuple(spec.name for spec in stage.outputs),
                _load_method(runtime, bundle, stage),
            )
            for stage in stages
        ]
        super().__init__(bundle.manifest.model, loaded[:-1], loaded[-1])


def _check_interfaces(bundle: Bundle) -> None:
    """Everything a stage takes must be there when it runs, and the head must be the loop's."""
    *layer_stages, head = bundle.manifest.stages
    if not layer_stages or head.role != "head" or any(s.role != "layers" for s in layer_stages):
        roles = ", ".join(f"{stage.name}: {stage.role}" for stage in bundle.manifest.stages)
        raise BundleError(
            f"{bundle.folder} has the stages {roles}; expected layers followed by one head"
        )
    known = set(LAYERS_INPUTS)
    for stage in layer_stages:
        missing = [spec.name for spec in stage.inputs if spec.name not in known]
        if missing:
            raise BundleError(
                f"the stage {stage.name} of {bundle.folder} takes {', '.join(missing)}, which "
                "nothing before it gives; export the bundle again"
            )
        known |= {spec.name for spec in stage.outputs}
    head_inputs = {spec.name for spec in head.inputs}
    head_outputs = {spec.name for spec in head.outputs}
    if (
        head_inputs != set(HEAD_INPUTS)
        or head_outputs != set(HEAD_OUTPUTS)
        or "hidden" not in known
    ):
        raise BundleError(
            f"the stage {head.name} of {bundle.folder} takes {', '.join(sorted(head_inputs))} and "
            f"gives {', '.join(sorted(head_outputs))}, which this program does not understand; "
            "export the bundle again"
        )


@contextmanager
def _single_torch_thread() -> Iterator[None]:
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


def _load_executorch(threads: int | None) -> Any:
    """The C++ bindings with all operator libraries registered and the thread pool set."""
    if threads is not None and threads < 1:
        raise InputError(f"the number of threads is {threads}; give at least 1")
    with captured_stderr():  # the library tells how it counted the cores
        # `portable_lib` offers the same and imports the whole compiler stack: four seconds more.
        import executorch.kernels.quantized  # noqa: F401
        from executorch.extension.pybindings import _C

        # Before any method is loaded: a delegate keeps the pool's size it was loaded with.
        if threads is not None:
            _C._unsafe_reset_threadpool(min(threads, _usable_cores()))
        _C._threadpool_get_thread_count()
    return _C


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load_method(
    runtime: Any, bundle: Bundle, stage: Stage
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    path = bundle.path(stage.file)
    data: Path | None = bundle.path(stage.data_file) if stage.data_file else None
    with captured_stderr() as log:
        try:
            program = runtime._load_program(
                str(path),
                program_verification=runtime.Verification.InternalConsistency,
                data_path=None if data is None else str(data),
            )
            method = program.load_method(stage.method)
            meta = method.method_meta()
        except RuntimeError as error:
            reason = (log.text() or str(error)).strip().splitlines()[-1].rstrip(".")
            raise BundleError(
                f"{path} cannot be loaded by ExecuTorch ({reason}); export the bundle again"
            ) from error
    found_inputs = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
    found_outputs = [meta.output_tensor_meta(i) for i in range(meta.num_outputs())]
    _check_tensors(path, "inputs", stage.inputs, found_inputs)
    _check_tensors(path, "outputs", stage.outputs, found_outputs)

    def run(inputs: list[Tensor], _keep_alive: Any = program) -> Sequence[Tensor]:
        with _single_torch_thread():
            return method(inputs)

    return run


def _check_tensors(path: Path, side: str, said: Sequence[TensorSpec], found: Sequence[Any]) -> None:
    program = [(_SCALAR_TYPES.get(t.dtype(), str(t.dtype())), tuple(t.sizes())) for t in found]
    manifest = [(spec.dtype, spec.shape) for spec in said]
    if program != manifest:
        raise BundleError(
            f"{path} has {side} {program}, and bundle.json says {manifest}; export it again"
        )


def _uniform_diffusion_session(
    model: _TensorModel, sampler: Sampler, special_tokens: SpecialTokens
) -> UniformDiffusionSession:
    if sampler.name != "entropy_bound":
        raise BundleError(
            f"{model.info.name} has the sampler {sampler.name!r}, this program knows "
            "'entropy_bound'; update the program"
        )
    try:
        settings = UniformDiffusionSettings(**sampler.settings)
    except (TypeError, InputError) as error:
        raise BundleError(
            f"{model.info.name} has sampler settings that cannot be used ({error}); correct them "
            "in the checkpoint's generation_config.json and export it again"
        ) from error
    return UniformDiffusionSession(model, special_tokens, settings)


SESSIONS: dict[str, Callable[[_TensorModel, Sampler, SpecialTokens], UniformDiffusionSession]] = {
    "uniform_diffusion": _uniform_diffusion_session,
}
"""Who runs which generation style."""


def open_session(bundle: Bundle, threads: int | None = None) -> UniformDiffusionSession:
    """Load a bundle and begin a session with its own sampler defaults.

    Raises BundleError for a style that this program does not run yet, and what BundleModel raises.
    """
    manifest = bundle.manifest
    begin = _session_of(manifest.style, bundle.folder)
    return begin(BundleModel(bundle, threads), manifest.sampler, manifest.special_tokens)


def open_eager_session(staged: StagedModel) -> UniformDiffusionSession:
    """Begin a session with a model that is run by PyTorch, with its own sampler defaults.

    Raises BundleError for a style that this program does not run yet.
    """
    begin = _session_of(staged.style, staged.info.name)
    return begin(EagerModel.from_stages(staged), staged.sampler, staged.special_tokens)


def _session_of(style: str, what: object) -> Callable[..., UniformDiffusionSession]:
    if style not in SESSIONS:
        raise BundleError(
            f"{what} generates by {style}, this program runs {', '.join(SESSIONS)}; "
            "update the program"
        )
    return SESSIONS[style]
