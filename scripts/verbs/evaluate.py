"""The verb `evaluate`: exact match and loss of bundles and checkpoints on held-out puzzles."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scripts.bundles import memory_options, open_eager
from scripts.console import column_table, number, out_console, print_json, reporting
from scripts.options import AsJson, MemoryBudget, PackedWeights, Puzzles, Seed, Threads

if TYPE_CHECKING:
    from export.host.streaming.mapped_weights import MemoryOptions


def evaluate(
    subjects: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", help="Bundles and checkpoint folders, in any mixture."),
    ],
    puzzles: Annotated[int, Puzzles] = 50,
    seed: Seed = 0,
    threads: Threads = None,
    memory_budget: MemoryBudget = None,
    packed_weights: PackedWeights = None,
    as_json: AsJson = False,
) -> None:
    """Measure exact match and denoising loss on held-out puzzles, the same for every model.

    A checkpoint folder is run by PyTorch as it is (fp32 or int4), a bundle by ExecuTorch.
    """
    from export.host.evaluation import evaluate as measure
    from export.host.puzzles import held_out

    memory = memory_options(memory_budget, packed_weights)
    tasks = held_out(puzzles, seed)
    document: list[dict[str, Any]] = []
    for subject in subjects:
        with reporting(f"evaluating {subject}") as progress:
            engine = None  # one at a time has its weights mapped
            kind, engine, tokenizer = _open_subject(subject, threads, memory)
            tallies = measure(engine, tokenizer, tasks, seed=seed, progress=progress)
        rows = [
            asdict(tally) | {"exact_match": tally.exact_match, "interval_95": list(tally.interval)}
            for tally in tallies
        ]
        document.append({"model": str(subject), "run_as": kind, "results": rows})
    if as_json:
        print_json({"puzzles_per_kind": puzzles, "seed": seed, "models": document})
        return
    table = column_table(
        f"{puzzles} held-out puzzles of each kind",
        ("model", "puzzle"),
        ("exact", "95 % interval", "nats/token", "steps"),
    )
    for entry in document:
        name = f"{Path(entry['model']).name}, {entry['run_as']}"
        for row in entry["results"]:
            low, high = row["interval_95"]
            table.add_row(
                name if row is entry["results"][0] else "",
                row["kind"],
                f"{100 * row['exact_match']:.1f} %",
                f"{100 * low:.1f}-{100 * high:.1f} %",
                number(row["loss"], digits=6),
                f"{row['mean_steps']:.2f}",
            )
    out_console().print(table)


def _open_subject(
    folder: Path, threads: int | None, memory: MemoryOptions | None
) -> tuple[str, Any, Any]:
    """How it is run, an engine and a tokenizer, for a bundle or a checkpoint folder."""
    from export.contract.bundle import open_bundle
    from export.contract.manifest import MANIFEST_FILE
    from export.host.tokenizer import open_tokenizer

    if (folder / MANIFEST_FILE).is_file():
        bundle = open_bundle(folder)
        from export.host.bundle_engine import open_engine

        kind = "fp32 bundle" if bundle.manifest.recipe is None else "int4 bundle"
        return kind, open_engine(bundle, threads, memory=memory), open_tokenizer(bundle)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return open_eager(folder)
