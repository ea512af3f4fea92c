"""Time of one layer's mixture of experts, dense against gathered, beside what the exporter expects.

    python -m benchmarks.experts --work FOLDER

Lowers both forms of each shape once into FOLDER (a program that is there already is used again),
with random int4 weights of group 32, and times them in turn in one process, so that a noisy minute
falls on both alike. The estimate is `choose_expert_computation`'s, whose constants this backs.
Routings: `even` draws each row's experts at random, `uneven` sends all rows to the first experts.

stdout: a table for people; the last line is one JSON document.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from export.host.process import processor_name

FORMS = ("dense", "gather")
ROUTINGS = ("even", "uneven")
SEED = 20261123
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Shape:
    """One layer: positions, sizes, and how many experts there are and each row takes."""

    tokens: int
    hidden_size: int
    expert_size: int
    num_experts: int
    top_k: int

    def __str__(self) -> str:
        return "-".join(str(size) for size in asdict(self).values())


SHAPES = tuple(
    Shape(*sizes)
    for sizes in (
        (256, 1024, 512, 64, 8),
        (256, 1024, 512, 16, 4),
        (256, 512, 256, 32, 4),
        (64, 256, 128, 16, 4),
        (64, 128, 64, 8, 2),
        (24, 128, 64, 8, 2),
        (64, 128, 64, 4, 2),
    )
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for lowered programs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--shape",
        action="append",
        type=lambda text: Shape(*map(int, text.split("-"))),
        help="tokens-hidden-expert-experts-topk; may be given again (default: seven shapes)",
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    shapes = arguments.shape or list(SHAPES)
    for shape in shapes:
        for form in FORMS:
            if not _program(arguments.work, shape, form).exists():
                print(f"lowering {form} {shape} ...", file=sys.stderr)
                _lower(arguments.work, shape, form)
    _report(arguments, [_measure(arguments, shape) for shape in shapes])


def _program(work: Path, shape: Shape, form: str) -> Path:
    return work / f"{form}-{shape}.pte"


def _lower(work: Path, shape: Shape, form: str) -> None:
    import torch

    from export.backends import lower_stage
    from export.models.staging import StageModule

    torch.set_num_threads(1)
    module = _module(shape, form)
    inputs = (torch.randn(shape.tokens, shape.hidden_size), *_routing(shape, "even"))
    stage = StageModule(
        name=form,
        role="layers",
        module=module,
        example_inputs=inputs,
        input_names=("x", "weights", "index"),
        output_names=("mixed",),
        mutates_buffers=True,
    )
    start, cpu = time.perf_counter(), time.process_time()
    lowered = lower_stage(stage, "xnnpack")
    seconds = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    target = _program(work, shape, form)
    about = {"lowering_s": seconds, "file_mb": lowered.bytes / 2**20}
    target.with_suffix(".json").write_text(json.dumps(about))
    partial = target.with_suffix(".partial")
    lowered.write(partial)
    partial.rename(target)


def _module(shape: Shape, form: str):  # -> torch.nn.Module
    import torch
    from torch import nn
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    from export.models.blocks import gelu_tanh
    from export.models.experts import DenseExperts, Expert, GatheredExperts

    generator = torch.Generator().manual_seed(SEED)
    sizes = (shape.hidden_size, shape.expert_size)

    def set_random(linear: nn.Linear) -> None:
        weight = torch.randn(linear.weight.shape, generator=generator)
        linear.weight = nn.Parameter(weight * linear.in_features**-0.5)

    experts = [Expert(*sizes, gelu_tanh) for _ in range(shape.num_experts)]
    for expert in experts:
        set_random(expert.gate_up_proj)
        set_random(expert.down_proj)
    if form == "gather":
        module = GatheredExperts(experts, shape.tokens, shape.top_k, shape.hidden_size)
    else:
        module = DenseExperts(*sizes, shape.num_experts, gelu_tanh)
        stacked = torch.cat([expert.gate_up_proj.weight for expert in experts])
        module.gate_up_proj.weight = nn.Parameter(stacked.detach())
        for down_proj, expert in zip(module.down_proj, experts, strict=True):
            down_proj.weight = expert.down_proj.weight
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,
        weight_granularity=PerGroup(32),
        weight_scale_dtype=torch.bfloat16,
    )
    quantize_(module, config)
    return module.eval()


def _routing(shape: Shape, kind: str):  # -> tuple[torch.Tensor, torch.Tensor]
    import torch

    generator = torch.Generator().manual_seed(SEED + 1)
    weights = torch.rand(shape.tokens, shape.top_k, generator=generator)
    if kind == "uneven":
        return weights, torch.arange(shape.top_k).expand(shape.tokens, -1).contiguous()
    order = torch.rand(shape.tokens, shape.num_experts, generator=generator).argsort(dim=1)
    return weights, order[:, : shape.top_k].contiguous()


def _measure(arguments: argparse.Namespace, shape: Shape) -> dict:
    """Times in ms by form and routing, the largest difference, and the estimate."""
    import torch
    from executorch.extension.pybindings import _C

    _C._unsafe_reset_threadpool(arguments.threads)
    from executorch.runtime import Runtime

    from export.families.expert_choice import choose_expert_computation

    methods = {}
    for form in FORMS:
        program = Runtime.get().load_program(_program(arguments.work, shape, form))
        methods[form] = program.load_method("forward")
    generator = torch.Generator().manual_seed(SEED + 2)
    x = torch.randn(shape.tokens, shape.hidden_size, generator=generator)
    times: dict[str, list[float]] = {f"{f} {r}": [] for r in ROUTINGS for f in FORMS}
    differences = []
    for routing in ROUTINGS:
        inputs = (x, *_routing(shape, routing))
        results = {}
        for number in range(WARM_UP_STEPS + arguments.rounds):
            for form, method in methods.items():
                start = time.perf_counter()
                results[form] = method.execute(inputs)[0]
                if number >= WARM_UP_STEPS:
                    times[f"{form} {routing}"].append((time.perf_counter() - start) * 1e3)
        differences.append((results["dense"] - results["gather"]).abs())
    choice = choose_expert_computation(**asdict(shape))
    difference = torch.stack(differences)
    return {
        "shape": asdict(shape),
        "ms": times,
        "estimate_ms": {"dense": choice.dense_ms, "gather": choice.gather_ms},
        "choice": choice.computation,
        "difference": {"median": difference.median().item(), "max": difference.max().item()},
        "programs": {
            form: json.loads(_program(arguments.work, shape, form).with_suffix(".json").read_text())
            for form in FORMS
        },
    }


def _report(arguments: argparse.Namespace, results: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"One layer's experts, int4 group 32, {arguments.threads} threads: "
        f"ms, median of {arguments.rounds}"
    )
    table.add_column("shape", no_wrap=True)
    columns = ("dense", "gather", "gather uneven", "estimates d/g", "chosen", "lowering s d/g")
    for column in columns:
        table.add_column(column, justify="right")
    for result in results:
        ms, estimate = result["ms"], result["estimate_ms"]
        lowering = [result["programs"][form]["lowering_s"]["cpu"] for form in FORMS]
        table.add_row(
            str(Shape(**result["shape"])),
            *(
                f"{statistics.median(ms[name]):.3g}"
                for name in ("dense even", "gather even", "gather uneven")
            ),
            f"{estimate['dense']:.3g} / {estimate['gather']:.3g}",
            result["choice"],
            f"{lowering[0]:.0f} / {lowering[1]:.0f}",
        )
    Console(width=100).print(table)
    print("shape: tokens-hidden-expert-experts-topk; d/g: dense/gather; lowering in seconds of")
    print("processor time, of one layer, with the tool chain's set-up in the first of a process")
    document = {
        "benchmark": "experts",
        "conditions": {
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "cores": os.cpu_count(),
            "processor": processor_name(),
            "load_average_at_end": os.getloadavg(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "executorch", "torchao")},
        },
        "results": [
            {**r, "ms": {name: [round(x, 4) for x in xs] for name, xs in r["ms"].items()}}
            for r in results
        ],
    }
    print(json.dumps(document, separators=(",", ":")))


if __name__ == "__main__":
    main()
