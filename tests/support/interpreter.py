"""What Python with PyTorch and ExecuTorch takes before any model is loaded."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

_IMPORTED = """
import export.host.bundle_engine, export.host.runner, export.host.tokenizer
import executorch.kernels.quantized, tokenizers
from executorch.extension.pybindings import _C
from export.host.process import peak_rss_bytes
print(peak_rss_bytes())
"""


@functools.cache
def interpreter_bytes() -> int:
    """Peak RSS of a runner's process on this machine that has run nothing.

    A budget for a run here is this and what the run may take: the CPU build of PyTorch takes some
    230 MiB, the CUDA build more than a GiB.
    """
    ran = subprocess.run(
        [sys.executable, "-c", _IMPORTED],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=True,
    )
    return int(ran.stdout)
