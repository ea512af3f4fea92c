"""Packs the weights of a bundle into their file, in a process of its own.

One program after the other is loaded, packs what it has and is let go of, so that packing takes the
memory of one. The process that wants the file starts this one (`make`): what packing touches is
then none of its own memory.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from export.contract.bundle import Bundle, open_bundle
from export.contract.manifest import Stage
from export.host.process import captured_stderr, die_with_parent
from export.host.program_file import read_program_memory
from export.host.streaming.mapped_bytes import MappedBytes
from export.host.streaming.packed_file import (
    STAGE_ALIGNMENT,
    DamagedFile,
    Entry,
    PackedFile,
    Packing,
    Span,
    chunks,
    index_bytes,
    read_index,
)
from export.host.streaming.xnnpack_weights import PackedWeights
from quantize.errors import BundleError, OutputError, UserError

_PAGE = 4096
_GROWTH = 1.3
"""Packed weights by those in the program, at most; 0.8 to 1.05 were seen."""


def make(bundle: Bundle, file: PackedFile, lock: int) -> Packing:
    """Make the file of a bundle, whose lock the descriptor `lock` holds; returns what is in it.

    Raises OutputError for a disk without room and BundleError for a program that cannot be loaded.
    """
    file.discard()
    _check_room(bundle, file.folder)
    root = str(Path(__file__).parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "export.host.streaming.pack_weights",
            str(bundle.folder),
            str(file.partial),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        pass_fds=[lock],
        check=False,
    )
    if done.returncode == 0:
        packing = Packing.from_json(json.loads(done.stdout))
        file.seal(packing)
        return packing
    file.discard()
    said = done.stderr.decode("utf-8", errors="replace").strip().splitlines()
    if done.returncode == -signal.SIGBUS:  # a mapped page for which the disk has no room
        raise _no_room(file.folder)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise OutputError(
            f"packing the weights of {bundle.folder} was ended by {name}; free memory and run again"
        )
    raise BundleError(said[-1] if said else f"the weights of {bundle.folder} cannot be packed")


def _check_room(bundle: Bundle, folder: Path) -> None:
    memory = [read_program_memory(bundle.path(stage.file)) for stage in bundle.manifest.stages]
    weights = [program.weight_bytes for program in memory]
    needed = round(_GROWTH * (sum(weights) + max(weights)))  # one stage is there twice
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder} has {free} bytes free and packing the weights of {bundle.folder} takes "
            f"about {needed}; free some, or give another folder with --packed-weights"
        )


def _no_room(folder: Path) -> OutputError:
    return OutputError(
        f"{folder} has no space left for packed weights; free some, or give another folder with "
        "--packed-weights"
    )


def pack(bundle: Bundle, destination: Path) -> Packing:
    """Write the file of all stages. Raises BundleError, OSError, DamagedFile."""
    digest = hashlib.sha256()
    spans: dict[str, Span] = {}
    entries: dict[bytes, Entry] = {}
    part = destination.with_suffix(".stage")
    private = functools.partial(os.open, mode=0o600)
    with open(destination, "wb", opener=private) as output:

        def put(content: bytes) -> None:
            output.write(content)
            digest.update(content)

        def align(to: int) -> None:
            put(bytes(-output.tell() % to))

        try:
            for stage in bundle.manifest.stages:
                part.unlink(missing_ok=True)
                _pack_stage(bundle, stage, part)
                align(STAGE_ALIGNMENT)
                start = output.tell()
                for entry in read_index(part) if part.exists() and part.stat().st_size else ():
                    if entry.name in entries:
                        output.flush()
                        _check_same(stage.name, destination, entries[entry.name], part, entry)
                        continue
                    align(_PAGE)
                    entries[entry.name] = Entry(entry.name, output.tell(), entry.bytes, entry.seed)
                    with part.open("rb") as source:
                        for piece in chunks(source, entry.offset, entry.bytes):
                            put(piece)
                spans[stage.name] = Span(start, output.tell() - start)
                # Written pages can be dropped by whoever is short of memory, others cannot.
                output.flush()
                os.fdatasync(output.fileno())
                os.posix_fadvise(output.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            part.unlink(missing_ok=True)
        align(_PAGE)
        put(index_bytes(entries.values(), output.tell()))
        output.flush()
        os.fsync(output.fileno())
    return Packing(digest.hexdigest(), spans)


def _check_same(stage: str, packed: Path, earlier: Entry, part: Path, entry: Entry) -> None:
    """Weights that two stages have by one name must be packed alike: the name is all that the cache
    goes by."""
    with packed.open("rb") as left, part.open("rb") as right:
        same = (earlier.bytes, earlier.seed) == (entry.bytes, entry.seed) and all(
            a == b
            for a, b in zip(
                chunks(left, earlier.offset, earlier.bytes),
                chunks(right, entry.offset, entry.bytes),
                strict=True,
            )
        )
    if not same:
        raise BundleError(
            f"the stage {stage} has weights in common with another that are packed in another way; "
            "run without a memory budget"
        )


def _pack_stage(bundle: Bundle, stage: Stage, destination: Path) -> None:
    if stage.data_file is not None:
        raise BundleError(
            f"the stage {stage.name} of {bundle.folder} has weights in a file apart, which cannot "
            "be packed into another; run without a memory budget"
        )
    program_file = bundle.path(stage.file)
    mapped = MappedBytes(program_file)
    weights = PackedWeights(destination)
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.pybindings import _C

    with captured_stderr() as log, weights.loading():
        try:
            program = _C._load_program_from_buffer(mapped.content)
            loaded = program.load_method(stage.method)
        except RuntimeError as error:
            reason = (log.text() or str(error)).strip().splitlines()[-1].rstrip(".")
            raise BundleError(
                f"{program_file} cannot be loaded by ExecuTorch ({reason}); export the bundle again"
            ) from error
        del loaded, program
    gc.collect()
    weights.close()
    mapped.forget()


def main() -> None:
    """Pack the bundle of the first argument into the file of the second; prints what it holds."""
    die_with_parent()
    bundle, destination = sys.argv[1:]
    try:
        packing = pack(open_bundle(bundle, verify=False), Path(destination))
        print(json.dumps(packing.to_json()))
    except UserError as error:
        sys.exit(str(error))
    except (OSError, DamagedFile) as error:
        sys.exit(f"the weights of {bundle} cannot be packed into {destination} ({error})")


if __name__ == "__main__":
    main()
