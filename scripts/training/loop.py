"""The training loop: optimizer steps that can be interrupted and resumed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.errors import InputError, OutputError
from quantize.files.durable import replacing
from scripts.console import Reporter
from scripts.training.optimizer import Optimizer, Recipe, rate_factor
from scripts.training.rounding import Weights

STATE_FILE = "state.pt"
FIGURES_FILE = "figures.json"


def check_work(work: Path, resume: bool) -> None:
    """Raise OutputError if `work` has a run that is not to be gone on with."""
    if (work / STATE_FILE).exists() and not resume:
        raise OutputError(
            f"{work} holds an earlier run; add --resume to go on, or give another folder"
        )


def train_steps(
    weights: Weights,
    recipe: Recipe,
    work: Path,
    loss_of_step: Callable[[Weights, int], tuple[Tensor, int]],
    rounded: Callable[[Weights], Weights],
    reporter: Reporter,
    *,
    resume: bool,
    steps_per_snapshot: int,
    dtype: torch.dtype = torch.bfloat16,
    after_step: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Train the weights in place, or go on from the state in `work`; returns the run's figures.

    loss_of_step: the loss of a step with these weights, and the tokens that it learned from.
    rounded: the weights as int4 rounds them; see `Recipe.int4_from`. dtype: of Muon's products.
    Raises InputError for the state of a run with another seed.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / STATE_FILE
    optimizer = Optimizer(weights, recipe, dtype)
    start, seconds, loss_mean, tokens = 0, 0.0, None, 0
    if resume and path.exists():
        state = torch.load(path, weights_only=True)
        if state["recipe"]["seed"] != recipe.seed:
            raise InputError(
                f"{path} was made with seed {state['recipe']['seed']}, not {recipe.seed}; "
                "use that seed or another folder"
            )
        with torch.no_grad():
            for name, value in state["weights"].items():
                weights[name].copy_(value)
        optimizer.momentum, optimizer.square = state["momentum"], state["square"]
        start, seconds = state["step"], state["seconds"]
        loss_mean, tokens = state["loss"], state["tokens"]
        reporter.line(f"resumed at step {start}")
    began = time.monotonic() - seconds
    for step in range(start, recipe.steps):
        int4 = step >= recipe.int4_from * recipe.steps and step % 2 == 1
        loss, learned_from = loss_of_step(rounded(weights) if int4 else weights, step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.update(weights, step, rate_factor(step, recipe))
        for value in weights.values():
            value.grad = None
        tokens += learned_from
        loss_mean = loss.item() if loss_mean is None else 0.98 * loss_mean + 0.02 * loss.item()
        done = step + 1
        reporter(done, recipe.steps, f"loss {loss_mean:.4f}")
        if done % steps_per_snapshot == 0 or done == recipe.steps:
            seconds = time.monotonic() - began
            state = {
                "weights": {name: value.detach() for name, value in weights.items()},
                "momentum": optimizer.momentum,
                "square": optimizer.square,
                "step": done,
                "seconds": seconds,
                "loss": loss_mean,
                "tokens": tokens,
                "recipe": asdict(recipe),
            }
            with replacing(path) as file:
                torch.save(state, file)
            reporter.line(f"step {done} loss {loss_mean:.4f} norm {norm:.2f} {seconds:.0f} s")
        after_step(done)
    return {
        "steps": recipe.steps,
        "seconds": round(time.monotonic() - began),
        "loss": loss_mean,
        "training_tokens": tokens,
    }


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A folder whose files replace those of `folder` when the block ends, one after the other."""
    building = folder.with_name(folder.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    yield building
    folder.mkdir(exist_ok=True)
    for file in sorted(building.iterdir()):
        file.chmod(0o644)
        os.replace(file, folder / file.name)
    building.rmdir()
