"""What this host takes of ExecuTorch 1.5.1's private parts: loading programs by its C++ bindings.

`executorch.runtime` and `portable_lib` offer the same and import the whole compiler stack: four
seconds more. Neither can set the number of threads.
"""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

from export.host.process import captured_stderr
from quantize.errors import InputError

VERSION = "1.5.1"

SCALAR_TYPES = {
    0: "uint8", 1: "int8", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 11: "bool",
    15: "bfloat16",
}  # fmt: skip
"""ScalarType of runtime/core/portable_type/scalar_type.h -> dtype."""


def import_bindings() -> Any:
    """`executorch.extension.pybindings._C`, with all operator libraries registered."""
    with captured_stderr():
        import executorch.kernels.quantized  # noqa: F401
        from executorch.extension.pybindings import _C
    return _C


class Bindings:
    """What loads programs, with a thread pool of a size."""

    def __init__(self, threads: int | None = None) -> None:
        """threads: of programs that are loaded from now on; None: as many as the library chooses.

        Raises InputError for another version of ExecuTorch, or less than one thread.
        """
        if threads is not None and threads < 1:
            raise InputError(f"the number of threads is {threads}; give at least 1")
        version = importlib.metadata.version("executorch")
        if version != VERSION:
            raise InputError(
                f"ExecuTorch has the version {version}, this program is made for {VERSION}; "
                f"install executorch=={VERSION}"
            )
        self._library = import_bindings()
        with captured_stderr():  # it logs how it counted the cores
            # Before any method is loaded: a delegate keeps the pool's size it was loaded with.
            if threads is not None:
                self._library._unsafe_reset_threadpool(min(threads, _usable_cores()))
            self.threads: int = self._library._threadpool_get_thread_count()

    def load_program(self, path: str, data_path: str | None = None) -> Any:
        """A program from its file, and its weights from another; RuntimeError if it cannot be."""
        return self._library._load_program(
            path,
            program_verification=self._library.Verification.InternalConsistency,
            data_path=data_path,
        )

    def load_program_from_buffer(self, content: bytes) -> Any:
        """A program from memory, which must outlive it; RuntimeError if it cannot be."""
        return self._library._load_program_from_buffer(
            content, program_verification=self._library.Verification.InternalConsistency
        )


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
