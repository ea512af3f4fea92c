"""HRM-Text: two stacks of layers that run in turns, several times in a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from export.contract.manifest import Call
from export.contract.styles import STYLES
from export.families.description import Description, Sizes, context_of
from export.families.fields import Section, model_type_of
from export.families.samplers import autoregressive_sampler, truncates
from export.families.shapes import Attention, Elementwise, ModelShape
from export.families.tokens import ModelFiles
from export.families.weights import Weight, linear
from quantize.errors import CheckpointError

EMBEDDING, HEAD, LOW_START = "model.embed_tokens.weight", "lm_head.weight", "model.z_L_init"
STYLE = STYLES["autoregressive"]

DEFAULT_CONTEXT = 512
"""Default maximum context: each run of a stack in a pass has a KV cache of its own, which at the
released sizes is 1.5 MiB a position."""
CAUSAL_PREFILL = 128
"""Most tokens in one call where the prompt is causal and can come in pieces."""

MAXIMUM_KV_BYTES = 16 * 2**30
"""No device that this project aims at has as much; a config that needs more is a mistake."""

StackName = Literal["low", "high"]
STACKS: dict[StackName, str] = {"low": "L_module", "high": "H_module"}
"""The checkpoint's names of the stacks."""


@dataclass(frozen=True)
class HrmTextConfig(Sizes):
    """The fields of `config.json` that shape the model; nothing is defaulted from a class.

    num_layers: transformer layers of one stack. high_cycles: turns of the high-level stack in a
    pass. low_cycles: turns of the low-level stack before each of them.
    """

    num_layers: int
    head_dim: int
    high_cycles: int
    low_cycles: int
    rotary_theta: float
    embedding_scale: float
    prefix_lm: bool
    tied_head: bool

    @classmethod
    def from_checkpoint_config(cls, config: Mapping[str, Any]) -> HrmTextConfig:
        """Read `config.json` as a dict.

        Raises:
            CheckpointError: another architecture, a missing field, or a variant that the released
                models do not use and this graph does not have.
        """
        model_type_of(config, ("hrm_text",))
        section = Section(config)
        section.only("hidden_act", "silu", default="silu")  # the released config.json leaves it out
        section.only("attention_bias", False, default=False)
        section.only("mlp_bias", False, default=False)
        head_dim = section.size("head_dim")
        if head_dim % 2:
            raise section.refusal("head_dim", "rotary embedding needs an even one")
        scale = section.get("embedding_scale")
        return cls(
            **cls.read(section),
            num_layers=_num_layers(section),
            head_dim=head_dim,
            high_cycles=section.size("H_cycles"),
            low_cycles=section.size("L_cycles"),
            rotary_theta=_rotary_theta(section),
            # As in the reference's config class.
            embedding_scale=1.0 / section.number("initializer_range")
            if scale is None
            else section.number("embedding_scale"),
            prefix_lm=section.flag("prefix_lm", default=True),
            tied_head=section.flag("tie_word_embeddings"),
        )

    @property
    def head_table(self) -> str:
        """The checkpoint's name of the vocabulary head's table."""
        return EMBEDDING if self.tied_head else HEAD

    def slots(self, stack: StackName) -> int:
        """How often a stack runs in a pass; each run has a KV cache of its own."""
        return self.high_cycles * (self.low_cycles if stack == "low" else 1)


def _num_layers(section: Section) -> int:
    """Layers of one stack.

    transformers writes them as `num_layers_per_stack` and makes `num_hidden_layers` the number of
    KV slots; a config that only has `num_hidden_layers` means those of one stack.
    """
    stated = section.size("num_hidden_layers")
    layers = section.layers("num_layers_per_stack", stated)
    expected = layers * section.size("H_cycles") * (section.size("L_cycles") + 1)
    if section.get("num_layers_per_stack") is not None and stated != expected:
        raise section.refusal(
            "num_hidden_layers",
            f"expected {expected}, the layers of all runs of the stacks by num_layers_per_stack, "
            "H_cycles and L_cycles",
        )
    return layers


