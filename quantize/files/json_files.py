"""Small JSON files of a checkpoint folder, read as untrusted input."""

from __future__ import annotations

import json
from pathlib import Path

from quantize.errors import CheckpointError

LARGEST_BYTES = 256 * 2**20


def read_json_object(path: Path) -> dict:
    """Returns the JSON object in `path`; raises CheckpointError for anything else."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes > LARGEST_BYTES:
            raise CheckpointError(
                f"{path} has {size_bytes:,} bytes, too many for a file of settings; "
                "fetch the file again."
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; name a folder that holds a whole checkpoint."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check its permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(
            f"{path} is not valid JSON ({reason}); fetch the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(value).__name__} where an object was expected; "
            "fetch the file again."
        )
    return value
