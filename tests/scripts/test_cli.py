"""The command line: what it prints, and one sentence with exit code 2 for what a user can cause."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from export.contract.bundle import open_bundle
from export.host.bundle_engine import open_engine
from scripts.console import Reporter
from scripts.pocketdiff import run
from scripts.views.live_canvas import LiveCanvas
from tests.support.command_line import command, start
from tests.support.sharded import save_shards
from tests.support.toy_model import INFO

ROOT = Path(__file__).parents[2]
VERBS = (
    *("plan", "quantize", "export", "inspect", "generate", "evaluate"),
    *("devices", "push", "report", "compare", "clean"),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that can be quantized in a moment: three small linears."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "none"}')
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"model.layers.{i}.self_attn.q_proj.weight": torch.randn(32, 64, generator=generator)
        for i in range(3)
    }
    save_file(weights, folder / "model.safetensors")
    return folder


# --- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    text = capfd.readouterr().out
    assert "Usage: pocketdiff" in text and "--json" in text
    # An option without a word of explanation would leave its line empty behind the type.
    assert "(default: " not in text or "default" in text


def test_help_waits_for_neither_torch_nor_anything_else_that_is_slow() -> None:
    code = (
        "import sys; from scripts.pocketdiff import run; run(['--help']); "
        "slow = {'torch', 'torchao', 'executorch', 'numpy', 'jinja2', 'tokenizers', 'jsonschema'}; "
        "sys.exit(', '.join(slow & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(verb in done.stdout for verb in VERBS)


# --- results -----------------------------------------------------------------------------------


def test_inspect_tells_people_and_programs_what_is_in_a_bundle(
    toy_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(command("inspect", toy_bundle)) == 0
    text = capfd.readouterr().out
    for fact in ("uniform_diffusion", "canvas of 6 tokens", "40 tokens", "SHA-256 verified",
                 "layers.pte", "head.pte", "entropy_bound"):  # fmt: skip
        assert fact in text
    assert run(command("inspect", toy_bundle, "--json")) == 0
    out, err = capfd.readouterr()
    assert err == ""
    document = json.loads(out)
    assert document["verified"] is True
    assert document["manifest"] == json.loads((toy_bundle / "bundle.json").read_text())


def test_generate_prints_the_answer_and_every_number_with_its_unit(
    toy_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(command("generate", toy_bundle, "-p", "hello", "--seed", 3)) == 0
    out, err = capfd.readouterr()
    for fact in ("time to first draft", "time to first committed text", "steps per canvas",
                 "tokens per forward", "tokens/s", " ms"):  # fmt: skip
        assert fact in out
    # A CUDA build of PyTorch alone is more than a GiB.
    assert re.search(r"peak memory \(RSS\) +[\d.,]+ [MG]iB", out)
    assert "step  1/5" in err and "nats" in err  # no terminal here: plain lines, and not in stdout


def test_generate_gives_programs_one_compact_document_with_the_tokens_of_the_runtime(
    toy_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--seed", 3, "--max-new-tokens", 7, "--threads", 1, "--no-live", "--json")
    assert run(command("generate", toy_bundle, "-p", "hello", *options)) == 0
    out, err = capfd.readouterr()
    assert out.count("\n") == 1 and ": " not in out and err == ""
    document = json.loads(out)
    session = open_engine(open_bundle(toy_bundle), 1).session()
    prompt = [2, *(ord(c) - ord("a") + 3 for c in "hello")]
    expected = session.generate(prompt, 7, 3)
    assert document["tokens"] == list(expected.tokens) and len(expected.tokens) == 12
    assert document["prompt_tokens"] == 6
    assert [len(c["steps"]) for c in document["canvases"]] == [
        len(c.steps) for c in expected.canvases
    ]
    assert document["peak_rss_bytes"] > 10 * 2**20 and document["median_step_ms"] > 0


def test_generate_passes_every_sampler_option_on(
    toy_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ("max_steps=3", "t_min=0.5", "t_max=0.9", "entropy_bound=0.25")
    options = [word for setting in given for word in ("--set", setting)]
    assert run(command("generate", toy_bundle, "-p", "hello", *options, "--no-live", "--json")) == 0
    settings = json.loads(capfd.readouterr().out)["settings"]
    assert [settings[k] for k in ("max_steps", "t_min", "t_max", "entropy_bound")] == [
        3, 0.5, 0.9, 0.25,
    ]  # fmt: skip


def test_new_tokens_default_to_what_the_context_has_room_for(
    toy_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(command("generate", toy_bundle, "-p", "hello", "--no-live", "--json")) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["finish_reason"] == "eos" or len(document["tokens"]) == 30


def test_the_live_canvas_shows_accepted_positions_bold_and_noise_dim(toy_bundle: Path) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, color_system="standard")
    session = open_engine(open_bundle(toy_bundle), 1).session()
    accepted: list[int] = []

    def texts(tokens: Any) -> list[str]:
        return [f"<{int(token)}\n>" for token in tokens]

    with LiveCanvas(console, texts, padding=28) as view:

        def watch(event: Any) -> None:
            view.on_event(event)
            accepted.append(int(event.accepted.sum()) if hasattr(event, "accepted") else -1)

        session.generate([2, 5, 6, 7], 12, 3, on_event=watch)
    text = file.getvalue()
    steps = [count for count in accepted if count >= 0]
    bold, dim = (text.count(f"\x1b[{n}m<") + text.count(f"\x1b[{n}m·") for n in (1, 2))
    assert bold == sum(steps)
    # Each of two canvases is shown once as nothing but noise before its first step.
    assert dim == sum(INFO.canvas_length - count for count in steps) + 2 * INFO.canvas_length
    assert "<28" not in text and "·" in text  # the one token that is declared to be padding
    assert "↵" in text  # a line break inside of a token would move the cursor
    assert "\x1b[?25h" in text  # and the cursor is given back


def test_quantize_prints_a_row_per_layer_and_writes_a_checkpoint(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(command("quantize", checkpoint, tmp_path / "int4", "--json")) == 0
    document = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [row["name"] for row in document["layers"]] == [f"model.layers.{i}" for i in range(3)]
    assert document["total"]["bytes_after"] < document["total"]["bytes_before"] / 5
    assert (tmp_path / "int4/recipe.json").is_file()
    assert run(command("quantize", checkpoint, tmp_path / "int4", "--overwrite")) == 0
    text = capfd.readouterr().out
    assert "layers.2" in text and "dB" in text and "total" in text


def test_quantize_takes_a_checkpoint_shard_by_shard(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    half = {
        "a.safetensors": {n: w for n, w in weights.items() if ".layers.0." in n},
        "b.safetensors": {n: w for n, w in weights.items() if ".layers.0." not in n},
    }
    save_shards(source, half)
    (source / "b.safetensors").unlink()
    quantize = command("quantize", source, tmp_path / "int4", "--available")
    assert run(quantize) == 0
    assert "1 shards are to come, the first b.safetensors" in capfd.readouterr().out
    assert run([*quantize, "--json"]) == 0
    document = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert document == {"destination": None, "missing": ["b.safetensors"]}
    (source / "a.safetensors").unlink()
    save_file(half["b.safetensors"], source / "b.safetensors")
    assert run(quantize) == 0
    assert "layers.2" in capfd.readouterr().out
    assert run(command("quantize", checkpoint, tmp_path / "whole")) == 0
    reports = [(tmp_path / name / "recipe.json").read_text() for name in ("int4", "whole")]
    assert reports[0] == reports[1]


def test_quantize_takes_a_recipe_from_a_file_and_an_algorithm_by_name(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from quantize.recipe import preset

    (tmp_path / "mine.json").write_text(json.dumps(preset("int4-g64").to_json()))
    assert (
        run(command("quantize", checkpoint, tmp_path / "a", "--recipe", tmp_path / "mine.json"))
        == 0
    )
    assert run(command("quantize", checkpoint, tmp_path / "b", "--algorithm", "hqq")) == 0
    found = {
        name: json.loads((tmp_path / name / "recipe.json").read_text())["recipe"] for name in "ab"
    }
    assert found["a"]["name"] == "int4-g64"
    assert '"hqq"' in json.dumps(found["b"]) and '"hqq"' not in json.dumps(found["a"])


def test_export_passes_its_options_on_and_describes_the_bundle(
    toy_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    calls: list[dict[str, Any]] = []

    def fake(source: Path, destination: Path, **options: Any) -> Any:
        options.pop("progress")(1, 2, "lowering")
        calls.append({"source": source, "destination": destination} | options)
        return open_bundle(toy_bundle, verify=False)

    monkeypatch.setitem(sys.modules, "export.exporter", SimpleNamespace(export_bundle=fake))
    options = ("--context", 64, "--experts", "gather", "--backend", "x", "--overwrite")
    assert run(command("export", tmp_path / "a", tmp_path / "b", *options)) == 0
    assert calls == [
        {"source": tmp_path / "a", "destination": tmp_path / "b", "maximum_context": 64,
         "experts": "gather", "backend": "x", "overwrite": True}
    ]  # fmt: skip
    assert "uniform_diffusion" in capfd.readouterr().out


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
    verb: str, sent: signal.Signals, code: int, tmp_path: Path
) -> None:
    process = start(verb, ROOT / "scripts/demo_model", tmp_path / "out")
    try:
        # The work is done in a temporary folder beside the destination: wait for it to appear.
        until = time.monotonic() + 120
        while not list(tmp_path.glob(".*/content")):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
        assert not (tmp_path / "out").exists()
        process.send_signal(sent)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert out == "" and "Traceback" not in err
    assert "the same command goes on from there" in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    if verb == "quantize":  # lowering takes minutes: see tests/export/backends/test_templates.py
        assert err.count("\n") == 1
        assert run(command(verb, ROOT / "scripts/demo_model", tmp_path / "out")) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- progress ----------------------------------------------------------------------------------


def test_the_time_left_is_of_the_pace_since_the_first_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = io.StringIO()
    clock = SimpleNamespace(monotonic=lambda: clock.now)
    clock.now = 0.0
    monkeypatch.setattr("scripts.console.time", clock)
    reporter = Reporter("quantizing", Console(file=said, width=100))
    # Eighty of a hundred were done by an earlier command, and say nothing about this one's pace.
    for now, done in ((10.0, 80), (16.0, 81), (30.0, 84), (130.0, 90)):
        clock.now = now
        reporter(done, 100, "a weight")
    assert said.getvalue().splitlines() == [
        "quantizing: 80 % a weight",
        "quantizing: 81 % (1 min 54 s left) a weight",
        "quantizing: 84 % (1 min 20 s left) a weight",
        "quantizing: 90 % (2 min 0 s left) a weight",
    ]


def test_the_bar_in_a_terminal_shows_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    clock = SimpleNamespace(monotonic=lambda: clock.now)
    clock.now = 0.0
    monkeypatch.setattr("scripts.console.time", clock)
    reporter = Reporter("quantizing", Console(file=said, width=120, force_terminal=True))
    reporter.start()
    for now, done in ((0.0, 10), (10.0, 11)):
        clock.now = now
        reporter(done, 10_000, "a weight")
    reporter.stop()
    assert "27 h 44 min left" in said.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="mappings and /proc are Linux's")
def test_generate_holds_a_memory_budget_and_says_what_it_took(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = command("generate", toy_bundle, "-p", "abc", "--no-live", "--json")

    def answer(*more: str) -> dict[str, Any]:
        assert run([*plain, *more]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    document = answer()
    memory = ("--packed-weights", tmp_path / "packed", "--memory-budget")
    within = answer(*command(*memory, "8G"))
    assert within["tokens"] == document["tokens"] and "weights" not in document
    assert within["weights"]["budget_bytes"] == 8 << 30
    assert [stage["name"] for stage in within["weights"]["stages"]] == ["layers", "head"]
    assert run([*plain, *command(*memory, "1K")]) == 2
    error = capsys.readouterr().err
    assert "a memory budget of 1024 bytes is too small" in error and "Traceback" not in error
