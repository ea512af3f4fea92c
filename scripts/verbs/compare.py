"""The verb `compare`: two results side by side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantize.errors import InputError
from scripts.console import out_console, print_json
from scripts.options import AsJson, Markdown, Overwrite
from scripts.output_files import check_target, write_report

if TYPE_CHECKING:
    from device_tests.results.record_fields import Record


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Results file that is the base.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Results file set beside it.")],
    select_a: Annotated[
        str,
        typer.Option("--a", metavar="SELECT", help="Of A only these: threads=N,bundle=HASH."),
    ] = "",
    select_b: Annotated[
        str, typer.Option("--b", metavar="SELECT", help="Of B only these, in the same way.")
    ] = "",
    across: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="What differs on purpose, e.g. bundle,threads; family: two styles of generation.",
        ),
    ] = "",
    markdown: Markdown = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Set two results side by side: ratio of medians B/A and its interval; same conditions only."""
    from device_tests.results import compare_views, records
    from device_tests.results.compare import compare as compare_records

    check_target(markdown, overwrite)
    names = tuple(name.strip() for name in across.split(",") if name.strip())
    found = compare_records(
        _select(records.read(a), "--a", select_a), _select(records.read(b), "--b", select_b), names
    )
    if as_json:
        print_json(compare_views.to_json(found))
    else:
        out_console().print(compare_views.to_rich(found))
    if markdown is not None:
        write_report(markdown, compare_views.to_markdown(found))


def _select(found: Iterable[Record], option: str, text: str) -> list[Record]:
    """The records that `threads=N,bundle=HASH`, or a part of it, means."""
    from device_tests.results.configuration import select

    wanted: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name == "threads" and value.isdecimal():
            wanted[name] = int(value)
        elif name == "bundle" and value:
            wanted[name] = value
        else:
            raise InputError(f"{option} {text!r} is not understood; give threads=N,bundle=HASH")
    return select(found, **wanted)
