"""Train the small DiffusionGemma that ships with the repository.

The architecture's own objective: the prompt is encoded causally into the KV cache, the canvas is
corrupted by uniform random tokens at a random noise level, the loss is the cross-entropy against
the clean canvas over all its positions, and half of the rows see their own first guess through
self-conditioning. The forward pass here is a batched restatement of `transformers`'
`DiffusionGemmaForBlockDiffusion` (dense experts, padded prompts) that uses its tensor names; it is
checked against that class before training begins. Accuracy is measured with that class's
`generate`, that is with the real sampler.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.overrides import TorchFunctionMode

from export.host.puzzles import KINDS, Puzzle, generate, is_exact
from quantize.errors import UserError

Weights = dict[str, Tensor]

CANVAS_LENGTH = 20
PAD, EOS, BOS, UNKNOWN, TURN_START, TURN_END = range(6)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
WORDS = ["user", "model", "system", "sudoku", "sort", "add"]
CHARACTERS = list("0123456789+-=.,?/ \n") + [chr(code) for code in range(ord("a"), ord("z") + 1)]
UNUSED = [f"<unused{n}>" for n in range(64 - len(SPECIAL + WORDS + CHARACTERS))]
VOCABULARY = SPECIAL + WORDS + CHARACTERS + UNUSED

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim }}{{ '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)

ROWS_PER_STEP = {"sudoku": 104, "add": 104, "sort": 48}
"""Rows of each puzzle kind in one optimizer step."""
PURE_NOISE_SHARE = 0.4
"""Share of rows whose canvas is all noise, as it is when sampling starts."""
EVALUATION_SEED = 20_000_003
STEPS_PER_SNAPSHOT = 500
STATE_FILE = "state.pt"


@dataclass(frozen=True)
class Recipe:
    """What decides the training run, with the seed.

    The learning rate warms up, holds, and falls linearly to zero over the last `decay_share` of
    the steps. From the share `int4_from` on, every second step sees its weights rounded to int4
    (straight-through gradients), so that the result is good in fp32 and in int4.
    """

    seed: int = 0
    steps: int = 2000
    warmup_steps: int = 100
    decay_share: float = 0.3
    int4_from: float = 0.6
    matrix_rate: float = 3e-3
    vector_rate: float = 3e-3
    weight_decay: float = 0.05


# --- what is written beside the weights -----------------------------------------------------------


def model_config() -> dict[str, Any]:
    """Return the keyword arguments of the text configuration."""
    return dict(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        global_head_dim=64,
        num_global_key_value_heads=1,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=24,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=32,
        max_position_embeddings=1024,
        final_logit_softcapping=30.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.5,
                "rope_theta": 10_000.0,
            },
        },
    )


def build_model() -> Any:
    """Return an untrained `DiffusionGemmaForBlockDiffusion` in fp32."""
    from transformers import (
        DiffusionGemmaConfig,
        DiffusionGemmaForBlockDiffusion,
        DiffusionGemmaTextConfig,
        Gemma4VisionConfig,
    )

    vision = Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        position_embedding_size=16,
        max_position_embeddings=256,
    )
    config = DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(**model_config()),
        vision_config=vision,
        canvas_length=CANVAS_LENGTH,
        image_token_id=len(VOCABULARY) - 1,
        boi_token_id=len(VOCABULARY) - 2,
        eoi_token_id=len(VOCABULARY) - 3,
    )
    return DiffusionGemmaForBlockDiffusion(config).eval()


def build_tokenizer() -> Any:
    """Return the 64-token `tokenizers.Tokenizer`: whole words where known, else characters."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(VOCABULARY)},
            merges=[],
            unk_token="<unk>",
            ignore_merges=True,
        )
    )
    pattern = "|".join(WORDS) + r"|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL + UNUSED]
    )
    return tokenizer


def render(prompt: str) -> str:
    """Render one user turn and the opening of the model's turn as the chat template does."""
    return f"<bos><|turn>user\n{prompt}<turn|>\n<|turn>model\n"


