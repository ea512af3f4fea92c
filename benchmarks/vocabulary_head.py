"""Time and memory of the chunked vocabulary head against the ways of doing without it.

    python -m benchmarks.vocabulary_head --work FOLDER

Lowers each variant once into FOLDER (minutes each at full size; a program that is there already is
used again), then runs it in processes of its own: every timed round starts each variant in turn, so
that a noisy minute falls on all alike; memory is taken in a pass of its own. Variants:

chunked      the head as it ships (`export/heads/uniform_diffusion.py`)
at once      the same code with one chunk: a whole canvas of logits
plain        softmax, log, cumsum, argmax over a whole canvas of logits, as one would write it
products     the two matrix products alone, in the chunks of `chunked`
products1    the two matrix products alone, over the whole vocabulary at once

stdout: a table for people; the last line is one JSON document.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from export.host.process import processor_name
from export.host.program_file import read_program_memory

VARIANTS = ("chunked", "at_once", "plain", "products", "products1")
BASELINE_TABLE_STD = 0.04
SEED = 20261123


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for lowered programs")
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--canvas", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--chunk-columns", type=int, default=2048)
    parser.add_argument("--arithmetic", choices=("int8", "fp32"), default="int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per round and variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--only", choices=("lower", "memory", "time"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.only == "lower":
        _lower(arguments, arguments.variants[0])
    elif arguments.only:
        print(json.dumps(_measure(arguments, arguments.variants[0])))
    else:
        _report(arguments, *_collect(arguments))


def _program(arguments: argparse.Namespace, variant: str) -> Path:
    chunk = f"-{arguments.chunk_columns}" if variant in ("chunked", "products") else ""
    return arguments.work / (
        f"{variant}-{arguments.arithmetic}-{arguments.vocabulary}"
        f"-{arguments.canvas}-{arguments.hidden}{chunk}.pte"
    )


def _child(arguments: argparse.Namespace, variant: str, only: str) -> dict:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.vocabulary_head"]
    command += ["--only", only, "--variants", variant]
    for name in (
        "work",
        "vocabulary",
        "canvas",
        "hidden",
        "chunk_columns",
        "arithmetic",
        "threads",
        "steps",
    ):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{variant}, {only}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return {} if only == "lower" else json.loads(done.stdout.splitlines()[-1])


def _collect(arguments: argparse.Namespace) -> tuple[dict, dict]:
    """Memory by variant, and step times in ms by variant (one list of rounds, each of steps)."""
    for variant in arguments.variants:
        if not _program(arguments, variant).exists():
            print(f"lowering {variant} ...", file=sys.stderr)
            _child(arguments, variant, "lower")
    memory = {variant: _child(arguments, variant, "memory") for variant in arguments.variants}
    times: dict[str, list[list[float]]] = {variant: [] for variant in arguments.variants}
    for number in range(arguments.rounds):
        shift = number % len(arguments.variants)
        for variant in arguments.variants[shift:] + arguments.variants[:shift]:
            times[variant].append(_child(arguments, variant, "time")["step_ms"])
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    return memory, times


def _report(arguments: argparse.Namespace, memory: dict, times: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    best = {name: [min(steps) for steps in rounds] for name, rounds in times.items()}
    median = {name: statistics.median(rounds) for name, rounds in best.items()}
    table = Table(
        title=f"vocabulary {arguments.vocabulary}, canvas {arguments.canvas}, "
        f"hidden {arguments.hidden}, {arguments.arithmetic}, {arguments.threads} threads"
    )
    columns = (
        "variant", "step ms (median)", "min-max", "step MB above loaded", "arena MB", "loaded MB",
        "file MB",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name in arguments.variants:
        numbers = memory[name]
        table.add_row(
            name,
            f"{median[name]:.0f}",
            f"{min(best[name]):.0f}-{max(best[name]):.0f}",
            *(f"{numbers[key]:.0f}" for key in ("step_mb", "arena_mb", "loaded_mb", "file_mb")),
        )
    Console(width=100).print(table)
    ratios = _ratios(best)
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    document = {
        "benchmark": "vocabulary_head",
        "conditions": {
            "vocabulary": arguments.vocabulary,
            "canvas": arguments.canvas,
            "hidden": arguments.hidden,
            "chunk_columns": arguments.chunk_columns,
            "arithmetic": arguments.arithmetic,
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "steps_per_round": arguments.steps,
            "cores": os.cpu_count(),
            "processor": processor_name(),
            "load_average_at_end": os.getloadavg(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "executorch", "torchao")},
        },
        "median_step_ms": {name: round(value, 1) for name, value in median.items()},
        "round_best_ms": {name: [round(x, 1) for x in rounds] for name, rounds in best.items()},
        "memory": memory,
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
    }
    print(json.dumps(document, separators=(",", ":")))


def _ratios(best: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the rounds of ratios taken within a round."""

    def median_ratio(top: str, bottom: str) -> float:
        return statistics.median(a / b for a, b in zip(best[top], best[bottom], strict=True))

    ratios = {}
    if "chunked" in best:
        for other in ("at_once", "plain"):
            if other in best:
                ratios[f"chunked / {other}"] = median_ratio("chunked", other)
        for other in ("products", "products1"):
            if other in best:
                ratios[f"beyond {other} / {other}"] = median_ratio("chunked", other) - 1
    return ratios


