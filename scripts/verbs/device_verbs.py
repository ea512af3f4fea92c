"""The verbs that work with a device: find it, bring bundles there, measure, report, clean up."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

# What a verb needs beyond this is imported inside of it: --help must not wait.
from quantize.errors import DeviceError, InputError, OutputError
from scripts.console import (
    AsJson,
    Overwrite,
    byte_count,
    err_console,
    fact_table,
    out_console,
    print_json,
    reporting,
    size,
)

if TYPE_CHECKING:
    from device_tests.adb.transport import Transport
    from device_tests.bench.deploy import Deployment
    from device_tests.results.records import Record
    from device_tests.results.report import Summary
    from export.contract.bundle import Bundle

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


def devices(as_json: AsJson = False) -> None:
    """List what answers adb, through the server or on USB."""
    from device_tests.adb.selection import list_devices

    found = list_devices(say=_tell)
    if as_json:
        print_json({"devices": [asdict(entry) for entry in found]})
        return
    console = out_console()
    if not found:
        console.print("no device answers adb; plug one in, switch USB debugging on, or use --local")
        return
    from rich.table import Table

    table = Table(box=None)
    for heading in ("serial", "state", "via", "model"):
        table.add_column(heading, overflow="fold")
    for entry in found:
        table.add_row(
            *(_inert(text) for text in (entry.serial, entry.state, entry.via, entry.model))
        )
    console.print(table)


def push(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle folder.")],
    serial: Serial = None,
    via: Via = "auto",
    local: Local = False,
    as_json: AsJson = False,
) -> None:
    """Bring a bundle to a device: only what is missing, verified there, whole or not at all."""
    bundle = _verified(folder)
    with _device(serial, via, local) as transport:
        memory = _tell_memory(transport, bundle)
        deployment = _deploy(transport, bundle)
    if as_json:
        print_json(
            {"device": transport.serial, "via": transport.kind, "memory": memory}
            | asdict(deployment)
        )
        return
    sent, speed = "nothing, all of it was there", ""
    if deployment.bytes_sent:
        rest = ", the rest was there" if deployment.bytes_present else ""
        sent = f"{size(deployment.bytes_sent)}{rest}"
        speed = f", {size(deployment.bytes_sent / max(deployment.seconds, 1e-3))}/s"
    out_console().print(
        fact_table(
            [
                ("device", f"{_inert(transport.serial)} ({transport.kind})"),
                ("bundle", deployment.bundle_id),
                ("folder", deployment.remote_folder),
                ("size", f"{size(deployment.bytes_total)} in {deployment.files} files"),
                ("sent", sent),
                ("time", f"{deployment.seconds:.1f} s{speed}, verified on the device"),
            ]
        )
    )  # fmt: skip


def clean(
    bundle: Annotated[
        str | None, typer.Option(metavar="ID", help="Only this bundle (default: everything).")
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

    with _device(serial, via, local) as transport:
        removed = remove(transport, bundle, force=force)
    if as_json:
        print_json({"device": transport.serial} | asdict(removed))
        return
    out_console().print(
        f"removed {_counted(removed.bundles, 'bundle')} and {_counted(removed.runs, 'run')}, "
        f"{size(removed.bytes)}, from "
        f"{_inert(transport.serial)}",
        soft_wrap=True,
    )


def bench(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle folder.")],
    results: Annotated[
        Path,
        typer.Option("--results", "-o", metavar="FILE", help="Where a line per run is appended."),
    ] = Path("results.jsonl"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out runs that FILE has already.")
    ] = False,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Text for the natural pass (default: random tokens)."),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Length of the random prompt (default: 32, or what fits).")
    ] = None,
    canvases: Annotated[
        int | None,
        typer.Option(help="Canvases to generate in a run (default: 1; other styles: 64 tokens)."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Denoising steps of a canvas in all passes but natural (default: 16)."),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(help="CPU threads; repeat it to measure several (default: the runtime's)."),
    ] = None,
    cold: Annotated[int, typer.Option(help="Runs that load from storage.")] = 1,
    speed: Annotated[int, typer.Option(help="Runs with a fixed number of steps.")] = 6,
    natural: Annotated[int, typer.Option(help="Runs that stop when the sampler is done.")] = 6,
    memory: Annotated[int, typer.Option(help="Runs during which memory is sampled.")] = 1,
    puzzles: Annotated[
        int | None,
        typer.Option(
            help="Held-out puzzles of each kind to be answered and graded, as `evaluate` does "
            "(default: none)."
        ),
    ] = None,
    puzzle_runs: Annotated[int, typer.Option(help="Runs over all of these puzzles.")] = 6,
    seed: Annotated[int, typer.Option(help="The same seed gives the same tokens.")] = 0,
    max_temperature: Annotated[
        float, typer.Option(metavar="C", help="A run begins when the hottest CPU sensor is below.")
    ] = 45.0,
    gate_timeout: Annotated[
        float, typer.Option(metavar="S", help="How long to wait for that; then the run failed.")
    ] = 300.0,
    hang: Annotated[
        float, typer.Option(metavar="S", help="A run without an event for so long is killed.")
    ] = 120.0,
    poll: Annotated[
        float, typer.Option(metavar="S", help="How often a run is looked at, sensors included.")
    ] = 1.0,
    memory_limit: Annotated[
        float | None,
        typer.Option(metavar="MIB", help="Address space that a run may take (default: any)."),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Most memory that a run may have resident (512M, 2G); weights that have no room "
            "are read in each pass (default: any).",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as one page with plots.")
    ] = None,
    overwrite: Overwrite = False,
    serial: Serial = None,
    via: Via = "auto",
    local: Local = False,
) -> None:
    """Deploy a bundle, run it again and again as the protocol says, and record every run.

    A table goes to stderr; the only line of stdout is the report as one compact JSON document.
    Exit code 2 if any run failed.
    """
    from device_tests.bench import measurement, workload
    from device_tests.bench.plan import BenchPlan
    from device_tests.bench.runner import choose_runner
    from device_tests.remote import conditions
    from device_tests.results import records
    from device_tests.results import report as reports
    from export.contract.bundle import open_bundle

    plan = BenchPlan(
        passes={"cold": cold, "warm_up": 1, "speed": speed, "natural": natural, "memory": memory}
        | ({} if puzzles is None else {"puzzles": puzzle_runs}),
        puzzles=puzzles,
        threads=tuple(threads) if threads else (None,),
        prompt_text=prompt,
        prompt_tokens=prompt_tokens,
        canvases=canvases,
        force_steps=steps,
        seed=seed,
        max_temperature_c=max_temperature,
        gate_timeout_s=gate_timeout,
        hang_s=hang,
        poll_s=poll,
        memory_limit_bytes=None if memory_limit is None else round(memory_limit * 2**20),
        memory_budget_bytes=None if memory_budget is None else byte_count(memory_budget),
    )
    _check_target(html, overwrite)
    if results.exists() and not resume and records.read(results):
        raise OutputError(
            f"{results} has runs already; give another --results, or --resume to go on with it"
        )
    # Refused before anything large is read, or a device looked for.
    workload.prepare(plan, open_bundle(folder, verify=False))
    bundle = _verified(folder)
    from scripts.bench_view import BenchView

    with _device(serial, via, local) as transport:
        runner = choose_runner(conditions.read_device(transport).android_sdk)
        _tell_memory(transport, bundle)
        deployment = _deploy(transport, bundle)
        with reporting("measuring") as reporter:
            outcome = measurement.bench(
                transport,
                bundle,
                deployment,
                runner,
                plan,
                results,
                resume=resume,
                on_event=BenchView(reporter).on_event,
            )
    found = records.read(results)
    summary = reports.summarize(found)
    console = err_console()
    console.print(reports.to_rich(summary))
    if html is not None:
        _write(html, reports.to_html(summary))
        console.print(f"wrote {html}", soft_wrap=True, markup=False)
    print_json({"results": str(results), "bench_id": outcome.bench_id} | reports.to_json(summary))
    if outcome.ended_early is not None:
        raise DeviceError(_inert(outcome.ended_early))
    if outcome.failed:
        raise DeviceError(
            f"{outcome.failed} of {len(outcome.records)} runs failed; the report says why, and "
            "--resume repeats them"
        )


def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="Results files of `bench`.")
    ],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one self-contained page with plots.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as Markdown.")
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Show what `plan` predicts of this model (preset, config.json or its folder) "
            "beside the measured, and the achieved share of the roofline.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="The device that it was measured on: a name or its TOML file."),
    ] = None,
    recipe: Annotated[str, typer.Option(help="The recipe of that model, or none.")] = "int4-g32",
    context: Annotated[
        int | None, typer.Option(min=2, help="Positions of its KV cache (default: as `export`).")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show what was measured, and every failure; as a table, Markdown, JSON, or a page."""
    from device_tests.results import records
    from device_tests.results import report as reports

    for target in (html, markdown):
        _check_target(target, overwrite)
    found = [record for path in results for record in records.read(path)]
    if not found:
        raise InputError(f"{', '.join(map(str, results))}: no runs in it; run `pocketdiff bench`")
    summary = reports.summarize(found)
    if plan is not None or device is not None:
        summary = _with_forecasts(summary, plan, device, recipe, context)
    if html is not None:
        with reporting("drawing"):
            _write(html, reports.to_html(summary))
    if markdown is not None:
        _write(markdown, reports.to_markdown(summary))
    if as_json:
        print_json(reports.to_json(summary))
        return
    console = out_console()
    console.print(reports.to_rich(summary))
    for target in (html, markdown):
        if target is not None:
            console.print(f"wrote {target}", soft_wrap=True, markup=False)


