"""Config.json files of published models, by name, and where they are from."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.families.description import PlainFiles
from quantize.errors import InputError
from quantize.files.json_files import read_json_object

FOLDER = Path(__file__).with_name("presets")
CONFIG_FILE, GENERATION_CONFIG_FILE = "config.json", "generation_config.json"


@dataclass(frozen=True)
class Source:
    """Of a preset. total, active: parameters as published, 10^9; None where they were not.
    published: where and how."""

    source: str
    published: str
    total: float | None = None
    active: float | None = None


def names() -> tuple[str, ...]:
    """Of all presets."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob(f"*/{CONFIG_FILE}")))


def source(name: str) -> Source:
    """Where a preset is from."""
    sources = tomllib.loads((FOLDER / "sources.toml").read_text(encoding="utf-8"))
    return Source(**sources[name])


def model_files(model: str) -> PlainFiles:
    """config.json and generation_config.json of a preset, of a checkpoint folder, or of a file.

    Raises InputError for a name that there is not, CheckpointError for a file that is no JSON
    object.
    """
    path = Path(model)
    if model in names():
        path = FOLDER / model / CONFIG_FILE
    elif path.is_dir():
        path = path / CONFIG_FILE
    elif path.suffix != ".json":
        raise InputError(
            f"{model} is neither a folder nor a config.json nor a preset; presets are "
            f"{', '.join(names())}"
        )
    if not path.is_file():
        raise InputError(
            f"{path} is missing; give a checkpoint folder, a config.json, or a preset's name"
        )
    folder = path.resolve().parent
    generation = folder / GENERATION_CONFIG_FILE
    found = read_json_object(generation) if generation.is_file() else {}
    return PlainFiles(folder, read_json_object(path), found)


def read_config(model: str) -> tuple[str, dict[str, Any]]:
    """The name and the config.json of what `model_files` takes. Raises what that raises."""
    files = model_files(model)
    return files.folder.name, files.config
