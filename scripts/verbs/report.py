"""The verb `report`: what results files say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantize.errors import InputError
from scripts.console import out_console, print_json, reporting
from scripts.options import (
    DEFAULT_RECIPE,
    AsJson,
    Context,
    Html,
    Markdown,
    Overwrite,
    RecipeName,
    recipe_or_none,
)
from scripts.output_files import check_target, write_report

if TYPE_CHECKING:
    from device_tests.results.summary import Summary


def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="Results files of `bench`.")
    ],
    html: Html = None,
    markdown: Markdown = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Show what `plan` predicts of this model (preset, config.json or its folder) "
            "beside the measured, and the achieved share of the roofline.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            "-d",
            metavar="DEVICE",
            help="The device that it was measured on: a name or its TOML file.",
        ),
    ] = None,
    recipe: RecipeName = DEFAULT_RECIPE,
    context: Context = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show what was measured, and every failure; as a table, Markdown, JSON, or a page."""
    from device_tests.results import records
    from device_tests.results import report as reports
    from device_tests.results.summary import summarize

    for target in (html, markdown):
        check_target(target, overwrite)
    found = [record for path in results for record in records.read(path)]
    if not found:
        raise InputError(f"{', '.join(map(str, results))}: no runs in it; run `pocketdiff bench`")
    summary = summarize(found)
    if plan is not None or device is not None:
        summary = _with_forecasts(summary, plan, device, recipe, context)
    if as_json:
        print_json(reports.to_json(summary))
    else:
        out_console().print(reports.to_rich(summary))
    if html is not None:
        with reporting("drawing"):
            page = reports.to_html(summary)
        write_report(html, page)
    if markdown is not None:
        write_report(markdown, reports.to_markdown(summary))


def _with_forecasts(
    summary: Summary, plan: str | None, device: str | None, recipe: str, context: int | None
) -> Summary:
    """The summary with what `plan` says of the model beside what was measured."""
    if plan is None or device is None:
        raise InputError("--plan and --device go together; give both, or neither")
    from device_tests.results.planned import with_forecasts
    from export.families import describe
    from export.plan.device import open_device
    from export.plan.presets import model_files

    shape = describe(model_files(plan)).shape
    return with_forecasts(summary, shape, recipe_or_none(recipe), open_device(device), context)
