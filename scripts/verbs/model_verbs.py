"""The verbs that make and run bundles on this machine, each a thin layer over its package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

# What a verb needs beyond this is imported inside of it: --help must not wait for torch.
from quantize.errors import InputError
from scripts.console import (
    AsJson,
    Overwrite,
    byte_count,
    err_console,
    fact_table,
    number,
    out_console,
    print_json,
    reporting,
    size,
)

if TYPE_CHECKING:
    from export.contract.bundle import Bundle, Manifest
    from export.host.generation import GenerationResult
    from export.host.streaming.mapped_weights import MemoryOptions
    from quantize.recipe import Recipe

MemoryBudget = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Most memory to be resident, the program's own included (512M, 2G): packed weights "
        "are mapped from a file, and what has no room is read in each pass.",
    ),
]
PackedWeightsFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Where packed weights lie between runs (default with a budget: the user's cache); "
        "without a budget, map them from there, which loads faster.",
    ),
]

DEFAULT_NEW_TOKENS = 256
"""As in transformers; less where the context has no room for it."""


def quantize(
    source: Annotated[Path, typer.Argument(help="Hugging Face checkpoint folder.")],
    destination: Annotated[Path, typer.Argument(help="New folder for the quantized checkpoint.")],
    recipe: Annotated[
        str, typer.Option(help="Name of a recipe (int4-g32, ...) or a recipe's JSON file.")
    ] = "int4-g32",
    algorithm: Annotated[
        Literal["minmax", "hqq"] | None,
        typer.Option(help="How a named recipe's 4-bit scales are found (default: minmax)."),
    ] = None,
    available: Annotated[
        bool,
        typer.Option(
            help="Quantize the shards that are there and keep the work for those to come; a shard "
            "that is done may be deleted."
        ),
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a checkpoint's weights, as a recipe says, into an int4 checkpoint.

    After an interruption the same command goes on with the weight at which it was.
    """
    chosen = _recipe(recipe, algorithm)
    from quantize.quantizer import quantize_available, quantize_checkpoint, read_report

    missing: tuple[str, ...] = ()
    with _resumable(destination), reporting("quantizing") as progress:
        options = {"progress": progress, "overwrite": overwrite}
        if available:
            missing = quantize_available(source, destination, chosen, **options)
        else:
            quantize_checkpoint(source, destination, chosen, **options)
    if missing:
        _print_missing(missing, source, destination, as_json)
        return
    report = read_report(destination)
    total, layers = report.total(), report.by_layer()
    if as_json:
        rows = [
            {
                "name": row.name,
                "scheme": row.scheme,
                "bytes_before": row.bytes_before,
                "bytes_after": row.bytes_after,
                "snr_db": row.snr_db,
            }
            for row in (*layers, total)
        ]
        print_json(
            {
                "destination": str(destination),
                "recipe": report.recipe_name,
                "layers": rows[:-1],
                "total": rows[-1],
                "notes": list(report.notes),
            }
        )
        return
    from rich.table import Table

    table = Table(title=f"recipe {report.recipe_name}", title_justify="left", box=None)
    table.add_column("layer", overflow="fold")
    table.add_column("scheme")
    # Names may break, numbers may not: a cut number is a wrong one.
    for heading, width in {"before": 9, "after": 9, "bits/weight": 11, "SNR": 7}.items():
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for row in (*layers, total):
        table.add_row(
            row.name.removeprefix("model."),
            row.scheme,
            size(row.bytes_before),
            size(row.bytes_after),
            f"{row.bits_per_weight:.2f}",
            number(row.snr_db, "dB"),
            style="bold" if row is total else None,
        )
    console = out_console()
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"wrote {destination}", soft_wrap=True)


def _print_missing(
    missing: tuple[str, ...], source: Path, destination: Path, as_json: bool
) -> None:
    if as_json:
        print_json({"destination": None, "missing": list(missing)})
        return
    out_console().print(
        f"quantized what is there; {len(missing)} shards are to come, the first {missing[0]}: "
        f"put them into {source} and give the same command, by which {destination} appears",
        soft_wrap=True,
    )


@contextmanager
def _resumable(destination: Path) -> Iterator[None]:
    """Say after an interruption what the same command would do."""
    from quantize.files.atomic_folder import unfinished_work

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if unfinished_work(destination):
            err_console().print(
                f"What is done of {destination} is kept; the same command goes on from there.",
                soft_wrap=True,
            )
        raise


def _recipe(name: str, algorithm: str | None) -> Recipe:
    from quantize.errors import RecipeError
    from quantize.recipe import preset, recipe_from_json

    path = Path(name)
    if path.suffix != ".json" and not path.is_file():
        return preset(name, scale_algorithm=algorithm or "minmax")
    if algorithm is not None:
        raise RecipeError(
            f"{name} is a recipe file, which names its own scale algorithms; leave out --algorithm"
        )
    try:
        return recipe_from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RecipeError(f"{name} is missing; give a recipe's name or its file") from None
    except ValueError as error:
        raise RecipeError(f"{name} is not valid JSON ({error}); correct it") from error


