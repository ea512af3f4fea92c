"""Train two small models that differ in one thing: how they generate.

Same shape (Qwen3), tokenizer, puzzles, batches and number of steps; one learns to predict the next
token, the other to fill masks block by block (block diffusion: Arriola et al., BD3-LM, arXiv
2503.09573). So `pocketdiff bench` can set diffusion beside autoregression at equal parameters, with
exact match beside speed. Optimizer, tokenizer and data are those of `scripts.training.train_demo`.

The masked model sees each row twice in one pass, as clean blocks and as noisy ones: a noisy block
sees itself and the clean blocks before it, which is what a denoising step sees over its cache. Its
noise level is 1 for `train_demo.PURE_NOISE_SHARE` of the blocks, as when denoising starts, and
uniform in 0..1 for the others; the loss is the mean cross-entropy of the masked positions, not
weighted by the level. Its folder is in SDAR's format (arXiv 2510.06303): Qwen3's tensors, blocks,
and a confidence threshold that lets several positions through in one step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from export.host.puzzles import KINDS, generate
from scripts.training import train_demo
from scripts.training.train_demo import (
    EOS,
    PAD,
    PROMPT_LENGTH,
    TURN_END,
    VOCABULARY,
    Optimizer,
    Recipe,
    fake_int,
    is_matrix,
    rate_factor,
    save_state,
)

Kind = Literal["autoregressive", "masked"]
Batch = tuple[Tensor, Tensor, Tensor]
"""Tokens [B, L], prompt lengths [B] and ends [B] (behind the end token)."""
KINDS_OF_MODEL: tuple[Kind, ...] = ("autoregressive", "masked")

BLOCK = 8
LENGTH = 56
"""Positions of a row: the longest prompt and canvas, in whole blocks."""
MASK = VOCABULARY.index("<unused0>")
CANVAS = train_demo.CANVAS_LENGTH
STATE_FILE = "state.pt"
STEPS_PER_SNAPSHOT = 50


def model_config(kind: Kind) -> dict[str, Any]:
    """config.json's entries, the same for both but for what names the format."""
    shape = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": train_demo.BOS,
        "eos_token_id": [EOS, TURN_END],
        "pad_token_id": PAD,
    }
    if kind == "autoregressive":
        return shape | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    masked = {"model_type": "sdar", "mask_token_id": MASK, "block_size": BLOCK}
    return shape | masked


def build_model(seed: int) -> Any:
    """An untrained `Qwen3ForCausalLM` in fp32, the same for both kinds."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = model_config("autoregressive")
    shape = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, attn_implementation="sdpa"))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if is_matrix(name, value) or "embed_tokens" in name:
                value.normal_(0, value.shape[-1] ** -0.5)
    return model


def rows_of(seed: int, step: int, tokenizer: Any, scale: float) -> Batch:
    """A step's batch, `scale` times `train_demo.ROWS_PER_STEP`."""
    puzzles = [
        puzzle
        for kind, count in train_demo.ROWS_PER_STEP.items()
        for puzzle in generate(kind, max(1, round(count * scale)), seed=seed * 10_000_019 + step)
    ]
    prompts, lengths, clean = train_demo.tensors(puzzles, tokenizer)
    tokens = torch.full((len(puzzles), LENGTH), PAD)
    tokens[:, :PROMPT_LENGTH] = prompts
    behind = lengths[:, None] + torch.arange(CANVAS)[None]
    tokens.scatter_(1, behind, clean)
    ends = lengths + (clean != PAD).sum(1)
    return tokens, lengths, ends


