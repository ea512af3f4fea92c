"""The options that several verbs share: one name, one unit and one sentence of help for each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from quantize.errors import RecipeError
from quantize.sizes import parse_bytes

if TYPE_CHECKING:
    from quantize.recipe import Recipe

BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle folder.")]

# What comes out

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of text for people.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result of this command.")
]
Html = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the report as one self-contained page with plots."),
]
Markdown = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write what is shown as Markdown.")
]

# The model

RecipeName = Annotated[
    str,
    typer.Option(
        metavar="RECIPE",
        help="Name of a recipe (int4-g32, ...) or its JSON file; of plans also none.",
    ),
]
DEFAULT_RECIPE = "int4-g32"
Context = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Positions of the KV cache: prompt, answer and a canvas (default: the model's, at "
        "most 2048).",
    ),
]

# The run

Seed = Annotated[int, typer.Option(help="The same seed on the same machine: the same result.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads (default: the fast cores).")]
Prompt = Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What the user says.")]
Puzzles = typer.Option(min=1, help="Held-out puzzles of each kind.")
MemoryBudget = Annotated[
    int | None,
    typer.Option(
        parser=parse_bytes,
        metavar="SIZE",
        help="Most memory to be resident (512M, 2G), the program's own included: packed weights "
        "are mapped from a file, and what has no room is read in each pass (default: any).",
    ),
]
PackedWeights = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Where packed weights lie between runs (default with a budget: the user's cache); "
        "without a budget, map them from there, which loads faster.",
    ),
]

# The device

Serial = Annotated[
    str | None,
    typer.Option(
        "--serial",
        "-s",
        metavar="SERIAL",
        help="Serial number or HOST:PORT, as `pocketdiff devices` shows it (default: "
        "ANDROID_SERIAL, else the only device).",
    ),
]
Via = Annotated[
    Literal["auto", "server", "direct"],
    typer.Option(help="Through the adb server, or directly to the device; auto: what is there."),
]
Local = Annotated[
    bool,
    typer.Option("--local", help="Use a device on this machine: adbd for Linux, on loopback only."),
]


def recipe_or_none(name: str) -> Recipe | None:
    """As `read_recipe`; None for `none`."""
    return None if name == "none" else read_recipe(name)


def read_recipe(name: str, algorithm: Literal["minmax", "hqq"] | None = None) -> Recipe:
    """The recipe of `--recipe`, by its name or from its file.

    algorithm: how a named recipe's 4-bit scales are found. Raises RecipeError.
    """
    import json

    from quantize.recipe import preset, recipe_from_json

    path = Path(name)
    if path.suffix != ".json" and not path.is_file():
        return preset(name, scale_algorithm=algorithm or "minmax")
    if algorithm is not None:
        raise RecipeError(
            f"{name} is a recipe file, which names its own scale algorithms; leave out --algorithm"
        )
    try:
        return recipe_from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RecipeError(f"{name} is missing; give a recipe's name or its file") from None
    except ValueError as error:
        raise RecipeError(f"{name} is not valid JSON ({error}); correct it") from error
