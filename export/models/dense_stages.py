"""Puts the dense decoders together: autoregressive ones, and the public masked-diffusion formats.

What differs between the formats is the table `MASKED_FAMILIES`; docs/families.md says against which
public source each was checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from export.contract.bundle import Decoding, Experts, ModelInfo, Sampler, SpecialTokens
from export.contract.styles.autoregressive import Autoregressive
from export.contract.styles.masked_diffusion import MaskedDiffusionSettings
from export.models.blocks import FinalNorm
from export.models.cutting import layer_stages, norm_stage
from export.models.defaults import (
    autoregressive_settings,
    checked_settings,
    truncated_sampler,
    truncates,
)
from export.models.dense_decoder import (
    DenseConfig,
    DenseEntry,
    LayerGroup,
    build_layers,
    check_vocabulary,
    load_weights,
    unused_notes,
    used_names,
)
from export.models.staging import (
    StagedModel,
    StageModule,
    block_layers_stage,
)
from export.models.weights import Weights
from quantize.checkpoint import Checkpoint
from quantize.errors import CheckpointError
from quantize.files.json_files import read_json_object

DEFAULT_CONTEXT = 2048
"""Default maximum context of causal and block-causal models."""

DEFAULT_CONTEXT_SEEING_ALL = 1024
"""The same for models that see everything: a step's arithmetic and memory grow with its square."""

PREFILL_LENGTH = 256
"""Most tokens in a call of causal and block-causal models, if a block is not longer."""

EXACT_CACHE = "the KV cache of committed blocks is exact: they see nothing behind them"
APPROXIMATE_CACHE = (
    "every position sees every other: with prefix_cache 1 keys and values before the canvas are "
    "those of the canvas's first step, an approximation; with prefix_cache 0 each step is exact"
)

Settings = dict[str, float]


@dataclass(frozen=True)
class MaskedFamily:
    """One public format of masked diffusion.

    shift: the hidden state at p is that of the token at p + shift. block_keys: keys of config.json
    that may state the block length; default_block: where none does (0: everything is visible, None:
    either is possible and must be told). canvas: positions denoised together where everything is
    visible; sub_block: the same within a block, None: all of it. settings: of the public default
    sampler, without its steps, which are one for each position. mask_token: its id where no file
    says. mask_names, end_names: texts of added tokens that mask and end an answer, beside those
    that the files name.
    """

    shift: int
    block_keys: tuple[str, ...]
    default_block: int | None
    settings: Settings
    canvas: int = 32
    sub_block: int | None = None
    mask_token: int | None = None
    mask_names: tuple[str, ...] = ()
    end_names: tuple[str, ...] = ("<|im_end|>",)


_A2D = MaskedFamily(
    shift=0,
    block_keys=("block_size",),
    default_block=None,
    settings={},
    mask_names=("<|mask|>",),
)
MASKED_FAMILIES: dict[str, MaskedFamily] = {
    "a2d-llama": _A2D,
    "a2d-qwen2": _A2D,
    "a2d-qwen3": _A2D,
    "sdar": MaskedFamily(
        shift=0,
        block_keys=("block_size", "block_length"),
        default_block=4,
        settings={"threshold": 0.9},
        mask_names=("<|MASK|>", "<MASK>"),
    ),
    "Fast_dLLM_Qwen": MaskedFamily(
        shift=1,
        block_keys=("bd_size",),
        default_block=32,
        settings={"threshold": 0.9},
        sub_block=8,
        mask_token=151665,
        mask_names=("|<MASK>|",),
    ),
    "Dream": MaskedFamily(
        shift=1,
        block_keys=(),
        default_block=0,
        settings={"temperature": 0.2, "top_p": 0.95, "order": 1},
        canvas=256,
        mask_names=("<|mask|>",),
    ),
    "llada": MaskedFamily(
        shift=0,
        block_keys=(),
        default_block=0,
        settings={},
        mask_names=("<|mdm_mask|>",),
        end_names=("<|eot_id|>",),
    ),
}

AUTOREGRESSIVE_TYPES = ("llama", "qwen2", "qwen3")

# Dream's `alg` of generation_config.json -> our order.
_DREAM_ORDERS = {"maskgit_plus": 0, "entropy": 1, "topk_margin": 2}


