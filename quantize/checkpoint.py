"""One way to read weights, be they a Hugging Face folder's or an int4 folder's of this project.

Everything read is untrusted: no pickle is loaded and no code of a checkpoint is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantize.errors import CheckpointError
from quantize.files.json_files import read_json_object
from quantize.files.safetensors_folder import SafetensorsFolder, refuse_unprintable_names
from quantize.packing import packed_width, unpack_int4

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
RECIPE_FILE = "recipe.json"
# What recipe.json calls itself, so that another tool's recipe.json is not taken for ours.
FORMAT = "pocket-diffusion-quantized"
SCHEMA_VERSION = 1

FLOAT_TYPES = {"F32", "F16", "BF16"}
# How torchao's tensor spells the recipe's `int8_dynamic`.
_TORCHAO_ACTIVATION = {"int8_dynamic": "int8_asym_per_token", "none": None}


@dataclass(frozen=True)
class PackedIntegers:
    """A quantized weight as it is stored: `qdata` int8, or uint8 with two 4-bit integers a byte
    (see quantize/packing.py), and `scale` in its stored type."""

    bits: int
    qdata: torch.Tensor
    scale: torch.Tensor


class Checkpoint:
    """Weights by their Hugging Face names, one tensor in memory at a time.

    `folder` is where they are, `config` and `generation_config` the JSON objects beside them
    (`{}` where there is no generation config), `is_quantized` tells an int4 folder of this
    project, whose whole recipe.json is `recipe` (None otherwise). `missing` are the shards that
    were not there, in a checkpoint that was opened as a part.
    """

    def __init__(self, folder: Path, *, partial: bool = False):
        self.folder = folder
        self.config: dict = read_json_object(folder / CONFIG_FILE)
        generation_config = folder / GENERATION_CONFIG_FILE
        self.generation_config: dict = (
            read_json_object(generation_config) if generation_config.exists() else {}
        )
        self._files = SafetensorsFolder(folder, partial=partial)
        self.missing = self._files.missing
        self.recipe: dict | None = _read_recipe(folder / RECIPE_FILE)
        self._quantized: dict[str, _Quantized] = {}
        if self.recipe is not None:
            self._quantized = _quantized_tensors(folder, self.recipe, self._files)

    @property
    def is_quantized(self) -> bool:
        """Whether this is an int4 folder of this project."""
        return self.recipe is not None

    def names(self) -> set[str]:
        """The weights' Hugging Face names, as stored (a tied copy may be absent)."""
        parts = {f"{name}{suffix}" for name in self._quantized for suffix in (".qdata", ".scale")}
        return (self._files.names() - parts) | set(self._quantized)

    def file(self, name: str) -> str:
        """Name of the file that holds a plain weight."""
        return self._files.file(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, without reading it; raises CheckpointError if there is none."""
        if name in self._quantized:
            return self._quantized[name].shape
        return self._files.shape(name)

    def stored_dtype(self, name: str) -> str:
        """Stored type of a plain weight, or of a quantized weight's packed integers."""
        return self._files.dtype(f"{name}.qdata" if name in self._quantized else name)

    def stored_bytes(self, name: str) -> int:
        """Bytes that a weight takes on disk, its scales included."""
        if name in self._quantized:
            return sum(self._files.stored_bytes(f"{name}{part}") for part in (".qdata", ".scale"))
        return self._files.stored_bytes(name)

    def get(self, name: str, index: int | None = None) -> torch.Tensor:
        """A weight, or with `index` one slice of its first axis (an expert of a 3-D weight).

        Plain weights come as fp32. Quantized ones come as torchao's IntxUnpackedToInt8Tensor of
        dtype fp32, bit for bit what the quantizer made: with int8 dynamic activations where the
        recipe says so, weight-only elsewhere. Raises CheckpointError.
        """
        shape = self.shape(name)
        if index is not None and not (len(shape) == 3 and 0 <= index < shape[0]):
            raise CheckpointError(
                f"Tensor {name} of {self.folder} has shape {list(shape)} and so no slice {index}; "
                "ask for a slice of a 3-D weight, counted from 0."
            )
        if name in self._quantized:
            return self._get_quantized(name, index)
        self._check_float(name)
        return self._files.read(name, index).to(torch.float32)

    def get_packed(self, name: str, index: int | None = None) -> PackedIntegers | None:
        """The integers and scales of what `get` gives, as stored; None for a plain weight.

        Raises CheckpointError.
        """
        if name not in self._quantized:
            return None
        qdata = self._files.read(f"{name}.qdata", index)
        return PackedIntegers(self._quantized[name].bits, qdata, self._scale(name, index))

    def get_rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Rows `start:end` of a plain weight's first axis as fp32; raises CheckpointError."""
        self._check_float(name)
        return self._files.read(name, rows=(start, end)).to(torch.float32)

    def get_as_stored(self, name: str) -> torch.Tensor:
        """A plain weight in the type it is stored in; raises CheckpointError."""
        return self._files.read(name)

    def _check_float(self, name: str) -> None:
        dtype = self._files.dtype(name)
        if dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"Tensor {name} of {self.folder} is stored as {dtype}, which is not supported; "
                "convert it to bfloat16, float16 or float32."
            )

    def _get_quantized(self, name: str, index: int | None) -> torch.Tensor:
        # Imported here: plain checkpoints do not need it, and it takes seconds.
        from torchao.quantization import IntxUnpackedToInt8Tensor

        stored = self._quantized[name]
        qdata = self._files.read(f"{name}.qdata", index)
        scale = self._scale(name, index)
        if stored.bits == 4:
            qdata = unpack_int4(qdata, stored.shape[-1])
        return IntxUnpackedToInt8Tensor(
            qdata=qdata,
            scale=scale,
            zero_point=torch.zeros(scale.shape, dtype=torch.int8),
            target_dtype=torch.int4 if stored.bits == 4 else torch.int8,
            block_size=(1,) * (qdata.ndim - 1) + (stored.group_size,),
            dtype=torch.float32,
            activation_quantization=_TORCHAO_ACTIVATION[stored.activation],
        )

    def _scale(self, name: str, index: int | None) -> torch.Tensor:
        scale = self._files.read(f"{name}.scale", index)
        if not torch.isfinite(scale).all():
            raise CheckpointError(
                f"Tensor {name}.scale of {self.folder} holds values that are not finite; "
                "quantize the checkpoint again."
            )
        return scale


