"""Our side of one case of `benchmarks.peer_llama_cpp`, in a process of its own.

    python -m benchmarks.peer_llama_cpp_case CASE BUNDLE STEPS

The last line of stdout is {"ms": …, "peak_rss_bytes": …}; ms is the best of three after a warm-up,
as `llama-bench` warms up: of a step, a full denoising, an answer, a token, a prompt.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from export.bundle import open_bundle
from export.process import peak_rss_bytes
from export.runtime import open_session

POSITIONS = 256
THREADS = 2
TOKENS = 64
SETTINGS = np.array([0.0, 1.0, 0.0, 2.0, 0.0], dtype=np.float32)
"""Greedy, no truncation, no threshold, in the order of confidence."""


def main() -> None:
    case, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    session = open_session(open_bundle(folder, verify=False), THREADS)
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

    def timed(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - began)

    if case == "step":
        hidden_rows = np.arange(POSITIONS)
        canvas = np.full(POSITIONS, mask, dtype=np.int64)

        def step() -> None:
            hidden = model.layers(canvas, 0, info.maximum_context)
            model.head(hidden, hidden_rows, SETTINGS, 1, np.zeros(POSITIONS, np.float32))

        measure: Callable[[], float] = lambda: timed(step)  # noqa: E731
    elif case == "full":
        measure = lambda: timed(lambda: denoise(steps))  # noqa: E731
    elif case == "prefill":
        measure = lambda: timed(lambda: model.layers(prompt, 0, 1))  # noqa: E731
    else:
        measure = {"answer": answer, "decode": decode}[case]
    measure()
    ms = min(measure() for _ in range(3))
    print(json.dumps({"ms": ms, "peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()
