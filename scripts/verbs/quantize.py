"""The verb `quantize`: checkpoint to int4 checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from quantize.sizes import format_bytes
from scripts.commands import resumable
from scripts.console import column_table, number, out_console, print_json, reporting, say
from scripts.options import DEFAULT_RECIPE, AsJson, Overwrite, RecipeName, read_recipe

if TYPE_CHECKING:
    from quantize.report import QuantizationReport


def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Hugging Face checkpoint folder.")
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DESTINATION", help="New folder for the int4 checkpoint.")
    ],
    recipe: RecipeName = DEFAULT_RECIPE,
    algorithm: Annotated[
        Literal["minmax", "hqq"] | None,
        typer.Option(help="How a named recipe's 4-bit scales are found (default: minmax)."),
    ] = None,
    available: Annotated[
        bool,
        typer.Option(
            "--available",
            help="Quantize the shards that are there and keep the work for those to come; a shard "
            "that is done may be deleted.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a checkpoint's weights, as a recipe says, into an int4 checkpoint.

    After an interruption the same command goes on with the weight at which it was.
    """
    chosen = read_recipe(recipe, algorithm)
    from quantize.quantizer import quantize_available, quantize_checkpoint, read_report

    missing: tuple[str, ...] = ()
    with resumable(destination), reporting("quantizing") as progress:
        if available:
            missing = quantize_available(
                source, destination, chosen, progress=progress, overwrite=overwrite
            )
        else:
            quantize_checkpoint(source, destination, chosen, progress=progress, overwrite=overwrite)
    if missing and as_json:
        print_json({"destination": None, "missing": list(missing)})
    elif missing:
        say(
            f"quantized what is there; {len(missing)} shards are to come, the first {missing[0]}: "
            f"put them into {source} and give the same command, by which {destination} appears"
        )
    else:
        _print_report(read_report(destination), destination, as_json)


def _print_report(report: QuantizationReport, destination: Path, as_json: bool) -> None:
    total, layers = report.total(), report.by_layer()
    if as_json:
        keys = ("name", "scheme", "bytes_before", "bytes_after", "snr_db")
        *rows, last = ({key: getattr(row, key) for key in keys} for row in (*layers, total))
        print_json(
            {
                "destination": str(destination),
                "recipe": report.recipe_name,
                "layers": rows,
                "total": last,
                "notes": list(report.notes),
            }
        )
        return
    table = column_table(
        f"recipe {report.recipe_name}",
        ("layer", "scheme"),
        ("before", "after", "bits/weight", "SNR"),
    )
    for row in (*layers, total):
        table.add_row(
            row.name.removeprefix("model."),
            row.scheme,
            format_bytes(row.bytes_before),
            format_bytes(row.bytes_after),
            f"{row.bits_per_weight:.2f}",
            number(row.snr_db, "dB"),
            style="bold" if row is total else None,
        )
    out_console().print(table)
    for note in report.notes:
        say(f"note: {note}")
    say(f"wrote {destination}")
