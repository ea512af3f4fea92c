"""Setting up `.venv`: which PyTorch comes from where, and what an interruption leaves. No network.

The interpreter, uv and uname are stand-ins that write down how they are called.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INDEX = "--index-url https://download.pytorch.org/whl/cpu"

PYTHON = """#!/bin/bash
case "$*" in
  *urlopen*) [ -n "$REACHABLE" ]; exit ;;
  "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; touch .venv/bin/activate ;;
  "-c "*) exit 0 ;;
esac
echo "python $*" >>"$CALLS"
[[ -n "$FAILS" && "$*" == *$FAILS* ]] && { echo noise; echo "no wheel for $FAILS"; exit 1; }
exit 0
"""
UV = """#!/bin/bash
[ "$1" = venv ] && { mkdir -p .venv/bin; cp "$PYTHON" .venv/bin/python; touch .venv/bin/activate; }
echo "uv $*" >>"$CALLS"
"""


class Setup:
    """A copy of the repository's set-up, with stand-ins for what it calls."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "repository"
        self.wheels = folder / "shared" / "wheels"
        self.programs = folder / "bin"
        self.calls = folder / "calls"
        (self.repository / "scripts").mkdir(parents=True)
        self.programs.mkdir()
        shutil.copy(ROOT / "scripts" / "setup.sh", self.repository / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.repository)
        self.program("python3", PYTHON)
        self.program("uname", '#!/bin/bash\necho "${UNAME:-Linux x86_64}"\n')
        tools = ("bash", "cksum", "cut", "grep", "head", "tail", "mkdir", "cp", "rm", "touch")
        for tool in (*tools, "mktemp", "timeout"):
            (self.programs / tool).symlink_to(str(shutil.which(tool)))

    def program(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text)
        (self.programs / name).chmod(0o755)

    def run(self, extra: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """What it says; `installs` has what it installed since the run before."""
        self.calls.write_text("")
        environment = {
            "PATH": str(self.programs),
            "CALLS": str(self.calls),
            "PYTHON": str(self.programs / "python3"),
            "TMPDIR": str(self.calls.parent),
            "FAILS": "",
            "REACHABLE": "",
        } | environment
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f". scripts/setup.sh; setup_environment {extra}"],
            cwd=self.repository,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def installs(self) -> list[str]:
        lines = self.calls.read_text().splitlines()
        return [
            line.partition("--disable-pip-version-check ")[2] for line in lines if " pip " in line
        ]


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    yield Setup(tmp_path)


def torch_version() -> str:
    text = (ROOT / "pyproject.toml").read_text()
    return text[text.index("torch==") :].partition('"')[0]


def test_wheels_beside_the_repository_come_first(setup: Setup) -> None:
    setup.wheels.mkdir(parents=True)
    assert setup.run("test", REACHABLE="1").returncode == 0
    assert setup.installs == [
        f"--no-index --find-links ../shared/wheels --no-deps {torch_version()}",
        "--editable .[test]",
    ]


def test_without_a_wheel_for_this_python_the_index_of_cpu_builds_is_next(setup: Setup) -> None:
    setup.wheels.mkdir(parents=True)
    assert setup.run(REACHABLE="1", FAILS="--no-index").returncode == 0
    assert setup.installs[1:] == [f"{INDEX} --no-deps {torch_version()}", "--editable ."]


@pytest.mark.parametrize(
    "environment",
    [
        {"REACHABLE": ""},
        {"REACHABLE": "1", "UNAME": "Darwin arm64"},
        {"REACHABLE": "1", "UNAME": "Linux aarch64"},
        {"REACHABLE": "1", "POCKETDIFF_TORCH": "cuda"},
    ],
)
def test_pypi_is_for_other_machines_for_cuda_and_where_the_index_is_out_of_reach(
    environment: dict[str, str], setup: Setup
) -> None:
    assert setup.run(**environment).returncode == 0
    assert setup.installs == [torch_version(), "--editable ."]


def test_pypi_is_the_last_resort_when_the_index_fails(setup: Setup) -> None:
    assert setup.run(REACHABLE="1", FAILS="--index-url").returncode == 0
    assert setup.installs[1:] == [torch_version(), "--editable ."]


def test_cuda_is_taken_although_wheels_lie_beside_and_replaces_a_cpu_build(setup: Setup) -> None:
    setup.wheels.mkdir(parents=True)
    setup.run()
    (setup.repository / ".venv" / "old").touch()
    assert setup.run(POCKETDIFF_TORCH="cuda").returncode == 0
    assert setup.installs == [torch_version(), "--editable ."]
    assert not (setup.repository / ".venv" / "old").exists()


def test_uv_does_it_where_there_is_one(setup: Setup) -> None:
    setup.program("uv", UV)
    assert setup.run(REACHABLE="1").returncode == 0
    install = "uv pip install --quiet --python .venv/bin/python"
    assert setup.calls.read_text().splitlines() == [
        f"uv venv --quiet --python {setup.programs}/python3 .venv",
        f"{install} {INDEX} --no-deps {torch_version()}",
        f"{install} --editable .",
    ]


def test_a_second_run_does_nothing_and_another_extra_or_requirement_something(
    setup: Setup,
) -> None:
    first = setup.run()
    assert "setting up" in first.stderr
    assert setup.run("test").returncode == 0 and len(setup.installs) == 2
    for extra in ("", "test"):
        again = setup.run(extra)
        assert (again.returncode, again.stderr, setup.calls.read_text()) == (0, "", "")
    with (setup.repository / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    (setup.repository / ".venv" / "kept").touch()
    assert setup.run().returncode == 0 and len(setup.installs) == 2
    assert (setup.repository / ".venv" / "kept").exists()


def test_a_failure_is_one_sentence_and_the_next_run_begins_anew(setup: Setup) -> None:
    failed = setup.run(FAILS="--editable")
    assert failed.returncode == 2
    begun, sentence = failed.stderr.splitlines()
    assert begun.startswith("setting up") and "failed: no wheel for --editable" in sentence
    log = Path(sentence.partition("all of it is in ")[2].rstrip(")"))
    assert "noise" in log.read_text()
    (setup.repository / ".venv" / "half").touch()
    assert setup.run().returncode == 0
    assert not (setup.repository / ".venv" / "half").exists()


def test_an_interpreter_that_is_gone_is_replaced(setup: Setup) -> None:
    setup.run()
    (setup.repository / ".venv" / "bin" / "python").unlink()
    assert setup.run().returncode == 0
    assert len(setup.installs) == 2


def test_what_cannot_be_is_refused_in_a_sentence(setup: Setup) -> None:
    refused = setup.run(POCKETDIFF_TORCH="rocm")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "'rocm'; set it to cpu or cuda" in refused.stderr
    setup.program(
        "old", '#!/bin/bash\n[ "$1" = --version ] && { echo Python 3.9.1; exit; }; exit 1'
    )
    old = setup.run(PYTHON=str(setup.programs / "old"))
    assert (old.returncode, old.stderr.count("\n")) == (2, 1)
    assert "Python 3.9.1 is not supported" in old.stderr
