"""What the files of a checkpoint say of its model: the type that every family returns.

`export.plan` reads its shape, `export.models` builds graphs from its config; weights are not read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from export.contract.manifest import Call, Decoding, Sampler
from export.families.fields import Section
from export.families.shapes import ModelShape
from export.families.tokens import TokenNames
from quantize.errors import CheckpointError


@dataclass(frozen=True)
class Sizes:
    """What the config.json of every family states; the base of the families' own types."""

    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    norm_eps: float
    max_positions: int

    @staticmethod
    def read(section: Section) -> dict[str, Any]:
        """These fields, by transformers' keys."""
        return {
            "vocabulary_size": section.size("vocab_size"),
            "hidden_size": section.size("hidden_size"),
            "intermediate_size": section.size("intermediate_size"),
            "num_heads": section.size("num_attention_heads"),
            "norm_eps": section.number("rms_norm_eps"),
            "max_positions": section.size("max_position_embeddings"),
        }

    def of_shape(self) -> dict[str, Any]:
        """The fields of `ModelShape` that follow from them."""
        return {
            "vocabulary_size": self.vocabulary_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "maximum_positions": self.max_positions,
        }


Config = TypeVar("Config", bound=Sizes, covariant=True)


@dataclass(frozen=True)
class PlainFiles:
    """`ModelFiles` of a model without a folder, or of one whose weights are not needed."""

    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Description(Generic[Config]):
    """A model, all but its weights.

    config: of the family's own type; what its graphs are built from. sampler: with the defaults of
    all settings. shift, bidirectional_prompt, schedule: as in a bundle's manifest. notes: sentences
    for the user.
    """

    config: Config
    shape: ModelShape
    sampler: Sampler
    shift: int = 1
    bidirectional_prompt: bool = False
    schedule: tuple[Call, ...] = ()
    tokens: TokenNames = field(default_factory=TokenNames)
    notes: tuple[str, ...] = ()

    def decoding(self, mask_token: int | None) -> Decoding | None:
        """How a host uses the layers; None for a style whose passes are all of one length."""
        shape = self.shape
        if shape.style.has_fixed_rows:
            return None
        return Decoding(
            prefill_length=shape.prefill_length(shape.default_context),
            block_length=shape.block_length,
            shift=self.shift,
            mask_token=mask_token,
            bidirectional_prompt=self.bidirectional_prompt,
        )


def context_of(asked: int | None, *, default: int, largest: int, least: int, block: int = 1) -> int:
    """Positions of the KV cache: those asked for, or the default in whole blocks.

    least: what a canvas, or a prompt and an answer, take. Raises CheckpointError for a number that
    cannot be.
    """
    if asked is None:
        context = min(default, largest) // block * block
        if context < least:
            raise CheckpointError(
                f"config.json allows {largest} positions, fewer than one block of {least}; correct "
                "the block length or the number of positions"
            )
        return context
    if asked > largest:
        raise CheckpointError(
            f"maximum context {asked} exceeds the {largest} positions of config.json; "
            "give at most that"
        )
    if asked % block:
        raise CheckpointError(
            f"maximum context {asked} is not a whole number of blocks of {block}; "
            f"give a multiple of {block}"
        )
    if asked < least:
        raise CheckpointError(f"maximum context {asked} holds no answer; give at least {least}")
    return asked
