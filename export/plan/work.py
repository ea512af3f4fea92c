"""What one pass of a model computes and moves: operations and bytes, a line for each kind of work.

The passes are those of the loops in `export`: a prefill chunk, a denoising step, a commit, a token.
Which processor does it in which time is `export.plan.roofline`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Literal

from export.families.shapes import ModelShape, expected_distinct
from export.families.weights import Part, Weight
from export.plan.layout import HEAD_COLUMNS, Arithmetic, Group, groups, packed_bytes, scheme_of
from quantize.recipe import Recipe, Scheme

Experts = Literal["routed", "dense", "gather"]
"""routed: only what the router chose, as a perfect kernel would. dense: every expert on every row.
gather: each expert on its own rows. The last two are what `export` builds."""


@dataclass(frozen=True)
class Work:
    """Some of what a pass does.

    part, kind: of the weights, as `Weight` has them. what: `product`, `scores` (attention),
    `simple` (elementwise), `softmax`, `copy`. arithmetic: in which the products are. rows: that a
    weight is multiplied by at once. operations: multiplications and additions. bytes: moved to and
    from memory at least. values: fp32 numbers that simple operators go through. calls: operators.
    """

    part: Part
    kind: str
    what: str
    arithmetic: Arithmetic
    rows: float
    operations: float
    bytes: float
    values: float = 0.0
    calls: float = 1.0


@dataclass(frozen=True)
class Pass:
    """One pass over the layers, with or without the head."""

    name: str
    rows: int
    work: tuple[Work, ...]

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        return sum(item.operations for item in self.work)

    @property
    def bytes(self) -> float:
        """Moved between memory and processor at least once."""
        return sum(item.bytes for item in self.work)

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes if self.bytes else 0.0

    def of_kind(self) -> dict[str, tuple[float, float]]:
        """(operations, bytes) by kind of layer, the head among them."""
        found: dict[str, tuple[float, float]] = {}
        for item in self.work:
            operations, moved = found.get(item.kind, (0.0, 0.0))
            found[item.kind] = (operations + item.operations, moved + item.bytes)
        return found


def step_pass(
    shape: ModelShape, recipe: Recipe | None, *, context: int, experts: Experts = "routed"
) -> Pass:
    """A denoising step of diffusion, or a token of an autoregressive model: layers and head."""
    rows = shape.step_rows
    work = (
        *_layers(shape, recipe, rows, context, experts, denoise=True),
        *_head(shape, recipe, shape.canvas_length),
    )
    return Pass(shape.style.step_name, rows, tuple(_merged(work)))


def layers_pass(
    shape: ModelShape,
    recipe: Recipe | None,
    *,
    rows: int,
    context: int,
    experts: Experts = "routed",
    name: str = "prefill",
) -> Pass:
    """A pass of the layers alone: a chunk of a prompt, or the commit of a canvas."""
    rows = shape.canvas_length if shape.style.has_fixed_rows else rows
    return Pass(
        name, rows, tuple(_merged(_layers(shape, recipe, rows, context, experts, denoise=False)))
    )


def chosen_experts(shape: ModelShape) -> Experts:
    """How `export` would compute this model's experts by its own estimate."""
    return shape.expert_choice().computation if shape.num_experts else "routed"


def _layers(
    shape: ModelShape,
    recipe: Recipe | None,
    rows: int,
    context: int,
    experts: Experts,
    *,
    denoise: bool,
) -> Iterator[Work]:
    for group in groups(shape, recipe):
        weight = group.weight
        if weight.name == shape.head_table and weight.use != "lookup":
            continue
        # The graph of DiffusionGemma multiplies by it in every pass; a perfect one in denoising.
        if weight.kind == "self_conditioning" and not denoise and experts == "routed":
            continue
        if weight.use == "lookup":
            width = weight.shape[-1]
            yield Work(
                weight.part, "", "simple", "fp32", rows, 0.0, rows * width * 2.0, rows * width
            )
        elif weight.use == "experts":
            yield from _expert_work(weight, group, rows, experts)
        elif weight.use == "product":
            yield _product(weight, group.scheme, rows, group.count)
    for a, count in Counter(shape.attentions).items():
        runs = float(a.runs * count)
        keys = 2.0 * a.num_kv_heads * a.head_dim * context * 4 * runs
        scores = a.num_heads * rows * context * runs
        yield Work(
            "attention", a.kind, "scores", "fp32", rows * a.num_heads // a.num_kv_heads,
            4.0 * scores * a.head_dim, keys, calls=2.0 * runs,
        )  # fmt: skip
        yield Work("attention", a.kind, "softmax", "fp32", rows, 0.0, 0.0, scores, 2.0 * runs)
        if a.copies_cache:
            yield Work("attention", a.kind, "copy", "fp32", rows, 0.0, 2.0 * keys, calls=2.0 * runs)
    for kind, values in shape.elementwise.per_row.items():
        yield Work("other", kind, "simple", "fp32", rows, 0.0, 0.0, float(values * rows))
    calls = sum(a.runs for a in shape.attentions) * shape.elementwise.operators
    yield Work("other", "", "simple", "fp32", rows, 0.0, 0.0, 0.0, float(calls))


