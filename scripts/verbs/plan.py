"""The verb `plan`: does a model fit a device, how fast can it be, and does diffusion pay there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from quantize.errors import InputError
from quantize.sizes import parse_bytes
from scripts.console import fact_table, out_console, print_json, reporting, say
from scripts.options import (
    DEFAULT_RECIPE,
    AsJson,
    Context,
    Local,
    Overwrite,
    RecipeName,
    Serial,
    Threads,
    Via,
    recipe_or_none,
)
from scripts.output_files import check_target

if TYPE_CHECKING:
    from export.plan.device import Device


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
            metavar="DEVICE",
            help="A device's name or its TOML file; may be repeated (default: all known ones).",
        ),
    ] = None,
    processor: Annotated[
        Literal["cpu", "npu"],
        typer.Option(help="Which of the device's processors; npu: where its peak is known."),
    ] = "cpu",
    recipe: RecipeName = DEFAULT_RECIPE,
    context: Context = None,
    memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="What the app can have (512M, 6G; default: the device's share).",
        ),
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
    example_steps: Annotated[
        int, typer.Option(min=1, help="Denoising steps of the example for its tokens.")
    ] = 30,
    example_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the example.")] = 256,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the break-even as PNG, or as a page (.html)."),
    ] = None,
    measure: Annotated[
        Path | None,
        typer.Option(
            metavar="TOML",
            help="Measure a device (this machine, or --serial / --local) with --threads, and write "
            "its file.",
        ),
    ] = None,
    threads: Threads = None,
    serial: Serial = None,
    via: Via = "auto",
    local: Local = False,
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
    check_target(plot, overwrite)
    from export.plan.answer import answer
    from export.plan.break_even import Acceptance

    points = dict(map(_accepted, acceptance or ()))
    if results is not None:
        points |= _measured_acceptance(results)
    if 0 in points:
        points[_canvas_of(model)] = points.pop(0)
    found = answer(
        model,
        recipe=recipe_or_none(recipe),
        devices=devices,
        context=context,
        available_bytes=memory,
        acceptance=Acceptance(points) if points else None,
        steps=example_steps,
        tokens=example_tokens,
        npu=processor == "npu",
    )
    if plot is not None:
        from export.plan.plot import draw

        draw(found, plot)
        say(f"wrote {plot}", on_stderr=True)
    if as_json:
        print_json(found.to_json())
        return
    from scripts.views.plan import print_answer

    print_answer(found)


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
    from export.families import describe
    from export.plan.presets import model_files

    return describe(model_files(model)).shape.canvas_length


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
            "bench` without --natural-runs 0, or give --acceptance"
        )
    return {canvas: median(rates) for canvas, rates in found.items()}


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
        console.print(
            fact_table(
                _device_rows(entry, sources=True),
                f"{entry.name}: {entry.title}, {entry.price_class}",
            )
        )
        console.print()


def _measure(
    target: Path,
    serial: str | None,
    via: Literal["auto", "server", "direct"],
    local: bool,
    threads: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    if target.suffix != ".toml":
        raise InputError(f"{target} does not end in .toml; a device's file does")
    check_target(target, overwrite)
    from export.plan.device import write_device
    from scripts.device_measurement import measured_device

    with reporting("measuring") as reporter:
        device = measured_device(
            target.stem, serial=serial, via=via, local=local, threads=threads, say=reporter.line
        )
    write_device(target, device)
    say(f"wrote {target}", on_stderr=True)
    if as_json:
        print_json({"device": str(target)} | _device_document(device))
        return
    rates = [
        (
            f"{name} products",
            ", ".join(f"{rows:g} rows {gops:,.0f}" for rows, gops in rate.points) + " Gop/s",
        )
        for name, rate in device.rates.items()
    ]
    out_console().print(fact_table(_device_rows(device) + rates, device.title))


def _device_rows(device: Device, sources: bool = False) -> list[tuple[str, str]]:
    rows = [("processor", f"{device.processor}: {device.cores}")]
    for key, figure in device.figures.items():
        value = "unknown" if figure.value is None else f"{figure.value:g}"
        rows.append((key, f"{value} ({figure.source})" if sources else value))
    return rows


def _device_document(device: Device) -> dict[str, Any]:
    keys = ("title", "price_class", "processor", "cores", "measured")
    return {
        **{key: getattr(device, key) for key in keys},
        "figures": {key: asdict(figure) for key, figure in device.figures.items()},
        "rates": {
            key: [list(point) for point in rate.points] for key, rate in device.rates.items()
        },
    }
