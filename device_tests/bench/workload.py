"""What each pass asks of the model: prompt, tokens, steps; and the request that asks it."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import numpy as np

from device_tests.bench.context import BenchContext, Workloads
from device_tests.bench.deploy import Deployment
from device_tests.bench.inventory import PACKED_FOLDER
from device_tests.bench.plan import BenchPlan, PlannedRun
from device_tests.results.records import PASSES, Pass
from export.contract import philox
from export.contract.bundle import Bundle
from export.contract.manifest import Manifest
from export.contract.runner_protocol import RunRequest
from export.contract.scalars import Prompt
from export.contract.styles import STYLES
from export.host.puzzles import Puzzle, held_out
from quantize.errors import InputError

PROMPT_STREAM = 2
"""Philox stream of random prompts; the sampler's are 0 and 1."""

DEFAULT_PROMPT_TOKENS = 32
DEFAULT_NEW_TOKENS = 64
DEFAULT_STEPS = 16


def prepare(plan: BenchPlan, bundle: Bundle) -> tuple[Workloads, tuple[Puzzle, ...]]:
    """The workload of each pass as a record has it, and the puzzles if there are to be some.

    Raises InputError for what does not fit the model, and for puzzles for a bundle that has no
    tokenizer, or one that cannot write them.
    """
    workloads: dict[Pass, dict[str, Any]] = {
        name: workload(plan, name, bundle.manifest) for name in PASSES if name != "puzzles"
    }
    if plan.puzzles is None:
        return workloads, ()
    from export.host.evaluation import room_for_answers
    from export.host.tokenizer import open_tokenizer

    puzzles = tuple(held_out(plan.puzzles, plan.seed))
    try:
        tokenizer = open_tokenizer(bundle)
        new_tokens = room_for_answers(puzzles, tokenizer, bundle.manifest.model)
    except InputError as error:
        raise InputError(f"puzzles cannot be asked: {error}; or leave out --puzzles") from error
    workloads["puzzles"] = workloads["natural"] | {
        "prompt_tokens": None,
        "prompt_text": None,
        "max_new_tokens": new_tokens,
        "puzzles": plan.puzzles,
    }
    return workloads, puzzles


def workload(plan: BenchPlan, name: Pass, manifest: Manifest) -> dict[str, Any]:
    """The workload of a pass as a record has it. Raises InputError if it does not fit the model."""
    info = manifest.model
    canvases, force_steps = plan.canvases, plan.force_steps
    style = STYLES[manifest.style]
    if canvases is None:
        wanted = style.usual_canvases(DEFAULT_NEW_TOKENS, info.canvas_length)
        fitting = (info.maximum_context - 1) // info.canvas_length
        canvases = max(1, min(wanted, fitting // 2))
    if force_steps is None:
        force_steps = style.usual_steps(DEFAULT_STEPS, info.canvas_length)
    new_tokens = canvases * info.canvas_length
    room = info.maximum_context - new_tokens
    if room < 1:
        raise InputError(
            f"{canvases} canvases of {info.canvas_length} tokens leave no room for a prompt "
            f"in a context of {info.maximum_context}; give fewer canvases"
        )
    count = min(DEFAULT_PROMPT_TOKENS, room) if plan.prompt_tokens is None else plan.prompt_tokens
    if count > room:
        raise InputError(
            f"a prompt of {count} tokens and {canvases} canvases of {info.canvas_length} do "
            f"not fit in a context of {info.maximum_context}; at most {room} prompt tokens do"
        )
    natural = name == "natural"
    text = plan.prompt_text if natural and manifest.tokenizer is not None else None
    return {
        "prompt_tokens": count if text is None else None,
        "prompt_text": text,
        "max_new_tokens": new_tokens,
        "seed": plan.seed,
        "force_steps": None if natural else force_steps,
        "settings": None if plan.settings is None else dict(plan.settings),
        # A first run that is warmed up would hide what loading from storage costs.
        "warmup_steps": 0 if name == "cold" else plan.warmup_steps,
        "memory_interval_ms": plan.memory_interval_ms if name == "memory" else None,
        "memory_limit_bytes": plan.memory_limit_bytes,
    } | (
        # Only where there is one: runs from before there were budgets had none.
        {}
        if plan.memory_budget_bytes is None
        else {"memory_budget_bytes": plan.memory_budget_bytes}
    )


def random_prompt(manifest: Manifest, count: int, seed: int) -> tuple[int, ...]:
    """`count` token ids, uniform over all that are not special, the same for the same seed."""
    special = manifest.special_tokens
    named = {*special.eos, special.pad, special.bos} - {None}
    ordinary = [i for i in range(min(manifest.model.vocabulary_size, 2**24)) if i not in named]
    if not ordinary:
        raise InputError("the bundle's vocabulary has only special tokens; give a prompt as text")
    drawn = philox.words(seed, 0, 0, PROMPT_STREAM, count).astype(np.uint64)
    places = (drawn * np.uint64(len(ordinary))) >> np.uint64(32)
    return tuple(ordinary[int(place)] for place in places)


def run_request(context: BenchContext, run: PlannedRun, run_id: str) -> RunRequest:
    """The request of a run."""
    work, deployment = context.workloads[run.pass_], context.deployment
    budget_bytes = work.get("memory_budget_bytes")
    prompts: tuple[Prompt, ...]
    if run.pass_ == "puzzles":
        prompts = tuple(puzzle.prompt for puzzle in context.puzzles)
    elif work["prompt_text"] is not None:
        prompts = (work["prompt_text"],)
    else:
        count, seed = work["prompt_tokens"], context.plan.seed
        prompts = (random_prompt(context.bundle.manifest, count, seed),)
    return RunRequest(
        run_id=run_id,
        bundle=deployment.remote_folder,
        bundle_sha256=deployment.bundle_sha256,
        threads=run.threads,
        cold=run.pass_ == "cold",
        warmup_steps=work["warmup_steps"],
        prompts=prompts,
        max_new_tokens=work["max_new_tokens"],
        seed=work["seed"],
        force_steps=work["force_steps"],
        settings=work["settings"],
        memory_interval_ms=work["memory_interval_ms"],
        memory_limit_bytes=work["memory_limit_bytes"],
        memory_budget_bytes=budget_bytes,
        packed_weights=None if budget_bytes is None else packed_folder(deployment),
    )


def packed_folder(deployment: Deployment) -> str:
    """Where the packed weights of a deployed bundle lie: beside the folder of all bundles."""
    return f"{PurePosixPath(deployment.remote_folder).parents[1]}/{PACKED_FOLDER}"