def _lower(arguments: argparse.Namespace, variant: str) -> None:
    from export.backends import lower_stage
    from export.models.head_stages import uniform_diffusion_head_stage

    module = _module(arguments, variant).eval()
    stage = uniform_diffusion_head_stage(module, arguments.canvas, arguments.hidden)
    if variant.startswith("products"):
        stage = replace(
            stage,
            example_inputs=stage.example_inputs[:1],
            input_names=("hidden",),
            output_names=("signal",),
        )
    target = _program(arguments, variant)
    partial = target.with_suffix(".partial")
    lower_stage(stage, "xnnpack").write(partial)
    partial.rename(target)


def _module(arguments: argparse.Namespace, variant: str):  # -> torch.nn.Module
    import torch
    from torch import nn
    from torchao.quantization import IntxUnpackedToInt8Tensor

    from export.heads.samplers import entropy_bound
    from export.heads.uniform_diffusion import DiffusionHead
    from export.heads.vocabulary import after

    generator = torch.Generator().manual_seed(SEED)
    shape = (arguments.vocabulary, arguments.hidden)
    table = torch.randn(shape, generator=generator) * BASELINE_TABLE_STD
    if arguments.arithmetic == "int8":
        table = IntxUnpackedToInt8Tensor.from_hp(table, (1, arguments.hidden), torch.int8)
    chunk = arguments.chunk_columns
    if variant in ("at_once", "plain", "products1"):
        chunk = arguments.vocabulary
    head = DiffusionHead(table, soft_cap=30.0, canvas_length=arguments.canvas, chunk_columns=chunk)

    class Products(nn.Module):
        """The logits of each chunk, and they (not their exponentials) times the table."""

        def __init__(self) -> None:
            super().__init__()
            self.logit_chunks, self.soft_chunks = head.logit_chunks, head.soft_chunks

        def forward(self, hidden):
            hidden = hidden[0]
            soft = self.soft_chunks[0](self.logit_chunks[0](hidden))
            for logit, product in zip(self.logit_chunks[1:], self.soft_chunks[1:], strict=True):
                soft = soft + product(logit(after(hidden, soft[:, :1])))
            return soft

    class Plain(nn.Module):
        """The sampler over a canvas of logits, step by step as in transformers."""

        def __init__(self) -> None:
            super().__init__()
            self.logits, self.soft = head.logit_chunks[0], head.soft_chunks[0]

        def forward(
            self, hidden, canvas, previous, stable, step, settings, uniform, random_tokens, targets
        ):
            logits = torch.tanh(self.logits(hidden[0] * (1 / 30.0))) * 30.0
            logits = logits / entropy_bound.temperature(settings, step)
            probabilities = torch.softmax(logits, dim=1)
            log_total = torch.log(torch.exp(logits).sum(dim=1, keepdim=True))
            entropy = -(probabilities * (logits - log_total)).sum(dim=1).reshape(1, -1)
            argmax = torch.argmax(logits, dim=1).reshape(1, -1)
            below = torch.cumsum(probabilities, dim=1) <= uniform.reshape(-1, 1)
            sample = below.to(torch.int64).sum(dim=1).reshape(1, -1)
            sample = torch.clamp(sample, max=arguments.vocabulary - 1)
            target = torch.gather(logits, 1, targets.reshape(-1, 1)) - log_total
            signal = self.soft(probabilities) * math.sqrt(arguments.hidden)
            decision = entropy_bound.decide(
                sample, argmax, entropy, previous, stable, settings, random_tokens
            )
            return (
                decision.next_canvas, argmax, entropy, decision.accepted, decision.stable_steps,
                decision.finished, target.reshape(1, -1), signal.unsqueeze(0),
            )  # fmt: skip

    if variant.startswith("products"):
        return Products()
    return Plain() if variant == "plain" else head


def _inputs(arguments: argparse.Namespace):  # -> tuple[torch.Tensor, ...]
    import torch

    from export.contract.styles.uniform_diffusion import UniformDiffusionSettings

    generator = torch.Generator().manual_seed(SEED + 1)
    shape = (1, arguments.canvas)

    def tokens():
        return torch.randint(arguments.vocabulary, shape, generator=generator)

    sharpness = torch.rand(*shape, 1, generator=generator) * 15
    return (
        torch.randn(*shape, arguments.hidden, generator=generator) * sharpness,
        tokens(), tokens(), torch.tensor([0]), torch.tensor([20]),
        torch.from_numpy(UniformDiffusionSettings().as_array()),
        torch.rand(shape, generator=generator),
        tokens(), tokens(),
    )  # fmt: skip


def _resident_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}; run this on Linux")


def _measure(arguments: argparse.Namespace, variant: str) -> dict:
    """Runs one lowered variant in this process: step times in ms, or memory in MB (2^20 bytes)."""
    from executorch.extension.pybindings import _C

    _C._unsafe_reset_threadpool(arguments.threads)
    import executorch.kernels.quantized  # noqa: F401
    from executorch.runtime import Runtime

    inputs = _inputs(arguments)
    if variant.startswith("products"):
        inputs = inputs[:1]
    path = _program(arguments, variant)
    method = Runtime.get().load_program(path).load_method("forward")
    loaded = _resident_mb("VmRSS")
    if arguments.only == "memory":
        Path("/proc/self/clear_refs").write_text("5")
        for _ in range(arguments.steps):
            method.execute(inputs)
        arena = read_program_memory(path).planned_bytes
        return {
            "step_mb": round(_resident_mb("VmHWM") - loaded, 1),
            "arena_mb": round(arena / 2**20, 1),
            "loaded_mb": round(loaded, 1),
            "file_mb": round(path.stat().st_size / 2**20, 1),
        }
    method.execute(inputs)
    times = []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        method.execute(inputs)
        times.append((time.perf_counter() - start) * 1e3)
    return {"step_ms": times}


if __name__ == "__main__":
    main()