def by_length(batch: Batch) -> Iterator[Batch]:
    """Rows of equally many blocks together, so that few positions are computed for nothing."""
    blocks = -(-batch[2] // BLOCK)
    for count in blocks.unique().tolist():
        rows = blocks == count
        yield tuple(part[rows] for part in batch)


def autoregressive_loss(model: Any, weights: dict[str, Tensor], batch: Batch) -> Tensor:
    """Mean cross-entropy of the answer's tokens, its end token included."""
    losses = []
    for tokens, lengths, ends in by_length(batch):
        tokens = tokens[:, : int(ends.max())]
        inputs = {"input_ids": tokens[:, :-1], "use_cache": False}
        output = torch.func.functional_call(model, weights, kwargs=inputs)
        position = torch.arange(1, tokens.shape[1])[None]
        counted = (position >= lengths[:, None]) & (position < ends[:, None])
        losses.append(
            F.cross_entropy(output.logits[counted], tokens[:, 1:][counted], reduction="none")
        )
    return torch.cat(losses).mean()


def two_copies(tokens: Tensor, noisy: Tensor, first: int) -> dict[str, Any]:
    """The pass in which noisy blocks see themselves and the clean ones before them.

    `tokens` [B, L] in whole blocks; `noisy` [B, L - first * BLOCK] replaces block `first` and what
    follows. The clean copy ends before the last block, which no other sees. The last rows of the
    model's output are the noisy blocks'.
    """
    clean = tokens[:, :-BLOCK]
    noisy_at = torch.arange(first * BLOCK, tokens.shape[1])
    positions = torch.cat((torch.arange(clean.shape[1]), noisy_at))
    block = positions // BLOCK
    is_noisy = torch.arange(len(positions)) >= clean.shape[1]
    seen = torch.where(
        is_noisy[None],
        is_noisy[:, None] & (block[:, None] == block[None]),
        block[:, None] >= block[None] + is_noisy[:, None].long(),
    )
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    return {
        "input_ids": torch.cat((clean, noisy), 1),
        "attention_mask": mask.expand(len(tokens), 1, -1, -1),
        "position_ids": positions[None].expand(len(tokens), -1),
        "use_cache": False,
    }


def masked_loss(
    model: Any, weights: dict[str, Tensor], batch: Batch, generator: torch.Generator
) -> Tensor:
    """Mean cross-entropy of the masked positions behind the prompt, up to the last block's end."""
    losses = []
    for tokens, lengths, ends in by_length(batch):
        tokens = tokens[:, : -(-int(ends.max()) // BLOCK) * BLOCK]
        first = int(lengths.min()) // BLOCK
        answer = tokens[:, first * BLOCK :]
        of_blocks = (len(tokens), answer.shape[1] // BLOCK)
        level = torch.rand(of_blocks, generator=generator)
        pure = torch.rand(of_blocks, generator=generator) < train_demo.PURE_NOISE_SHARE
        level = torch.where(pure, 1.0, level).repeat_interleave(BLOCK, 1)
        drawn = torch.rand(answer.shape, generator=generator) < level
        masked = drawn & (torch.arange(first * BLOCK, tokens.shape[1])[None] >= lengths[:, None])
        inputs = two_copies(tokens, torch.where(masked, MASK, answer), first)
        output = torch.func.functional_call(model, weights, kwargs=inputs)
        logits = output.logits[:, -answer.shape[1] :]
        losses.append(F.cross_entropy(logits[masked], answer[masked], reduction="none"))
    return torch.cat(losses).mean()


def train(
    kind: Kind,
    recipe: Recipe,
    work: Path,
    show: Callable[[int, str], None],
    log: Callable[[str], None],
    scale: float,
    resume: bool,
) -> tuple[Any, dict[str, Any]]:
    """Train one of the two; goes on from WORK's state with `resume`."""
    work.mkdir(parents=True, exist_ok=True)
    path = work / STATE_FILE
    model, tokenizer = build_model(recipe.seed), train_demo.build_tokenizer()
    weights = dict(model.named_parameters())
    optimizer = Optimizer(weights, recipe, dtype=torch.float32)
    start, seconds, loss_mean, tokens_seen = 0, 0.0, None, 0
    if resume and path.exists():
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            for name, value in state["weights"].items():
                weights[name].copy_(value)
        optimizer.momentum, optimizer.square = state["momentum"], state["square"]
        start, seconds = state["step"], state["seconds"]
        loss_mean, tokens_seen = state["loss"], state["tokens"]
    began = time.monotonic()
    for step in range(start, recipe.steps):
        batch = rows_of(recipe.seed, step, tokenizer, scale)
        seen: dict[str, Tensor] = dict(weights)
        if step >= recipe.int4_from * recipe.steps and step % 2 == 1:
            seen = {n: fake_int(v, 4, 32) if is_matrix(n, v) else v for n, v in weights.items()}
        if kind == "autoregressive":
            loss = autoregressive_loss(model, seen, batch)
        else:
            generator = torch.Generator().manual_seed(recipe.seed * 10_000_019 + step)
            loss = masked_loss(model, seen, batch, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.update(weights, step, rate_factor(step, recipe))
        model.zero_grad(set_to_none=True)
        tokens_seen += int(batch[2].sum())
        loss_mean = loss.item() if loss_mean is None else 0.98 * loss_mean + 0.02 * loss.item()
        show(step + 1, f"{kind} loss {loss_mean:.4f}")
        if (step + 1) % STEPS_PER_SNAPSHOT == 0 or step + 1 == recipe.steps:
            state = {
                "weights": {name: value.detach() for name, value in weights.items()},
                "momentum": optimizer.momentum,
                "square": optimizer.square,
                "step": step + 1,
                "seconds": seconds + time.monotonic() - began,
                "loss": loss_mean,
                "tokens": tokens_seen,
            }
            save_state(path, state)
            log(f"{kind} step {step + 1} loss {loss_mean:.4f} {state['seconds']:.0f} s")
    figures = {
        "kind": kind,
        "steps": recipe.steps,
        "parameters": sum(value.numel() for value in weights.values()),
        "training_tokens": tokens_seen,
        "loss": loss_mean,
        "seconds": round(seconds + time.monotonic() - began),
    }
    return model, figures


def save_model(folder: Path, kind: Kind, model: Any) -> None:
    """Write a Hugging Face folder, weights in bf16; it appears whole or not at all."""
    from safetensors.torch import save_file

    building = folder.with_name(folder.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    train_demo.write_companions(building)
    generation = {
        "bos_token_id": train_demo.BOS,
        "eos_token_id": [EOS, TURN_END],
        "pad_token_id": PAD,
        "max_new_tokens": CANVAS,
    }
    (building / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    config = model_config(kind) | {"torch_dtype": "bfloat16"}
    (building / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.named_parameters()
    }
    save_file(weights, building / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(building.iterdir()):
        file.chmod(0o644)
        os.replace(file, folder / file.name)
    building.rmdir()


def evaluate(folder: Path, count: int) -> dict[str, str]:
    """Exact match on held-out puzzles by this project's own loop, run eagerly."""
    from export.host.eager import eager_engine
    from export.host.evaluation import evaluate as measure
    from export.host.tokenizer import tokenizer_files
    from export.models import stage_model
    from quantize.checkpoint import open_checkpoint

    staged = stage_model(open_checkpoint(folder), maximum_context=LENGTH + BLOCK)
    files = tokenizer_files(folder)
    assert files is not None  # every twin has one
    tokenizer = files.open(staged.info.vocabulary_size, staged.special_tokens)
    puzzles = [puzzle for kind in KINDS for puzzle in generate(kind, count, 7, "held_out")]
    tallies = measure(eager_engine(staged), tokenizer, puzzles)
    return {tally.kind: f"{tally.correct}/{tally.count}" for tally in tallies}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.training.train_twins",
        description="Train the autoregressive and the masked-diffusion demo model from one seed.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for both models")
    parser.add_argument("--kind", choices=KINDS_OF_MODEL, help="only one of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=float, default=1.0, help="times 256 rows a step")
    parser.add_argument("--threads", type=int, help="on a busy machine 1 is the fastest")
    parser.add_argument("--resume", action="store_true", help="go on where a run stopped")
    parser.add_argument("--final-count", type=int, default=100, metavar="PUZZLES")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, not {arguments.steps}.")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    warmup = max(1, arguments.steps // 20)
    recipe = Recipe(seed=arguments.seed, steps=arguments.steps, warmup_steps=warmup)
    for kind in (arguments.kind,) if arguments.kind else KINDS_OF_MODEL:
        folder = arguments.out / kind
        work = arguments.out / f"{kind}.training"
        if (work / STATE_FILE).exists() and not arguments.resume:
            parser.error(f"{work} holds an earlier run; add --resume, or name another --out.")
        with Progress() as progress:
            task = progress.add_task(kind, total=recipe.steps)

            def show(step: int, text: str, progress: Any = progress, task: Any = task) -> None:
                progress.update(task, completed=step, description=text)

            def log(line: str, progress: Any = progress) -> None:
                progress.console.print(line, highlight=False, soft_wrap=True)

            model, figures = train(kind, recipe, work, show, log, arguments.rows, arguments.resume)
        save_model(folder, kind, model)
        figures["exact"] = evaluate(folder, arguments.final_count)
        (work / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
