"""An engine keeps what its program heeds, and every session begins from it."""

from __future__ import annotations

import pytest

from export.host.eager import eager_engine
from export.host.engine import Engine
from quantize.errors import InputError
from tests.support.tiny_decoder import Weights, staged


def engine(**settings: float) -> Engine:
    model = staged(Weights(0), "autoregressive", settings=settings)
    return eager_engine(model)


def test_a_setting_that_the_program_does_not_heed_is_refused() -> None:
    plain, truncating = engine(temperature=0.0), engine(temperature=0.0, top_p=1.0, top_k=0)
    assert truncating.settings_with({"top_p": 0.5}).top_p == 0.5
    for _ in range(2):  # whatever sessions there were
        with pytest.raises(InputError, match=r"no setting top_p; it has temperature; export it"):
            plain.settings_with({"top_p": 0.5})
        plain.session().generate([3], 2)
    assert plain.settings_with({"temperature": 0.7}).temperature == 0.7


def test_a_setting_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match="temperature is -1"):
        engine(temperature=0.0).settings_with({"temperature": -1.0})


def test_every_session_begins_with_nothing_and_with_the_engines_settings() -> None:
    loaded = engine(temperature=0.6)
    first = loaded.session()
    answer = first.generate([3, 4], 6, seed=7)
    second = loaded.session()
    assert (second.tokens, second.cached, second.canvases) == ((), 0, 0)
    assert second.settings == loaded.settings and second.settings.temperature == 0.6
    assert second.generate([3, 4], 6, seed=7).tokens == answer.tokens
