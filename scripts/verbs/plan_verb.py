"""The verb `plan`: does a model fit a device, how fast can it be, and does diffusion pay there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quantize.errors import InputError, OutputError
from scripts.console import (
    AsJson,
    Overwrite,
    err_console,
    fact_table,
    out_console,
    print_json,
    reporting,
    size,
)

if TYPE_CHECKING:
    from export.plan.answer import Answer, OnDevice
    from quantize.recipe import Recipe

VERDICT_STYLE = {
    "fits": "green", "tight": "yellow", "needs streaming": "magenta", "refuses": "red",
}  # fmt: skip


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint folder, a config.json, or a preset (--list names them).",
        ),
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            "-d",
            help="A device's name or its TOML file; may be repeated (default: all known ones).",
        ),
    ] = None,
    processor: Annotated[
        Literal["cpu", "npu"],
        typer.Option(help="Which of the device's processors; npu: where its peak is known."),
    ] = "cpu",
    recipe: Annotated[
        str,
        typer.Option(help="Name of a recipe (int4-g32, ...), a recipe's JSON file, or none."),
    ] = "int4-g32",
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Positions of the KV cache (default: what `export` takes)."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="What the app can have (default: the device's share)."),
    ] = None,
    acceptance: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[CANVAS=]TOKENS",
            help="Tokens accepted per forward, at a canvas length or the model's; may be repeated.",
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Take the acceptance from these results of `bench`."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the example: steps for its tokens.")] = 30,
    tokens: Annotated[int, typer.Option(min=2, help="Of the example: tokens.")] = 256,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the break-even as PNG, or as a page (.html)."),
    ] = None,
    measure: Annotated[
        Path | None,
        typer.Option(
            metavar="TOML",
            help="Measure a device (this machine, or --serial / --local) and write its file.",
        ),
    ] = None,
    serial: Annotated[
        str | None, typer.Option(help="Serial of the device to measure, as for adb -s.")
    ] = None,
    via: Annotated[
        str, typer.Option(help="How to reach that device: auto, direct or server.")
    ] = "auto",
    local: Annotated[
        bool, typer.Option("--local", help="Measure over adb, on a device on this machine.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads to measure with.")] = None,
    listed: Annotated[
        bool, typer.Option("--list", help="List the presets and the devices, with their sources.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Say from config.json alone whether a model fits, how fast it can be, and what pays.

    Per device: a memory budget with a verdict, the roofline of a denoising step and of a token, and
    the tokens per forward at which diffusion overtakes its autoregressive twin.
    """
    if listed:
        _list(as_json)
        return
    if measure is not None:
        _measure(measure, serial, via, local, threads, overwrite, as_json)
        return
    if model is None:
        raise InputError("no model was given; give a config.json, a preset, or --list")
    for target in (plot,):
        if target is not None and target.exists() and not overwrite:
            raise OutputError(f"{target} is there already; give another name, or --overwrite")
    from export.plan.answer import answer
    from export.plan.break_even import Acceptance

    points = dict(map(_accepted, acceptance or ()))
    if results is not None:
        points |= _measured_acceptance(results)
    if 0 in points:
        points[_canvas_of(model)] = points.pop(0)
    known = Acceptance(points) if points else None
    found = answer(
        model,
        recipe=read_recipe(recipe),
        devices=devices,
        context=context,
        available_bytes=None if memory is None else round(memory * 2**30),
        acceptance=known,
        steps=steps,
        tokens=tokens,
        npu=processor == "npu",
    )
    if plot is not None:
        from export.plan.plot import draw

        draw(found, plot)
    if as_json:
        print_json(found.to_json())
        return
    _print(found)
    if plot is not None:
        out_console().print(f"wrote {plot}", soft_wrap=True, markup=False)


def read_recipe(name: str) -> Recipe | None:
    """A recipe by name or file; None for `none`. Raises InputError or RecipeError."""
    if name == "none":
        return None
    import json

    from quantize.recipe import preset, recipe_from_json

    path = Path(name)
    if path.suffix != ".json":
        return preset(name)
    try:
        return recipe_from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f"{name} is missing; give a recipe's name or its file") from None
    except ValueError as error:
        raise InputError(f"{name} is not valid JSON ({error}); correct it") from error


def _accepted(text: str) -> tuple[int, float]:
    """`[CANVAS=]TOKENS`; a canvas of 0 is the model's own."""
    length, separator, value = text.rpartition("=")
    try:
        return int(length) if separator else 0, float(value)
    except ValueError:
        raise InputError(
            f"--acceptance {text} is not understood; give TOKENS or CANVAS=TOKENS"
        ) from None


def _canvas_of(model: str) -> int:
    from export.families import read_shape
    from export.plan.presets import read_config

    return read_shape(read_config(model)[1]).canvas_length


