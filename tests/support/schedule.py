"""Which tests run together in one process, and in which order, where pytest-xdist divides them."""

from __future__ import annotations

import pytest

SLOW_FIXTURES = {
    "cut_bundle", "demo_bundle", "gemma4", "hrm_text", "killed", "lowered", "outcome", "wide",
}  # fmt: skip
"""They lower a model, or kill long work again and again."""
SHARED_FIXTURES = {"module", "package", "class"}
BRACKETS = str.maketrans("[]@", "()_")  # pytest-xdist looks for a group behind them


def divide(items: list[pytest.Item]) -> None:
    """Mark groups for `--dist loadgroup` and put the slow ones first, in place.

    Whoever is the first to ask for a fixture that lowers a model waits for it, so all tests that do
    are slow; those of a device do by its bundle.

    The tests of a file are a group, so that what its fixtures hold is made once; a slow test that
    shares nothing is a group of its own. A long group that begins last would leave one process
    without work, so files with slow tests come first.
    """
    for item in items:
        asks = SLOW_FIXTURES & set(getattr(item, "fixturenames", ()))
        if asks or item.get_closest_marker("device"):
            item.add_marker(pytest.mark.slow)
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)  # stable: files keep their order
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            is_alone = item.get_closest_marker("slow") and not _shares(item)
            name = f"{item.path.stem}::{item.name}" if is_alone else item.path.stem
            item.add_marker(pytest.mark.xdist_group(name.translate(BRACKETS)))


def _shares(item: pytest.Item) -> bool:
    """Whether a fixture of the test lives for its file."""
    info = item._fixtureinfo  # type: ignore[attr-defined]
    return any(
        definition.scope in SHARED_FIXTURES
        for definitions in info.name2fixturedefs.values()
        for definition in definitions
    )
