"""The Python host does what the golden traces say, on freshly lowered bundles."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.contract.bundle import Bundle
from export.contract.styles import STYLES
from export.contract.traces import FOLDER, read_traces
from export.host.bundle_engine import open_engine
from export.host.golden_traces import REQUESTS, conversations, play

REPOSITORY = Path(__file__).parents[3]


def test_every_style_has_traces_of_its_requests() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(STYLES) == set(REQUESTS)
    for style in STYLES:
        found = [conversation.name for conversation in read_traces(style).conversations]
        assert found == list(REQUESTS[style])


@pytest.fixture(scope="session", params=list(STYLES))
def small_bundle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The model of a style's traces, quantized and lowered as they say."""
    from export.exporter import export_bundle
    from quantize.quantizer import quantize_checkpoint
    from quantize.recipe import preset

    traces = read_traces(request.param)
    if request.param == "uniform_diffusion":
        return request.getfixturevalue("demo_bundle")
    folder = tmp_path_factory.mktemp(request.param)
    quantize_checkpoint(REPOSITORY / traces.checkpoint, folder / "int4", preset(traces.recipe))
    return export_bundle(folder / "int4", folder / "bundle")


@pytest.mark.slow
def test_a_bundle_replays_every_token(small_bundle: Bundle) -> None:
    """Equal wherever no decision is a near-tie; the others are for one kind of processor."""
    traces = read_traces(small_bundle.manifest.style)
    requests = conversations(small_bundle.folder)
    engine = open_engine(small_bundle, threads=1)
    for conversation in traces.conversations:
        turns = play(engine, requests[conversation.name])
        assert [turn.prompt for turn in turns] == [turn.prompt for turn in conversation.turns]
        if conversation.is_equal_everywhere:
            assert turns == conversation.turns, conversation.name
