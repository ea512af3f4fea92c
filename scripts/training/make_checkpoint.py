"""Writes a checkpoint of any config.json with random weights, for rehearsals at full size.

    python -m scripts.training.make_checkpoint diffusiongemma-26b-a4b /data/rehearsal --layers 2

The folder is as transformers' `save_pretrained` lays it out: bf16, shards that fill up in order,
their index, config.json. It is written a few megabytes at a time.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from export.families import read_shape
from export.plan.presets import read_config
from quantize.checkpoint import CONFIG_FILE, GENERATION_CONFIG_FILE
from quantize.errors import InputError, OutputError, UserError
from quantize.files.atomic_folder import resumable_folder
from quantize.files.durable import replacing
from quantize.files.json_files import read_json_object
from quantize.files.safetensors_folder import INDEX_FILE, SINGLE_FILE
from quantize.files.safetensors_writer import SafetensorsWriter, TensorSpec
from quantize.ordered_map import in_order
from quantize.sizes import format_bytes, parse_bytes
from scripts.commands import run_command
from scripts.console import reporting, say
from scripts.options import Overwrite, Seed
from scripts.training.gemma_vision import vision_weights
from scripts.training.random_weights import CHUNK, chunks, values

MAX_SHARD_BYTES = 5_000_000_000
"""What `save_pretrained` took until transformers 5, and released checkpoints have."""

MOST_CHUNKS = 32
"""Of 8 MiB, drawn ahead of the one that is written."""

# Called with bytes done, bytes in all, and the weight just written.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class RandomCheckpoint:
    """What is to be written: JSON files, and the shapes of all weights by name, by file.

    generation_config: None where the model has none.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    shards: dict[str, dict[str, TensorSpec]]
    seed: int

    @property
    def std(self) -> float:
        """Standard deviation of the weights, as the model is initialized in training."""
        text = self.config.get("text_config")
        sections = [self.config, text if isinstance(text, dict) else {}]
        stated = [s["initializer_range"] for s in sections if "initializer_range" in s]
        return float(stated[0]) if stated else 0.02

    @property
    def total_bytes(self) -> int:
        """Of all weights."""
        return sum(_bytes(specs) for specs in self.shards.values())


