"""The verb `clean`: what was deployed on a device removed from it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from quantize.sizes import format_bytes
from scripts.console import print_json, say
from scripts.device_access import connected_device
from scripts.options import AsJson, Local, Serial, Via


def clean(
    bundle: Annotated[
        str | None,
        typer.Option("--bundle-id", metavar="ID", help="Only this bundle (default: everything)."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Even while a benchmark has the device.")
    ] = False,
    serial: Serial = None,
    via: Via = "auto",
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Remove from a device what was deployed there, and only that."""
    from device_tests.bench.inventory import clean as remove
    from device_tests.results.plain_text import plain

    with connected_device(serial, via, local) as transport:
        removed = remove(transport, bundle, force=force)
    if as_json:
        print_json({"device": transport.serial} | asdict(removed))
        return
    say(
        f"removed {_counted(removed.bundles, 'bundle')} and {_counted(removed.runs, 'run')}, "
        f"{format_bytes(removed.bytes)}, from {plain(transport.serial)}"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
