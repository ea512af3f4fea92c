"""What a plan found, as tables: memory, work, verdicts, rates, break-even."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantize.sizes import format_bytes
from scripts.console import column_table, fact_table, number, out_console

if TYPE_CHECKING:
    from rich.table import Table

    from export.plan.answer import Answer, OnDevice

VERDICT_STYLE = {
    "fits": "green", "tight": "yellow", "needs streaming": "magenta", "refuses": "red",
}  # fmt: skip


def print_answer(found: Answer) -> None:
    """Print it on stdout."""
    tables = [_facts(found), _memory(found), _passes(found), _verdicts(found), _speeds(found)]
    if found.on_devices and found.on_devices[0].break_even is not None:
        tables += _break_even(found)
    console = out_console()
    for table in tables:
        console.print(table)
        console.print()


def _facts(found: Answer) -> Table:
    shape, layout = found.shape, found.layout
    parts = ", ".join(f"{part} {_count(n)}" for part, n in shape.parameters_by_part().items())
    active = ""
    if shape.active_parameters != shape.total_parameters:
        active = f", {_count(shape.active_parameters)} active"
    style = shape.style.name.replace("_", " ")
    canvas = "" if shape.canvas_length == 1 else f", canvas of {shape.canvas_length}"
    return fact_table(
        [
            ("model", f"{found.model} ({shape.family}): {style}{canvas}"),
            ("parameters", f"{_count(shape.total_parameters)}{active}: {parts}"),
            ("recipe", found.recipe_name),
            ("int4 checkpoint", format_bytes(found.checkpoint_bytes)),
            ("bundle", format_bytes(layout.file_bytes)),
            ("context", f"{layout.context:,} positions"),
        ]
    )


def _memory(found: Answer) -> Table:
    table = column_table("memory", ("what",), ("anonymous", "file-backed"))
    for line in found.lines:
        cells = ["", ""]
        cells[line.kind == "file"] = format_bytes(line.bytes)
        table.add_row(line.what, *cells)
    return table


def _passes(found: Answer) -> Table:
    table = column_table(
        "work of a pass", ("pass",), ("rows", "Gop", "moved", "ops/byte", "experts touched")
    )
    for item in found.passes:
        touched = found.experts_touched(item)
        table.add_row(
            item.name,
            f"{item.rows:,}",
            f"{item.operations / 1e9:,.1f}",
            format_bytes(item.bytes),
            f"{item.intensity:,.1f}",
            "-" if touched is None else f"{touched:,.1f} of {found.shape.num_experts}",
        )
        for kind, (operations, moved) in item.of_kind().items():
            if item is found.passes[0] and (operations or moved):
                table.add_row(
                    f"  {kind or 'embedding'}",
                    "",
                    f"{operations / 1e9:,.1f}",
                    format_bytes(moved),
                    f"{operations / moved:,.1f}" if moved else "-",
                    "",
                    style="dim",
                )
    return table


def _verdicts(found: Answer) -> Table:
    table = column_table("does it fit", ("device", "verdict", "why"))
    for entry in found.on_devices:
        verdict = entry.budget.verdict or "unknown"
        colour = VERDICT_STYLE.get(verdict, "dim")
        table.add_row(entry.device.name, f"[{colour}]{verdict}[/{colour}]", entry.budget.reason)
    return table


def _speeds(found: Answer) -> Table:
    diffusion = not found.shape.style.step_is_token
    numbers = ["ridge", "step ms" if diffusion else "token ms", "bound by"]
    numbers += ["twin's token ms"] if diffusion else []
    table = column_table(
        "how fast, at best (expected where the device was measured)",
        ("device",),
        [*numbers, "roofline", "tokens/s"],
    )
    for entry in found.on_devices:
        table.add_row(entry.device.name, *_speed_cells(entry, diffusion))
    return table


def _speed_cells(entry: OnDevice, diffusion: bool) -> list[str]:
    ridge = number(entry.ridge, digits=0)
    if entry.step is None:
        return [ridge] + ["-"] * (5 if diffusion else 4)
    cells = [ridge, _ms(entry.step.ms), entry.step.bound]
    if diffusion:
        cells.append("-" if entry.break_even is None else _ms(entry.break_even.token.ms))
    share = None if entry.step.share is None else 100 * entry.step.share
    return [*cells, number(share, "%", 0), number(entry.tokens_per_s)]


def _break_even(found: Answer) -> list[Table]:
    first = found.on_devices[0].break_even
    assert first is not None
    lengths = [str(point.length) for point in first.points]
    known = found.acceptance is not None
    needed = column_table(
        "tokens per forward from which diffusion is faster, by canvas length (-: never)",
        ("device",),
        [*lengths, *(("best", "tokens/s", "twin") if known else ())],
    )
    claims = column_table(
        found.claim_title, ("device",), ("diffusion s", "twin s", "ratio", "faster")
    )
    for entry in found.on_devices:
        if entry.break_even is None or entry.claim is None:
            continue
        cells = [number(point.needed) for point in entry.break_even.points]
        if known and entry.break_even.best is not None:
            best = entry.break_even.best
            rates = (best.tokens_per_s or 0, entry.break_even.twin_tokens_per_s)
            cells += [str(best.length), *map(number, rates)]
        needed.add_row(entry.device.name, *cells)
        claim = entry.claim
        claims.add_row(
            entry.device.name,
            number(claim.diffusion_ms / 1000),
            number(claim.twin_ms / 1000),
            f"{claim.twin_ms / claim.diffusion_ms:.2f}",
            "[green]diffusion[/green]" if claim.holds else "[red]twin[/red]",
        )
    return [needed, claims]


def _ms(value: float) -> str:
    return number(value, digits=0 if value >= 100 else 1)


def _count(value: int) -> str:
    for unit, divisor in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= divisor:
            return f"{value / divisor:.2f} {unit}"
    return str(value)