def stage_model(
    checkpoint: Checkpoint,
    *,
    maximum_context: int | None,
    experts: Literal["auto", "dense", "gather"],
    truncation: bool | None,
    layers_per_stage: int | None,
) -> StagedModel:
    """Build the stages; see `export.models.stage_model`. There are no experts to choose for."""
    config = DenseConfig.from_checkpoint_config(checkpoint.config)
    kind = checkpoint.config["model_type"]
    family = MASKED_FAMILIES.get(kind)
    tokens = AddedTokens(checkpoint.folder)
    if family is None:
        decoding, context, canvas, sampler, notes = _autoregressive(
            checkpoint, config, maximum_context, truncation
        )
    else:
        decoding, context, canvas, sampler, notes = _masked(
            checkpoint, config, family, tokens, maximum_context, truncation
        )
    end_names = () if family is None else family.end_names
    special = _special_tokens(checkpoint, config, end_names, tokens)
    if layers_per_stage is None:
        module, unused = build_layers(
            checkpoint, config, maximum_context=context, prefill_length=decoding.prefill_length
        )
        layers = [block_layers_stage(module, decoding.prefill_length)]
    else:
        check_vocabulary(checkpoint, config)
        unused = unused_notes(checkpoint, used_names(config))
        layers = _cut_layers(checkpoint, config, context, decoding.prefill_length, layers_per_stage)
    return StagedModel(
        info=ModelInfo(
            family=kind,
            name=checkpoint.folder.resolve().name,
            vocabulary_size=config.vocabulary_size,
            hidden_size=config.hidden_size,
            canvas_length=canvas,
            maximum_context=context,
        ),
        style="autoregressive" if family is None else "masked_diffusion",
        sampler=sampler,
        special_tokens=special,
        experts=Experts(),
        stages=(
            *layers,
            _head_stage(checkpoint, config, decoding, canvas, truncates(sampler)),
        ),
        notes=(*notes, *unused, *_folder_notes(checkpoint)),
        decoding=decoding,
    )


