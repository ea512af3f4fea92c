"""The verb `bench`: a bundle measured on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantize.errors import DeviceError, OutputError
from quantize.sizes import parse_bytes
from scripts.bundles import verified_bundle
from scripts.console import err_console, print_json, reporting
from scripts.device_access import check_memory, connected_device, deploy_bundle
from scripts.options import (
    BundleFolder,
    Html,
    Local,
    MemoryBudget,
    Overwrite,
    Seed,
    Serial,
    Via,
)
from scripts.output_files import check_target, write_report


def bench(
    folder: BundleFolder,
    results: Annotated[
        Path,
        typer.Option("--results", "-o", metavar="FILE", help="Where a line per run is appended."),
    ] = Path("results.jsonl"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out runs that FILE has already.")
    ] = False,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Text for the natural pass (default: random tokens).",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Length of the random prompt (default: 32, or what fits)."),
    ] = None,
    canvases: Annotated[
        int | None,
        typer.Option(help="Canvases to generate in a run (default: 1; other styles: 64 tokens)."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps of a canvas in all passes but natural (default: 16).",
        ),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(help="CPU threads; may be repeated (default: the fast cores)."),
    ] = None,
    cold_runs: Annotated[int, typer.Option(help="Runs that load from storage.")] = 1,
    speed_runs: Annotated[int, typer.Option(help="Runs with a fixed number of steps.")] = 6,
    natural_runs: Annotated[int, typer.Option(help="Runs that stop when the sampler is done.")] = 6,
    memory_runs: Annotated[int, typer.Option(help="Runs during which memory is sampled.")] = 1,
    puzzle_runs: Annotated[
        int, typer.Option(help="Runs over all puzzles, where there are any.")
    ] = 6,
    puzzles: Annotated[
        int | None,
        typer.Option(
            help="Held-out puzzles of each kind to answer and grade, as `evaluate` does "
            "(default: none).",
        ),
    ] = None,
    seed: Seed = 0,
    max_temperature: Annotated[
        float,
        typer.Option(metavar="CELSIUS", help="A run begins when the hottest CPU sensor is below."),
    ] = 45.0,
    gate_timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="How long to wait for that; then the run failed."),
    ] = 300.0,
    hang_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="A run without an event for so long is killed.")
    ] = 120.0,
    poll_interval: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="How often a run is looked at, sensors included."),
    ] = 1.0,
    memory_limit: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help="Address space that a run may take (512M, 2G; default: any).",
        ),
    ] = None,
    memory_budget: MemoryBudget = None,
    html: Html = None,
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
    from device_tests.results.plain_text import plain
    from device_tests.results.summary import summarize
    from export.contract.bundle import open_bundle

    passes = {
        "cold": cold_runs,
        "warm_up": 1,
        "speed": speed_runs,
        "natural": natural_runs,
        "memory": memory_runs,
    }
    plan = BenchPlan(
        passes=passes if puzzles is None else passes | {"puzzles": puzzle_runs},
        puzzles=puzzles,
        threads=tuple(threads) if threads else (None,),
        prompt_text=prompt,
        prompt_tokens=prompt_tokens,
        canvases=canvases,
        force_steps=steps,
        seed=seed,
        max_temperature_c=max_temperature,
        gate_timeout_s=gate_timeout,
        hang_s=hang_timeout,
        poll_s=poll_interval,
        memory_limit_bytes=memory_limit,
        memory_budget_bytes=memory_budget,
    )
    check_target(html, overwrite)
    if results.exists() and not resume and records.read(results):
        raise OutputError(
            f"{results} has runs already; give another --results, or --resume to go on with it"
        )
    # Refused before anything large is read, or a device looked for.
    workload.prepare(plan, open_bundle(folder, verify=False))
    bundle = verified_bundle(folder)
    from scripts.views.bench import BenchView

    with connected_device(serial, via, local) as transport:
        runner = choose_runner(conditions.read_device(transport).android_sdk)
        check_memory(transport, bundle)
        deployment = deploy_bundle(transport, bundle)
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
    summary = summarize(records.read(results))
    err_console().print(reports.to_rich(summary))
    if html is not None:
        write_report(html, reports.to_html(summary))
    print_json({"results": str(results), "bench_id": outcome.bench_id} | reports.to_json(summary))
    if outcome.ended_early is not None:
        raise DeviceError(plain(outcome.ended_early))
    if outcome.failed:
        raise DeviceError(
            f"{outcome.failed} of {len(outcome.records)} runs failed; the report says why, and "
            "--resume repeats them"
        )
