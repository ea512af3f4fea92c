"""Checks that a bundle's stages fit together, and the loop of its style."""

from __future__ import annotations

from collections.abc import Mapping

from export.contract.bundle import Bundle
from export.contract.manifest import Call, Stage, TensorSpec
from export.contract.styles import STYLES
from quantize.errors import BundleError


def check_interfaces(bundle: Bundle) -> None:
    """Everything a stage takes must be there when it runs, and the head must be the loop's."""
    style = STYLES[bundle.manifest.style]
    *layer_stages, head = bundle.manifest.stages
    if not layer_stages or head.role != "head" or any(s.role != "layers" for s in layer_stages):
        roles = ", ".join(f"{stage.name}: {stage.role}" for stage in bundle.manifest.stages)
        raise BundleError(
            f"{bundle.folder} has the stages {roles}; expected layers followed by one head"
        )
    by_name = {stage.name: stage for stage in layer_stages}
    # From the loop come values whose shapes the loop knows; between stages, shapes must agree.
    known: dict[str, TensorSpec | None] = dict.fromkeys(style.layers_inputs)
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
        head_inputs != set(style.head_inputs)
        or head_outputs != set(style.head_outputs)
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