def write_companions(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    documents = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<bos>",
            "eos_token": "<turn|>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
            "chat_template": CHAT_TEMPLATE,
        },
        "generation_config.json": {
            "bos_token_id": BOS,
            "eos_token_id": [EOS, TURN_END],
            "pad_token_id": PAD,
            "max_new_tokens": CANVAS_LENGTH,
            "max_denoising_steps": 48,
            "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
            "t_min": 0.4,
            "t_max": 0.8,
            "stability_threshold": 1,
            "confidence_threshold": 0.005,
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")


# --- weights --------------------------------------------------------------------------------------


def hf_name(name: str) -> str:
    """Return the checkpoint's name of one trained tensor."""
    if name.startswith("encoder."):
        return name.replace("encoder.", "model.encoder.language_model.", 1)
    return f"model.decoder.{name}"


def initial_weights(seed: int) -> Weights:
    """Draw the starting weights, fp32: unit-variance matrices, quiet residual branches."""
    config = model_config()
    model = build_model()
    own = {hf_name(""): "", "model.encoder.language_model.": "encoder."}
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for full_name, reference in model.state_dict().items():
        prefix = next((prefix for prefix in own if full_name.startswith(prefix)), None)
        if prefix is None or (own[prefix] and not full_name.endswith("layer_scalar")):
            continue
        name, shape = own[prefix] + full_name[len(prefix) :], reference.shape
        if name == "embed_tokens.weight":
            value = torch.randn(shape, generator=generator) * config["hidden_size"] ** -0.5
        elif name.endswith("router.proj.weight"):
            value = torch.randn(shape, generator=generator) * 0.5
        elif len(shape) >= 2:
            value = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            value = torch.full(shape, shape[0] ** -0.25)
        elif ".post_" in name:
            value = torch.full(shape, 0.5)
        else:
            value = torch.ones(shape)
        weights[name] = value
    return weights


def is_matrix(name: str, value: Tensor) -> bool:
    """Say whether a tensor is a linear layer's or the experts' (what int4 will quantize)."""
    return value.ndim >= 2 and "router" not in name and "embed_tokens" not in name


def fake_int(weight: Tensor, bits: int, group: int) -> Tensor:
    """Round to symmetric integers per group along the last axis; gradients pass straight through.

    The rule is torchao's `MappingType.SYMMETRIC` with a bf16 scale.
    """
    grouped = weight.detach().unflatten(-1, (-1, group))
    largest = grouped.abs().amax(-1, keepdim=True)
    scale = (largest / ((2**bits - 1) / 2)).clamp_min(1e-9).bfloat16().float()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    rounded = (grouped / scale).round().clamp(low, high) * scale
    return weight + (rounded.flatten(-2) - weight.detach())


def quantized_weights(weights: Weights) -> Weights:
    """Return the weights as int4 (linears, experts; group 32) and int8 (embedding) sees them."""
    result = dict(weights)
    for name, value in weights.items():
        if is_matrix(name, value):
            result[name] = fake_int(value, 4, 32)
        elif name == "embed_tokens.weight":
            result[name] = fake_int(value, 8, value.shape[-1])
    return result


# --- the forward pass -----------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    x = x.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x if weight is None else x * weight


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype))