def _cut_layers(
    checkpoint: Checkpoint,
    config: DenseConfig,
    context: int,
    prefill: int,
    layers_per_stage: int,
) -> list[StageModule]:
    """The entry, the layers in groups, the final norm: each a stage, built when it is lowered."""
    sizes = {"maximum_context": context, "prefill_length": prefill}

    def entry() -> nn.Module:
        module = DenseEntry(config, **sizes)
        load_weights(module, config, checkpoint)
        return module.eval()

    def layers(weights: Weights, first: int, end: int) -> nn.Module:
        module = LayerGroup(config, end - first, **sizes)
        load_weights(module, config, weights, first)
        return module.eval()

    def norm() -> nn.Module:
        module = FinalNorm(config.hidden_size, config.norm_eps)
        load_weights(module, config, checkpoint)
        return module.eval()

    start = torch.zeros(1, dtype=torch.int64)
    angles = torch.zeros(prefill, 1, config.head_dim // 2)
    shared = {
        "mask": torch.zeros(config.kv_groups * prefill, context),
        "cos": angles,
        "sin": angles,
    }
    given = {"hidden": torch.zeros(1, prefill, config.hidden_size), "start": start, **shared}
    rows = {"hidden": {1: "tokens"}}
    return [
        StageModule(
            name="entry",
            role="layers",
            module=entry,
            example_inputs=(torch.zeros(1, prefill, dtype=torch.int64), start, start + 1),
            input_names=Autoregressive.layers_inputs,
            output_names=("hidden", *shared),
            dynamic={"tokens": {1: "tokens"}},
        ),
        *layer_stages(
            checkpoint,
            [config] * config.num_layers,
            layers_per_stage,
            build=layers,
            inputs=lambda first, end: given,
            dynamic=rows
            | {
                "mask": {0: f"{config.kv_groups}*tokens"},
                "cos": {0: "tokens"},
                "sin": {0: "tokens"},
            },
        ),
        norm_stage(norm, prefill, config.hidden_size, rows),
    ]


def _head_stage(
    checkpoint: Checkpoint,
    config: DenseConfig,
    decoding: Decoding,
    canvas: int,
    truncation: bool,
) -> StageModule:
    from export.heads.token import autoregressive_head_stage, masked_head_stage

    table = checkpoint.get(config.head_name(checkpoint))
    rows, hidden = decoding.prefill_length, config.hidden_size
    if decoding.mask_token is None:
        return autoregressive_head_stage(table, rows, hidden, truncation=truncation)
    return masked_head_stage(
        table, rows, canvas, hidden, mask_token=decoding.mask_token, truncation=truncation
    )


_Parts = tuple[Decoding, int, int, Sampler, list[str]]
"""Decoding, maximum context, canvas length, sampler, notes."""


def _autoregressive(
    checkpoint: Checkpoint,
    config: DenseConfig,
    maximum_context: int | None,
    truncation: bool | None,
) -> _Parts:
    context = _context(config, maximum_context, DEFAULT_CONTEXT, 1)
    settings = autoregressive_settings(checkpoint.generation_config)
    decoding = Decoding(prefill_length=min(PREFILL_LENGTH, context), block_length=1, shift=1)
    sampler = truncated_sampler("autoregressive", settings, truncation)
    return decoding, context, 1, sampler, []


def _masked(
    checkpoint: Checkpoint,
    config: DenseConfig,
    family: MaskedFamily,
    tokens: AddedTokens,
    maximum_context: int | None,
    truncation: bool | None,
) -> _Parts:
    block = _block_length(checkpoint, family)
    default = DEFAULT_CONTEXT if block else DEFAULT_CONTEXT_SEEING_ALL
    context = _context(config, maximum_context, default, block or 1)
    if block:
        canvas = family.sub_block if family.sub_block and block % family.sub_block == 0 else block
    else:
        canvas = min(family.canvas, context // 2)  # the other half is for the prompt
    found = dict(family.settings)
    if checkpoint.config["model_type"] == "Dream":
        found |= _dream_settings(checkpoint)
    settings = checked_settings(MaskedDiffusionSettings, {"steps_per_canvas": canvas, **found})
    prefill = context
    if block:
        prefill = min(context, max(PREFILL_LENGTH // block * block, block + family.shift))
    decoding = Decoding(
        prefill_length=prefill,
        block_length=block,
        shift=family.shift,
        mask_token=_mask_token(checkpoint, config, family, tokens),
    )
    notes = [EXACT_CACHE if block else APPROXIMATE_CACHE]
    sampler = truncated_sampler("masked", settings, truncation)
    return decoding, context, canvas, sampler, notes


def _context(
    config: DenseConfig, maximum_context: int | None, default: int, block_length: int
) -> int:
    """The maximum context asked for, or the default in whole blocks."""
    largest = config.max_positions
    if maximum_context is None:
        context = min(default, largest) // block_length * block_length
        if context < 2:
            raise CheckpointError(
                f"config.json allows {largest} positions, fewer than one block of {block_length}; "
                "correct the block length or the number of positions"
            )
        return context
    if maximum_context > largest:
        raise CheckpointError(
            f"maximum context {maximum_context} exceeds the {largest} positions of config.json; "
            "give at most that"
        )
    if maximum_context % block_length:
        raise CheckpointError(
            f"maximum context {maximum_context} is not a whole number of blocks of {block_length}; "
            f"give a multiple of {block_length}"
        )
    if maximum_context < 2:
        raise CheckpointError(f"maximum context {maximum_context} holds no answer; give at least 2")
    return maximum_context


def _block_length(checkpoint: Checkpoint, family: MaskedFamily) -> int:
    """Positions that see each other; 0: all do."""
    config = checkpoint.config
    for key in family.block_keys:
        value = config.get(key)
        if value is None:
            continue
        may_see_all = family.default_block is None
        if type(value) is not int or value < (0 if may_see_all else 1):
            also = ", 0 for a model that sees everything" if may_see_all else ""
            raise CheckpointError(
                f"config.json has {key} = {value!r}; give a number of positions{also}"
            )
        return value
    if not family.block_keys and config.get("block_size") is not None:
        raise CheckpointError(
            f"config.json has block_size = {config['block_size']!r}, a blockwise variant of "
            f"{config['model_type']} that is not built; supported: those that see everything"
        )
    if family.default_block is not None:
        return family.default_block
    # Checkpoints of both kinds have one config.json; only their names differ.
    named = f"{checkpoint.folder.resolve().name} {config.get('_name_or_path', '')}".lower()
    kinds = {kind for kind in ("bd3lm", "mdlm") if kind in named}
    if len(kinds) == 1:
        return 32 if kinds == {"bd3lm"} else 0
    raise CheckpointError(
        f"config.json of {checkpoint.folder} does not say which positions see each other: add "
        '"block_size": 32 for a bd3lm checkpoint (or what it was trained with), '
        '"block_size": 0 for an mdlm one'
    )


def _mask_token(
    checkpoint: Checkpoint, config: DenseConfig, family: MaskedFamily, tokens: AddedTokens
) -> int:
    for file, section in (
        ("config.json", checkpoint.config),
        ("generation_config.json", checkpoint.generation_config),
    ):
        value = section.get("mask_token_id")
        if value is not None:
            return _in_vocabulary(value, f"mask_token_id of {file}", config)
    own = tokens.text_of("mask_token")
    names = family.mask_names if own is None else (own, *family.mask_names)
    for name in names:
        if (value := tokens.find(name)) is not None:
            return _in_vocabulary(value, f"the tokenizer's {name!r}", config)
    if family.mask_token is not None:
        return _in_vocabulary(family.mask_token, "the mask token of this format", config)
    raise CheckpointError(
        f"{checkpoint.folder} does not say which token is the mask: neither config.json "
        f"(mask_token_id) nor the tokenizer ({', '.join(map(repr, names))}) has it; add "
        "mask_token_id to config.json"
    )


def _in_vocabulary(value: Any, what: str, config: DenseConfig) -> int:
    if type(value) is not int or not 0 <= value < config.vocabulary_size:
        raise CheckpointError(
            f"{what} is {value!r}, the vocabulary has {config.vocabulary_size} tokens; "
            "take all files from one checkpoint"
        )
    return value


def _special_tokens(
    checkpoint: Checkpoint, config: DenseConfig, end_names: Iterable[str], tokens: AddedTokens
) -> SpecialTokens:
    """Ids of generation_config.json, or of config.json where it does not say; and what else ends
    an answer in this format."""

    def find(key: str) -> Any:
        value = checkpoint.generation_config.get(key)
        return checkpoint.config.get(key) if value is None else value

    def one(key: str, role: str) -> int | None:
        value = find(key)
        if value is None and (text := tokens.text_of(role)) is not None:
            value = tokens.find(text)
        return None if value is None else _in_vocabulary(value, key, config)

    ends = find("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    ends = [_in_vocabulary(end, "eos_token_id", config) for end in ends]
    for name in end_names:
        if (value := tokens.find(name)) is not None:
            ends.append(_in_vocabulary(value, f"the tokenizer's {name!r}", config))
    return SpecialTokens(
        eos=tuple(dict.fromkeys(ends)),
        pad=one("pad_token_id", "pad_token"),
        bos=one("bos_token_id", "bos_token"),
    )


def _dream_settings(checkpoint: Checkpoint) -> Settings:
    """What Dream's own generation code reads from generation_config.json."""
    config = checkpoint.generation_config
    found = {name: config.get(name) for name in ("temperature", "top_p", "top_k")}
    order = config.get("alg")
    if order is not None:
        if not isinstance(order, str) or order not in _DREAM_ORDERS:
            raise CheckpointError(
                f"generation_config.json asks for the alg {order!r}; supported: "
                f"{', '.join(map(repr, sorted(_DREAM_ORDERS)))}"
            )
        found["order"] = _DREAM_ORDERS[order]
    return {name: value for name, value in found.items() if value is not None}


def _folder_notes(checkpoint: Checkpoint) -> list[str]:
    """What these formats bring that is not used: Python code, and tokenizers in an older form."""
    folder, notes = checkpoint.folder, []
    if not (folder / "tokenizer.json").is_file() and (folder / "vocab.json").is_file():
        notes.append(
            "the tokenizer is given as vocab.json and merges.txt, which is not read: save it as "
            "tokenizer.json with transformers to give the bundle one"
        )
    if checkpoint.config.get("auto_map"):
        notes.append(
            "config.json names Python code of the checkpoint (auto_map): not needed, and not run"
        )
    return notes


class AddedTokens:
    """The tokens that a tokenizer's files name, by their text; read when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids: dict[str, Any] | None = None

    def find(self, text: str) -> Any:
        """The id of an added token, or of a whole-word entry of the vocabulary; None without."""
        if self._ids is None:
            self._ids = self._read_ids()
        return self._ids.get(text)

    def text_of(self, role: str) -> str | None:
        """The text of the token that the tokenizer calls `mask_token` or the like; None without."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            value = self._read(file).get(role)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                return value
        return None

    def _read_ids(self) -> dict[str, Any]:
        ids: dict[str, Any] = {}
        tokenizer = self._read("tokenizer.json")
        model = tokenizer.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            ids |= vocabulary
        ids |= self._read("added_tokens.json")
        decoder = self._read("tokenizer_config.json").get("added_tokens_decoder")
        for number, entry in decoder.items() if isinstance(decoder, dict) else ():
            if isinstance(entry, dict) and isinstance(entry.get("content"), str):
                ids[entry["content"]] = int(number) if str(number).isdecimal() else number
        added = tokenizer.get("added_tokens")
        for entry in added if isinstance(added, list) else ():
            if isinstance(entry, dict) and isinstance(entry.get("content"), str):
                ids[entry["content"]] = entry.get("id")
        return ids

    def _read(self, file: str) -> dict[str, Any]:
        path = self._folder / file
        return read_json_object(path) if path.is_file() else {}