def _product(weight: Weight, scheme: Scheme | None, rows: float, count: int = 1) -> Work:
    outputs, width = prod(weight.shape[:-1]), weight.shape[-1]
    size, _, arithmetic = packed_bytes(outputs, width, scheme)
    runs = float(weight.runs * count)
    return Work(
        weight.part, weight.kind, "product", arithmetic, rows,
        2.0 * rows * outputs * width * runs, size * runs, calls=runs,
    )  # fmt: skip


def _expert_work(weight: Weight, group: Group, rows: int, experts: Experts) -> Iterator[Work]:
    """One of the two stacked weights of a layer's experts, in all layers of a group."""
    experts_of_layer, outputs, width = weight.shape
    size, _, arithmetic = packed_bytes(outputs, width, group.scheme)
    if experts == "dense":
        touched, each = float(experts_of_layer), float(rows)
    else:
        touched = expected_distinct(experts_of_layer, weight.active, rows)
        each = rows * weight.active / touched
    touched *= group.count
    yield Work(
        weight.part, weight.kind, "product", arithmetic, each,
        2.0 * touched * each * outputs * width, touched * size, calls=touched,
    )  # fmt: skip
    if weight.name.endswith("down_proj"):
        # The tanh-GELU and its product on the inner values; weighting, summing, choosing rows.
        inner = touched * each * (9 * width + (3 if experts == "dense" else 6) * outputs)
        calls = experts_of_layer * group.count * (12.0 if experts == "gather" else 4.0)
        yield Work(weight.part, weight.kind, "simple", "fp32", each, 0.0, 0.0, inner, calls)


def _head(shape: ModelShape, recipe: Recipe | None, rows: int) -> Iterator[Work]:
    """Logits of `rows` positions, the sampler over them, and the soft embedding."""
    table = shape.weight(shape.head_table)
    scheme = scheme_of(table, recipe)
    product = replace(_product(table, scheme, rows), part="head", kind="head")
    vocabulary, hidden = table.shape
    chunks = ceil(vocabulary / HEAD_COLUMNS) if shape.style.walks_vocabulary else 1
    yield replace(product, calls=float(chunks))
    values = float(rows * vocabulary * shape.style.values_per_logit)
    if shape.truncation:
        values *= 8  # a search over the held logits for top-k and top-p, some dozens of passes
    yield Work("head", "head", "simple", "fp32", rows, 0.0, 0.0, values, 8.0 * chunks)
    if shape.soft_embedding:
        soft = None if scheme is None else Scheme(bits=8, group_size=None, scale_dtype="float32")
        columns = ceil(vocabulary / chunks)
        size, _, arithmetic = packed_bytes(hidden, columns, soft)
        yield Work(
            "head", "head", "product", arithmetic, rows,
            2.0 * rows * vocabulary * hidden, float(chunks * size), calls=float(chunks),
        )  # fmt: skip


def _merged(work: Iterable[Work]) -> list[Work]:
    """Lines of the same kind as one."""
    found: dict[tuple[object, ...], Work] = {}
    for item in work:
        key = (item.part, item.kind, item.what, item.arithmetic, item.rows)
        if key in found:
            before = found[key]
            item = replace(
                before,
                operations=before.operations + item.operations,
                bytes=before.bytes + item.bytes,
                values=before.values + item.values,
                calls=before.calls + item.calls,
            )
        found[key] = item
    return list(found.values())
