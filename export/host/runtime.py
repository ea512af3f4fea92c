"""Runs a model's stages for the host's loops: a bundle's programs in ExecuTorch, or eager modules.

The loops are sessions of `export.host.session`; what each style takes from its stages, and which
session serves it, is the table `SESSIONS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.contract.bundle import (
    Bundle,
    Call,
    Decoding,
    ModelInfo,
    Sampler,
    SpecialTokens,
    Stage,
    TensorSpec,
)
from export.contract.styles import STYLES, Style
from export.contract.styles.autoregressive import Autoregressive
from export.contract.styles.base import LAYERS_OUTPUTS
from export.contract.styles.masked_diffusion import MaskedDiffusion
from export.contract.styles.uniform_diffusion import UniformDiffusion
from export.host.autoregressive import (
    AutoregressiveHeadOutput,
    AutoregressiveSession,
)
from export.host.masked_diffusion import (
    MaskedDiffusionSession,
    MaskedHeadOutput,
)
from export.host.process import captured_stderr
from export.host.session import Session
from export.host.streaming.mapped_weights import MappedWeights, MemoryOptions, loading
from export.host.uniform_diffusion import (
    HeadOutput,
    UniformDiffusionSession,
)
from export.models.staging import (
    StagedModel,
    StageModule,
)
from quantize.errors import BundleError, InputError

# ExecuTorch's ScalarType (runtime/core/portable_type/scalar_type.h).
_SCALAR_TYPES = {
    0: "uint8", 1: "int8", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 11: "bool",
    15: "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class LoadedStage:
    """A stage that can be run: `run` takes and gives tensors in the order of the names."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[[list[Tensor]], Sequence[Tensor]]

    def __call__(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = self.run([named[name] for name in self.inputs])
        return dict(zip(self.outputs, values, strict=True))


class LoadedStages:
    """The stages of one model, ready to run: a pass of its layers as scheduled, and its head.

    All values between stages stay tensors. A KV cache belongs to the stages, so to this object.
    threads: of ExecuTorch; None for eager modules. weights: None unless they are mapped from a
    file.
    """

    def __init__(
        self,
        info: ModelInfo,
        layers: Sequence[LoadedStage],
        head: LoadedStage,
        *,
        decoding: Decoding | None = None,
        schedule: Sequence[Call] = (),
        threads: int | None = None,
        weights: MappedWeights | None = None,
    ) -> None:
        self.info = info
        self.decoding = decoding
        self.threads = threads
        self.weights = weights
        self._head = head
        by_name = {stage.name: stage for stage in layers}
        self._calls = tuple(
            _planned(by_name[call.stage], call)
            for call in schedule or (Call(stage.name) for stage in layers)
        )

    def layers(self, named: Mapping[str, Tensor]) -> Tensor:
        """One pass on the loop's tensors by name; returns hidden states `[1, N, H]`."""
        values = dict(named)
        for run in self._calls:
            values |= run(values)
        return values["hidden"]

    def head(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head on its inputs by name; returns its outputs by name."""
        return self._head(named)


def _planned(stage: LoadedStage, call: Call) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """The stage with the names and the constants of one call of the schedule."""
    constants = {name: torch.tensor([value]) for name, value in call.constants.items()}
    inputs = [(name, call.inputs.get(name, name)) for name in stage.inputs]
    outputs = [call.outputs.get(name, name) for name in stage.outputs]

    def run(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = [
            constants[name] if name in constants else values[source] for name, source in inputs
        ]
        return dict(zip(outputs, stage.run(given), strict=True))

    return run


class _TensorModel:
    """Between a loop's arrays and the stages' tensors, which pass by name; one class per style."""

    layers_inputs: tuple[str, ...]
    head_inputs: tuple[str, ...]

    def __init__(self, stages: LoadedStages) -> None:
        self.stages = stages
        self.info = stages.info

    @property
    def decoding(self) -> Decoding | None:
        """How the loop uses the layers; None for uniform diffusion."""
        return self.stages.decoding

    @property
    def threads(self) -> int | None:
        """ExecuTorch's threads; None for eager modules."""
        return self.stages.threads

    @property
    def weights(self) -> MappedWeights | None:
        """The stages' packed weights, if they are mapped from a file."""
        return self.stages.weights

    def run_layers(self, *inputs: Tensor) -> Tensor:
        """A pass on the tensors of `layers_inputs`, in order; returns hidden states `[1, N, H]`."""
        return self.stages.layers(dict(zip(self.layers_inputs, inputs, strict=True)))

    def run_head(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The head on the tensors of `head_inputs`, in order; returns its outputs by name."""
        return self.stages.head(dict(zip(self.head_inputs, inputs, strict=True)))


class UniformDiffusionTensors(_TensorModel):
    """A `UniformDiffusionModel`: arrays `[T]` for the loop, tensors `[1, T]` for the stages."""

    layers_inputs = UniformDiffusion.layers_inputs
    head_inputs = UniformDiffusion.head_inputs

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


class _BlockTensors(_TensorModel):
    """What masked diffusion and autoregressive models share: layers that see blocks."""

    layers_inputs = Autoregressive.layers_inputs

    def layers(self, tokens: np.ndarray, start: int, block_length: int) -> Tensor:
        """N tokens `[N]` at positions start .. start + N; returns hidden states `[1, N, H]`."""
        return self.run_layers(
            torch.from_numpy(tokens).unsqueeze(0),
            torch.tensor([start]),
            torch.tensor([block_length]),
        )


class MaskedDiffusionTensors(_BlockTensors):
    """A `MaskedDiffusionModel`."""

    head_inputs = MaskedDiffusion.head_inputs

    def head(
        self, hidden: Tensor, rows: np.ndarray, settings: np.ndarray, quota: int,
        uniform: np.ndarray,
    ) -> MaskedHeadOutput:  # fmt: skip
        """See `MaskedDiffusionModel`."""
        named = self.run_head(
            hidden,
            torch.from_numpy(rows),
            torch.from_numpy(settings),
            torch.tensor([quota]),
            torch.from_numpy(uniform),
        )
        return MaskedHeadOutput(
            token=named["token"].numpy(),
            accepted=named["accepted"].numpy().astype(bool),
            score=named["score"].numpy(),
            entropy=named["entropy"].numpy(),
        )


class AutoregressiveTensors(_BlockTensors):
    """An `AutoregressiveModel`."""

    head_inputs = Autoregressive.head_inputs

    def head(
        self, hidden: Tensor, row: int, settings: np.ndarray, uniform: np.ndarray
    ) -> AutoregressiveHeadOutput:
        """See `AutoregressiveModel`."""
        named = self.run_head(
            hidden, torch.tensor([row]), torch.from_numpy(settings), torch.from_numpy(uniform)
        )
        return AutoregressiveHeadOutput(
            token=int(named["token"]),
            log_prob=float(named["log_prob"]),
            entropy=float(named["entropy"]),
        )


class EagerModel(UniformDiffusionTensors):
    """Uniform diffusion's reference: modules with the stages' signatures, run by PyTorch."""

    def __init__(
        self, layers_module: torch.nn.Module, head_module: torch.nn.Module, info: ModelInfo
    ) -> None:
        super().__init__(
            LoadedStages(
                info,
                [LoadedStage("layers", self.layers_inputs, LAYERS_OUTPUTS, _eager(layers_module))],
                LoadedStage(
                    "head", self.head_inputs, UniformDiffusion.head_outputs, _eager(head_module)
                ),
            )
        )

    @classmethod
    def from_stages(cls, staged: StagedModel) -> EagerModel:
        """A model as its family builds it for lowering, without lowering it."""
        model = cls.__new__(cls)
        _TensorModel.__init__(model, eager_stages(staged))
        return model


class BundleModel(UniformDiffusionTensors):
    """The stages of a bundle of uniform diffusion, loaded into ExecuTorch.

    Memory and weights are taken when it is made; it holds the one KV cache of its programs.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        """Load every stage with `threads` threads; raises what `load_stages` raises."""
        super().__init__(load_stages(bundle, threads, SESSIONS["uniform_diffusion"]))


def eager_stages(staged: StagedModel) -> LoadedStages:
    """A model's stages as its family builds them, run by PyTorch without being lowered."""
    *layers, head = (eager_stage(stage) for stage in staged.stages)
    return LoadedStages(
        staged.info, layers, head, decoding=staged.decoding, schedule=staged.schedule
    )


def _eager(module: torch.nn.Module) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    def run(inputs: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            outputs = module(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return run


def load_stages(
    bundle: Bundle,
    threads: int | None = None,
    style: _Style | None = None,
    memory: MemoryOptions | None = None,
) -> LoadedStages:
    """Load every stage of a bundle with `threads` threads (None: as many as ExecuTorch chooses).

    style: what the loop expects of the stages; None: what the manifest says. memory: have packed
    weights mapped from a file, and a budget held; None: they are packed into memory. Raises
    InputError for a thread count or a budget that cannot be, BundleError for a program that cannot
    be loaded, is not what the manifest says, or does not fit its style's loop, OutputError if
    packed weights cannot be written.
    """
    manifest = bundle.manifest
    style = style or _style_of(manifest.style, bundle.folder)
    _check_interfaces(bundle, style)
    runtime = _load_executorch(threads)
    with nullcontext() if memory is None else loading(bundle, memory) as weights:
        loaded = [
            _loaded(
                stage,
                _with_weights(weights, number, _load_method(runtime, bundle, stage, weights)),
            )
            for number, stage in enumerate(manifest.stages)
        ]
    if weights is not None:
        weights.begin()
    return LoadedStages(
        manifest.model,
        loaded[:-1],
        loaded[-1],
        decoding=manifest.decoding,
        schedule=manifest.schedule,
        threads=runtime._threadpool_get_thread_count(),
        weights=weights,
    )


def load_stage(bundle: Bundle, stage: Stage) -> LoadedStage:
    """One stage by itself, as `load_stages` loads it; it takes memory while it is referred to."""
    return _loaded(stage, _load_method(_load_executorch(None), bundle, stage, None))


def eager_stage(stage: StageModule) -> LoadedStage:
    """One stage as its family builds it, run by PyTorch."""
    return LoadedStage(stage.name, stage.input_names, stage.output_names, _eager(stage.load()))


def _loaded(stage: Stage, run: Callable[[list[Tensor]], Sequence[Tensor]]) -> LoadedStage:
    return LoadedStage(
        stage.name,
        tuple(spec.name for spec in stage.inputs),
        tuple(spec.name for spec in stage.outputs),
        run,
    )


def _with_weights(
    weights: MappedWeights | None, number: int, run: Callable[[list[Tensor]], Sequence[Tensor]]
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    if weights is None:
        return run
    return lambda inputs: weights.run(number, lambda: run(inputs))


def _check_interfaces(bundle: Bundle, style: _Style) -> None:
    """Everything a stage takes must be there when it runs, and the head must be the loop's."""
    *layer_stages, head = bundle.manifest.stages
    if not layer_stages or head.role != "head" or any(s.role != "layers" for s in layer_stages):
        roles = ", ".join(f"{stage.name}: {stage.role}" for stage in bundle.manifest.stages)
        raise BundleError(
            f"{bundle.folder} has the stages {roles}; expected layers followed by one head"
        )
    by_name = {stage.name: stage for stage in layer_stages}
    # From the loop come values whose shapes the loop knows; between stages, shapes must agree.
    known: dict[str, TensorSpec | None] = dict.fromkeys(style.model.layers_inputs)
    for call in bundle.manifest.schedule or [Call(stage.name) for stage in layer_stages]:
        if call.stage not in by_name:
            raise BundleError(
                f"{bundle.folder} schedules the stage {call.stage}, which is its head; export the "
                "bundle again"
            )
        known |= _check_call(bundle, by_name[call.stage], call, known)
    head_inputs = {spec.name for spec in head.inputs}
    head_outputs = {spec.name for spec in head.outputs}
    if (
        head_inputs != set(style.model.head_inputs)
        or head_outputs != set(style.contract.head_outputs)
        or "hidden" not in known
    ):
        raise BundleError(
            f"the stage {head.name} of {bundle.folder} takes {', '.join(sorted(head_inputs))} and "
            f"gives {', '.join(sorted(head_outputs))}, which this program does not understand; "
            "export the bundle again"
        )
    hidden = next(spec for spec in head.inputs if spec.name == "hidden")
    _check_value(bundle, head, hidden, known["hidden"])
    _check_lengths(bundle)


def _check_call(
    bundle: Bundle, stage: Stage, call: Call, known: Mapping[str, TensorSpec | None]
) -> dict[str, TensorSpec | None]:
    """Check one call of a pass against the values so far; returns the values it adds."""
    inputs = {spec.name: spec for spec in stage.inputs}
    outputs = {spec.name: spec for spec in stage.outputs}
    strange = [*(set(call.inputs) | set(call.constants)) - set(inputs),
               *set(call.outputs) - set(outputs)]  # fmt: skip
    if strange:
        raise BundleError(
            f"the schedule of {bundle.folder} gives the stage {stage.name} a tensor "
            f"{sorted(strange)[0]!r}, which it does not have; export the bundle again"
        )
    missing = [
        call.inputs.get(name, name)
        for name in inputs
        if name not in call.constants and call.inputs.get(name, name) not in known
    ]
    if missing:
        raise BundleError(
            f"the stage {stage.name} of {bundle.folder} takes {', '.join(missing)}, which "
            "nothing before it gives; export the bundle again"
        )
    for name, spec in inputs.items():
        given = known.get(call.inputs.get(name, name))
        if name in call.constants:
            given = TensorSpec(name, "int64", (1,))
        _check_value(bundle, stage, spec, given)
    return {call.outputs.get(name, name): spec for name, spec in outputs.items()}


def _check_value(bundle: Bundle, stage: Stage, spec: TensorSpec, given: TensorSpec | None) -> None:
    """`given` is None for what the loop makes."""
    if given is not None and (spec.dtype, spec.shape) != (given.dtype, given.shape):
        raise BundleError(
            f"the stage {stage.name} of {bundle.folder} takes {spec.name} as {spec.dtype} "
            f"{list(spec.shape)} and is given {given.dtype} {list(given.shape)}; export the bundle "
            "again"
        )


def _check_lengths(bundle: Bundle) -> None:
    """The loop's longest calls must fit in the programs."""
    manifest = bundle.manifest
    if manifest.decoding is None:
        return
    longest = {
        "tokens": manifest.decoding.prefill_length,
        "rows": manifest.model.canvas_length,
        "uniform": manifest.model.canvas_length,
    }
    for stage in manifest.stages:
        for spec in stage.inputs:
            if spec.name in longest and spec.shape[-1:] < (longest[spec.name],):
                raise BundleError(
                    f"the stage {stage.name} of {bundle.folder} takes {spec.name} "
                    f"{list(spec.shape)}, and the loop gives up to {longest[spec.name]}; export "
                    "the bundle again"
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
    runtime: Any, bundle: Bundle, stage: Stage, weights: MappedWeights | None
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    path = bundle.path(stage.file)
    data: Path | None = bundle.path(stage.data_file) if stage.data_file else None
    with captured_stderr() as log:
        try:
            check = runtime.Verification.InternalConsistency
            if weights is None:
                program = runtime._load_program(
                    str(path),
                    program_verification=check,
                    data_path=None if data is None else str(data),
                )
            else:
                program = runtime._load_program_from_buffer(
                    weights.program(stage), program_verification=check
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


@dataclass(frozen=True)
class _Style:
    """How this host runs a generation style: its session, and the model between loop and stages."""

    contract: Style
    session: Callable[[Any, SpecialTokens, Any], Session]
    model: type[_TensorModel]

    def begin(self, stages: LoadedStages, sampler: Sampler, special: SpecialTokens) -> Session:
        """A session with the sampler's own settings; BundleError for those that cannot be."""
        settings = self.contract.read_settings(stages.info.name, sampler)
        session = self.session(self.model(stages), special, settings)
        session.can_set = frozenset(sampler.settings)
        return session


SESSIONS: dict[str, _Style] = {
    "uniform_diffusion": _Style(
        STYLES["uniform_diffusion"], UniformDiffusionSession, UniformDiffusionTensors
    ),
    "masked_diffusion": _Style(
        STYLES["masked_diffusion"], MaskedDiffusionSession, MaskedDiffusionTensors
    ),
    "autoregressive": _Style(
        STYLES["autoregressive"], AutoregressiveSession, AutoregressiveTensors
    ),
}
"""Who runs which generation style."""


def open_session(
    bundle: Bundle, threads: int | None = None, *, memory: MemoryOptions | None = None
) -> Session:
    """Load a bundle and begin a session with its own sampler defaults; arguments as `load_stages`.

    Raises BundleError for a style that this program does not run yet, and what `load_stages`
    raises.
    """
    manifest = bundle.manifest
    style = _style_of(manifest.style, bundle.folder)
    style.contract.check_decoding(bundle.folder, manifest.model, manifest.decoding)
    stages = load_stages(bundle, threads, style, memory)
    return style.begin(stages, manifest.sampler, manifest.special_tokens)


def open_eager_session(staged: StagedModel) -> Session:
    """Begin a session with a model that is run by PyTorch, with its own sampler defaults.

    Raises BundleError for a style that this program does not run yet.
    """
    style = _style_of(staged.style, staged.info.name)
    style.contract.check_decoding(staged.info.name, staged.info, staged.decoding)
    return style.begin(eager_stages(staged), staged.sampler, staged.special_tokens)


def _style_of(style: str, what: object) -> _Style:
    if style not in SESSIONS:
        raise BundleError(
            f"{what} generates by {style}, this program runs {', '.join(SESSIONS)}; "
            "update the program"
        )
    return SESSIONS[style]
