"""The tests lie as the packages do and share only what is in `tests/support`."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT)
    for pattern in ("tests/**/*.py", "device_tests/test_*.py", "device_tests/conftest.py")
    for path in ROOT.glob(pattern)
)
FOLDERS = sorted({path.parent for path in FILES if path.name.startswith("test_")})


def imported(path: Path) -> set[str]:
    """Names of modules that a file imports, and of what it takes from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return names


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_test_is_imported(path: Path) -> None:
    tests = {".".join(other.with_suffix("").parts) for other in FILES}
    shared = {name for name in tests if name.startswith("tests.support.")}
    own_fixtures = ".".join((*path.parent.parts, "conftest"))
    assert imported(path) & (tests - shared) <= {own_fixtures}


def test_every_folder_of_tests_is_a_package_of_the_project() -> None:
    folders = (Path(*folder.parts[1:]) for folder in FOLDERS if folder.parts[0] == "tests")
    assert [str(folder) for folder in folders if not (ROOT / folder).is_dir()] == []


def test_no_two_tests_of_a_file_have_one_name() -> None:
    """The later one would hide the earlier."""
    for path in FILES:
        body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        names = sorted(node.name for node in body if isinstance(node, ast.FunctionDef))
        assert [a for a, b in itertools.pairwise(names) if a == b] == [], path
