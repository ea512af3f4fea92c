"""One example of each event of the runner protocol, and of a result."""

from __future__ import annotations

from typing import Any

MEMORY = {
    "rss_bytes": 5, "pss_bytes": 4, "anonymous_bytes": 3, "file_bytes": 2, "swap_bytes": None,
    "major_faults": 0, "minor_faults": 9,
}  # fmt: skip


COLD = {"requested": True, "method": "fadvise", "resident_before": 1.0, "resident_after": 0.0}


DELEGATION = {"head": {"delegates": 1, "delegated": 7, "portable": 2}}


RUNTIME = {"host": "cpp", "version": "0.1.0"}


EXAMPLES: dict[str, dict[str, Any]] = {
    "started": {
        "protocol": 1, "run_id": "r-1", "runtime": RUNTIME, "pid": 7,
        "versions": {"torch": "2"},
    },
    "loaded": {
        "import_ms": 1.0, "verify_ms": 2.0, "tokenizer_ms": None, "load_ms": 3.0, "threads": 2,
        "cold": COLD, "delegation": DELEGATION, "rss_bytes": 5,
    },
    "warmed_up": {"ms": 3.5, "steps": 2},
    "prefill": {"done": 6, "total": 9, "ms": 0.5},
    "step": {
        "canvas": 0, "step": 1, "max_steps": 5, "layers_ms": 1.5, "head_ms": 0.5, "accepted": 4,
        "mean_entropy": 0.1, "finished": False,
    },
    "canvas": {"canvas": 0, "steps": 3, "new_tokens": 6, "is_last": True},
    "text": {"text": "hello"},
    "answer": {"done": 1, "total": 3, "total_ms": 7.5},
    "memory": MEMORY,
    "temperature": {"zones": {"cpu-0": 41.5}},
    "done": {},
    "failed": {"reason": "input", "sentence": "the prompt is empty; give at least one token"},
}  # fmt: skip


ANSWER: dict[str, Any] = {
    "prompt_tokens": 3, "prompt_ms": 1.0, "encode_ms": 0.0, "encodings": 1, "total_ms": 9.0,
    "first_draft_ms": 2.0, "first_commit_ms": 8.0, "finish_reason": "eos",
    "canvases": [
        {
            "canvas": 0, "tokens": [4, 1], "converged": True,
            "steps": [{"layers_ms": 1.0, "head_ms": 1.0, "accepted": 2, "mean_entropy": 0.5}],
        }
    ],
    "answer_tokens": [4], "new_tokens": 2, "text": "a",
}  # fmt: skip


RESULT: dict[str, Any] = {
    "protocol": 1, "run_id": "r-1", "status": "ok", "failure": None, "runtime": RUNTIME,
    "versions": {}, "import_ms": 1.0, "verify_ms": 1.0, "tokenizer_ms": None, "load_ms": 1.0,
    "cold": COLD, "threads": 2, "delegation": DELEGATION, "warmup_ms": None, "pack_ms": None,
    "weights": None, "answers": [ANSWER],
    "memory": {
        "peak_rss_bytes": 9, "after_load": MEMORY, "at_end": MEMORY, "major_faults": 0,
    },
}  # fmt: skip
