"""Bytes of a model under a recipe: in the checkpoint, in the bundle's programs, in memory.

Knows how the exporter stores weights (`export.heads`) and how XNNPACK packs them; knows no device.
`tests/export/plan/test_plan_bundles.py` holds it against real programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

from export.families.shapes import ModelShape
from export.families.weights import Part, Weight
from quantize.recipe import Recipe, Scheme

Where = Literal["packed", "mapped", "planned"]
"""packed: copied out of the file into memory of the backend (anonymous). mapped: read where it is
in the mapped file (file-backed, can be dropped and read again). planned: buffers of the program
(anonymous)."""

Arithmetic = Literal["fp32", "int8", "int4"]

HEAD_COLUMNS = 2048
"""Logits of a row in one chunk of the walking heads (`CHUNK_COLUMNS` there)."""

TILE = 16
"""XNNPACK pads the outputs of a packed product to its widest tile; 16 is that of its int4 kernels
for AVX-512, 8 elsewhere."""

KV_ALLOCATIONS = 2
"""How often the planned memory has each cache: the in-place write's result has a place of its own,
alive to the end of the program, though it is the cache itself and never touched otherwise. It is
allocated and zeroed all the same."""


@dataclass(frozen=True)
class Stored:
    """One tensor in one of the places it is stored in.

    Alike tensors of several layers are one. stage: the program that has it. what: the role it has
    there. weight: the name of the first. bytes: in memory; file_bytes: in the program.
    """

    stage: str
    what: str
    weight: str
    part: Part
    where: Where
    bytes: int
    file_bytes: int
    arithmetic: Arithmetic = "fp32"


@dataclass(frozen=True)
class Layout:
    """All that a bundle's programs store, and what they allocate beside it.

    context: positions of the KV cache. rows: of the largest call that is meant to be made.
    """

    shape: ModelShape
    recipe: Recipe | None
    context: int
    rows: int
    stored: tuple[Stored, ...]

    @property
    def file_bytes(self) -> int:
        """Of all programs together."""
        return sum(item.file_bytes for item in self.stored)

    @property
    def loading_bytes(self) -> int:
        """Of the head in its file, all mapped while its one delegate packs them: the peak of
        loading. A head with a delegate for each chunk has no such peak."""
        if not (self.shape.style.loads_head_whole or self.shape.truncation):
            return 0
        head = (item for item in self.stored if item.stage == "head" and item.where == "packed")
        return sum(item.file_bytes for item in head)

    def weight_bytes(self, where: Where) -> int:
        """In memory, of what is stored in one kind of place."""
        return sum(item.bytes for item in self.stored if item.where == where)

    def by_part(self) -> dict[Part, int]:
        """Bytes in memory of the weights of each part, wherever they are."""
        found: dict[Part, int] = {}
        for item in self.stored:
            found[item.part] = found.get(item.part, 0) + item.bytes
        return found

    @property
    def kv_bytes(self) -> int:
        """Of the caches of keys and values."""
        return self.shape.kv_bytes(self.context)

    @property
    def kv_planned_bytes(self) -> int:
        """What the memory planner allocates for them."""
        return KV_ALLOCATIONS * self.kv_bytes

    @property
    def activation_bytes(self) -> int:
        """Tensors between the delegates of the layers, at the most rows of a call."""
        shape = self.shape
        rows = shape.prefill_length(self.context)
        return int(4 * shape.style.live_rows * rows * shape.hidden_size)

    @property
    def head_bytes(self) -> int:
        """Buffers of the head: hidden states, block sums and maxima, or the logits it holds."""
        shape, style = self.shape, self.shape.style
        hidden = shape.prefill_length(self.context) * shape.hidden_size
        chosen = shape.canvas_length + style.head_rows_beyond_canvas
        if shape.truncation or not style.walks_vocabulary:
            return 4 * (hidden + style.held_logits * chosen * shape.vocabulary_size)
        sums = ceil(ceil(shape.vocabulary_size / HEAD_COLUMNS) / 16)
        tables = (2 * sums + 4) * chosen * HEAD_COLUMNS
        reread = 2 * 16 * chosen * shape.hidden_size  # rows of the table, in one byte each
        return 4 * (hidden + tables) + reread

    @property
    def workspace_bytes(self) -> int:
        """Activations inside of the delegates; XNNPACK has one workspace for all, as large as the
        largest needs: scores and their softmax, the inner tensors of an MLP, a chunk of logits."""
        shape, rows = self.shape, self.rows
        scores = max((2 * a.num_heads * rows * self.context for a in shape.attentions), default=0)
        mlps = (w for w in shape.weights if w.part == "mlp" and w.use == "product")
        widest = max((prod(w.shape[:-1]) for w in mlps), default=0)
        head = 4 * shape.canvas_length * HEAD_COLUMNS
        return 4 * max(scores, 3 * rows * max(widest, shape.hidden_size), head)

    @property
    def planned_bytes(self) -> int:
        """Buffers that the programs allocate when they are loaded."""
        return self.kv_planned_bytes + self.activation_bytes + self.head_bytes


def scheme_of(weight: Weight, recipe: Recipe | None, name: str | None = None) -> Scheme | None:
    """How a recipe quantizes a weight; None where it is kept in fp32.

    Raises RecipeError for rows that cannot be split into groups.
    """
    rule = None if recipe is None else recipe.rule_for(name or weight.name)
    if rule is None or not isinstance(rule.treatment, Scheme):
        return None
    return rule.treatment.for_shape(weight.name, weight.shape)


@dataclass(frozen=True)
class Group:
    """Weights that are alike but for the layer they are of: one of them, how it is quantized, and
    how many there are."""

    weight: Weight
    scheme: Scheme | None
    count: int


_GROUPS: dict[tuple[int, int], tuple[object, object, tuple[Group, ...]]] = {}
"""Of the shapes and recipes asked for last, by identity (both are held, so that it stays one)."""


def groups(shape: ModelShape, recipe: Recipe | None) -> tuple[Group, ...]:
    """A model's weights in groups, in the order of each group's first."""
    key = (id(shape.weights), id(recipe))
    if key not in _GROUPS:
        if len(_GROUPS) > 32:
            _GROUPS.clear()
        _GROUPS[key] = (shape.weights, recipe, tuple(_grouped(shape.weights, recipe)))
    return _GROUPS[key][2]


def _grouped(weights: tuple[Weight, ...], recipe: Recipe | None) -> Iterator[Group]:
    first: dict[tuple[object, ...], tuple[Weight, Scheme | None]] = {}
    counts: dict[tuple[object, ...], int] = {}
    for weight in weights:
        scheme = scheme_of(weight, recipe)
        alike = ".".join(part for part in weight.name.split(".") if not part.isdigit())
        key = (alike, weight.shape, weight.kind, weight.runs, scheme)
        first.setdefault(key, (weight, scheme))
        counts[key] = counts.get(key, 0) + 1
    for kind, (weight, scheme) in first.items():
        yield Group(weight, scheme, counts[kind])


def checkpoint_bytes(shape: ModelShape, recipe: Recipe | None) -> int:
    """Of the tensors of an int4 checkpoint: integers, scales, and what is kept, in bf16."""
    total = 0
    for group in groups(shape, recipe):
        weight, scheme = group.weight, group.scheme
        if scheme is None:
            total += 2 * weight.parameters * group.count
            continue
        rows, width = prod(weight.shape[:-1]), weight.shape[-1]
        scales = 1 if scheme.group_size is None else width // scheme.group_size
        scale = 2 if scheme.scale_dtype == "bfloat16" else 4
        total += rows * (width * scheme.bits // 8 + scales * scale) * group.count
    return total


def packed_bytes(rows: int, width: int, scheme: Scheme | None) -> tuple[int, int, Arithmetic]:
    """A product's weight `[rows, width]`: bytes packed in memory, in the file, and its arithmetic.

    Packed by XNNPACK (`xnn_pack_qs8_qc4w_gemm` and its like): for each output the integers, the
    scales of its groups (bf16) or its own (fp32), the sum of its row and its bias, fp32 each.
    """
    padded = ceil(rows / TILE) * TILE
    if scheme is None:
        return padded * (4 * width + 4), 4 * rows * width, "fp32"
    scales = 4 if scheme.group_size is None else 2 * (width // scheme.group_size)
    integers = width * scheme.bits // 8
    own = integers + scales
    return padded * (own + 8), rows * own, "int4" if scheme.bits == 4 else "int8"


def lookup_bytes(rows: int, width: int, scheme: Scheme | None) -> int:
    """A table `[rows, width]` to look rows up in: integers with fp32 scales, or fp32."""
    if scheme is None:
        return 4 * rows * width
    scales = 1 if scheme.group_size is None else width // scheme.group_size
    return rows * (width * scheme.bits // 8 + 4 * scales)


def lay_out(
    shape: ModelShape, recipe: Recipe | None, *, context: int, rows: int | None = None
) -> Layout:
    """What a bundle of this model stores and allocates.

    context: positions of the KV cache. rows: of the largest call that will be made; None: the
    largest that can be. Raises RecipeError for rows that cannot be split into groups.
    """
    largest = shape.prefill_length(context)
    rows = largest if rows is None else min(rows, largest)
    stored = (*_layers(shape, recipe), *_head(shape, recipe))
    return Layout(shape, recipe, context, rows, stored)


def _layers(shape: ModelShape, recipe: Recipe | None) -> Iterator[Stored]:
    for group in groups(shape, recipe):
        weight, count = group.weight, group.count
        if weight.name == shape.head_table and weight.use != "lookup":
            continue  # the head's program has it
        rows, width = prod(weight.shape[:-1]), weight.shape[-1]
        arithmetic: Arithmetic = "fp32"
        if weight.use == "lookup":
            what, size = "lookup", lookup_bytes(rows, width, group.scheme)
            file_size = size
        elif weight.use == "elementwise":
            what, size = "vector", 4 * weight.parameters
            file_size = size
        else:
            what = "product"
            size, file_size, arithmetic = packed_bytes(rows, width, group.scheme)
        where: Where = "mapped" if what == "lookup" else "packed"
        yield Stored(
            "layers", what, weight.name, weight.part, where, count * size, count * file_size,
            arithmetic,
        )  # fmt: skip


def largest_layer_bytes(shape: ModelShape, recipe: Recipe | None) -> int:
    """Packed weights of the layer with most of them."""
    sizes: dict[str, int] = {}
    for weight in shape.weights:
        parts = weight.name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None or weight.use not in ("product", "experts"):
            continue
        scheme = scheme_of(weight, recipe)
        size, _, _ = packed_bytes(prod(weight.shape[:-1]), weight.shape[-1], scheme)
        layer = ".".join(parts[: at + 1])
        sizes[layer] = sizes.get(layer, 0) + size
    return max(sizes.values(), default=0)


def _head(shape: ModelShape, recipe: Recipe | None) -> Iterator[Stored]:
    """The table of the vocabulary head, in the layouts that its program keeps of it."""
    table = shape.weight(shape.head_table)
    scheme = scheme_of(table, recipe)
    vocabulary, hidden = table.shape
    size, file_size, arithmetic = packed_bytes(vocabulary, hidden, scheme)
    yield Stored("head", "logits", table.name, "head", "packed", size, file_size, arithmetic)
    if shape.style.walks_vocabulary and not shape.truncation:
        size = lookup_bytes(vocabulary, hidden, scheme)
        yield Stored("head", "lookup", table.name, "head", "mapped", size, size)
    if shape.soft_embedding:
        chunks = ceil(vocabulary / HEAD_COLUMNS)
        columns = ceil(vocabulary / chunks)
        # Of a quantized table in int8 by output and chunk, whatever its own scheme.
        soft = None if scheme is None else Scheme(bits=8, group_size=None, scale_dtype="float32")
        size, file_size, arithmetic = packed_bytes(hidden, columns, soft)
        yield Stored(
            "head", "soft embedding", table.name, "head", "packed",
            chunks * size, chunks * file_size, arithmetic,
        )  # fmt: skip
