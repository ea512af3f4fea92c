"""Samplers of masked diffusion as their papers state them, on full logits and without a cache.

A step recomputes the whole text under an explicit mask. Differences to the published code, all
chosen once for the project: the mask token is never sampled; a random token is drawn by inverse
CDF from a given uniform number (`export.contract.philox`) instead of by Gumbel noise or
multinomial. Every choice is clear (`clear_choices`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from export.contract import philox
from tests.support.clear_choices import assert_clear, highest, over
from tests.support.tiny_decoder import MASK_TOKEN, Weights, plain_hidden

Logits = Callable[[Tensor, Tensor], Tensor]
"""Tokens `[N]` and what each position sees, `[N, N]` bool -> logits `[N, V]`."""


def sees_everything(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool)


def block_causal(length: int, block: int) -> Tensor:
    """Each position sees its own block and those before; blocks count from position 0."""
    blocks = torch.arange(length) // block
    return blocks[:, None] >= blocks[None, :]


def get_num_transfer_tokens(masked: int, steps: int) -> list[int]:
    """LLaDA `generate.py`: an even split, the remainder in the first steps."""
    return [masked // steps + (1 if i < masked % steps else 0) for i in range(steps)]


def sample(
    logits: Tensor, mask: int, temperature: float = 0.0, uniform: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[M]`, probabilities `[M, V]` and the tokens' margins `[M]` of rows of logits."""
    logits = logits.clone()
    logits[:, mask] = float("-inf")
    if temperature == 0:
        first, second = logits.topk(2).values.unbind(-1)
        return logits.argmax(-1), torch.softmax(logits, -1), first - second
    probabilities = torch.softmax(logits / temperature, -1)
    cumulative = probabilities.cumsum(-1)
    below = (cumulative <= uniform[:, None]).sum(-1)
    margins = (cumulative - uniform[:, None]).abs().amin(-1)
    return below.clamp(max=logits.shape[1] - 1), probabilities, margins


def commit(canvas: Tensor, chosen: Tensor, tokens: Tensor, margins: Tensor) -> None:
    """Write the chosen tokens into the canvas, in place."""
    assert_clear(margins[chosen])
    canvas[chosen] = tokens[chosen]


