"""The break-even of a model on several devices, as a PNG or as one self-contained page."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from export.plan.answer import Answer
from quantize.errors import InputError


def draw(answer: Answer, target: Path) -> None:
    """Draw tokens per forward needed over canvas length, a line for each device.

    Raises InputError for a model that does not diffuse, and for a name that is neither PNG nor
    HTML.
    """
    if target.suffix not in (".png", ".html"):
        raise InputError(f"{target} is neither .png nor .html; give a name that is")
    if all(entry.break_even is None for entry in answer.on_devices):
        raise InputError(
            f"{answer.model} generates a token a step and has no break-even; leave out --plot"
        )
    image = _png(answer)
    if target.suffix == ".png":
        target.write_bytes(image)
        return
    title = f"Break-even of {answer.model}"
    data = base64.b64encode(image).decode("ascii")
    rows = "".join(_row(answer, index) for index in range(len(answer.on_devices)))
    target.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto}"
        "td,th{padding:.2em .8em;text-align:right}img{max-width:100%}</style>"
        f"<h1>{escape(title)}</h1><p>Recipe {escape(answer.recipe_name)}, context "
        f"{answer.layout.context:,}.</p><img alt='{escape(title)}' "
        f"src='data:image/png;base64,{data}'><table><tr><th>device<th>example: diffusion s"
        f"<th>twin s<th>faster</tr>{rows}</table></html>\n",
        encoding="utf-8",
    )


def _row(answer: Answer, index: int) -> str:
    entry = answer.on_devices[index]
    if entry.claim is None:
        return ""
    claim = entry.claim
    return (
        f"<tr><td>{escape(entry.device.title)}<td>{claim.diffusion_ms / 1000:.1f}"
        f"<td>{claim.twin_ms / 1000:.1f}<td>{'diffusion' if claim.holds else 'twin'}</tr>"
    )


def _png(answer: Answer) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    lengths: list[int] = []
    for entry in answer.on_devices:
        if entry.break_even is None:
            continue
        known = [point for point in entry.break_even.points if point.needed is not None]
        lengths = [point.length for point in entry.break_even.points]
        label = entry.device.title + ("" if entry.break_even.is_expected else " (best possible)")
        axes.plot(
            [point.length for point in known],
            [point.needed or 0.0 for point in known],
            marker="o",
            label=label,
        )
    axes.plot(lengths, lengths, color="black", linestyle=":", label="the whole canvas at once")
    if answer.acceptance is not None:
        accepted = [answer.acceptance.at(length) for length in lengths]
        axes.plot(lengths, accepted, color="black", linewidth=2, label="accepted")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="canvas length, tokens",
        ylabel="tokens per forward needed",
        title=f"{answer.model}: from where on diffusion is faster than its twin",
        xticks=lengths,
        xticklabels=[str(length) for length in lengths],
    )
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
