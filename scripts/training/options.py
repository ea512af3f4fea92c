"""The options that the trainers share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Destination = Annotated[
    Path, typer.Argument(metavar="DESTINATION", help="Folder that is written to.")
]
Steps = Annotated[int, typer.Option(min=1, help="Optimizer steps.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that was interrupted.")]
FinalPuzzles = Annotated[
    int, typer.Option("--puzzles", min=1, help="Held-out puzzles of each kind in the end.")
]
