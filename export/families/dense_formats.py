"""The formats of dense decoders: autoregressive ones, and the public ones of masked diffusion.

docs/families.md says against which public source each was checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from export.families.fields import Section
from export.families.tokens import ModelFiles, TokenNames
from quantize.errors import CheckpointError

EXACT_CACHE = "the KV cache of committed blocks is exact: they see nothing behind them"
APPROXIMATE_CACHE = (
    "every position sees every other: with prefix_cache 1 keys and values before the canvas are "
    "those of the canvas's first step, an approximation; with prefix_cache 0 each step is exact"
)


@dataclass(frozen=True)
class Masked:
    """One public format of masked diffusion.

    shift: the hidden state at p is that of the token at p + shift. block_keys: keys of config.json
    that may state the block length; default_block: where none does (0: everything is visible, None:
    either is possible, and the folder's name must say). canvas: positions denoised together where
    everything is visible; sub_block: the same within a block, None: all of it. settings: of the
    public default sampler, without its steps, which are one for each position.
    """

    shift: int = 0
    block_keys: tuple[str, ...] = ()
    default_block: int | None = 0
    canvas: int = 32
    sub_block: int | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    tokens: TokenNames = field(default_factory=TokenNames)

    def block_length(self, files: ModelFiles) -> int:
        """Positions that see each other; 0: all do. Raises CheckpointError where no file says."""
        section = Section(files.config)
        for key in self.block_keys:
            if section.get(key) is None:
                continue
            return section.count(key) if self.default_block is None else section.size(key)
        if not self.block_keys and section.get("block_size") is not None:
            raise section.refusal(
                "block_size",
                f"a blockwise variant of {section.get('model_type')} is not built; supported: "
                "those that see everything",
            )
        if self.default_block is not None:
            return self.default_block
        # Checkpoints of both kinds have one config.json; only their names differ.
        named = f"{files.folder.resolve().name} {section.get('_name_or_path') or ''}".lower()
        kinds = {kind for kind in ("bd3lm", "mdlm") if kind in named}
        if len(kinds) == 1:
            return 32 if kinds == {"bd3lm"} else 0
        raise CheckpointError(
            f"config.json of {files.folder} does not say which positions see each other: add "
            '"block_size": 32 for a bd3lm checkpoint (or what it was trained with), '
            '"block_size": 0 for an mdlm one'
        )

    def canvas_length(self, block: int, context: int) -> int:
        """Positions denoised together in a cache of `context` positions."""
        if not block:
            return min(self.canvas, context // 2)  # the other half is for the prompt
        return self.sub_block if self.sub_block and block % self.sub_block == 0 else block

    def settings_of(self, generation_config: Mapping[str, Any]) -> dict[str, Any]:
        """The sampler's defaults: generation_config.json is not read, it holds other models'."""
        return dict(self.settings)


# Dream's `alg` of generation_config.json -> our order.
_DREAM_ORDERS = {"maskgit_plus": 0, "entropy": 1, "topk_margin": 2}


class Dream(Masked):
    """Dream, whose own generation code reads generation_config.json."""

    def settings_of(self, generation_config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Masked`. Raises CheckpointError for an `alg` that is not built."""
        found = {name: generation_config.get(name) for name in ("temperature", "top_p", "top_k")}
        order = generation_config.get("alg")
        if order is not None:
            if not isinstance(order, str) or order not in _DREAM_ORDERS:
                raise CheckpointError(
                    f"generation_config.json asks for the alg {order!r}; supported: "
                    f"{', '.join(map(repr, sorted(_DREAM_ORDERS)))}"
                )
            found["order"] = _DREAM_ORDERS[order]
        return {**self.settings, **{k: v for k, v in found.items() if v is not None}}


@dataclass(frozen=True)
class Format:
    """Which layers a model_type has, and how it is denoised; None: it is autoregressive."""

    layers: Literal["llama", "qwen2", "qwen3", "llada"]
    masked: Masked | None = None


_QWEN_END = ("<|im_end|>",)
_A2D = Masked(
    block_keys=("block_size",),
    default_block=None,
    tokens=TokenNames(masks=("<|mask|>",), ends=_QWEN_END),
)
FORMATS: dict[str, Format] = {
    "llama": Format("llama"),
    "qwen2": Format("qwen2"),
    "qwen3": Format("qwen3"),
    "a2d-llama": Format("llama", _A2D),
    "a2d-qwen2": Format("qwen2", _A2D),
    "a2d-qwen3": Format("qwen3", _A2D),
    "sdar": Format(
        "qwen3",
        Masked(
            block_keys=("block_size", "block_length"),
            default_block=4,
            settings={"threshold": 0.9},
            tokens=TokenNames(masks=("<|MASK|>", "<MASK>"), ends=_QWEN_END),
        ),
    ),
    "Fast_dLLM_Qwen": Format(
        "qwen2",
        Masked(
            shift=1,
            block_keys=("bd_size",),
            default_block=32,
            sub_block=8,
            settings={"threshold": 0.9},
            tokens=TokenNames(masks=("|<MASK>|",), ends=_QWEN_END, mask_token=151665),
        ),
    ),
    "Dream": Format(
        "qwen2",
        Dream(
            shift=1,
            canvas=256,
            settings={"temperature": 0.2, "top_p": 0.95, "order": 1},
            tokens=TokenNames(masks=("<|mask|>",), ends=_QWEN_END),
        ),
    ),
    "llada": Format(
        "llada", Masked(tokens=TokenNames(masks=("<|mdm_mask|>",), ends=("<|eot_id|>",)))
    ),
}
