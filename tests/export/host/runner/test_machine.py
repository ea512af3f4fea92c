"""Temperatures are those of the thermal zones that can be read."""

from __future__ import annotations

from pathlib import Path

from export.host.runner.machine import read_temperatures


def test_temperatures_of_the_zones_that_can_be_read(tmp_path: Path) -> None:
    zones = {
        "thermal_zone0": ("cpu-0\n", "41500\n"),
        "thermal_zone1": ("cpu-0\n", "42000\n"),
        "thermal_zone2": ("no sensor\n", "-273000\n"),
        "thermal_zone3": ("broken\n", "n/a\n"),
        "thermal_zone4": ("off\n", None),
    }
    for name, (kind, value) in zones.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "type").write_text(kind)
        if value is not None:
            (tmp_path / name / "temp").write_text(value)
    assert read_temperatures(tmp_path) == {"cpu-0": 41.5, "cpu-0 (thermal_zone1)": 42.0}
    assert read_temperatures(tmp_path / "missing") == {}
