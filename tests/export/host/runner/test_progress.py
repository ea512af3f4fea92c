"""What costs time is reported at a pace, and at the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.host.runner.run import run
from tests.support.runner_process import read_back, write_request


def test_temperatures_are_told_at_load_and_then_at_their_pace(
    folder: Path, toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = tmp_path / "thermal" / "thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("soc")
    (zone / "temp").write_text("30000")

    def told(interval_s: float) -> tuple[int, int]:
        """Temperatures and canvases of a run."""
        monkeypatch.setattr("export.host.runner.progress.TEMPERATURE_INTERVAL_S", interval_s)
        own = tmp_path / f"every {interval_s}"
        own.mkdir()
        # The two canvases that fit, whatever the model answers.
        request = write_request(own, toy_bundle, force_steps=1, settings={"entropy_bound": 9.0})
        assert run(request, zone.parent) == 0
        events, result = read_back(own)
        zones = [e["zones"] for e in events if e["event"] == "temperature"]
        assert zones == [{"soc": 30.0}] * len(zones)
        return len(zones), len(result["answers"][0]["canvases"])

    often, canvases = told(0.0)
    assert often == 1 + canvases
    assert told(3600.0) == (1, canvases)


def test_the_text_is_told_at_its_pace_and_at_the_end(
    folder: Path, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.host.runner.progress.TEXT_INTERVAL_S", 3600.0)
    assert run(write_request(folder, toy_bundle, max_new_tokens=30, seed=3)) == 0
    events, result = read_back(folder)
    texts = [e["text"] for e in events if e["event"] == "text"]
    assert len(texts) <= 2 and texts[-1] == result["answers"][0]["text"]
