"""device_tests, plan, families and the contract import where there is no torch."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import device_tests
import export.contract
import export.families
import export.plan

BLOCKED = ("torch", "torchao", "executorch", "transformers")

PYTEST_FILES = {
    "device_tests.conftest", "device_tests.test_on_device", "device_tests.local.fixture",
}  # fmt: skip

# Imports each module named on the command line in one interpreter whose finder refuses the rest.
SCRIPT = f"""
import importlib, importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{{name}}: {{error}}")
        for other in [n for n in sys.modules if n.startswith(("device_tests", "export"))]:
            del sys.modules[other]  # what was half imported
assert not set(sys.modules) & set({BLOCKED!r})
"""


def modules() -> list[str]:
    """Every module of these packages but those that are pytest's."""
    found = []
    for package in (device_tests, export.contract, export.families, export.plan):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name not in PYTEST_FILES:
                found.append(module.name)
    return found


def imported(names: list[str]) -> str:
    """What an interpreter without torch says about importing `names`; "" if all can be."""
    command = [sys.executable, "-c", SCRIPT, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_module_imports_with_torch_blocked() -> None:
    names = modules()
    assert len(names) > 40
    # The last three are imported by functions of device_tests when they are called.
    lazily = ["export.host.evaluation", "export.host.puzzles", "export.host.tokenizer"]
    assert imported([*names, *lazily]) == ""


def test_the_block_holds() -> None:
    assert "torch is blocked" in imported(["export.exporter"])