def llada(
    model: Logits,
    prompt: list[int],
    answer: int,
    block: int,
    steps: int,
    temperature: float = 0.0,
    seed: int = 0,
    mask: int = MASK_TOKEN,
) -> list[int]:
    """LLaDA (arXiv 2502.09992), `generate`: low-confidence remasking with a fixed number a step.

    Semi-autoregressive: blocks of the answer from left to right, all masks visible throughout.
    """
    x = torch.tensor(prompt + [mask] * answer)
    for number in range(answer // block):
        begin = len(prompt) + number * block
        counts = get_num_transfer_tokens(block, steps)
        for step, count in enumerate(counts, start=1):
            logits = model(x, sees_everything(len(x)))
            uniform = torch.from_numpy(philox.uniforms(seed, number, step, block))
            tokens, probabilities, margins = sample(
                logits[begin : begin + block], mask, temperature, uniform
            )
            confidence = probabilities.gather(1, tokens[:, None])[:, 0]
            is_masked = x[begin : begin + block] == mask
            confidence = torch.where(is_masked, confidence, -torch.inf)
            chosen = highest(confidence, count)
            commit(x[begin : begin + block], chosen, tokens, margins)
    return x[len(prompt) :].tolist()


def dream(
    model: Logits,
    prompt: list[int],
    answer: int,
    block: int,
    steps: int,
    order: str,
    mask: int = MASK_TOKEN,
) -> list[int]:
    """Dream (arXiv 2508.15487), `_sample`: the order of entropy or of the top-2 margin.

    The logits are those of an autoregressive model: a position's are one to its left. The number a
    step is LLaDA's even split; Dream's time grid rounds a nearly even one down.
    """
    x = torch.tensor(prompt + [mask] * answer)
    for number in range(answer // block):
        begin = len(prompt) + number * block
        for count in get_num_transfer_tokens(block, steps):
            logits = model(x, sees_everything(len(x)))
            logits = torch.cat([logits[:1], logits[:-1]])
            tokens, probabilities, margins = sample(logits[begin : begin + block], mask)
            if order == "entropy":
                score = (probabilities * torch.log(probabilities + 1e-10)).sum(-1)
            else:
                best = probabilities.topk(2).values
                score = best[:, 0] - best[:, 1]
            score = torch.where(x[begin : begin + block] == mask, score, -torch.inf)
            chosen = highest(score, count)
            commit(x[begin : begin + block], chosen, tokens, margins)
    return x[len(prompt) :].tolist()


def fast_dllm_prefix_cache(
    weights: Weights, prompt: list[int], answer: int, block: int, steps: int, shift: int
) -> list[int]:
    """Fast-dLLM (arXiv 2505.22618), `generate_with_prefix_cache`, with a fixed number a step.

    A block's first step computes everything; later ones compute from the block on, against the
    keys and values that the first one found for the positions before. With a token shift, one row
    more is computed, so that the block's first position has its logits.
    """
    x = torch.tensor(prompt + [MASK_TOKEN] * answer)
    for begin in range(len(prompt), len(prompt) + answer, block):
        first = begin - shift
        for step, count in enumerate(get_num_transfer_tokens(block, steps)):
            if step == 0:
                hidden, cache = plain_hidden(weights, x, sees_everything(len(x)))
                past = [(k[:first], v[:first]) for k, v in cache]
                hidden = hidden[first:]
            else:
                visible = torch.ones(len(x) - first, len(x), dtype=torch.bool)
                hidden, _ = plain_hidden(weights, x[first:], visible, past if first else None)
            tokens, probabilities, margins = sample(hidden[:block] @ weights.head.T, MASK_TOKEN)
            confidence = probabilities.gather(1, tokens[:, None])[:, 0]
            is_masked = x[begin : begin + block] == MASK_TOKEN
            confidence = torch.where(is_masked, confidence, -torch.inf)
            chosen = highest(confidence, count)
            commit(x[begin : begin + block], chosen, tokens, margins)
    return x[len(prompt) :].tolist()


def sdar(
    model: Logits,
    prompt: list[int],
    answer: int,
    block: int,
    steps: int,
    threshold: float,
    temperature: float = 0.0,
    seed: int = 0,
    mask: int = MASK_TOKEN,
) -> list[int]:
    """SDAR (arXiv 2510.06303), `block_diffusion_generate`, `low_confidence_dynamic`.

    All positions over the threshold, or the step's number of best ones if those are fewer. A
    threshold over 1 is `low_confidence_static`, and bd3lm's sampler.
    """
    blocks = -(-(len(prompt) + answer) // block)
    x = torch.tensor(prompt + [mask] * (blocks * block - len(prompt)))
    visible = block_causal(len(x), block)
    for canvas, number in enumerate(range(len(prompt) // block, blocks)):
        begin, end = number * block, (number + 1) * block
        counts = get_num_transfer_tokens(int((x[begin:end] == mask).sum()), steps)
        known = (x[begin:end] != mask).sum()
        for step, count in enumerate(counts, start=1):
            is_masked = x[begin:end] == mask
            if not is_masked.any():
                break
            logits = model(x[:end], visible[:end, :end])[begin:end]
            uniform = torch.zeros(block)
            drawn = torch.from_numpy(philox.uniforms(seed, canvas, step, block - int(known)))
            uniform[known:] = drawn
            tokens, probabilities, margins = sample(logits, mask, temperature, uniform)
            confidence = probabilities.gather(1, tokens[:, None])[:, 0]
            confidence = torch.where(is_masked, confidence, -torch.inf)
            chosen = over(confidence, threshold)
            if chosen.sum() < count:
                chosen = torch.zeros(block, dtype=torch.bool)
                chosen[highest(confidence, min(count, int(is_masked.sum())))] = True
            commit(x[begin:end], chosen, tokens, margins)
    return x[len(prompt) :].tolist()


def fast_dllm_v2(
    model: Logits,
    prompt: list[int],
    answer: int,
    block: int,
    small_block: int,
    threshold: float,
    mask: int = MASK_TOKEN,
) -> list[int]:
    """Fast-dLLM v2 (arXiv 2509.26328), `batch_sample`: small blocks within a block, token shift.

    Each step takes the positions of the small block over the threshold, and the best one. Its code
    takes a block's first token from the logits before it without asking for confidence; here that
    position is masked like the others.
    """
    total = -(-(len(prompt) + answer) // small_block) * small_block
    blocks = -(-total // block)
    x = torch.tensor(prompt + [mask] * (blocks * block - len(prompt)))
    visible = block_causal(len(x), block)
    for begin in range(len(prompt) // small_block * small_block, total, small_block):
        end = begin + small_block
        seen = (begin // block + 1) * block
        while (is_masked := x[begin:end] == mask).any():
            logits = model(x[:seen], visible[:seen, :seen])
            logits = torch.cat([logits[:1], logits[:-1]])[begin:end]
            tokens, probabilities, margins = sample(logits, mask)
            confidence = probabilities.gather(1, tokens[:, None])[:, 0]
            confidence = torch.where(is_masked, confidence, -torch.inf)
            chosen = over(confidence, threshold)
            chosen[highest(confidence, 1)] = True
            commit(x[begin:end], chosen, tokens, margins)
    return x[len(prompt) : total].tolist()