def open_checkpoint(folder: str | Path, *, partial: bool = False) -> Checkpoint:
    """Opens a Hugging Face folder or an int4 folder; raises CheckpointError if it is not whole.

    With `partial`, shards of a Hugging Face folder may be missing.
    Headers of all files are checked at once (a truncated shard is found here, not halfway);
    tensors are memory-mapped and read when asked for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"The checkpoint {folder} {what}; name a folder with {CONFIG_FILE} and safetensors."
        )
    return Checkpoint(folder, partial=partial)


class _Quantized:
    """How one quantized weight is stored, as its validated entry in recipe.json says."""

    def __init__(self, path: Path, name: str, entry: dict):
        scheme = entry["scheme"]
        shape = entry.get("shape")
        if not (
            isinstance(shape, list)
            and len(shape) in (2, 3)
            and all(type(size) is int and size > 0 for size in shape)
        ):
            raise _bad_entry(path, name, "shape", shape)
        self.shape: tuple[int, ...] = tuple(shape)
        self.bits = _one_of(path, name, scheme, "bits", (4, 8))
        self.activation = _one_of(path, name, scheme, "activation", tuple(_TORCHAO_ACTIVATION))
        group_size = scheme.get("group_size")
        if group_size is None:
            group_size = self.shape[-1]
        if type(group_size) is not int or group_size < 1 or self.shape[-1] % group_size:
            raise _bad_entry(path, name, "group_size", group_size)
        self.group_size: int = group_size

    @property
    def parts(self) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Stored types and shape that each of the weight's two tensors must have."""
        *rows, width = self.shape
        qdata = ("U8", packed_width(width)) if self.bits == 4 else ("I8", width)
        return {
            ".qdata": ((qdata[0],), (*rows, qdata[1])),
            ".scale": (("BF16", "F32"), (*rows, width // self.group_size)),
        }


def _bad_entry(path: Path, name: str, field: str, value: object) -> CheckpointError:
    return CheckpointError(
        f"{path} gives tensor {name} the {field} {value!r}, which cannot be; "
        "quantize the checkpoint again."
    )


def _one_of(path: Path, name: str, scheme: dict, field: str, allowed: tuple) -> Any:
    value = scheme.get(field)
    if type(value) is not type(allowed[0]) or value not in allowed:
        raise _bad_entry(path, name, field, value)
    return value


def _read_recipe(path: Path) -> dict | None:
    if not path.exists():
        return None
    recipe = read_json_object(path)
    if recipe.get("format") != FORMAT:
        return None
    version = recipe.get("schema_version")
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"{path} has the schema version {version!r}, which is no version number; "
            "quantize the checkpoint again."
        )
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{path} has schema version {version}, newer than the {SCHEMA_VERSION} that this "
            "program knows; update the program."
        )
    return recipe


def _quantized_tensors(
    folder: Path, recipe: dict, files: SafetensorsFolder
) -> dict[str, _Quantized]:
    path = folder / RECIPE_FILE
    tensors = recipe.get("tensors")
    if not isinstance(tensors, dict) or not all(isinstance(e, dict) for e in tensors.values()):
        raise CheckpointError(f"{path} has no table of tensors; quantize the checkpoint again.")
    refuse_unprintable_names(path, tensors)
    quantized = {}
    for name, entry in tensors.items():
        scheme = entry.get("scheme")
        if scheme is None:
            files.shape(name)
            continue
        if not isinstance(scheme, dict):
            raise _bad_entry(path, name, "scheme", scheme)
        stored = _Quantized(path, name, entry)
        for suffix, (dtypes, shape) in stored.parts.items():
            part = f"{name}{suffix}"
            seen_dtype, seen_shape = files.dtype(part), files.shape(part)
            if seen_dtype not in dtypes or seen_shape != shape:
                raise CheckpointError(
                    f"Tensor {part} of {folder} is {seen_dtype} {list(seen_shape)} where "
                    f"recipe.json asks for {' or '.join(dtypes)} {list(shape)}; "
                    "quantize the checkpoint again."
                )
        quantized[name] = stored
    return quantized