def gated(x: Tensor, weights: Weights, prefix: str, dtype: torch.dtype) -> Tensor:
    gate = linear(x, weights[prefix + "gate_proj.weight"], dtype)
    up = linear(x, weights[prefix + "up_proj.weight"], dtype)
    return linear(
        F.gelu(gate, approximate="tanh") * up, weights[prefix + "down_proj.weight"], dtype
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Network:
    """The text model as two functions of its weights, for batches of padded prompts.

    `dtype` is that of the matrix products; norms, router, softmax and residual stay in fp32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.config = model_config()
        self.dtype = dtype
        self.full = [kind == "full_attention" for kind in self.config["layer_types"]]
        self.tables = {}
        for full in (False, True):
            kind = "full_attention" if full else "sliding_attention"
            size = self.config["global_head_dim" if full else "head_dim"]
            rope = self.config["rope_parameters"][kind]
            frequency = rope["rope_theta"] ** -(torch.arange(0, size, 2) / size)
            rotated = int(rope.get("partial_rotary_factor", 1.0) * size // 2)
            frequency[rotated:] = 0.0
            angles = torch.outer(torch.arange(128.0), frequency)
            angles = torch.cat((angles, angles), -1)
            self.tables[full] = (angles.cos(), angles.sin())

    def _attention(
        self,
        x: Tensor,
        weights: Weights,
        layer: int,
        positions: Tensor,
        mask: Tensor,
        cached: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attend from x [B, S, H]; mask [B or 1, 1, 1, S or 1, L] is added to the scores."""
        prefix, full, dtype = f"layers.{layer}.self_attn.", self.full[layer], self.dtype
        size = self.config["global_head_dim" if full else "head_dim"]
        heads = self.config["num_attention_heads"]
        kv_heads = self.config["num_global_key_value_heads" if full else "num_key_value_heads"]
        batch, length, _ = x.shape
        cos, sin = (table[positions][:, :, None] for table in self.tables[full])
        query = linear(x, weights[prefix + "q_proj.weight"], dtype)
        query = rms_norm(query.view(batch, length, heads, size), weights[prefix + "q_norm.weight"])
        query = rotate(query, cos, sin).to(dtype)
        raw_key = linear(x, weights[prefix + "k_proj.weight"], dtype)
        raw_value = raw_key if full else linear(x, weights[prefix + "v_proj.weight"], dtype)
        shape = (batch, length, kv_heads, size)
        key = rotate(rms_norm(raw_key.view(shape), weights[prefix + "k_norm.weight"]), cos, sin)
        key = key.to(dtype).transpose(1, 2)
        value = rms_norm(raw_value.view(shape)).to(dtype).transpose(1, 2)
        own = (key, value)
        if cached is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(cached, own, strict=True))
        groups = heads // kv_heads
        query = query.view(batch, length, kv_heads, groups, size).permute(0, 2, 3, 1, 4)
        query = query.reshape(batch * kv_heads, groups * length, size)
        keys = key.shape[2]
        scores = torch.bmm(query, key.reshape(batch * kv_heads, keys, size).transpose(1, 2))
        scores = scores.view(batch, kv_heads, groups, length, keys).float() + mask
        share = torch.softmax(scores, -1).to(dtype)
        mixed = torch.bmm(
            share.view(batch * kv_heads, groups * length, keys),
            value.reshape(batch * kv_heads, keys, size),
        )
        mixed = mixed.view(batch, kv_heads, groups, length, size).permute(0, 3, 1, 2, 4)
        mixed = mixed.reshape(batch, length, heads * size)
        return linear(mixed, weights[prefix + "o_proj.weight"], dtype), own

    def _experts(self, residual: Tensor, weights: Weights, prefix: str) -> Tensor:
        """Run all experts on all tokens; the router's weights are zero beyond the top k."""
        config = self.config
        experts, inner = config["num_experts"], config["moe_intermediate_size"]
        routed = rms_norm(residual) * weights[prefix + "router.scale"] * residual.shape[-1] ** -0.5
        chance = torch.softmax(F.linear(routed, weights[prefix + "router.proj.weight"]), -1)
        with torch.no_grad():
            smallest = chance.topk(config["top_k_experts"], -1).values[..., -1:]
        chance = torch.where(chance >= smallest, chance, 0.0)
        chance = chance / chance.sum(-1, keepdim=True)
        chance = chance * weights[prefix + "router.per_expert_scale"]
        x = rms_norm(residual, weights[prefix + "pre_feedforward_layernorm_2.weight"])
        gate_up = weights[prefix + "experts.gate_up_proj"].flatten(0, 1)
        both = linear(x, gate_up, self.dtype).unflatten(-1, (experts, 2, inner))
        active = F.gelu(both[..., 0, :], approximate="tanh") * both[..., 1, :]
        active = (active * chance[..., None]).flatten(-2)
        down = weights[prefix + "experts.down_proj"].permute(1, 0, 2).flatten(1)
        return linear(active, down, self.dtype)

    def _layer(
        self,
        x: Tensor,
        weights: Weights,
        layer: int,
        positions: Tensor,
        mask: Tensor,
        cached: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        prefix = f"layers.{layer}."

        def norm(x: Tensor, name: str) -> Tensor:
            return rms_norm(x, weights[f"{prefix}{name}.weight"])

        attended, own = self._attention(
            norm(x, "input_layernorm"), weights, layer, positions, mask, cached
        )
        x = x + norm(attended, "post_attention_layernorm")
        dense = gated(norm(x, "pre_feedforward_layernorm"), weights, prefix + "mlp.", self.dtype)
        dense = norm(dense, "post_feedforward_layernorm_1")
        sparse = norm(self._experts(x, weights, prefix), "post_feedforward_layernorm_2")
        x = x + norm(dense + sparse, "post_feedforward_layernorm")
        scalar = ("encoder." if cached is None else "") + prefix + "layer_scalar"
        return x * weights[scalar], own

    def _embed(self, tokens: Tensor, weights: Weights) -> Tensor:
        return F.embedding(tokens, weights["embed_tokens.weight"]) * (
            self.config["hidden_size"] ** 0.5
        )

    def encode(self, weights: Weights, prompts: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Encode right-padded prompts [B, P]; returns keys and values per layer."""
        length = prompts.shape[1]
        positions = torch.arange(length)[None]
        age = positions[0][:, None] - positions[0][None, :]
        seen = {True: age >= 0, False: (age >= 0) & (age < self.config["sliding_window"])}
        masks = {full: torch.where(seen[full], 0.0, -1e9) for full in seen}
        x, cache = self._embed(prompts, weights), []
        for layer, full in enumerate(self.full):
            x, own = self._layer(x, weights, layer, positions, masks[full], None)
            cache.append(own)
        return cache

    def denoise(
        self,
        weights: Weights,
        canvas: Tensor,
        cache: list[tuple[Tensor, Tensor]],
        lengths: Tensor,
        signal: Tensor,
    ) -> Tensor:
        """Return soft-capped logits [B, T, V] of a canvas [B, T] behind prompts of `lengths` [B].

        `signal` [B, T, H] is the soft embedding of an earlier guess, zeros where there is none.
        """
        count = canvas.shape[1]
        prompt_positions = torch.arange(cache[0][0].shape[2])[None]
        known = prompt_positions < lengths[:, None]
        near = known & (prompt_positions > lengths[:, None] - self.config["sliding_window"])
        masks = {
            full: F.pad(torch.where(seen, 0.0, -1e9), (0, count))[:, None, None, None]
            for full, seen in ((True, known), (False, near))
        }
        positions = lengths[:, None] + torch.arange(count)[None]
        prefix = "self_conditioning."
        normed = rms_norm(signal, weights[prefix + "pre_norm.weight"])
        x = self._embed(canvas, weights) + gated(normed, weights, prefix, self.dtype)
        x = rms_norm(x)
        for layer, full in enumerate(self.full):
            x, _ = self._layer(x, weights, layer, positions, masks[full], cache[layer])
        x = rms_norm(x, weights["norm.weight"])
        cap = self.config["final_logit_softcapping"]
        return cap * torch.tanh(linear(x, weights["embed_tokens.weight"], self.dtype).float() / cap)

    def soft_embedding(self, weights: Weights, logits: Tensor) -> Tensor:
        """Return softmax(logits) [B, T, V] as embeddings [B, T, H]."""
        table = weights["embed_tokens.weight"]
        return (torch.softmax(logits, -1) @ table) * self.config["hidden_size"] ** 0.5

    def loss(
        self,
        weights: Weights,
        prompts: Tensor,
        lengths: Tensor,
        noisy: Tensor,
        clean: Tensor,
        temperature: Tensor,
    ) -> Tensor:
        """Return the cross-entropy [B] per row; the first half of the rows self-conditions."""
        cache = self.encode(weights, prompts)
        half = prompts.shape[0] // 2
        with torch.no_grad():
            first_cache = [(key[:half], value[:half]) for key, value in cache]
            nothing = torch.zeros(*noisy.shape, self.config["hidden_size"])
            guess = self.denoise(weights, noisy[:half], first_cache, lengths[:half], nothing[:half])
            signal = self.soft_embedding(weights, guess / temperature[:half, None, None])
            signal = torch.cat((signal, nothing[half:]))
        logits = self.denoise(weights, noisy, cache, lengths, signal)
        each = F.cross_entropy(logits.flatten(0, 1), clean.flatten(), reduction="none")
        return each.view(clean.shape).mean(1)


def load_into(model: Any, weights: Weights) -> None:
    """Copy trained weights into the `transformers` model (its tied tensors follow)."""
    state = {hf_name(name): value for name, value in weights.items()}
    for name, value in list(state.items()):
        if name.startswith("model.decoder.") and "self_conditioning" not in name:
            if name.endswith("layer_scalar"):
                continue
            state[name.replace("model.decoder.", "model.encoder.language_model.")] = value
    state["lm_head.weight"] = weights["embed_tokens.weight"]
    unknown = model.load_state_dict(state, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"The transformers model does not know {unknown[:3]}.")


def check_against_transformers(weights: Weights) -> float:
    """Return the largest logit difference to the reference class, with and without a signal."""
    model, network = build_model(), Network(torch.float32)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in weights.items()
    }
    load_into(model, weights)
    tokenizer, worst = build_tokenizer(), 0.0
    puzzles = [generate(kind, 1, seed=1)[0] for kind in KINDS]
    prompts, lengths, clean = tensors(puzzles, tokenizer)
    canvas = torch.randint(0, len(VOCABULARY), clean.shape, generator=generator)
    guess = torch.randn(*clean.shape, len(VOCABULARY), generator=generator) * 3
    with torch.no_grad():
        for signal in (None, guess):
            cache = network.encode(weights, prompts)
            soft = torch.zeros(*clean.shape, network.config["hidden_size"])
            if signal is not None:
                soft = network.soft_embedding(weights, signal)
            ours = network.denoise(weights, canvas, cache, lengths, soft)
            for row, length in enumerate(lengths.tolist()):
                theirs = model(
                    input_ids=prompts[row : row + 1, :length],
                    decoder_input_ids=canvas[row : row + 1],
                    self_conditioning_logits=None if signal is None else signal[row : row + 1],
                ).logits
                worst = max(worst, (theirs[0] - ours[row]).abs().max().item())
    return worst


# --- data -----------------------------------------------------------------------------------------

PROMPT_LENGTH = 30
"""Tokens of the longest rendered prompt."""


def tensors(puzzles: list[Puzzle], tokenizer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return prompts [B, P] (right-padded), their lengths [B] and clean canvases [B, T]."""
    encoded = tokenizer.encode_batch([render(puzzle.prompt) for puzzle in puzzles])
    answers = tokenizer.encode_batch([puzzle.answer + "<turn|>" for puzzle in puzzles])
    prompts = torch.full((len(puzzles), PROMPT_LENGTH), PAD)
    clean = torch.full((len(puzzles), CANVAS_LENGTH), PAD)
    for row, (prompt, answer) in enumerate(zip(encoded, answers, strict=True)):
        prompts[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
        clean[row, : len(answer.ids)] = torch.tensor(answer.ids)
    return prompts, torch.tensor([len(prompt.ids) for prompt in encoded]), clean


def training_batch(seed: int, step: int, tokenizer: Any) -> tuple[Tensor, ...]:
    """Draw the batch of one step: a function of seed and step only, so that a run can resume."""
    puzzles = []
    for kind, rows in ROWS_PER_STEP.items():
        puzzles += generate(kind, rows, seed=seed * 10_000_019 + step)
    random.Random(step).shuffle(puzzles)
    prompts, lengths, clean = tensors(puzzles, tokenizer)
    generator = torch.Generator().manual_seed(seed * 10_000_019 + step)
    rows = len(puzzles)
    level = torch.rand(rows, generator=generator)
    level[torch.rand(rows, generator=generator) < PURE_NOISE_SHARE] = 1.0
    noise = torch.randint(0, len(VOCABULARY), clean.shape, generator=generator)
    replaced = torch.rand(clean.shape, generator=generator) < level[:, None]
    noisy = torch.where(replaced, noise, clean)
    temperature = 0.4 + 0.4 * level
    return prompts, lengths, noisy, clean, temperature


# --- the optimizer --------------------------------------------------------------------------------


def orthogonalized(update: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return the nearest semi-orthogonal matrices [N, R, C] by Newton-Schulz (Muon, 2024)."""
    x = update.to(dtype)
    flipped = x.shape[-2] > x.shape[-1]
    x = x.mT if flipped else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if flipped else x).float()


class Optimizer:
    """Muon for matrices, AdamW for everything else, with one learning-rate factor for both.

    `dtype` is that of Muon's products: without bf16 instructions a CPU is faster in fp32.
    """

    def __init__(
        self, weights: Weights, recipe: Recipe, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.recipe, self.dtype = recipe, dtype
        self.matrices: dict[tuple[int, ...], list[str]] = {}
        self.vectors = []
        for name, value in weights.items():
            if is_matrix(name, value):
                self.matrices.setdefault(tuple(value.shape[-2:]), []).append(name)
            else:
                self.vectors.append(name)
        self.momentum = {name: torch.zeros_like(value) for name, value in weights.items()}
        self.square = {name: torch.zeros_like(weights[name]) for name in self.vectors}

    @torch.no_grad()
    def update(self, weights: Weights, step: int, factor: float) -> None:
        """Change the weights in place from their gradients; `step` counts from 0."""
        recipe = self.recipe
        for shape, names in self.matrices.items():
            stack = []
            for name in names:
                grad, momentum = weights[name].grad, self.momentum[name]
                momentum.lerp_(grad, 0.05)
                stack.append(grad.lerp(momentum, 0.95).view(-1, *shape))
            direction = orthogonalized(torch.cat(stack), self.dtype)
            direction = direction * (0.2 * math.sqrt(max(shape)))
            rate = recipe.matrix_rate * factor
            for name, change in zip(names, direction.split([len(s) for s in stack]), strict=True):
                weights[name].mul_(1 - rate * recipe.weight_decay)
                weights[name].sub_(change.view(weights[name].shape), alpha=rate)
        rate = recipe.vector_rate * factor
        for name in self.vectors:
            grad, momentum, square = weights[name].grad, self.momentum[name], self.square[name]
            if grad is None:  # the last layer's scalar in encoder mode reaches no output
                continue
            momentum.lerp_(grad, 0.1)
            square.lerp_(grad * grad, 0.02)
            corrected = momentum / (1 - 0.9 ** (step + 1))
            spread = (square / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8
            weights[name].sub_(corrected / spread, alpha=rate)


def rate_factor(step: int, recipe: Recipe) -> float:
    """Warm up, hold, then decay linearly to zero over the last `decay_share` of the run."""
    left = (recipe.steps - step) / max(1, recipe.steps * recipe.decay_share)
    return min(1.0, (step + 1) / recipe.warmup_steps, left)


# --- measuring ------------------------------------------------------------------------------------


class Int8Activations(TorchFunctionMode):
    """Round the input of every linear to int8 per token, asymmetric, as torchao's dynamic int8.

    Linears whose weight is in `spared` (router and head) keep their input.
    """

    def __init__(self, spared: list[Tensor]) -> None:
        super().__init__()
        self.spared = {id(weight) for weight in spared}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and id(args[1]) not in self.spared:
            args = (fake_int8_per_token(args[0]), *args[1:])
        return function(*args, **(kwargs or {}))


def fake_int8_per_token(x: Tensor) -> Tensor:
    """Round to 256 levels between each token's smallest and largest value (zero included)."""
    low, high = (x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0))
    scale = ((high - low) / 255).clamp_min(1e-9)
    zero = -128 - (low / scale).round()
    return ((x / scale).round() + zero).clamp(-128, 127).sub(zero) * scale


@torch.no_grad()
def evaluate(
    weights: Weights, count: int, seed: int = EVALUATION_SEED, int4: bool = False
) -> dict[str, dict]:
    """Measure exact match on held-out puzzles with `transformers`' own `generate`.

    With `int4`, weights are rounded as `quantized_weights` says and activations to int8.
    Returns per kind: exact, count, denoising steps per canvas (mean over the rows).
    """
    model, tokenizer = build_model(), build_tokenizer()
    load_into(model, quantized_weights(weights) if int4 else weights)
    model.set_experts_implementation("eager")  # one plain linear per expert: what int8 rounds
    spared = [model.lm_head.weight]
    spared += [p for name, p in model.named_parameters() if "router" in name]
    activations = Int8Activations(spared) if int4 else contextlib.nullcontext()
    results = {}
    for kind in KINDS:
        puzzles = generate(kind, count, seed, split="held_out")
        prompts, lengths, _ = tensors(puzzles, tokenizer)
        prompts = prompts[:, : int(lengths[0])]
        torch.manual_seed(seed)
        with activations:
            output = model.generate(
                prompts,
                max_new_tokens=CANVAS_LENGTH,
                eos_token_id=[EOS, TURN_END],
                pad_token_id=PAD,
            )
        new = output.sequences[:, prompts.shape[1] :]
        texts = tokenizer.decode_batch(new.tolist())
        exact = sum(is_exact(p, text) for p, text in zip(puzzles, texts, strict=True))
        tokens = (new != PAD).sum(1)
        steps = (tokens / output.tokens_per_forward).mean().item()
        results[kind] = {"exact": exact, "count": count, "steps_per_canvas": round(steps, 2)}
    return results


def describe(results: dict[str, dict]) -> str:
    """Return one line per evaluation for the log."""
    return "  ".join(
        f"{kind} {r['exact']}/{r['count']} ({r['steps_per_canvas']} steps)"
        for kind, r in results.items()
    )


# --- files ----------------------------------------------------------------------------------------


def save_state(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".partial")
    torch.save(state, temporary)
    os.replace(temporary, path)


def save_model(folder: Path, weights: Weights) -> None:
    """Write a Hugging Face folder, weights in bf16, without the untrained vision tower."""
    from safetensors.torch import load_file, save_file

    building = folder.with_name(folder.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    model = build_model()
    load_into(model, weights)
    model.to(torch.bfloat16).save_pretrained(building)
    (building / "generation_config.json").unlink(missing_ok=True)
    path = building / "model.safetensors"
    text_only = {
        name: value
        for name, value in load_file(path).items()
        if "vision_tower" not in name and "embed_vision" not in name
    }
    save_file(text_only, path, metadata={"format": "pt"})
    write_companions(building)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(building.iterdir()):
        file.chmod(0o644)
        os.replace(file, folder / file.name)
    building.rmdir()


# --- the run --------------------------------------------------------------------------------------


def train(
    recipe: Recipe,
    work: Path,
    resume: bool,
    log: Callable[[str], None],
    show: Callable[[int, str], None],
    evaluate_every: int,
    evaluate_count: int,
    compiled: bool = True,
) -> tuple[Weights, dict[str, Any]]:
    """Train, or go on after an interruption; returns the weights and the run's figures."""
    work.mkdir(parents=True, exist_ok=True)
    state_path = work / STATE_FILE
    weights = initial_weights(recipe.seed)
    difference = check_against_transformers(weights)
    log(f"largest logit difference to transformers: {difference:.2e}")
    if difference > 1e-4:
        raise RuntimeError(f"The forward pass differs from transformers by {difference:.2e}.")
    for value in weights.values():
        value.requires_grad_(True)
    optimizer = Optimizer(weights, recipe)
    start, seconds, loss_mean = 0, 0.0, None
    if resume and state_path.exists():
        state = torch.load(state_path, weights_only=True)
        if state["recipe"]["seed"] != recipe.seed:
            raise UserError(
                f"{state_path} was made with seed {state['recipe']['seed']}, not {recipe.seed}; "
                "use that seed or another work folder."
            )
        with torch.no_grad():
            for name, value in state["weights"].items():
                weights[name].copy_(value)
        optimizer.momentum, optimizer.square = state["momentum"], state["square"]
        start, seconds, loss_mean = state["step"], state["seconds"], state["loss"]
        log(f"resumed at step {start}")
    network, tokenizer = Network(torch.bfloat16), build_tokenizer()
    loss_of = torch.compile(network.loss, dynamic=False) if compiled else network.loss
    clock = time.monotonic()

    def snapshot(step: int) -> None:
        save_state(
            state_path,
            {
                "weights": {name: value.detach() for name, value in weights.items()},
                "momentum": optimizer.momentum,
                "square": optimizer.square,
                "step": step,
                "seconds": seconds + time.monotonic() - clock,
                "loss": loss_mean,
                "recipe": asdict(recipe),
            },
        )

    for step in range(start, recipe.steps):
        batch = training_batch(recipe.seed, step, tokenizer)
        int4 = step >= recipe.int4_from * recipe.steps and step % 2 == 1
        seen = quantized_weights(weights) if int4 else weights
        loss = loss_of(seen, *batch).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.update(weights, step, rate_factor(step, recipe))
        for value in weights.values():
            value.grad = None
        loss_mean = loss.item() if loss_mean is None else 0.98 * loss_mean + 0.02 * loss.item()
        show(step + 1, f"loss {loss_mean:.4f}")
        if (step + 1) % 100 == 0:
            elapsed = seconds + time.monotonic() - clock
            log(f"step {step + 1} loss {loss_mean:.4f} norm {norm:.2f} {elapsed:.0f} s")
        if (step + 1) % STEPS_PER_SNAPSHOT == 0:
            snapshot(step + 1)
        if evaluate_every and (step + 1) % evaluate_every == 0:
            log(f"step {step + 1} fp32 {describe(evaluate(weights, evaluate_count))}")
            log(f"step {step + 1} int4 {describe(evaluate(weights, evaluate_count, int4=True))}")
    snapshot(recipe.steps)
    figures = {
        "steps": recipe.steps,
        "seconds": round(seconds + time.monotonic() - clock),
        "loss": loss_mean,
    }
    return weights, figures


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.training.train_demo",
        description="Train the demo model from a seed and write a Hugging Face folder. "
        "Needs the `test` extra (transformers) and, without --eager, a C++ compiler. "
        "About half an hour on two AVX-512 cores. The same seed gives the same data, noise and "
        "starting weights everywhere; the same machine and thread count give the same weights "
        "bit for bit with --eager only, since torch.compile sums in an order of its own.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder the model is written to")
    parser.add_argument("--work", type=Path, help="folder for the resumable state (OUT.training)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on from the state in WORK")
    parser.add_argument("--eager", action="store_true", help="do not use torch.compile")
    parser.add_argument("--evaluate-every", type=int, default=1000, metavar="STEPS")
    parser.add_argument("--evaluate-count", type=int, default=100, metavar="PUZZLES")
    parser.add_argument("--final-count", type=int, default=500, metavar="PUZZLES")
    arguments = parser.parse_args()
    work = arguments.work or arguments.out.with_name(arguments.out.name + ".training")
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, not {arguments.steps}.")
    if importlib.util.find_spec("transformers") is None:
        parser.error("transformers is missing; install the `test` extra.")
    if (work / STATE_FILE).exists() and not arguments.resume:
        parser.error(f"{work} holds an earlier run; add --resume to go on or name another --work.")
    wanted = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    if any(name not in os.environ for name in wanted):
        # Read by the OpenMP runtime at load: spinning threads starve each other on busy cores.
        environment = wanted | dict(os.environ)
        command = [sys.executable, "-m", "scripts.training.train_demo", *sys.argv[1:]]
        os.execve(sys.executable, command, environment)
    recipe = Recipe(seed=arguments.seed, steps=arguments.steps)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("training", total=recipe.steps)
            weights, figures = train(
                recipe,
                work,
                arguments.resume,
                log=lambda line: progress.console.print(line, highlight=False, soft_wrap=True),
                show=lambda step, text: progress.update(task, completed=step, description=text),
                evaluate_every=arguments.evaluate_every,
                evaluate_count=arguments.evaluate_count,
                compiled=not arguments.eager,
            )
    except UserError as error:
        parser.error(str(error))
    save_model(arguments.out, weights)
    rounded = {name: value.detach().bfloat16().float() for name, value in weights.items()}
    figures["fp32"] = evaluate(rounded, arguments.final_count)
    figures["int4"] = evaluate(rounded, arguments.final_count, int4=True)
    figures["recipe"] = asdict(recipe)
    (work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
