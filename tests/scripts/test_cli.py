"""The command line: what its verbs print, for people and for programs."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import save_file

from export.contract.bundle import open_bundle
from export.host.bundle_engine import open_engine
from scripts.pocketdiff import run
from scripts.views.live_canvas import LiveCanvas
from tests.support.command_line import command
from tests.support.sharded import save_shards
from tests.support.toy_model import INFO

ROOT = Path(__file__).parents[2]
VERBS = (
    *("plan", "quantize", "export", "inspect", "generate", "evaluate"),
    *("devices", "push", "report", "compare", "clean"),
)


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
    from safetensors.torch import load_file

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
