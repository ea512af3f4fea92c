"""What a bundle is, as a list of facts and a table of its stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.contract.styles import STYLES
from quantize.sizes import format_bytes
from scripts.console import column_table, fact_table, out_console, say

if TYPE_CHECKING:
    from export.contract.bundle import Bundle
    from export.contract.manifest import Manifest


def print_bundle(bundle: Bundle) -> None:
    """Print it on stdout."""
    console = out_console()
    console.print(fact_table(_facts(bundle), title=str(bundle.folder)))
    console.print()
    manifest = bundle.manifest
    table = column_table(
        "stages in order",
        ("stage", "program"),
        ("size", "delegates", "operators inside", "outside"),
    )
    for stage in manifest.stages:
        report = stage.delegation
        counts = ["-", "-", "-"]
        if report is not None:
            sides = (report.delegated, report.portable)
            counts = [str(report.delegates), *(str(sum(side.values())) for side in sides)]
        table.add_row(stage.name, stage.file, format_bytes(bundle.files[stage.file].bytes), *counts)
    console.print(table)
    console.print()
    for stage in manifest.stages:
        inputs, outputs = (
            ", ".join(f"{t.name} {t.dtype}{list(t.shape)}" for t in side)
            for side in (stage.inputs, stage.outputs)
        )
        say(f"{stage.name}: {inputs} -> {outputs}")
    for note in manifest.notes:
        say(f"note: {note}")


def _facts(bundle: Bundle) -> list[tuple[str, str]]:
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
    settings = ", ".join(f"{k} {v:g}" for k, v in manifest.sampler.settings.items())
    return [
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
        ("sampler", f"{manifest.sampler.name}: {settings}"),
        ("experts", manifest.experts.computation + (f" (a layer: {estimates})" * bool(estimates))),
        ("recipe", str(recipe)),
        ("backend", ", ".join(manifest.backends)),
        ("made with", ", ".join(f"{k} {v}" for k, v in manifest.versions.items())),
        ("size", f"{format_bytes(bundle.total_bytes)} in {len(bundle.files)} files, {verified}"),
    ]


def _style(manifest: Manifest) -> str:
    """How it generates, in a line."""
    decoding = manifest.decoding
    parts: list[str] = [manifest.style]
    style = STYLES[manifest.style]
    if not style.step_is_token:
        parts.append(f"canvas of {manifest.model.canvas_length} tokens")
    if decoding is not None and style.masks:
        parts.append(
            f"blocks of {decoding.block_length}" if decoding.block_length else "sees everything"
        )
    if decoding is not None and decoding.bidirectional_prompt:
        parts.append("prompt bidirectional")
    return ", ".join(parts)