def _measured_acceptance(path: Path) -> dict[int, float]:
    """Median tokens per forward of the natural runs of a results file, by canvas length."""
    from statistics import median

    from device_tests.results import records

    found: dict[int, list[float]] = {}
    for record in records.read(path):
        rate = (record["metrics"] or {}).get("tokens_per_forward")
        canvases = (record["result"] or {}).get("canvases")
        if record["pass"] != "natural" or not rate or not canvases:
            continue
        length = len(canvases[0]["tokens"])
        if length > 1:
            found.setdefault(length, []).append(float(rate))
    if not found:
        raise InputError(
            f"{path} has no natural run of a diffusion model that ended well; run `pocketdiff "
            "bench` without --natural 0, or give --acceptance"
        )
    return {canvas: median(rates) for canvas, rates in found.items()}


# Tables


def _print(found: Answer) -> None:
    from rich.table import Table

    console = out_console()
    shape, layout = found.shape, found.layout
    parts = ", ".join(f"{part} {_count(n)}" for part, n in shape.parameters_by_part().items())
    active = ""
    if shape.active_parameters != shape.total_parameters:
        active = f", {_count(shape.active_parameters)} active"
    style = shape.style.replace("_", " ")
    canvas = "" if shape.canvas_length == 1 else f", canvas of {shape.canvas_length}"
    console.print(
        fact_table(
            [
                ("model", f"{found.model} ({shape.family}): {style}{canvas}"),
                ("parameters", f"{_count(shape.total_parameters)}{active}: {parts}"),
                ("recipe", found.recipe_name),
                ("int4 checkpoint", size(found.checkpoint_bytes)),
                ("bundle", size(layout.file_bytes)),
                ("context", f"{layout.context:,} positions"),
            ]
        )
    )
    console.print()
    table = Table(title="memory", title_justify="left", box=None)
    table.add_column("what", overflow="fold")
    table.add_column("anonymous", justify="right", no_wrap=True)
    table.add_column("file-backed", justify="right", no_wrap=True)
    for line in found.lines:
        cells = ["", ""]
        cells[line.kind == "file"] = size(line.bytes)
        table.add_row(line.what, *cells)
    console.print(table)
    console.print()
    _print_passes(found)
    _print_devices(found)
    if found.on_devices and found.on_devices[0].break_even is not None:
        _print_break_even(found)


def _print_passes(found: Answer) -> None:
    from rich.table import Table

    table = Table(title="work of a pass", title_justify="left", box=None)
    table.add_column("pass")
    for heading in ("rows", "Gop", "moved", "ops/byte", "experts touched"):
        table.add_column(heading, justify="right", no_wrap=True)
    for item in found.passes:
        touched = found.experts_touched(item)
        table.add_row(
            item.name,
            f"{item.rows:,}",
            f"{item.operations / 1e9:,.1f}",
            size(item.bytes),
            f"{item.intensity:,.1f}",
            "-" if touched is None else f"{touched:,.1f} of {found.shape.num_experts}",
        )
        if item is found.passes[0]:
            for kind, (operations, moved) in item.of_kind().items():
                if operations or moved:
                    table.add_row(
                        f"  {kind or 'embedding'}",
                        "",
                        f"{operations / 1e9:,.1f}",
                        size(moved),
                        f"{operations / moved:,.1f}" if moved else "-",
                        "",
                        style="dim",
                    )
    out_console().print(table)
    out_console().print()


