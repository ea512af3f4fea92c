"""Our side of one case of `benchmarks.peer_llama_cpp`, in a process of its own.

    python -m benchmarks.peer_llama_cpp_case CASE BUNDLE STEPS

The last line of stdout is {"ms": …, "memory": {…}}; ms is the median of three after a warm-up, as
`llama-bench` warms up: of a step, a full denoising, an answer, a token, a prompt; or, of the case
`products` with a program instead of a bundle, of the matrix products alone.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_llama_cpp import HEAD_DIM, KV_HEADS, LAYERS, POSITIONS, THREADS
from export.contract.bundle import open_bundle
from export.host.bundle_engine import open_engine
from export.host.process import peak_rss_bytes

TOKENS = 64
SETTINGS = np.array([0.0, 1.0, 0.0, 2.0, 0.0], dtype=np.float32)
"""Greedy, no truncation, no threshold, in the order of confidence."""


def main() -> None:
    case, path, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    before = peak_rss_bytes()
    measure, kv_cache = _products(path) if case == "products" else _case(case, path, steps)
    measure()
    ms = statistics.median(measure() for _ in range(3))
    memory = {
        "before_bytes": before,
        "peak_rss_bytes": peak_rss_bytes(),
        "kv_cache_bytes": kv_cache,
    }
    print(json.dumps({"ms": ms, "memory": memory}))


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


def _products(path: Path) -> tuple[Callable[[], float], int]:
    import torch

    from export.host.bundle_engine import single_torch_thread
    from export.host.executorch_1_5_1 import Bindings

    program = Bindings(THREADS).load_program(str(path))
    method = program.load_method("forward")
    shape = method.method_meta().input_tensor_meta(0).sizes()
    inputs = [torch.randn(*shape, generator=torch.Generator().manual_seed(0))]

    def run(_keep_alive: Any = program) -> None:
        with single_torch_thread():
            method(inputs)

    return lambda: _timed(run), 0


def _case(case: str, folder: Path, steps: int) -> tuple[Callable[[], float], int]:
    """What to time, returning milliseconds, and the bytes of the KV cache."""
    session = open_engine(open_bundle(folder, verify=False), THREADS).session()
    model, info = session.model, session.info
    prompt = np.random.default_rng(0).integers(0, 150_000, POSITIONS, dtype=np.int64)
    mask = model.decoding.mask_token

    def denoise(count: int) -> None:
        """All positions masked, then as many steps, each with its share of them."""
        canvas = np.full(POSITIONS, mask, dtype=np.int64)
        for step in range(count):
            rows = np.flatnonzero(canvas == mask)
            quota = -(-len(rows) // (count - step))
            hidden = model.layers(canvas, 0, info.maximum_context)
            output = model.head(hidden, rows, SETTINGS, quota, np.zeros(len(rows), np.float32))
            canvas[rows[output.accepted]] = output.token[output.accepted]

    def answer() -> float:
        session.truncate(0)
        result = session.generate(prompt.tolist(), POSITIONS, force_steps=steps)
        return result.total_ms - result.prompt_ms

    def decode() -> float:
        session.truncate(0)
        result = session.generate([1], TOKENS, force_steps=1)
        return result.median_step_ms

    def step() -> None:
        canvas = np.full(POSITIONS, mask, dtype=np.int64)
        hidden = model.layers(canvas, 0, info.maximum_context)
        model.head(hidden, np.arange(POSITIONS), SETTINGS, 1, np.zeros(POSITIONS, np.float32))

    cases: dict[str, Callable[[], float]] = {
        "step": lambda: _timed(step),
        "full": lambda: _timed(lambda: denoise(steps)),
        "answer": answer,
        "decode": decode,
        "prefill": lambda: _timed(lambda: model.layers(prompt, 0, 1)),
    }
    return cases[case], 2 * LAYERS * KV_HEADS * HEAD_DIM * 4 * info.maximum_context


if __name__ == "__main__":
    main()