def plan_checkpoint(
    config: dict[str, Any],
    *,
    generation_config: dict[str, Any] | None = None,
    seed: int = 0,
    layers: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> RandomCheckpoint:
    """Decides on names, shapes and files of a config.json, cut to its first `layers`.

    Raises CheckpointError for a config that no family of `export.plan` reads, InputError for a
    number of layers that it does not have.
    """
    config = copy.deepcopy(config)
    if layers is not None:
        cut_config(config, layers)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = "bfloat16"
    shapes = {weight.name: weight.shape for weight in read_shape(config).weights}
    if config["model_type"] == "diffusion_gemma":
        shapes |= vision_weights(config)
    specs = {name: TensorSpec("BF16", shape) for name, shape in shapes.items()}
    return RandomCheckpoint(config, generation_config, _shards(specs, max_shard_bytes), seed)


def write_checkpoint(
    checkpoint: RandomCheckpoint,
    destination: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes the whole folder; a call that was interrupted is gone on with at its last shard.

    Raises OutputError.
    """
    files = {file: [*specs] for file, specs in checkpoint.shards.items()}
    work = json.dumps([checkpoint.config, checkpoint.seed, np.__version__, files])
    with resumable_folder(
        destination, work, overwrite=overwrite, is_ours=_is_random_checkpoint
    ) as (folder, journal):
        written = {record["shard"] for record in journal.records}
        done = sum(_bytes(checkpoint.shards[file]) for file in written)
        if progress is not None and done:
            progress(done, checkpoint.total_bytes, "done before")
        for file, specs in checkpoint.shards.items():
            if file not in written:
                _write_file(checkpoint, folder / file, done, checkpoint.total_bytes, progress)
                journal.append([{"shard": file}])
                done += _bytes(specs)
        _write_json_files(checkpoint, folder)


def write_shard(
    checkpoint: RandomCheckpoint,
    destination: str | Path,
    number: int,
    *,
    progress: Progress | None = None,
) -> Path:
    """Writes shard `number`, counted from 1, and the JSON files into a folder of other shards.

    So that a rehearsal needs the disk space of one shard at a time. Raises InputError for a number
    that there is not, OutputError for a folder of another checkpoint.
    """
    if not 1 <= number <= len(checkpoint.shards):
        raise InputError(
            f"There is no shard {number}; give a number from 1 to {len(checkpoint.shards)}."
        )
    folder = Path(destination)
    file = list(checkpoint.shards)[number - 1]
    temporary = folder / f".{file}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and _config_of(folder) != _config_document(checkpoint):
            raise OutputError(
                f"{folder} holds something else than shards of this checkpoint; choose another "
                "destination."
            )
        _write_json_files(checkpoint, folder)
        total = _bytes(checkpoint.shards[file])
        try:
            _write_file(checkpoint, temporary, 0, total, progress, file)
            os.replace(temporary, folder / file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder / file} cannot be written ({error.strerror}); free some space or choose "
            "another destination."
        ) from error
    return folder / file


def _write_file(
    checkpoint: RandomCheckpoint,
    path: Path,
    done: int,
    total: int,
    progress: Progress | None,
    file: str | None = None,
) -> None:
    specs = checkpoint.shards[file or path.name]
    writer = SafetensorsWriter(path, specs)

    def draw(piece: tuple[str, int]) -> Any:
        name, chunk = piece
        shape = specs[name].shape
        return values(checkpoint.seed, name, shape, chunk, std=checkpoint.std)

    def pieces() -> Iterator[tuple[str, int]]:
        for name, spec in specs.items():
            for chunk in chunks(spec.nbytes // 2):
                yield name, chunk

    try:
        with closing(
            in_order(draw, pieces(), size=lambda piece: CHUNK, size_in_all=MOST_CHUNKS * CHUNK)
        ) as drawn:
            for (name, _), tensor in drawn:
                writer.append(name, tensor)
                done += tensor.nbytes
                if progress is not None:
                    progress(done, total, name)
        writer.close()
    finally:
        writer.abandon()


def _bytes(specs: dict[str, TensorSpec]) -> int:
    return sum(spec.nbytes for spec in specs.values())


def _shards(specs: dict[str, TensorSpec], max_bytes: int) -> dict[str, dict[str, TensorSpec]]:
    """As `split_state_dict_into_shards_factory` of huggingface_hub (serialization/_base.py) does:
    a weight that is larger than a shard has one of its own, before the shard in work."""
    groups: list[dict[str, TensorSpec]] = []
    group: dict[str, TensorSpec] = {}
    filled = 0
    for name, spec in specs.items():
        if spec.nbytes > max_bytes:
            groups.append({name: spec})
            continue
        if filled + spec.nbytes > max_bytes:
            groups.append(group)
            group, filled = {}, 0
        group[name] = spec
        filled += spec.nbytes
    if group:
        groups.append(group)
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def cut_config(config: dict[str, Any], layers: int) -> None:
    """Keeps the first layers, the last of them with the attention that the model ends with.

    Changes `config`; raises InputError for a number that it does not have.
    """
    section = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    key = "n_layers" if "n_layers" in section else "num_hidden_layers"
    had = section.get(key)
    if type(had) is not int or not 1 <= layers <= had:
        raise InputError(
            f"The model has {had} layers; give a number from 1 to {had}, not {layers}."
        )
    section[key] = layers
    kinds = section.get("layer_types")
    if isinstance(kinds, list):
        section["layer_types"] = [*kinds[: layers - 1], *kinds[-1:]]
    own = section.get("per_layer_config")
    if isinstance(own, dict):
        kept = {number: own[number] for number in map(str, range(layers - 1)) if number in own}
        last = own.get(str(had - 1))
        section["per_layer_config"] = kept | ({} if last is None else {str(layers - 1): last})
    shared = section.get("num_kv_shared_layers")
    if type(shared) is int:
        section["num_kv_shared_layers"] = max(0, layers - (had - shared))


def _config_document(checkpoint: RandomCheckpoint) -> dict[str, Any]:
    # The mark by which --overwrite knows what it may replace; transformers keeps unknown keys.
    return checkpoint.config | {"random_weights_seed": checkpoint.seed}


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        return read_json_object(folder / CONFIG_FILE)
    except UserError:
        return {}


def _is_random_checkpoint(folder: Path) -> bool:
    return "random_weights_seed" in _config_of(folder)


def _write_json_files(checkpoint: RandomCheckpoint, folder: Path) -> None:
    documents = {CONFIG_FILE: _config_document(checkpoint)}
    if checkpoint.generation_config is not None:
        documents[GENERATION_CONFIG_FILE] = checkpoint.generation_config
    if len(checkpoint.shards) > 1:
        documents[INDEX_FILE] = {
            "metadata": {"total_size": checkpoint.total_bytes},
            "weight_map": {
                name: file for file, specs in checkpoint.shards.items() for name in specs
            },
        }
    for name, document in documents.items():
        text = json.dumps(document, indent=2, sort_keys=True) + "\n"
        if (folder / name).exists() and (folder / name).read_text(encoding="utf-8") == text:
            continue  # its time is what tells a quantizer at work that it is the same
        with replacing(folder / name) as file:
            file.write(text.encode("utf-8"))


def make_checkpoint(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A preset, a config.json, or a folder with one.")
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DESTINATION", help="New folder for the checkpoint.")
    ],
    seed: Seed = 0,
    layers: Annotated[int | None, typer.Option(help="Keep so many layers.")] = None,
    max_shard_size: Annotated[
        int | None,
        typer.Option(
            parser=parse_bytes,
            metavar="SIZE",
            help=f"Most bytes of a shard (512M, 2G; default: {MAX_SHARD_BYTES}).",
        ),
    ] = None,
    only: Annotated[
        int | None, typer.Option(help="Write this shard alone, counted from 1.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint with random weights in the layout of Hugging Face folders."""
    beside = Path(model) / GENERATION_CONFIG_FILE
    checkpoint = plan_checkpoint(
        read_config(model)[1],
        generation_config=read_json_object(beside) if beside.is_file() else None,
        seed=seed,
        layers=layers,
        max_shard_bytes=max_shard_size or MAX_SHARD_BYTES,
    )
    with reporting("writing") as progress:
        if only is not None:
            write_shard(checkpoint, destination, only, progress=progress)
        else:
            write_checkpoint(checkpoint, destination, overwrite=overwrite, progress=progress)
    say(
        f"wrote {destination}: {format_bytes(checkpoint.total_bytes)} in "
        f"{len(checkpoint.shards)} shards" + (f", of these number {only}" * (only is not None))
    )


def main() -> int:
    """The entry point; returns the exit code."""
    return run_command(lambda: typer.run(make_checkpoint), "make_checkpoint")


if __name__ == "__main__":
    sys.exit(main())
