"""The verb `plan`: what it prints, its JSON, its plot, and that it waits for no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.pocketdiff import run

ROOT = Path(__file__).parents[2]
FAST = ("--device", "oneplus-12", "--device", "raspberry-pi-5")


def document(capfd: pytest.CaptureFixture[str], *words: str) -> dict:
    assert run(["plan", *words, "--json"]) == 0
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def test_the_26b_is_planned_in_under_a_second_of_processor_time_without_torch() -> None:
    code = (
        "import sys, time\n"
        "from scripts.pocketdiff import run\n"
        "code = run(['plan', 'diffusiongemma-26b-a4b', '--json'])\n"
        "heavy = {'torch', 'numpy', 'executorch', 'matplotlib', 'jsonschema'} & set(sys.modules)\n"
        "print(code, sorted(heavy), time.process_time(), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said, heavy, seconds = done.stderr.strip().splitlines()[-1].replace("[]", "none").split()
    assert (said, heavy) == ("0", "none")
    # Processor time from the interpreter's start; a wall clock would time the machine's other work.
    assert float(seconds) < 1.0
    assert json.loads(done.stdout)["parameters"]["total"] > 25e9


def test_tables_name_every_device_with_its_verdict(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "sdar-1.7b", "--acceptance", "4=2.5"]) == 0
    text = capfd.readouterr().out
    words = ("galaxy-s25", "galaxy-a15-5g", "rock-5b", "fits", "needs streaming", "denoising step")
    for word in (*words, "KV cache", "the example: 256 tokens in 30 steps", "tokens per forward"):
        assert word in text


def test_json_has_the_budget_the_roofline_and_the_break_even(
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = document(capfd, "qwen3-0.6b-bd3lm", *FAST, "--acceptance", "3", "--example-steps", "40")
    assert found["canvas_length"] == 32 and found["context"] == 2048
    assert sum(line["bytes"] for line in found["memory"]) > found["bundle_bytes"]
    phone = found["devices"][0]
    assert phone["verdict"] == "fits" and phone["example"]["tokens"] == 256
    own = next(p for p in phone["break_even"] if p["canvas_length"] == 32)
    assert own["tokens_per_forward_accepted"] == pytest.approx(3)
    assert phone["tokens_per_s"] == own["tokens_per_s"]
    assert phone["best_canvas_length"] in {p["canvas_length"] for p in phone["break_even"]}


def test_an_autoregressive_model_has_no_break_even(capfd: pytest.CaptureFixture[str]) -> None:
    found = document(capfd, "gemma-4-e2b", *FAST)
    assert "break_even" not in found["devices"][0]
    assert found["devices"][0]["tokens_per_s"] == pytest.approx(
        1000 / found["devices"][0]["step"]["best_ms"]
    )


def test_the_example_holds_on_an_npu_and_not_on_the_cores_beside_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ("diffusiongemma-26b-a4b", "--device", "jetson-orin-nano")
    cores = document(capfd, *words)["devices"][0]
    npu = document(capfd, *words, "--processor", "npu")["devices"][0]
    assert not cores["example"]["holds"] and npu["example"]["holds"]
    # Memory is the same, so a token of the twin is; the canvas is not.
    assert npu["token"]["memory_ms"] == cores["token"]["memory_ms"]
    assert npu["step"]["best_ms"] < cores["step"]["best_ms"] / 10


def test_memory_and_recipe_and_context_change_the_answer(
    capfd: pytest.CaptureFixture[str],
) -> None:
    base = document(capfd, "sdar-4b", *FAST)
    small = document(capfd, "sdar-4b", *FAST, "--memory", "2G")
    assert base["devices"][0]["verdict"] == "fits"
    assert small["devices"][0]["verdict"] in ("needs streaming", "refuses")
    plain = document(capfd, "sdar-4b", *FAST, "--recipe", "none")
    assert plain["bundle_bytes"] > 5 * base["bundle_bytes"]
    short = document(capfd, "sdar-4b", *FAST, "--context", "512")
    assert short["devices"][0]["needed_bytes"] < base["devices"][0]["needed_bytes"]


@pytest.mark.parametrize("name", ["plot.png", "page.html"])
def test_the_break_even_is_drawn(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / name
    assert run(["plan", "sdar-4b", *FAST, "--plot", str(target)]) == 0
    content = target.read_bytes()
    assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<!doctype html>")
    assert len(content) > 10_000
    assert b"OnePlus 12" in content or name.endswith("png")
    assert run(["plan", "sdar-4b", *FAST, "--plot", str(target)]) == 2
    assert "is there already" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no model was given"),
        (["gemma-5"], "presets are"),
        (["sdar-4b", "--device", "nokia-3310"], "there is no device 'nokia-3310'"),
        (["sdar-4b", "--acceptance", "many"], "--acceptance many is not understood"),
        (["sdar-4b", "--acceptance", "4=5"], "5 tokens per forward at a canvas of 4"),
        (["sdar-4b", "--recipe", "int3"], "There is no recipe 'int3'"),
        (["gemma-4-e2b", "--plot", "x.png"], "has no break-even"),
        (["sdar-4b", "--plot", "x.gif"], "neither .png nor .html"),
        (["--measure", "device.json"], "does not end in .toml"),
        (
            ["sdar-4b", "--processor", "npu", "--device", "oneplus-12"],
            "the NPU of oneplus-12 has no known peak",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    words: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", *words]) == 2
    assert said in capfd.readouterr().err


def test_the_list_names_every_source(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--list"]) == 0
    text = capfd.readouterr().out
    assert "JetAstra/SDAR" in text and "geektopia.es" in text
    assert run(["plan", "--list", "--json"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["devices"]["oneplus-12"]["figures"]["memory_gb_s"]["value"] == 76.8
    assert found["presets"]["llada-8b"]["total"] == 8.02
