"""The schema files are those of the types."""

from __future__ import annotations

import pytest

from export.contract.schemas import FOLDER, schemas


@pytest.mark.parametrize("name", schemas())
def test_the_file_is_up_to_date(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text == schemas()[name], "run python -m export.contract.schemas"


def test_every_schema_file_is_made_from_types() -> None:
    assert {path.name for path in FOLDER.glob("*.schema.json")} >= set(schemas())
