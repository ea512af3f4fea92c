"""Opens what a verb is asked to run: a bundle, or a checkpoint as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import InputError
from scripts.console import reporting

# What is slow to import is imported where it is needed: --help must not wait for it.
if TYPE_CHECKING:
    from export.contract.bundle import Bundle
    from export.host.streaming.mapped_weights import MemoryOptions
    from export.host.tokenizer import TextTokenizer


def verified_bundle(folder: Path) -> Bundle:
    """The bundle in `folder`, every file of it hashed; raises BundleError."""
    from export.contract.bundle import open_bundle

    with reporting("verifying") as progress:
        return open_bundle(folder, progress=progress)


def memory_options(budget_bytes: int | None, folder: Path | None) -> MemoryOptions | None:
    """What `--memory-budget` and `--packed-weights` ask for; None without either."""
    from export.host.streaming.mapped_weights import MemoryOptions

    if budget_bytes is None and folder is None:
        return None
    return MemoryOptions(budget_bytes, folder)


def open_eager(folder: Path, maximum_context: int | None = None) -> tuple[str, Any, TextTokenizer]:
    """What a checkpoint folder is run as by PyTorch, an engine of it, and its tokenizer.

    Raises CheckpointError, InputError.
    """
    from export.host.eager import eager_engine
    from export.host.tokenizer import tokenizer_files
    from export.models import stage_model
    from quantize.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder)
    files = tokenizer_files(folder)
    if files is None:
        raise InputError(f"{folder} has no tokenizer.json; put the model's there")
    staged = stage_model(checkpoint, maximum_context=maximum_context)
    tokenizer = files.open(staged.info.vocabulary_size, staged.special_tokens)
    kind = "int4 eager" if checkpoint.is_quantized else "fp32 eager"
    return kind, eager_engine(staged), tokenizer
