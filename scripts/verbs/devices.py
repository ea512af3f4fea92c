"""The verb `devices`: what answers adb."""

from __future__ import annotations

from dataclasses import asdict

from scripts.console import column_table, out_console, print_json
from scripts.device_access import warn
from scripts.options import AsJson


def devices(as_json: AsJson = False) -> None:
    """List what answers adb, through the server or on USB."""
    from device_tests.adb.selection import list_devices
    from device_tests.results.plain_text import plain

    found = list_devices(say=warn)
    if as_json:
        print_json({"devices": [asdict(entry) for entry in found]})
        return
    console = out_console()
    if not found:
        console.print("no device answers adb; plug one in, switch USB debugging on, or use --local")
        return
    table = column_table(None, ("serial", "state", "via", "model"))
    for entry in found:
        table.add_row(*map(plain, (entry.serial, entry.state, entry.via, entry.model)))
    console.print(table)
