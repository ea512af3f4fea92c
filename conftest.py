"""Divides the tests of both suites among processes."""

from __future__ import annotations

import pytest

from tests.support.schedule import divide


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    divide(items)