def _rotary_theta(section: Section) -> float:
    rope = section.get("rope_parameters")
    if rope is None and section.get("rope_scaling") is None:
        return section.number("rope_theta")
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"config.json has rope_parameters = {rope!r} and rope_scaling = "
            f"{section.get('rope_scaling')!r}; expected rope_type 'default' with a rope_theta"
        )
    return section.section("rope_parameters").number("rope_theta")


def describe(files: ModelFiles, maximum_context: int | None) -> Description[HrmTextConfig]:
    """See `export.families.describe`."""
    config = HrmTextConfig.from_checkpoint_config(files.config)
    sampler = autoregressive_sampler(STYLE, files.generation_config)
    shape = ModelShape(
        family="hrm_text",
        style=STYLE,
        **config.of_shape(),
        default_context=context_of(
            maximum_context, default=DEFAULT_CONTEXT, largest=config.max_positions, least=1
        ),
        weights=tuple(_weights(config)),
        attentions=tuple(
            Attention(
                stack,
                config.num_heads,
                config.num_heads,
                config.head_dim,
                runs=config.slots(stack),
                copies_cache=True,
            )
            for stack in STACKS
            for _ in range(config.num_layers)
        ),
        elementwise=_elementwise(config),
        embedding=EMBEDDING,
        head_table=config.head_table,
        # A bidirectional prompt must come whole: its first token depends on its last.
        prefill_rows=0 if config.prefix_lm else CAUSAL_PREFILL,
        truncation=truncates(sampler),
    )
    if (kv_bytes := shape.kv_bytes(shape.default_context)) > MAXIMUM_KV_BYTES:
        raise CheckpointError(
            f"config.json and a maximum context of {shape.default_context} need a KV cache of "
            f"{kv_bytes} bytes, at most {MAXIMUM_KV_BYTES} are supported; give a shorter context"
        )
    return Description(
        config,
        shape,
        sampler,
        bidirectional_prompt=config.prefix_lm,
        schedule=stack_schedule(config),
    )


def stack_schedule(config: HrmTextConfig) -> tuple[Call, ...]:
    """The runs of a pass: per high-level cycle, the low stack `low_cycles` times, then the high.

    Slots count from 0 in each stack, because each owns the KV caches of its own runs.
    """
    calls = [Call("embed")]
    for cycle in range(config.high_cycles):
        first, is_last = cycle * config.low_cycles, cycle == config.high_cycles - 1
        calls += [Call("low", constants={"slot": first + i}) for i in range(config.low_cycles)]
        outputs = {"high": "hidden"} if is_last else {}
        calls.append(Call("high", outputs=outputs, constants={"slot": cycle}))
    return tuple(calls)


def _weights(config: HrmTextConfig) -> list[Weight]:
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_heads * config.head_dim
    found = [
        Weight(EMBEDDING, (config.vocabulary_size, hidden), "embedding", "lookup"),
        Weight(LOW_START, (hidden,), "other", "elementwise"),
    ]
    for stack, module in STACKS.items():
        runs = config.slots(stack)
        for i in range(config.num_layers):
            at = f"model.{module}.layers.{i}."
            found += linear(
                f"{at}attn.gqkv_proj", (4 * query, hidden), "attention", stack, runs=runs
            )
            found += linear(f"{at}attn.o_proj", (hidden, query), "attention", stack, runs=runs)
            found += linear(f"{at}mlp.gate_up_proj", (2 * inner, hidden), "mlp", stack, runs=runs)
            found += linear(f"{at}mlp.down_proj", (hidden, inner), "mlp", stack, runs=runs)
    if not config.tied_head:
        found.append(Weight(HEAD, (config.vocabulary_size, hidden), "head", "product"))
    return found


def _elementwise(config: HrmTextConfig) -> Elementwise:
    hidden, query = config.hidden_size, config.num_heads * config.head_dim
    # Two norms without weights and two residuals; silu; rotary of queries and keys, the gate,
    # slices and rearrangements of four parts.
    layer = hidden * (2 * 2 + 2) + 5 * config.intermediate_size + 22 * query
    one_run = config.num_layers * layer + 3 * hidden
    return Elementwise({stack: config.slots(stack) * one_run for stack in STACKS}, 45)
