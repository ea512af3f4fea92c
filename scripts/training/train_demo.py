"""Train the small DiffusionGemma that ships with the repository.

The architecture's own objective: the prompt is encoded causally into the KV cache, the canvas is
corrupted by uniform random tokens at a random noise level, the loss is the cross-entropy against
the clean canvas over all its positions, and half of the rows see their own first guess through
self-conditioning. Accuracy is measured with `transformers`' own `generate`, that is with the real
sampler.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from export.host.puzzles import KINDS, generate, is_exact
from quantize.errors import InputError
from quantize.files.durable import write_json
from scripts.commands import run_command
from scripts.console import Reporter, reporting
from scripts.options import Seed
from scripts.training.demo_network import (
    Network,
    build_model,
    check_against_transformers,
    initial_weights,
    load_into,
)
from scripts.training.loop import FIGURES_FILE, check_work, train_steps, written_beside
from scripts.training.optimizer import Recipe
from scripts.training.options import Destination, FinalPuzzles, Resume, Steps
from scripts.training.puzzle_text import (
    CANVAS_LENGTH,
    EOS,
    PAD,
    PURE_NOISE_SHARE,
    TURN_END,
    VOCABULARY,
    build_tokenizer,
    puzzles_of_step,
    step_seed,
    tensors,
    write_companions,
)
from scripts.training.rounding import Int8Activations, Weights, quantized_weights

EVALUATION_SEED = 20_000_003
STEPS_PER_SNAPSHOT = 100
OPENMP = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""Read by the OpenMP runtime at load: spinning threads starve each other on busy cores."""


def training_batch(seed: int, step: int, tokenizer: Any) -> tuple[Tensor, ...]:
    """The batch of one step: prompts, their lengths, noisy and clean canvases, temperatures."""
    puzzles = puzzles_of_step(seed, step)
    random.Random(step).shuffle(puzzles)
    prompts, lengths, clean = tensors(puzzles, tokenizer)
    generator = torch.Generator().manual_seed(step_seed(seed, step))
    rows = len(puzzles)
    level = torch.rand(rows, generator=generator)
    level[torch.rand(rows, generator=generator) < PURE_NOISE_SHARE] = 1.0
    noise = torch.randint(0, len(VOCABULARY), clean.shape, generator=generator)
    replaced = torch.rand(clean.shape, generator=generator) < level[:, None]
    noisy = torch.where(replaced, noise, clean)
    temperature = 0.4 + 0.4 * level
    return prompts, lengths, noisy, clean, temperature


@torch.no_grad()
def evaluate(
    weights: Weights, count: int, seed: int = EVALUATION_SEED, int4: bool = False
) -> dict[str, dict[str, Any]]:
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


def describe(results: dict[str, dict[str, Any]]) -> str:
    """Return one line per evaluation for the log."""
    return "  ".join(
        f"{kind} {r['exact']}/{r['count']} ({r['steps_per_canvas']} steps)"
        for kind, r in results.items()
    )


