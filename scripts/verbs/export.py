"""The verb `export`: checkpoint to bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from scripts.commands import resumable
from scripts.console import print_json, reporting
from scripts.options import AsJson, Context, Overwrite


def export(
    source: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder, quantized or not.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="BUNDLE", help="New bundle folder.")],
    context: Context = None,
    experts: Annotated[
        Literal["auto", "dense", "gather"],
        typer.Option(help="How a mixture of experts is computed; auto takes the cheaper one."),
    ] = "auto",
    truncation: Annotated[
        bool | None,
        typer.Option(
            help="Whether top_p and top_k can be set later; they cost time and memory at every "
            "step (default: only if the checkpoint's own settings use them).",
            show_default=False,
        ),
    ] = None,
    layers_per_stage: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut the layers into programs of so many, which run in less memory than the model "
            "(default: one program).",
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="What the programs are lowered to.")
    ] = "xnnpack",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Lower a checkpoint through ExecuTorch into a bundle, the folder that devices run.

    After an interruption the same command goes on with the program at which it was.
    """
    from export.exporter import export_bundle

    given = {
        "maximum_context": context,
        "truncation": truncation,
        "layers_per_stage": layers_per_stage,
    }
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    with resumable(destination), reporting("exporting") as progress:
        bundle = export_bundle(
            source,
            destination,
            progress=progress,
            experts=experts,
            backend=backend,
            overwrite=overwrite,
            **options,
        )
    if as_json:
        print_json({"bundle": str(destination), "manifest": bundle.to_json()})
        return
    from scripts.views.bundle import print_bundle

    print_bundle(bundle)