def _with_forecasts(
    summary: Summary, plan: str | None, device: str | None, recipe: str, context: int | None
) -> Summary:
    """The summary with what `plan` says of the model beside what was measured."""
    if plan is None or device is None:
        raise InputError("--plan and --device go together; give both, or neither")
    from device_tests.results.planned import with_forecasts
    from export.families import read_shape
    from export.plan.device import open_device
    from export.plan.presets import read_config
    from scripts.verbs.plan_verb import read_recipe

    shape = read_shape(read_config(plan)[1])
    return with_forecasts(summary, shape, read_recipe(recipe), open_device(device), context)


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
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the comparison as Markdown.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Set two results side by side: ratio of medians B/A and its interval; same conditions only."""
    from device_tests.results import compare as comparing
    from device_tests.results import records

    _check_target(markdown, overwrite)
    names = tuple(name.strip() for name in across.split(",") if name.strip())
    found = comparing.compare(
        _select(records.read(a), "--a", select_a), _select(records.read(b), "--b", select_b), names
    )
    if markdown is not None:
        _write(markdown, comparing.to_markdown(found))
    if as_json:
        print_json(comparing.to_json(found))
        return
    out_console().print(comparing.to_rich(found))


def _select(found: list[Record], option: str, text: str) -> list[Record]:
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


@contextmanager
def _device(serial: str | None, via: str, local: bool) -> Iterator[Transport]:
    """The chosen device, connected; a local one lives as long as the block."""
    from device_tests.adb.selection import open_device

    if local and serial is not None:
        raise InputError(f"--local and --serial {serial} were both given; choose one")
    if local and via == "server":
        raise InputError("--local speaks to its own device directly; leave out --via server")
    with _local_device() if local else nullcontext(serial) as chosen:
        transport = open_device(chosen, via="direct" if local else via, say=_tell)
        try:
            yield transport
        finally:
            transport.close()


@contextmanager
def _local_device() -> Iterator[str]:
    """The serial of the local device: the one that runs already, or one for the block."""
    from device_tests.local.device import LocalDevice, cache_folder, kept

    folder = cache_folder() / "device"
    running = kept(folder)
    if running is not None:
        yield running.serial
        return
    with reporting("starting the local device"):
        device = LocalDevice(folder).start()
    try:
        yield device.serial
    finally:
        device.stop()


def _tell(sentence: str) -> None:
    err_console().print(_inert(sentence), soft_wrap=True, markup=False)


def _tell_memory(transport: Transport, bundle: Bundle) -> dict[str, object] | None:
    """Warn before a run that cannot be expected to fit; its budget, None where it is not known."""
    from device_tests.bench.memory_budget import run_budget

    found = run_budget(transport, bundle)
    if found is not None and found.warning is not None:
        _tell(f"warning: {found.warning}")
    return None if found is None else found.to_json()


def _deploy(transport: Transport, bundle: Bundle) -> Deployment:
    from device_tests.bench import device_lock
    from device_tests.bench.deploy import deploy
    from device_tests.errors import DeviceBusy

    # A push would spoil what is being measured.
    if (found := device_lock.holder(transport)) is not None:
        raise DeviceBusy(
            f"the device {transport.serial} is taken by {found}; wait for its end, or choose "
            "another device"
        )
    with reporting("deploying") as progress:
        return deploy(transport, bundle, progress=progress)


def _verified(folder: Path) -> Bundle:
    from export.contract.bundle import open_bundle

    with reporting("verifying") as progress:
        return open_bundle(folder, progress=progress)


def _check_target(target: Path | None, overwrite: bool) -> None:
    """Refuse in the first second what could not be written in the end."""
    if target is None:
        return
    if target.exists() and not overwrite:
        raise OutputError(f"{target} is there already; give another name, or --overwrite")
    if not target.absolute().parent.is_dir():
        raise OutputError(f"{target.parent} is not a folder; make it, or give another name")


def _write(target: Path, text: str) -> None:
    """The whole file or none."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.absolute().parent, prefix=f".{target.name}.", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _inert(text: str) -> str:
    """What a device said, without anything that a terminal would obey."""
    from device_tests.results.plain_text import plain

    return plain(text)
