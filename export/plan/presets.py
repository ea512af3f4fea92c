"""Config.json files of published models, by name, and where they are from."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import CheckpointError, InputError

FOLDER = Path(__file__).with_name("presets")
CONFIG_FILE = "config.json"


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


def read_config(model: str) -> tuple[str, dict[str, Any]]:
    """The name and the config.json of a preset, of a checkpoint folder, or of a file.

    Raises InputError for a name that there is not, CheckpointError for a file that is not JSON.
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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing; give a checkpoint folder, a config.json, or a preset's name"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again")
    return path.resolve().parent.name, config
