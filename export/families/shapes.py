"""A model as a list of weights and of attentions: what budget and roofline are computed from.

How a config.json becomes one is the business of `export.families`; bytes of
`export.plan.layout`, time of `export.plan.work`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from export.contract.styles import STYLES, Style
from export.families.expert_choice import ExpertChoice, choose_expert_computation
from export.families.weights import PARTS, Part, Weight


@dataclass(frozen=True)
class Attention:
    """The attention of one layer over a static cache of keys and values in fp32.

    kind: as of `Weight`. owns_cache: whether its layer has a cache of its own. runs: how often it
    runs in a pass, each with a cache of its own. copies_cache: whether a run copies its cache
    first. window: positions that a sliding layer sees, None for all.
    """

    kind: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    owns_cache: bool = True
    runs: int = 1
    copies_cache: bool = False
    window: int | None = None

    def kv_bytes(self, positions: int) -> int:
        """Bytes of its own caches for so many positions."""
        if not self.owns_cache:
            return 0
        return self.runs * 2 * self.num_kv_heads * self.head_dim * 4 * positions


@dataclass(frozen=True)
class Elementwise:
    """What a pass computes beside products, as fp32 values read and written by simple operators.

    per_row: values that one row takes through simple operators (norms, activations, residuals), by
    kind of layer. Counted from the graphs of `export.models`, an operator at a time.
    """

    per_row: dict[str, int] = field(default_factory=dict)
    operators: int = 0


@dataclass(frozen=True)
class ModelShape:
    """Everything of a config.json that bytes and time follow from.

    family: the name that a bundle has of it. canvas_length: positions denoised together; 1 for
    autoregressive models. block_length: positions that see each other, 0 for all, 1 for causal.
    default_context: positions of the KV cache that `export` takes, unless it was read for another
    number. prefill_rows: most rows of a call of the layers, 0 for as many as there is context.
    head_table: the name of the weight that is the vocabulary head's table (the embedding's where
    they are tied). soft_embedding: whether the head also multiplies probabilities by the table.
    truncation: whether top-p and top-k are in the head's graph. num_experts: in a layer, or 0.
    """

    family: str
    style: Style
    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    maximum_positions: int
    default_context: int
    weights: tuple[Weight, ...]
    attentions: tuple[Attention, ...]
    elementwise: Elementwise
    embedding: str
    head_table: str
    prefill_rows: int
    canvas_length: int = 1
    block_length: int = 1
    truncation: bool = False
    soft_cap: float | None = None
    soft_embedding: bool = False
    num_experts: int = 0
    top_k: int = 0
    expert_size: int = 0

    @property
    def num_layers(self) -> int:
        """Layers with weights of their own."""
        return len(self.attentions)

    @property
    def total_parameters(self) -> int:
        """All numbers of the text model, a tied table counted once."""
        return sum(weight.parameters for weight in self.weights)

    @property
    def active_parameters(self) -> int:
        """Numbers that one token goes through: of the experts only the chosen ones."""
        return sum(weight.active_parameters for weight in self.weights)

    def parameters_by_part(self) -> dict[Part, int]:
        """Numbers of each part that there is, in the order of PARTS."""
        found = {part: 0 for part in PARTS}
        for weight in self.weights:
            found[weight.part] += weight.parameters
        return {part: count for part, count in found.items() if count}

    def weight(self, name: str) -> Weight:
        """The weight of a name."""
        return next(weight for weight in self.weights if weight.name == name)

    def prefill_length(self, context: int) -> int:
        """Most rows of one call of the layers for a cache of `context` positions."""
        return min(context, self.prefill_rows or context)

    @property
    def step_rows(self) -> int:
        """Rows of the layers in a step: a block, or the canvas where all see each other."""
        return self.block_length or self.canvas_length

    def with_canvas(self, length: int) -> ModelShape:
        """The same layers with another canvas or block length."""
        block = length if self.block_length > 1 else self.block_length
        rows = length if self.style.has_fixed_rows else self.prefill_rows
        return replace(self, canvas_length=length, block_length=block, prefill_rows=rows)

    def twin(self) -> ModelShape:
        """The autoregressive model of the same layers: one row a step, no soft embedding."""
        return replace(
            self,
            style=STYLES["autoregressive"],
            canvas_length=1,
            block_length=1,
            soft_embedding=False,
            truncation=False,
        )

    def expert_choice(self) -> ExpertChoice:
        """How `export` computes the experts of a canvas, by estimate."""
        return choose_expert_computation(
            tokens=self.canvas_length,
            hidden_size=self.hidden_size,
            expert_size=self.expert_size,
            num_experts=self.num_experts,
            top_k=self.top_k,
        )

    def kv_bytes(self, positions: int) -> int:
        """Bytes of all caches of keys and values for so many positions."""
        return sum(attention.kv_bytes(positions) for attention in self.attentions)


def expected_distinct(choices: int, chosen: int, rows: int) -> float:
    """Expected number of distinct experts of `choices` that `rows` rows touch, `chosen` by each.

    Under uniform, independent routing: E (1 - (1 - k / E)^n). Real routers are less even, so this
    is an upper estimate; a canvas of 256 with 8 of 128 gives 127.99999.
    """
    if choices == 0:
        return 0.0
    return choices * (1.0 - (1.0 - chosen / choices) ** rows)