def export(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder, quantized or not.")],
    destination: Annotated[Path, typer.Argument(metavar="BUNDLE", help="New bundle folder.")],
    maximum_context: Annotated[
        int | None,
        typer.Option(min=1, help="Positions of the KV cache: prompt, answer, and a canvas."),
    ] = None,
    experts: Annotated[
        Literal["auto", "dense", "gather"],
        typer.Option(help="How a mixture of experts is computed; auto takes the cheaper one."),
    ] = "auto",
    truncation: Annotated[
        bool | None,
        typer.Option(
            help="Whether top_p and top_k can be set later; they cost time and memory at every "
            "step (default: only if the checkpoint's own settings use them).",
            show_default=False,
        ),
    ] = None,
    layers_per_stage: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cut the layers into programs of so many: lowered once for each form they have, "
            "and run in less memory than the model (default: one program).",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="What the programs are lowered to.")] = "xnnpack",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Lower a checkpoint through ExecuTorch into a bundle, the folder that devices run.

    After an interruption the same command goes on with the program at which it was.
    """
    from export.exporter import export_bundle

    options: dict[str, Any] = {"experts": experts, "backend": backend, "overwrite": overwrite}
    if maximum_context is not None:
        options["maximum_context"] = maximum_context
    if truncation is not None:
        options["truncation"] = truncation
    if layers_per_stage is not None:
        options["layers_per_stage"] = layers_per_stage
    with _resumable(destination), reporting("exporting") as progress:
        bundle = export_bundle(source, destination, progress=progress, **options)
    if as_json:
        print_json({"bundle": str(destination), "manifest": bundle.to_json()})
    else:
        _print_bundle(bundle)


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle folder.")],
    as_json: AsJson = False,
) -> None:
    """Verify a bundle and say what is in it."""
    bundle = _open_bundle(folder)
    if as_json:
        print_json(
            {"bundle": str(folder), "verified": bundle.verified, "manifest": bundle.to_json()}
        )
    else:
        _print_bundle(bundle)


def _open_bundle(folder: Path) -> Bundle:
    from export.contract.bundle import open_bundle

    with reporting("verifying") as progress:
        return open_bundle(folder, progress=progress)


def _style(manifest: Manifest) -> str:
    """How it generates, in a line."""
    decoding = manifest.decoding
    parts = [manifest.style]
    if manifest.style != "autoregressive":
        parts.append(f"canvas of {manifest.model.canvas_length} tokens")
    if decoding is not None and manifest.style == "masked_diffusion":
        parts.append(
            f"blocks of {decoding.block_length}" if decoding.block_length else "sees everything"
        )
    if decoding is not None and decoding.bidirectional_prompt:
        parts.append("prompt bidirectional")
    return ", ".join(parts)


def _print_bundle(bundle: Bundle) -> None:
    from rich.table import Table

    manifest = bundle.manifest
    model, special, tokenizer = manifest.model, manifest.special_tokens, manifest.tokenizer
    recipe = "none (not quantized)"
    if manifest.recipe is not None:
        recipe = manifest.recipe.get("recipe", manifest.recipe).get("name", "without a name")
    estimates = ", ".join(
        f"{name} {value:.2f} ms" for name, value in manifest.experts.estimated_ms_per_layer.items()
    )
    template = "" if tokenizer is None or tokenizer.chat_template is None else ", chat template"
    verified = "every file's SHA-256 verified" if bundle.verified else "sizes checked"
    console = out_console()
    rows = [
        ("model", f"{model.name} ({model.family})"),
        ("style", _style(manifest)),
        ("context", f"{model.maximum_context} tokens, canvas included"),
        ("vocabulary", f"{model.vocabulary_size:,} tokens, hidden size {model.hidden_size:,}"),
        (
            "special tokens",
            f"end {', '.join(map(str, special.eos)) or '-'}, padding {special.pad}, "
            f"begin {special.bos}",
        ),
        ("tokenizer", "none" if tokenizer is None else tokenizer.file + template),
        (
            "sampler",
            f"{manifest.sampler.name}: "
            + ", ".join(f"{k} {v:g}" for k, v in manifest.sampler.settings.items()),
        ),
        ("experts", manifest.experts.computation + (f" (a layer: {estimates})" * bool(estimates))),
        ("recipe", str(recipe)),
        ("backend", manifest.backend),
        ("made with", ", ".join(f"{k} {v}" for k, v in manifest.versions.items())),
        ("size", f"{size(bundle.total_bytes)} in {len(bundle.files)} files, {verified}"),
    ]
    console.print(fact_table(rows, title=str(bundle.folder)))
    console.print()
    stages = Table(title="stages in order", title_justify="left", box=None)
    for heading in ("stage", "program"):
        stages.add_column(heading, no_wrap=True)
    for heading in ("size", "delegates", "operators in them", "operators outside"):
        stages.add_column(heading, justify="right")
    for stage in manifest.stages:
        report = manifest.delegation.get(stage.name)
        counts = ("-", "-", "-")
        if report is not None:
            operators = (report.delegated, report.portable)
            counts = (str(report.delegates), *(str(sum(side.values())) for side in operators))
        stages.add_row(stage.name, stage.file, size(bundle.files[stage.file].bytes), *counts)
    console.print(stages)
    console.print()
    for stage in manifest.stages:
        shapes = [
            ", ".join(f"{t.name} {t.dtype}{list(t.shape)}" for t in side)
            for side in (stage.inputs, stage.outputs)
        ]
        console.print(f"{stage.name}: {shapes[0]} -> {shapes[1]}", markup=False, soft_wrap=True)
    for note in manifest.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def generate(
    folder: Annotated[Path, typer.Option("--bundle", "-b", help="Bundle folder.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the user says.")],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most new tokens, rounded up to whole canvases (default: 256, or the room)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the bundle's sampler, as `inspect` lists them; may be repeated.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads (default: the fast cores).")
    ] = None,
    memory_budget: MemoryBudget = None,
    packed_weights: PackedWeightsFolder = None,
    live: Annotated[
        bool, typer.Option("--live/--no-live", help="Show the canvas while it is denoised.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt with a bundle, and show how the canvas is denoised."""
    wanted = dict(map(_setting, changes or ()))
    budget_bytes = None if memory_budget is None else byte_count(memory_budget)
    bundle = _open_bundle(folder)
    from export.host.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(bundle)
    tokens = tokenizer.encode_prompt(prompt)
    with reporting("loading the programs"):
        from export.host.bundle_engine import open_engine

        memory = _memory_options(budget_bytes, packed_weights)
        engine = open_engine(bundle, threads, memory=memory)
    session = engine.session()
    settings = engine.settings_with(wanted)
    if max_new_tokens is None:
        max_new_tokens = min(DEFAULT_NEW_TOKENS, session.room(len(tokens))) or 1

    from scripts.live_canvas import LiveCanvas, PlainSteps

    console = out_console()
    if not live:
        view: Any = nullcontext()
    elif console.is_terminal and not as_json:
        padding = bundle.manifest.special_tokens.pad
        view = LiveCanvas(console, tokenizer.token_texts, padding)
    else:
        view = PlainSteps(err_console())
    mapped = engine.weights
    before = None if mapped is None else mapped.report()
    with view:
        result = session.generate(
            tokens,
            max_new_tokens,
            seed,
            settings=settings,
            on_event=view.on_event if live else None,
        )
    text = tokenizer.decode(result.answer_tokens)
    weights = None if mapped is None else mapped.report(since=before)
    if as_json:
        document = _generation_document(bundle, text, seed, settings, result)
        print_json(document if weights is None else document | {"weights": weights})
        return
    console.print(text, style="bold", markup=False, soft_wrap=True)
    console.print()
    console.print(_generation_table(result, weights))


