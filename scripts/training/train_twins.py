"""Train two small models that differ in one thing: how they generate.

Same shape (Qwen3), tokenizer, puzzles, batches and number of steps; one learns to predict the next
token, the other to fill masks block by block (block diffusion: Arriola et al., BD3-LM, arXiv
2503.09573). So `pocketdiff bench` can set diffusion beside autoregression at equal parameters, with
exact match beside speed. Optimizer, tokenizer and data are those of `scripts.training.train_demo`.

The masked model sees each row twice in one pass, as clean blocks and as noisy ones: a noisy block
sees itself and the clean blocks before it, which is what a denoising step sees over its cache. Its
noise level is 1 for `PURE_NOISE_SHARE` of the blocks, as when denoising starts, and
uniform in 0..1 for the others; the loss is the mean cross-entropy of the masked positions, not
weighted by the level. Its folder is in SDAR's format (arXiv 2510.06303): Qwen3's tensors, blocks,
and a confidence threshold that lets several positions through in one step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from export.host.puzzles import KINDS, generate
from quantize.files.durable import write_json
from scripts.bundles import open_eager
from scripts.commands import run_command
from scripts.console import Reporter, reporting
from scripts.options import Seed, Threads
from scripts.training.loop import FIGURES_FILE, check_work, train_steps, written_beside
from scripts.training.optimizer import Recipe
from scripts.training.options import Destination, FinalPuzzles, Resume, Steps
from scripts.training.puzzle_text import (
    BOS,
    CANVAS_LENGTH,
    EOS,
    PAD,
    PROMPT_LENGTH,
    PURE_NOISE_SHARE,
    TURN_END,
    VOCABULARY,
    build_tokenizer,
    puzzles_of_step,
    step_seed,
    tensors,
    write_companions,
)
from scripts.training.rounding import Weights, fake_int, is_matrix

Kind = Literal["autoregressive", "masked"]
Batch = tuple[Tensor, Tensor, Tensor]
"""Tokens [B, L], prompt lengths [B] and ends [B] (behind the end token)."""
KINDS_OF_MODEL: tuple[Kind, ...] = ("autoregressive", "masked")

BLOCK = 8
LENGTH = 56
"""Positions of a row: the longest prompt and canvas, in whole blocks."""
MASK = VOCABULARY.index("<unused0>")
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
        "bos_token_id": BOS,
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
    """A step's batch, `scale` times `puzzle_text.ROWS_PER_STEP`."""
    puzzles = puzzles_of_step(seed, step, scale)
    prompts, lengths, clean = tensors(puzzles, tokenizer)
    tokens = torch.full((len(puzzles), LENGTH), PAD)
    tokens[:, :PROMPT_LENGTH] = prompts
    behind = lengths[:, None] + torch.arange(CANVAS_LENGTH)[None]
    tokens.scatter_(1, behind, clean)
    ends = lengths + (clean != PAD).sum(1)
    return tokens, lengths, ends


def by_length(batch: Batch) -> Iterator[Batch]:
    """Rows of equally many blocks together, so that few positions are computed for nothing."""
    blocks = -(-batch[2] // BLOCK)
    for count in blocks.unique().tolist():
        rows = blocks == count
        tokens, lengths, ends = (part[rows] for part in batch)
        yield tokens, lengths, ends


def autoregressive_loss(model: Any, weights: Weights, batch: Batch) -> Tensor:
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


def masked_loss(model: Any, weights: Weights, batch: Batch, generator: torch.Generator) -> Tensor:
    """Mean cross-entropy of the masked positions behind the prompt, up to the last block's end."""
    losses = []
    for tokens, lengths, ends in by_length(batch):
        tokens = tokens[:, : -(-int(ends.max()) // BLOCK) * BLOCK]
        first = int(lengths.min()) // BLOCK
        answer = tokens[:, first * BLOCK :]
        of_blocks = (len(tokens), answer.shape[1] // BLOCK)
        level = torch.rand(of_blocks, generator=generator)
        pure = torch.rand(of_blocks, generator=generator) < PURE_NOISE_SHARE
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
    reporter: Reporter,
    *,
    scale: float = 1.0,
    resume: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """Train one of the two, or go on from the state in `work`; the model and the run's figures."""
    model, tokenizer = build_model(recipe.seed), build_tokenizer()
    weights = dict(model.named_parameters())

    def loss_of_step(seen: Weights, step: int) -> tuple[Tensor, int]:
        batch = rows_of(recipe.seed, step, tokenizer, scale)
        if kind == "autoregressive":
            loss = autoregressive_loss(model, seen, batch)
        else:
            generator = torch.Generator().manual_seed(step_seed(recipe.seed, step))
            loss = masked_loss(model, seen, batch, generator)
        return loss, int(batch[2].sum())

    figures = train_steps(
        weights,
        recipe,
        work,
        loss_of_step,
        lambda exact: {n: fake_int(v, 4, 32) if is_matrix(n, v) else v for n, v in exact.items()},
        reporter,
        resume=resume,
        steps_per_snapshot=STEPS_PER_SNAPSHOT,
        dtype=torch.float32,
    )
    parameters = sum(value.numel() for value in weights.values())
    return model, {"kind": kind, "parameters": parameters} | figures


def save_model(folder: Path, kind: Kind, model: Any) -> None:
    """Write a Hugging Face folder, weights in bf16."""
    from safetensors.torch import save_file

    weights = {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.named_parameters()
    }
    with written_beside(folder) as building:
        write_companions(building)
        write_json(building / "config.json", model_config(kind) | {"torch_dtype": "bfloat16"})
        save_file(weights, building / "model.safetensors", metadata={"format": "pt"})


def evaluate(folder: Path, count: int) -> dict[str, str]:
    """Exact match on held-out puzzles by this project's own loop, run eagerly."""
    from export.host.evaluation import evaluate as measure

    _, engine, tokenizer = open_eager(folder, LENGTH + BLOCK)
    puzzles = [puzzle for kind in KINDS for puzzle in generate(kind, count, 7, "held_out")]
    tallies = measure(engine, tokenizer, puzzles)
    return {tally.kind: f"{tally.correct}/{tally.count}" for tally in tallies}


def train_twins(
    destination: Destination,
    kind: Annotated[Kind | None, typer.Option(help="Only this one (default: both).")] = None,
    seed: Seed = 0,
    steps: Steps = 3000,
    rows: Annotated[float, typer.Option(help="Times 256 rows a step.")] = 1.0,
    threads: Threads = None,
    resume: Resume = False,
    puzzles: FinalPuzzles = 100,
) -> None:
    """Train the autoregressive and the masked-diffusion demo model from one seed.

    On a busy machine one thread is the fastest.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    recipe = Recipe(seed=seed, steps=steps, warmup_steps=max(1, steps // 20))
    for each in (kind,) if kind else KINDS_OF_MODEL:
        work = destination / f"{each}.training"
        check_work(work, resume)
        with reporting(each) as reporter:
            model, figures = train(each, recipe, work, reporter, scale=rows, resume=resume)
        save_model(destination / each, each, model)
        figures["exact"] = evaluate(destination / each, puzzles)
        write_json(work / FIGURES_FILE, figures)
        print(json.dumps(figures))


def main() -> int:
    """The entry point; returns the exit code."""
    return run_command(lambda: typer.run(train_twins), "train_twins")


if __name__ == "__main__":
    sys.exit(main())
