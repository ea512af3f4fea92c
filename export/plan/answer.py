"""Everything `pocketdiff plan` says of one model: on every device asked for, ready to print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from export.families import describe
from export.families.shapes import ModelShape, expected_distinct
from export.plan.break_even import Acceptance, BreakEven, Claim, break_even, canvas_passes, claim
from export.plan.budget import Budget, Line, budget_of_layout
from export.plan.device import Device, names, on_npu, open_device
from export.plan.layout import Layout, checkpoint_bytes, lay_out
from export.plan.presets import model_files
from export.plan.roofline import Time, ridge, time_of
from export.plan.work import Experts, Pass, chosen_experts, layers_pass, step_pass
from quantize.errors import InputError
from quantize.recipe import Recipe


@dataclass(frozen=True)
class OnDevice:
    """The model on one device. step: a denoising step, or a token; None where the device says too
    little. break_even, claim: of diffusion models. tokens_per_s: at the stated acceptance, or of
    an autoregressive model; None without."""

    device: Device
    budget: Budget
    ridge: float | None = None
    step: Time | None = None
    break_even: BreakEven | None = None
    claim: Claim | None = None
    tokens_per_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; bytes, ms, tokens/s."""
        budget, flash = self.budget, self.device.value("flash_read_mb_s")
        # What reading the streamed weights takes in each pass, at the flash's speed.
        streaming_ms = None
        if budget.streamed_bytes and flash is not None:
            streaming_ms = budget.streamed_bytes / 1e3 / flash
        document: dict[str, Any] = {
            "device": self.device.name,
            "price_class": self.device.price_class,
            "needed_bytes": budget.total_bytes,
            "streaming_ms": streaming_ms,
            "ridge": self.ridge,
            "step": None if self.step is None else self.step.to_json(),
            "tokens_per_s": self.tokens_per_s,
        }
        for name in ("verdict", "reason", "anonymous_bytes", "file_bytes", "available_bytes",
                     "streamed_bytes"):  # fmt: skip
            document[name] = getattr(budget, name)
        if self.break_even is not None and self.claim is not None:
            document |= self.break_even.to_json()
            document["example"] = {**asdict(self.claim), "holds": self.claim.holds}
        return document


@dataclass(frozen=True)
class Answer:
    """The model, its passes (a step first), and every device."""

    model: str
    shape: ModelShape
    recipe_name: str
    layout: Layout
    checkpoint_bytes: int
    lines: tuple[Line, ...]
    passes: tuple[Pass, ...]
    on_devices: tuple[OnDevice, ...]
    acceptance: Acceptance | None
    tokens: int
    steps: int

    @property
    def claim_title(self) -> str:
        """What the example says."""
        return f"the example: {self.tokens} tokens in {self.steps} steps and a commit"

    def experts_touched(self, item: Pass) -> float | None:
        """Expected number of distinct experts of a layer in a pass; None without experts."""
        if not self.shape.num_experts:
            return None
        return expected_distinct(self.shape.num_experts, self.shape.top_k, item.rows)

    def to_json(self) -> dict[str, Any]:
        """As one JSON document; bytes, ms, tokens/s."""
        shape = self.shape
        return {
            "model": self.model,
            "family": shape.family,
            "style": shape.style.name,
            "canvas_length": shape.canvas_length,
            "recipe": self.recipe_name,
            "context": self.layout.context,
            "parameters": {
                "total": shape.total_parameters,
                "active": shape.active_parameters,
                "by_part": shape.parameters_by_part(),
            },
            "checkpoint_bytes": self.checkpoint_bytes,
            "bundle_bytes": self.layout.file_bytes,
            "memory": [asdict(line) for line in self.lines],
            "passes": [
                {
                    "name": item.name,
                    "rows": item.rows,
                    "operations": item.operations,
                    "bytes": item.bytes,
                    "intensity": item.intensity,
                    "experts_touched": self.experts_touched(item),
                    "by_kind": {
                        kind or "embedding": {"operations": operations, "bytes": moved}
                        for kind, (operations, moved) in item.of_kind().items()
                    },
                }
                for item in self.passes
            ],
            "devices": [entry.to_json() for entry in self.on_devices],
        }


def answer(
    model: str,
    *,
    recipe: Recipe | None,
    devices: Sequence[str] | None = None,
    context: int | None = None,
    available_bytes: int | None = None,
    acceptance: Acceptance | None = None,
    steps: int = 30,
    tokens: int = 256,
    npu: bool = False,
) -> Answer:
    """Plan a model, given as a preset, a folder or a config.json, for devices (None: all known).

    npu: on their NPUs; of all known devices then only those whose NPU is known.

    Raises InputError, CheckpointError, RecipeError: a model, device, recipe or length that cannot
    be.
    """
    files = model_files(model)
    shape = describe(files).shape
    if context is not None:
        if not shape.canvas_length <= context <= shape.maximum_positions:
            raise InputError(
                f"a context of {context} is not from the canvas of {shape.canvas_length} to the "
                f"{shape.maximum_positions} positions of config.json; give one that is"
            )
        shape = describe(files, context).shape
    context = shape.default_context
    layout = lay_out(shape, recipe, context=context)
    found = [open_device(known) for known in devices or names()]
    if npu:
        known = [device for device in found if device.value("npu_int8_gops") is not None]
        found = [on_npu(device) for device in (found if devices else known)]
    entries = tuple(
        _on_device(layout, device, available_bytes, acceptance, tokens=tokens, steps=steps)
        for device in found
    )
    return Answer(
        model=files.folder.name,
        shape=shape,
        recipe_name="none (fp32)" if recipe is None else recipe.name,
        layout=layout,
        checkpoint_bytes=checkpoint_bytes(shape, recipe),
        lines=budget_of_layout(layout, None).lines,
        passes=_passes(shape, recipe, context),
        on_devices=entries,
        acceptance=acceptance,
        tokens=tokens,
        steps=steps,
    )


def _passes(shape: ModelShape, recipe: Recipe | None, context: int) -> tuple[Pass, ...]:
    prefill = layers_pass(
        shape, recipe, rows=shape.prefill_length(context), context=context, name="prefill chunk"
    )
    if shape.style.step_is_token:
        return step_pass(shape, recipe, context=context), prefill
    step, commit = canvas_passes(shape, recipe, context=context)
    return step, commit, prefill, step_pass(shape.twin(), recipe, context=context)


def _on_device(
    layout: Layout,
    device: Device,
    available_bytes: int | None,
    acceptance: Acceptance | None,
    *,
    tokens: int,
    steps: int,
) -> OnDevice:
    shape, recipe, context = layout.shape, layout.recipe, layout.context
    budget = budget_of_layout(layout, device, available_bytes)
    if device.value("memory_gb_s") is None or device.peak_gops("int8") is None:
        return OnDevice(device, budget)
    experts: Experts = chosen_experts(shape) if device.is_measured else "routed"
    step = time_of(step_pass(shape, recipe, context=context, experts=experts), device)
    found = made = None
    rate: float | None = 1000.0 / step.ms
    if not shape.style.step_is_token:
        found = break_even(shape, recipe, device, context=context, acceptance=acceptance)
        made = claim(shape, recipe, device, context=context, tokens=tokens, steps=steps)
        own = next(point for point in found.points if point.length == shape.canvas_length)
        rate = own.tokens_per_s
    return OnDevice(device, budget, ridge(device), step, found, made, rate)