def _memory_options(budget_bytes: int | None, folder: Path | None) -> MemoryOptions | None:
    from export.host.streaming.mapped_weights import MemoryOptions

    if budget_bytes is None and folder is None:
        return None
    return MemoryOptions(budget_bytes, folder)


def _setting(text: str) -> tuple[str, float]:
    """Name and value of `NAME=VALUE`."""
    name, separator, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        what = f"the value {value!r}" if separator else "no value"
        raise InputError(f"--set {text} has {what}; give NAME=NUMBER") from None


def _generation_document(
    bundle: Bundle, text: str, seed: int, settings: Any, result: GenerationResult
) -> dict[str, Any]:
    return {
        "bundle": str(bundle.folder),
        "model": bundle.manifest.model.name,
        "text": text,
        "tokens": list(result.tokens),
        "finish_reason": result.finish_reason,
        "seed": seed,
        "settings": asdict(settings),
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "prompt_ms": result.prompt_ms,
        "encode_ms": result.encode_ms,
        "first_draft_ms": result.first_draft_ms,
        "first_commit_ms": result.first_commit_ms,
        "total_ms": result.total_ms,
        "median_step_ms": result.median_step_ms,
        "steps_per_canvas": result.steps_per_canvas,
        "tokens_per_forward": result.tokens_per_forward,
        "tokens_per_second": result.tokens_per_second,
        "peak_rss_bytes": result.peak_rss_bytes,
        "canvases": [asdict(canvas) for canvas in result.canvases],
    }


