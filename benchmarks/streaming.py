"""A denoising step in less memory than the model, against reading the bytes plus computing.

    python -m benchmarks.streaming BUNDLE --budget 1G

Three processes: one with all weights resident gives the time of computing and the tokens; one reads
the file of packed weights from end to end, through the page cache and past it; the last runs within
the budget, in a memory cgroup whose hard limit is the budget, with the page cache dropped before.
What is compared is milliseconds of a step: measured within the budget, and the sum of computing and
of reading the streamed bytes at the faster of the two rates, as if neither overlapped.

Linux, root for the cgroup. Prints a table and, as the last line, one JSON document.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.memory_cgroup import memory_group
from export.contract.bundle import open_bundle
from export.contract.styles import STYLES
from export.host.streaming import page_cache
from export.host.streaming.packed_file import PackedFile
from quantize.sizes import format_bytes, parse_bytes

CHUNK_BYTES = 8 << 20
PROMPT_TOKENS = 32


def generate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer in this process; what a run of either kind tells."""
    from export.host.bundle_engine import open_engine
    from export.host.process import peak_rss_bytes
    from export.host.streaming.mapped_weights import MemoryOptions

    bundle = open_bundle(arguments.bundle, verify=False)
    model = bundle.manifest.model
    began_s = time.perf_counter()
    memory = MemoryOptions(arguments.budget, arguments.packed_weights)
    engine = open_engine(bundle, arguments.threads, memory=memory)
    load_ms = 1000 * (time.perf_counter() - began_s)
    ordinary = [i for i in range(5, model.vocabulary_size)]
    prompt = [ordinary[7919 * i % len(ordinary)] for i in range(PROMPT_TOKENS)]
    is_diffusion = not STYLES[bundle.manifest.style].step_is_token
    new_tokens = model.canvas_length if is_diffusion else arguments.steps
    steps = arguments.steps if is_diffusion else 1
    # The first answer warms up: the division of the weights is made in it.
    engine.session().generate(prompt, new_tokens, 0, force_steps=1)
    before = engine.weights.report()
    result = engine.session().generate(prompt, new_tokens, 1, force_steps=steps)
    return {
        "tokens": list(result.tokens),
        "load_ms": load_ms,
        "step_ms": result.median_step_ms,
        "total_ms": result.total_ms,
        "new_tokens": result.new_tokens,
        "peak_rss_bytes": peak_rss_bytes(),
        "weights": engine.weights.report(since=before),
    }


def read_rates(path: Path) -> dict[str, float]:
    """Bytes a second of reading a file in order, by way; the page cache is dropped before."""
    rates = {}
    for way, flags in (("through the page cache", 0), ("past it", os.O_DIRECT)):
        page_cache.drop([path])
        descriptor = os.open(path, os.O_RDONLY | flags)
        try:
            total = os.fstat(descriptor).st_size
            with mmap.mmap(-1, CHUNK_BYTES) as buffer:
                began_s, done = time.perf_counter(), 0
                while done < total and (count := os.preadv(descriptor, [buffer], done)):
                    done += count
                rates[way] = done / (time.perf_counter() - began_s)
        finally:
            os.close(descriptor)
    page_cache.drop([path])
    return rates