def _print_devices(found: Answer) -> None:
    from rich.table import Table

    console = out_console()
    table = Table(title="does it fit", title_justify="left", box=None)
    table.add_column("device", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("why", overflow="fold")
    for entry in found.on_devices:
        verdict = entry.budget.verdict or "unknown"
        colour = VERDICT_STYLE.get(verdict, "dim")
        table.add_row(entry.device.name, f"[{colour}]{verdict}[/{colour}]", entry.budget.reason)
    console.print(table)
    console.print()
    diffusion = found.shape.style != "autoregressive"
    table = Table(
        title="how fast, at best (expected where the device was measured)",
        title_justify="left",
        box=None,
    )
    table.add_column("device", no_wrap=True)
    headings = ["ridge", "step ms" if diffusion else "token ms", "bound by"]
    headings += ["twin's token ms"] if diffusion else []
    headings += ["roofline", "tokens/s"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in found.on_devices:
        table.add_row(entry.device.name, *_time_cells(entry, diffusion))
    console.print(table)
    console.print()


def _time_cells(entry: OnDevice, diffusion: bool) -> list[str]:
    ridge = "-" if entry.ridge is None else f"{entry.ridge:,.0f}"
    if entry.step is None:
        return [ridge] + ["-"] * (5 if diffusion else 4)
    cells = [ridge, _ms(entry.step.ms), entry.step.bound]
    if diffusion:
        cells.append("-" if entry.break_even is None else _ms(entry.break_even.token.ms))
    cells.append("-" if entry.step.share is None else f"{100 * entry.step.share:.0f} %")
    rate = entry.tokens_per_s
    cells.append("-" if rate is None else f"{rate:,.1f}")
    return cells


def _print_break_even(found: Answer) -> None:
    from rich.table import Table

    console = out_console()
    first = found.on_devices[0].break_even
    assert first is not None
    table = Table(
        title="tokens per forward from which diffusion is faster, by canvas length (-: never)",
        title_justify="left",
        box=None,
    )
    table.add_column("device", no_wrap=True)
    for point in first.points:
        table.add_column(str(point.length), justify="right", no_wrap=True)
    if found.acceptance is not None:
        table.add_column("best", justify="right", no_wrap=True)
        table.add_column("tokens/s", justify="right", no_wrap=True)
        table.add_column("twin", justify="right", no_wrap=True)
    claims = Table(title=found.claim_title, title_justify="left", box=None)
    claims.add_column("device", no_wrap=True)
    for heading in ("diffusion s", "twin s", "ratio", "faster"):
        claims.add_column(heading, justify="right", no_wrap=True)
    for entry in found.on_devices:
        if entry.break_even is None or entry.claim is None:
            continue
        cells = ["-" if p.needed is None else f"{p.needed:,.1f}" for p in entry.break_even.points]
        if found.acceptance is not None and entry.break_even.best is not None:
            best = entry.break_even.best
            rate = entry.break_even.twin_tokens_per_s
            cells += [str(best.length), f"{best.tokens_per_s or 0:,.1f}", f"{rate:,.1f}"]
        table.add_row(entry.device.name, *cells)
        claim = entry.claim
        claims.add_row(
            entry.device.name,
            f"{claim.diffusion_ms / 1000:,.1f}",
            f"{claim.twin_ms / 1000:,.1f}",
            f"{claim.twin_ms / claim.diffusion_ms:.2f}",
            "[green]diffusion[/green]" if claim.holds else "[red]twin[/red]",
        )
    console.print(table)
    console.print()
    console.print(claims)


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"


def _count(number: int) -> str:
    for unit, divisor in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= divisor:
            return f"{number / divisor:.2f} {unit}"
    return str(number)


def _list(as_json: bool) -> None:
    from export.plan import device, presets

    devices = [device.open_device(name) for name in device.names()]
    if as_json:
        print_json(
            {
                "presets": {name: asdict(presets.source(name)) for name in presets.names()},
                "devices": {entry.name: _device_document(entry) for entry in devices},
            }
        )
        return
    console = out_console()
    console.print(
        fact_table([(name, presets.source(name).source) for name in presets.names()], "presets")
    )
    console.print()
    for entry in devices:
        rows = [("processor", f"{entry.processor}: {entry.cores}")]
        for key, figure in entry.figures.items():
            value = "unknown" if figure.value is None else f"{figure.value:g}"
            rows.append((key, f"{value} ({figure.source})"))
        console.print(fact_table(rows, f"{entry.name}: {entry.title}, {entry.price_class}"))
        console.print()


def _device_document(entry: Any) -> dict[str, Any]:
    return {
        "title": entry.title,
        "price_class": entry.price_class,
        "processor": entry.processor,
        "cores": entry.cores,
        "measured": entry.measured,
        "figures": {key: asdict(figure) for key, figure in entry.figures.items()},
        "rates": {key: [list(point) for point in rate.points] for key, rate in entry.rates.items()},
    }


# Measuring


def _measure(
    target: Path,
    serial: str | None,
    via: str,
    local: bool,
    threads: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    if target.suffix != ".toml":
        raise InputError(f"{target} does not end in .toml; a device's file does")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} is there already; give another name, or --overwrite")
    from export.plan.device import write_device
    from scripts.verbs.plan_measure import measured_device

    with reporting("measuring") as reporter:
        device = measured_device(
            target.stem, serial=serial, via=via, local=local, threads=threads, say=reporter.line
        )
    write_device(target, device)
    if as_json:
        print_json({"device": str(target)} | _device_document(device))
        return
    rows = [("processor", f"{device.processor}: {device.cores}")]
    rows += [
        (key, "unknown" if figure.value is None else f"{figure.value:g}")
        for key, figure in device.figures.items()
    ]
    rows += [
        (
            f"{name} products",
            ", ".join(f"{rows:g} rows {gops:,.0f}" for rows, gops in rate.points) + " Gop/s",
        )
        for name, rate in device.rates.items()
    ]
    out_console().print(fact_table(rows, device.title))
    err_console().print(f"wrote {target}", soft_wrap=True, markup=False)