def _generation_table(result: GenerationResult, weights: dict[str, Any] | None) -> Any:
    counts = ", ".join(str(len(canvas.steps)) for canvas in result.canvases[:8])
    counts += ", …" * (len(result.canvases) > 8)
    ends = {
        "eos": "the model ended its text",
        "length": "all canvases asked for are full",
        "cancelled": "cancelled",
    }
    return fact_table(
        [
            ("prompt", f"{result.prompt_tokens} tokens, encoded in {result.prompt_ms:,.1f} ms"),
            ("time to first draft", number(result.first_draft_ms, "ms")),
            ("time to first committed text", number(result.first_commit_ms, "ms")),
            ("denoising step, median", number(result.median_step_ms, "ms", 2)),
            ("steps per canvas", f"{number(result.steps_per_canvas, '')} ({counts})"),
            ("new tokens", f"{result.new_tokens}: {ends[result.finish_reason]}"),
            ("tokens per forward", number(result.tokens_per_forward, "tokens", 2)),
            ("tokens per second", number(result.tokens_per_second, "tokens/s")),
            ("peak memory (RSS)", size(result.peak_rss_bytes)),
            *([] if weights is None else _weights_rows(weights, result)),
        ]
    )


def _weights_rows(weights: dict[str, Any], result: GenerationResult) -> list[tuple[str, str]]:
    read = weights["storage_bytes"]
    per_token = None if read is None or not result.new_tokens else read / result.new_tokens
    return [
        ("memory budget", size(weights["budget_bytes"])),
        (
            "packed weights",
            f"{size(weights['kept_bytes'])} of {size(weights['weights_bytes'])} kept, "
            f"{size(weights['pass_bytes'])} read in a pass",
        ),
        ("read from storage per new token", "-" if per_token is None else size(per_token)),
    ]


def evaluate(
    subjects: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL...", help="Bundles and checkpoint folders, in any mixture."),
    ],
    puzzles: Annotated[int, typer.Option(min=1, help="Held-out puzzles of each kind.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Chooses puzzles and random numbers.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: all).")] = None,
    memory_budget: MemoryBudget = None,
    packed_weights: PackedWeightsFolder = None,
    as_json: AsJson = False,
) -> None:
    """Measure exact match and denoising loss on held-out puzzles, the same for every model.

    A checkpoint folder is run by PyTorch as it is (fp32 or int4), a bundle by ExecuTorch.
    """
    from export.host.evaluation import evaluate as measure
    from export.host.puzzles import held_out

    budget_bytes = None if memory_budget is None else byte_count(memory_budget)
    memory = _memory_options(budget_bytes, packed_weights)
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
    from rich.table import Table

    table = Table("model", "puzzle", title=f"{puzzles} held-out puzzles of each kind")
    for heading in ("exact", "95 % interval", "nats/token", "steps"):
        table.add_column(heading, justify="right")
    for entry in document:
        for row in entry["results"]:
            low, high = row["interval_95"]
            is_first = row is entry["results"][0]
            table.add_row(
                f"{Path(entry['model']).name}, {entry['run_as']}" if is_first else "",
                row["kind"],
                f"{100 * row['exact_match']:.1f} %",
                f"{100 * low:.1f}-{100 * high:.1f} %",
                "-" if row["loss"] is None else f"{row['loss']:.6f}",
                f"{row['mean_steps']:.2f}",
                end_section=row is entry["results"][-1],
            )
    out_console().print(table)


def _open_subject(
    folder: Path, threads: int | None, memory: MemoryOptions | None
) -> tuple[str, Any, Any]:
    """How it is run, an engine and a tokenizer, for a bundle or a checkpoint folder."""
    from export.contract.bundle import MANIFEST_FILE, open_bundle
    from export.host.tokenizer import TextTokenizer, open_tokenizer, tokenizer_files

    if (folder / MANIFEST_FILE).is_file():
        bundle = open_bundle(folder)
        from export.host.bundle_engine import open_engine

        kind = "fp32 bundle" if bundle.manifest.recipe is None else "int4 bundle"
        return kind, open_engine(bundle, threads, memory=memory), open_tokenizer(bundle)
    from export.models import stage_model
    from quantize.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder)
    files = tokenizer_files(folder)
    if files is None:
        raise InputError(f"{folder} has no tokenizer.json; put the model's there")
    import torch

    from export.host.eager import eager_engine

    if threads is not None:
        torch.set_num_threads(threads)
    staged = stage_model(checkpoint)
    tokenizer = TextTokenizer(
        files.file,
        staged.info.vocabulary_size,
        chat_template=files.chat_template,
        special_tokens=staged.special_tokens,
    )
    kind = "int4 eager" if checkpoint.is_quantized else "fp32 eager"
    return kind, eager_engine(staged), tokenizer
