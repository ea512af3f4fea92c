"""The JSON Schemas of the formats, made from their types, for readers in other languages.

`python -m export.contract.schemas` writes those of the contract beside this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import msgspec

from export.contract.manifest import BundleDocument
from export.contract.runner_protocol import (
    EVENT_TYPES,
    AnyEvent,
    FailedResult,
    OkResult,
    RunRequest,
)
from export.contract.traces import Traces

FOLDER = Path(__file__).parent


def schema_text(title: str, root: Any, others: Iterable[Any] = ()) -> str:
    """A schema file: the document's type at the top, further types under `$defs`."""
    (top, *_), definitions = msgspec.json.schema_components(
        (root, *others), ref_template="#/$defs/{name}"
    )
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        **top,
        "$defs": dict(sorted(definitions.items())),
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def schemas() -> dict[str, str]:
    """File name -> content of every schema of the contract."""
    events = reduce(or_, EVENT_TYPES.values())
    return {
        "bundle.schema.json": schema_text("bundle.json of a bundle", BundleDocument),
        "runner_protocol.schema.json": schema_text(
            "Runner protocol: request.json, a line of events.jsonl, result.json",
            OkResult | FailedResult,
            (RunRequest, events, AnyEvent),
        ),
        "traces.schema.json": schema_text("Golden traces of one style", Traces),
    }


if __name__ == "__main__":
    for name, text in schemas().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
