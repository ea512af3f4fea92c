"""A report's configurations with what `plan` predicts of them: peak RSS and the time of a step.

What is shown of it is `prediction.py`.
"""

from __future__ import annotations

import dataclasses

from device_tests.results.plain_text import plain
from device_tests.results.prediction import Forecast, Prediction, Roofline
from device_tests.results.summary import Group, Summary
from export.families.shapes import ModelShape
from export.plan.budget import budget_of_layout
from export.plan.device import Device
from export.plan.layout import lay_out
from export.plan.roofline import time_of
from export.plan.work import chosen_experts, step_pass
from quantize.errors import InputError
from quantize.recipe import Recipe


def with_forecasts(
    summary: Summary,
    shape: ModelShape,
    recipe: Recipe | None,
    device: Device,
    context: int | None = None,
) -> Summary:
    """The same summary, every configuration of the model's family with its forecast.

    context: positions of the bundle's KV cache; None: what `export` takes. Raises InputError if no
    configuration is of this family.
    """
    context = shape.default_context if context is None else context
    if shape.family not in (families := {_bundle(group)["family"] for group in summary.groups}):
        found = ", ".join(sorted(plain(family, 60) for family in families))
        raise InputError(
            f"the results are of {found} and the plan is of {shape.family}; "
            "give the config.json of what was measured"
        )
    return dataclasses.replace(
        summary,
        groups=tuple(
            _with_forecast(group, shape, recipe, device, context)
            if _bundle(group)["family"] == shape.family
            else group
            for group in summary.groups
        ),
    )


def _bundle(group: Group) -> dict[str, str]:
    return group.records[0]["conditions"]["bundle"]


def _with_forecast(
    group: Group, shape: ModelShape, recipe: Recipe | None, device: Device, context: int
) -> Group:
    step = time_of(step_pass(shape, recipe, context=context, experts=chosen_experts(shape)), device)
    # The roofline is of the model, not of how the exporter computes it: only the chosen experts.
    best = time_of(step_pass(shape, recipe, context=context), device)
    layout = lay_out(shape, recipe, context=context, rows=max(32, shape.step_rows))
    memory = budget_of_layout(layout, device).total_bytes
    by_name = {item.metric.name: item for item in group.quantities}
    rows = []
    for metric, predicted, roofline in (
        ("peak_rss_bytes", float(memory), None),
        ("step_ms", step.ms, Roofline(best.best_ms, best.bound)),
    ):
        item = by_name[metric]
        rows.append(
            Prediction(metric, item.title, item.metric.unit, predicted, item.median, roofline)
        )
    name = None if recipe is None else recipe.name
    notes = group.notes
    if (recorded := _bundle(group)["recipe"]) != name:
        notes += (
            f"predicted for {name or 'weights that are not quantized'}, and the bundle says "
            f"{plain(recorded or 'that its are not', 60)}: give its --recipe",
        )
    if any(row.share is not None and row.share > 1 for row in rows):
        notes += (
            "measured faster than the roofline: the plan's model, recipe, context or device is not "
            "what was measured, or the device's peaks are set too low",
        )
    forecast = Forecast(device.name, name, context, tuple(rows))
    return dataclasses.replace(group, notes=notes, forecast=forecast)
