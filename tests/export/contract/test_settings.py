"""Sampler settings are accepted and refused as the vectors say that every host does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import contract
from export.contract.styles import STYLES
from quantize.errors import InputError

VECTORS: list[dict[str, Any]] = json.loads(
    Path(contract.__path__[0], "settings_vectors.json").read_text(encoding="utf-8")
)["vectors"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['style']}-{v['settings']}")
def test_settings_are_as_the_vector_says(vector: dict[str, Any]) -> None:
    settings = STYLES[vector["style"]].settings
    if vector["refused"] is not None:
        with pytest.raises(InputError, match=rf"^{vector['refused']} is "):
            settings(**vector["settings"])
        return
    array = settings(**vector["settings"]).as_array()
    np.testing.assert_array_equal(array, np.array(vector["array"], dtype=np.float32))


def test_every_setting_of_every_style_is_refused_once() -> None:
    refused = {(vector["style"], vector["refused"]) for vector in VECTORS if vector["refused"]}
    unbounded = {("masked_diffusion", "threshold")}  # only what JSON cannot carry is refused
    expected = {
        (style.name, name) for style in STYLES.values() for name in style.settings.__annotations__
    }
    assert refused == expected - unbounded
