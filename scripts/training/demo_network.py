"""The demo model: its configuration, weights, and forward pass for batches of padded prompts.

The forward pass is a batched restatement of `transformers`' `DiffusionGemmaForBlockDiffusion` with
dense experts, and uses its tensor names; `check_against_transformers` compares the two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from export.host.puzzles import KINDS, generate
from scripts.training.puzzle_text import (
    BOS,
    CANVAS_LENGTH,
    EOS,
    PAD,
    VOCABULARY,
    build_tokenizer,
    tensors,
)
from scripts.training.rounding import Weights

KeysAndValues = tuple[Tensor, Tensor]
"""Of one layer, each [B, heads, L, size]."""


def model_config() -> dict[str, Any]:
    """The keyword arguments of the text configuration."""
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
    """An untrained `DiffusionGemmaForBlockDiffusion` in fp32."""
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


class Pass(NamedTuple):
    """What all layers of one pass share.

    positions: of the tokens, [B or 1, S]. masks: added to the scores of full (True) and sliding
    attention, [B or 1, 1, 1, S or 1, L]. cache: the prompts' keys and values of each layer; None
    while they are encoded.
    """

    weights: Weights
    positions: Tensor
    masks: dict[bool, Tensor]
    cache: list[KeysAndValues] | None


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

    def _attention(self, x: Tensor, layer: int, of: Pass) -> tuple[Tensor, KeysAndValues]:
        """Attend from x [B, S, H]; also the keys and values of x itself."""
        prefix, full, dtype = f"layers.{layer}.self_attn.", self.full[layer], self.dtype
        weights = of.weights
        size = self.config["global_head_dim" if full else "head_dim"]
        heads = self.config["num_attention_heads"]
        kv_heads = self.config["num_global_key_value_heads" if full else "num_key_value_heads"]
        batch, length, _ = x.shape
        cos, sin = (table[of.positions][:, :, None] for table in self.tables[full])
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
        if of.cache is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(of.cache[layer], own, strict=True))
        groups = heads // kv_heads
        query = query.view(batch, length, kv_heads, groups, size).permute(0, 2, 3, 1, 4)
        query = query.reshape(batch * kv_heads, groups * length, size)
        keys = key.shape[2]
        scores = torch.bmm(query, key.reshape(batch * kv_heads, keys, size).transpose(1, 2))
        scores = scores.view(batch, kv_heads, groups, length, keys).float() + of.masks[full]
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

    def _layer(self, x: Tensor, layer: int, of: Pass) -> tuple[Tensor, KeysAndValues]:
        prefix, weights = f"layers.{layer}.", of.weights

        def norm(x: Tensor, name: str) -> Tensor:
            return rms_norm(x, weights[f"{prefix}{name}.weight"])

        attended, own = self._attention(norm(x, "input_layernorm"), layer, of)
        x = x + norm(attended, "post_attention_layernorm")
        dense = gated(norm(x, "pre_feedforward_layernorm"), weights, prefix + "mlp.", self.dtype)
        dense = norm(dense, "post_feedforward_layernorm_1")
        sparse = norm(self._experts(x, weights, prefix), "post_feedforward_layernorm_2")
        x = x + norm(dense + sparse, "post_feedforward_layernorm")
        scalar = ("encoder." if of.cache is None else "") + prefix + "layer_scalar"
        return x * weights[scalar], own

    def _embed(self, tokens: Tensor, weights: Weights) -> Tensor:
        return F.embedding(tokens, weights["embed_tokens.weight"]) * (
            self.config["hidden_size"] ** 0.5
        )

    def encode(self, weights: Weights, prompts: Tensor) -> list[KeysAndValues]:
        """Encode right-padded prompts [B, P]; returns keys and values per layer."""
        length = prompts.shape[1]
        positions = torch.arange(length)[None]
        age = positions[0][:, None] - positions[0][None, :]
        seen = {True: age >= 0, False: (age >= 0) & (age < self.config["sliding_window"])}
        masks = {full: torch.where(seen[full], 0.0, -1e9) for full in seen}
        x, cache = self._embed(prompts, weights), []
        encoding = Pass(weights, positions, masks, None)
        for layer in range(len(self.full)):
            x, own = self._layer(x, layer, encoding)
            cache.append(own)
        return cache

    def denoise(
        self,
        weights: Weights,
        canvas: Tensor,
        cache: list[KeysAndValues],
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
        denoising = Pass(weights, positions, masks, cache)
        for layer in range(len(self.full)):
            x, _ = self._layer(x, layer, denoising)
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
