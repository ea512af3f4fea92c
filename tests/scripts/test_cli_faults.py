"""The command line: one sentence and exit code 2 for what a user can cause; interruptions."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.pocketdiff import run
from tests.support.command_line import ForkedCommand, command

ROOT = Path(__file__).parents[2]


# --- what a user can cause ---------------------------------------------------------------------


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((bundle / "bundle.json").read_text())
    change(document)
    (bundle / "bundle.json").write_text(json.dumps(document))


def truncate_program(bundle: Path) -> None:
    os.truncate(bundle / "layers.pte", 1000)


def flip_a_bit(bundle: Path) -> None:
    content = bytearray((bundle / "head.pte").read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / "head.pte").write_bytes(content)


def make_newer(bundle: Path) -> None:
    edit_manifest(bundle, lambda document: document.update(schema_version=3))


def seal_again(bundle: Path, name: str, content: bytes) -> None:
    """Replace a file as somebody would who also corrects size and hash."""
    import hashlib

    (bundle / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(bundle, lambda document: document["files"].update({name: entry}))


def exchange_the_tokenizer(bundle: Path) -> None:
    text = (bundle / "tokenizer.json").read_text().replace('"z": 28', '"z": 28, "more": 29')
    seal_again(bundle, "tokenizer.json", text.encode())


def replace_a_program_by_text(bundle: Path) -> None:
    seal_again(bundle, "head.pte", b"not a program" * 100)


def remove_the_tokenizer(bundle: Path) -> None:
    edit_manifest(bundle, lambda document: document.update(tokenizer=None))


def nothing(bundle: Path) -> None:
    pass


BAD: dict[str, tuple[Callable[[Path], None], tuple[object, ...], str]] = {
    "a truncated program": (truncate_program, (), "layers.pte has 1000 bytes, expected"),
    "a damaged program": (flip_a_bit, (), "head.pte is damaged"),
    "a newer bundle": (make_newer, (), "schema version 3"),
    "a program that is none": (replace_a_program_by_text, (), "cannot be loaded by ExecuTorch"),
    "the tokenizer of another model": (exchange_the_tokenizer, (), "'more' the id 29"),
    "no tokenizer": (remove_the_tokenizer, (), "without a tokenizer"),
    "a prompt over the context": (nothing, ("-p", "a" * 40), "exceeds the context of 40"),
    "more new tokens than fit": (nothing, ("--max-new-tokens", 31), "only 30 fit"),
    "a character without a token": (nothing, ("-p", "héllo"), "'é'"),
    "temperatures the wrong way round": (nothing, ("--set", "t_min=0.9"), "t_max is 0.8"),
    "a negative entropy bound": (nothing, ("--set", "entropy_bound=-1"), "entropy_bound is -1.0"),
    "an unknown setting": (
        nothing,
        ("--set", "colour=1"),
        "has no setting colour; it has max_steps",
    ),
    "a setting without a value": (nothing, ("--set", "t_min"), "no value; give NAME=NUMBER"),
    "a setting that is no number": (nothing, ("--set", "t_min=x"), "'x'; give NAME=NUMBER"),
    "a negative seed": (nothing, ("--seed", -1), "seed is -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence_on_stderr_nothing_on_stdout_and_exit_code_2(
    case: str, toy_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, options, says = BAD[case]
    damage(toy_bundle)
    prompt = () if "-p" in options else ("-p", "hello")
    code = run(command("generate", toy_bundle, *prompt, *options, "--json"))
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("pocketdiff: ") and says in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "nowhere"),
        ("generate", "nowhere", "-p", "hi"),
        ("evaluate", "nowhere"),
        ("quantize", "nowhere", "out"),
        ("export", "nowhere", "out"),
        ("quantize", "nowhere", "out", "--recipe", "no-such-recipe"),
        ("quantize", "nowhere", "out", "--recipe", "nowhere.json"),
    ],
)
def test_a_path_that_is_not_there_is_named(
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(list(arguments)) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "nowhere" in err or "no-such-recipe" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("frobnicate",),
        ("generate",),
        ("generate", "x", "-p", "y", "--threads", "0"),
        ("generate", "x", "-p", "y", "--threads", "many"),
        ("export", "a", "b", "--experts", "all"),
        ("quantize", "a", "b", "--algorithm", "guess"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    arguments: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(list(arguments)) == 2
    out, err = capfd.readouterr()
    assert out == "" and "Error" in err


def test_a_recipe_file_and_an_algorithm_contradict_each_other(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.json").write_text("{}")
    options = ("--recipe", tmp_path / "mine.json", "--algorithm", "hqq")
    assert run(command("quantize", checkpoint, tmp_path / "out", *options)) == 2
    assert "--algorithm" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_fault_of_the_program_is_not_passed_off_as_the_users(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("export.contract.bundle.open_bundle", fail)
    with pytest.raises(ZeroDivisionError):
        run(command("inspect", toy_bundle))


# --- full disks and interruptions --------------------------------------------------------------


def test_a_full_disk_leaves_nothing_of_a_quantized_checkpoint(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel itself refuses to write a file beyond this size.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        code = run(command("quantize", checkpoint, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "does not fit on the disk" in err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_interrupted_generation_exits_with_130(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: object, event: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scripts.views.live_canvas.PlainSteps.on_event", interrupt)
    assert run(command("generate", toy_bundle, "-p", "hello", "--json")) == 130
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("verb", "sent", "code"),
    [
        ("quantize", signal.SIGINT, 130),
        ("quantize", signal.SIGTERM, 143),
        ("export", signal.SIGINT, 130),
    ],
)
def test_an_interrupted_verb_leaves_nothing_under_its_final_name(
    verb: str,
    sent: signal.Signals,
    code: int,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    import export.exporter  # noqa: F401  (forked with what it imports)
    import quantize.quantizer  # noqa: F401

    output = tmp_path_factory.mktemp("output")
    process = ForkedCommand(output, verb, ROOT / "scripts/demo_model", tmp_path / "out")

    def wait(until_true: Callable[[], bool]) -> None:
        give_up = time.monotonic() + 120
        while not until_true():
            assert time.monotonic() < give_up, process.output()
            time.sleep(0.02)

    try:
        # The work is done in a temporary folder beside the destination: wait for it to appear.
        wait(lambda: bool(list(tmp_path.glob(".*/content"))) or process.poll() is not None)
        assert process.poll() is None, process.output()
        assert not (tmp_path / "out").exists()
        process.send(sent)
        wait(lambda: process.poll() is not None)
    finally:
        process.send(signal.SIGKILL)
    out, err = process.output()
    assert process.poll() == code, err
    assert out == "" and "Traceback" not in err
    assert "the same command goes on from there" in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    if verb == "quantize":  # lowering takes minutes: see tests/export/backends/test_templates.py
        assert err.count("\n") == 1
        assert run(command(verb, ROOT / "scripts/demo_model", tmp_path / "out")) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
