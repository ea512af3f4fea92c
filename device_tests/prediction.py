"""Predicted beside measured: what `plan` says of a model against what a results file has of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from device_tests.plain_text import quantity
from device_tests.report import Group, Summary
from export.plan.budget import budget_of_layout
from export.plan.device import Device
from export.plan.layout import lay_out
from export.plan.roofline import time_of
from export.plan.shapes import ModelShape
from export.plan.work import chosen_experts, step_pass
from quantize.errors import InputError
from quantize.recipe import Recipe


@dataclass(frozen=True)
class Prediction:
    """One quantity of one configuration. error: of the prediction, 0.1 is 10 % too much; None where
    nothing was measured. share: of the roofline, as measured; of times only."""

    configuration: str
    name: str
    title: str
    unit: str
    predicted: float
    measured: float | None
    share: float | None = None

    @property
    def error(self) -> float | None:
        """Relative, of the prediction."""
        return None if not self.measured else self.predicted / self.measured - 1.0

    def to_json(self) -> dict[str, object]:
        """For the report's document."""
        return {
            "configuration": self.configuration,
            "name": self.name,
            "predicted": self.predicted,
            "measured": self.measured,
            "error": self.error,
            "share_of_roofline": self.share,
        }


def predictions(
    summary: Summary,
    shape: ModelShape,
    recipe: Recipe | None,
    device: Device,
    context: int | None = None,
) -> tuple[Prediction, ...]:
    """Peak RSS and step time of every configuration of the model's family.

    context: positions of the bundle's KV cache; None: what `export` takes. Raises InputError if no
    configuration is of this family.
    """
    context = shape.default_context if context is None else context
    found: list[Prediction] = []
    for group in summary.groups:
        if _family(group) != shape.family:
            continue
        found += _of_group(group, shape, recipe, device, context)
    if not found:
        families = {_family(group) for group in summary.groups}
        raise InputError(
            f"the results are of {', '.join(sorted(families))} and the plan is of {shape.family}; "
            "give the config.json of what was measured"
        )
    return tuple(found)


def _family(group: Group) -> str:
    return group.records[0]["conditions"]["bundle"]["family"]


def _of_group(
    group: Group, shape: ModelShape, recipe: Recipe | None, device: Device, context: int
) -> list[Prediction]:
    step = time_of(step_pass(shape, recipe, context=context, experts=chosen_experts(shape)), device)
    best = time_of(step_pass(shape, recipe, context=context), device)
    layout = lay_out(shape, recipe, context=context, rows=max(32, shape.step_rows(context)))
    memory = budget_of_layout(layout, device).total_bytes
    by_name = {item.metric.name: item for item in group.quantities}
    rows = []
    for name, predicted in (("peak_rss_bytes", float(memory)), ("step_ms", step.ms)):
        item = by_name[name]
        share = best.best_ms / item.median if name == "step_ms" and item.median else None
        rows.append(
            Prediction(
                group.title, name, item.metric.title, item.metric.unit, predicted, item.median,
                share,
            )
        )  # fmt: skip
    return rows


def to_rich(found: Sequence[Prediction]) -> object:
    """A table: predicted, measured, error, share of the roofline."""
    from rich.table import Table

    table = Table(title="predicted and measured", title_justify="left", box=None)
    table.add_column("configuration", overflow="fold")
    table.add_column("quantity")
    for heading in ("predicted", "measured", "error", "of the roofline"):
        table.add_column(heading, justify="right", no_wrap=True)
    for item in found:
        table.add_row(
            item.configuration,
            item.title,
            quantity(item.predicted, item.unit),
            quantity(item.measured, item.unit),
            "-" if item.error is None else f"{100 * item.error:+.0f} %",
            "-" if item.share is None else f"{100 * item.share:.0f} %",
        )
    return table