def in_process(arguments: argparse.Namespace, budget: int | None, enter: Any = None) -> Any:
    """`generate` in a process of its own; `enter` is called in it before it begins."""
    command = [
        sys.executable, "-m", "benchmarks.streaming", str(arguments.bundle),
        "--packed-weights", str(arguments.packed_weights), "--steps", str(arguments.steps),
        "--child",
    ]  # fmt: skip
    command += [] if budget is None else ["--budget", str(budget)]
    command += [] if arguments.threads is None else ["--threads", str(arguments.threads)]
    done = subprocess.run(command, capture_output=True, preexec_fn=enter, check=False)
    if done.returncode != 0:
        sys.exit(f"a run ended with {done.returncode}: {done.stderr.decode()[-2000:]}")
    return json.loads(done.stdout.decode().splitlines()[-1])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All three, and what follows from them."""
    bundle = open_bundle(arguments.bundle, verify=False)
    packed = PackedFile(bundle, arguments.packed_weights)
    resident = in_process(arguments, None)
    rates = read_rates(packed.path)
    files = [packed.path, *(bundle.path(name) for name in bundle.files)]
    page_cache.drop(files)
    with memory_group(arguments.budget) as group:
        within = in_process(arguments, arguments.budget, group.enter)
        peak, at_limit = group.peak_bytes, group.times_at_the_limit
    read_ms = 1000 * within["weights"]["pass_bytes"] / max(rates.values())
    bound_ms = read_ms + resident["step_ms"]
    return {
        "bundle_bytes": bundle.total_bytes,
        "packed_bytes": packed.path.stat().st_size,
        "budget_bytes": arguments.budget,
        "model_by_budget": packed.path.stat().st_size / arguments.budget,
        "same_tokens": within["tokens"] == resident["tokens"],
        "read_bytes_per_s": rates,
        "pass_bytes": within["weights"]["pass_bytes"],
        "read_ms": read_ms,
        "compute_ms": resident["step_ms"],
        "bound_ms": bound_ms,
        "step_ms": within["step_ms"],
        "ratio": within["step_ms"] / bound_ms,
        "group_peak_bytes": peak,
        "group_at_limit": at_limit,
        "storage_bytes_per_token": within["weights"]["storage_bytes"] / within["new_tokens"],
        "resident": {k: v for k, v in resident.items() if k != "tokens"},
        "within": {k: v for k, v in within.items() if k != "tokens"},
    }


def tell(found: dict[str, Any]) -> None:
    """The table."""
    within, resident = found["within"], found["resident"]
    weights = within["weights"]
    rates = ", ".join(f"{v / 1e6:,.0f} MB/s {k}" for k, v in found["read_bytes_per_s"].items())
    rows = [
        ("packed weights, file", format_bytes(found["packed_bytes"])),
        ("budget and hard limit", f"{format_bytes(found['budget_bytes'])}, the file is "
         f"{found['model_by_budget']:.2f} times that"),
        ("tokens", "the same" if found["same_tokens"] else "NOT THE SAME"),
        ("peak RSS within, without a budget",
         f"{format_bytes(within['peak_rss_bytes'])}, {format_bytes(resident['peak_rss_bytes'])}"),
        ("peak of the cgroup", f"{format_bytes(found['group_peak_bytes'])}, at its limit "
         f"{found['group_at_limit']} times"),
        ("kept, held to compute, read in a pass",
         f"{format_bytes(weights['kept_bytes'])}, {format_bytes(weights['window_bytes'])}, "
         f"{format_bytes(weights['pass_bytes'])}"),
        ("loading within, without a budget",
         f"{within['load_ms']:,.0f} ms, {resident['load_ms']:,.0f} ms"),
        ("reading in order", rates),
        ("a step: reading", f"{found['read_ms']:,.1f} ms"),
        ("a step: computing", f"{found['compute_ms']:,.1f} ms"),
        ("a step: both", f"{found['bound_ms']:,.1f} ms"),
        ("a step: measured", f"{found['step_ms']:,.1f} ms, {found['ratio']:.2f} times that"),
        ("read from storage by new tokens", format_bytes(found["storage_bytes_per_token"])),
        ("read from storage (/proc/self/io)",
         f"{format_bytes(weights['storage_bytes'])} of "
         f"{format_bytes(weights['streamed_bytes'])} streamed"),
    ]  # fmt: skip
    for name, value in rows:
        print(f"{name:40} {value}")


def main() -> None:
    """The entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--budget", type=parse_bytes)
    parser.add_argument("--packed-weights", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8, help="measured, after a warm-up")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(generate(arguments)))
        return
    found = measure(arguments)
    tell(found)
    print(json.dumps(found, separators=(",", ":")))


if __name__ == "__main__":
    main()