def save_model(folder: Path, weights: Weights) -> None:
    """Write a Hugging Face folder, weights in bf16, without the untrained vision tower."""
    from safetensors.torch import load_file, save_file

    model = build_model()
    load_into(model, weights)
    with written_beside(folder) as building:
        model.to(torch.bfloat16).save_pretrained(building)
        path = building / "model.safetensors"
        text_only = {
            name: value
            for name, value in load_file(path).items()
            if "vision_tower" not in name and "embed_vision" not in name
        }
        save_file(text_only, path, metadata={"format": "pt"})
        write_companions(
            building,
            max_denoising_steps=48,
            sampler_config={"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
            t_min=0.4,
            t_max=0.8,
            stability_threshold=1,
            confidence_threshold=0.005,
        )


def train(
    recipe: Recipe,
    work: Path,
    reporter: Reporter,
    *,
    resume: bool = False,
    evaluate_every: int = 0,
    evaluate_count: int = 0,
    compiled: bool = True,
) -> tuple[Weights, dict[str, Any]]:
    """Train, or go on after an interruption; returns the weights and the run's figures.

    evaluate_every: steps between two measurements of accuracy, 0 for none.
    """
    weights = initial_weights(recipe.seed)
    difference = check_against_transformers(weights)
    reporter.line(f"largest logit difference to transformers: {difference:.2e}")
    if difference > 1e-4:
        raise RuntimeError(f"The forward pass differs from transformers by {difference:.2e}.")
    for value in weights.values():
        value.requires_grad_(True)
    network, tokenizer = Network(torch.bfloat16), build_tokenizer()
    loss_of = torch.compile(network.loss, dynamic=False) if compiled else network.loss

    def loss_of_step(seen: Weights, step: int) -> tuple[Tensor, int]:
        prompts, lengths, noisy, clean, temperature = training_batch(recipe.seed, step, tokenizer)
        loss = loss_of(seen, prompts, lengths, noisy, clean, temperature).mean()
        return loss, int(lengths.sum()) + clean.numel()

    def after_step(step: int) -> None:
        if evaluate_every and step % evaluate_every == 0:
            for name, int4 in (("fp32", False), ("int4", True)):
                found = describe(evaluate(weights, evaluate_count, int4=int4))
                reporter.line(f"step {step} {name} {found}")

    figures = train_steps(
        weights,
        recipe,
        work,
        loss_of_step,
        quantized_weights,
        reporter,
        resume=resume,
        steps_per_snapshot=STEPS_PER_SNAPSHOT,
        after_step=after_step,
    )
    return weights, figures


def train_demo(
    destination: Destination,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="For the resumable state (default: DESTINATION.training)."
        ),
    ] = None,
    seed: Seed = 0,
    steps: Steps = Recipe.steps,
    resume: Resume = False,
    eager: Annotated[bool, typer.Option("--eager", help="Do not use torch.compile.")] = False,
    evaluate_every: Annotated[
        int, typer.Option(metavar="STEPS", help="Measure accuracy so often; 0: not before the end.")
    ] = 1000,
    evaluate_puzzles: Annotated[
        int, typer.Option(min=1, help="Held-out puzzles of each kind then.")
    ] = 100,
    puzzles: FinalPuzzles = 500,
) -> None:
    """Train the demo model from a seed and write a Hugging Face folder.

    Needs the `test` extra (transformers) and, without --eager, a C++ compiler. About half an hour
    on two AVX-512 cores. The same seed gives the same data, noise and starting weights everywhere;
    the same machine and thread count give the same weights bit for bit with --eager only, since
    torch.compile sums in an order of its own.
    """
    work = work or destination.with_name(destination.name + ".training")
    if importlib.util.find_spec("transformers") is None:
        raise InputError("transformers is missing; install the `test` extra")
    check_work(work, resume)
    if any(name not in os.environ for name in OPENMP):
        command = [sys.executable, "-m", "scripts.training.train_demo", *sys.argv[1:]]
        os.execve(sys.executable, command, OPENMP | dict(os.environ))
    recipe = Recipe(seed=seed, steps=steps)
    with reporting("training") as reporter:
        weights, figures = train(
            recipe,
            work,
            reporter,
            resume=resume,
            evaluate_every=evaluate_every,
            evaluate_count=evaluate_puzzles,
            compiled=not eager,
        )
    save_model(destination, weights)
    stored = {name: value.detach().bfloat16().float() for name, value in weights.items()}
    figures["fp32"] = evaluate(stored, puzzles)
    figures["int4"] = evaluate(stored, puzzles, int4=True)
    figures["recipe"] = asdict(recipe)
    write_json(work / FIGURES_FILE, figures)
    print(json.dumps(figures))


def main() -> int:
    """The entry point; returns the exit code."""
    return run_command(lambda: typer.run(train_demo), "train_demo")


if __name__ == "__main__":
    sys.exit(main())
