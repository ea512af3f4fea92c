"""The verb `generate`: one prompt answered by a bundle on this machine."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantize.errors import InputError
from quantize.sizes import format_bytes
from scripts.bundles import memory_options, verified_bundle
from scripts.console import err_console, fact_table, number, out_console, print_json, reporting
from scripts.options import (
    AsJson,
    BundleFolder,
    MemoryBudget,
    PackedWeights,
    Prompt,
    Seed,
    Threads,
)

if TYPE_CHECKING:
    from export.host.generation import GenerationResult

DEFAULT_NEW_TOKENS = 256
"""As in transformers; less where the context has no room for it."""

ENDS = {
    "eos": "the model ended its text",
    "length": "all canvases asked for are full",
    "cancelled": "cancelled",
}
RESULT_KEYS = (
    *("finish_reason", "prompt_tokens", "new_tokens", "prompt_ms", "encode_ms", "first_draft_ms"),
    *("first_commit_ms", "total_ms", "median_step_ms", "steps_per_canvas", "tokens_per_forward"),
    *("tokens_per_second", "peak_rss_bytes"),
)
"""Of a result, what the JSON document has as it is."""


def generate(
    folder: BundleFolder,
    prompt: Prompt,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most new tokens, rounded up to whole canvases (default: 256, or the room).",
        ),
    ] = None,
    seed: Seed = 0,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting of the bundle's sampler, as `inspect` lists them; may be repeated.",
        ),
    ] = None,
    threads: Threads = None,
    memory_budget: MemoryBudget = None,
    packed_weights: PackedWeights = None,
    live: Annotated[
        bool, typer.Option("--live/--no-live", help="Show the canvas while it is denoised.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt with a bundle, and show how the canvas is denoised."""
    wanted = dict(map(_setting, changes or ()))
    bundle = verified_bundle(folder)
    from export.host.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(bundle)
    tokens = tokenizer.encode_prompt(prompt)
    with reporting("loading the programs"):
        from export.host.bundle_engine import open_engine

        memory = memory_options(memory_budget, packed_weights)
        engine = open_engine(bundle, threads, memory=memory)
    session = engine.session()
    settings = engine.settings_with(wanted)
    if max_new_tokens is None:
        max_new_tokens = min(DEFAULT_NEW_TOKENS, session.room(len(tokens))) or 1

    from scripts.views.live_canvas import LiveCanvas, PlainSteps

    console = out_console()
    view: Any = nullcontext()
    if live and console.is_terminal and not as_json:
        padding = bundle.manifest.special_tokens.pad
        view = LiveCanvas(console, tokenizer.token_texts, padding)
    elif live:
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
        document = {
            "bundle": str(bundle.folder),
            "model": bundle.manifest.model.name,
            "text": text,
            "tokens": list(result.tokens),
            "seed": seed,
            "settings": asdict(settings),
            **{key: getattr(result, key) for key in RESULT_KEYS},
            "canvases": [asdict(canvas) for canvas in result.canvases],
        }
        print_json(document if weights is None else document | {"weights": weights})
        return
    console.print(text, style="bold", markup=False, soft_wrap=True)
    console.print()
    console.print(fact_table(_result_rows(result) + _weights_rows(weights, result)))


def _setting(text: str) -> tuple[str, float]:
    """Name and value of `NAME=VALUE`."""
    name, separator, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        what = f"the value {value!r}" if separator else "no value"
        raise InputError(f"--set {text} has {what}; give NAME=NUMBER") from None


def _result_rows(result: GenerationResult) -> list[tuple[str, str]]:
    counts = ", ".join(str(len(canvas.steps)) for canvas in result.canvases[:8])
    counts += ", …" * (len(result.canvases) > 8)
    return [
        ("prompt", f"{result.prompt_tokens} tokens, encoded in {result.prompt_ms:,.1f} ms"),
        ("time to first draft", number(result.first_draft_ms, "ms")),
        ("time to first committed text", number(result.first_commit_ms, "ms")),
        ("denoising step, median", number(result.median_step_ms, "ms", 2)),
        ("steps per canvas", f"{number(result.steps_per_canvas)} ({counts})"),
        ("new tokens", f"{result.new_tokens}: {ENDS[result.finish_reason]}"),
        ("tokens per forward", number(result.tokens_per_forward, "tokens", 2)),
        ("tokens per second", number(result.tokens_per_second, "tokens/s")),
        ("peak memory (RSS)", format_bytes(result.peak_rss_bytes)),
    ]


def _weights_rows(
    weights: dict[str, Any] | None, result: GenerationResult
) -> list[tuple[str, str]]:
    if weights is None:
        return []
    read = weights["storage_bytes"]
    per_token = None if read is None or not result.new_tokens else read / result.new_tokens
    return [
        ("memory budget", format_bytes(weights["budget_bytes"])),
        (
            "packed weights",
            f"{format_bytes(weights['kept_bytes'])} of {format_bytes(weights['weights_bytes'])} "
            f"kept, {format_bytes(weights['pass_bytes'])} read in a pass",
        ),
        (
            "read from storage per new token",
            "-" if per_token is None else format_bytes(per_token),
        ),
    ]
