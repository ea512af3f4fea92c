"""The verbs for devices, through the real adbd: what they print, write and refuse."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_tests.adb.direct import open_tcp
from device_tests.bench.device_lock import DeviceLock
from device_tests.bench.inventory import deployed
from device_tests.local.device import LocalDevice
from device_tests.results import records
from export.contract.bundle import write_bundle
from scripts.pocketdiff import run
from tests.support import toy_model
from tests.support.record_samples import bench as sample_bench

# No adb server of this machine, and no serial of its user, has a say here.
pytestmark = pytest.mark.usefixtures("no_server")

SHORT = (
    *("--cold-runs", 0, "--speed-runs", 1, "--natural-runs", 0, "--memory-runs", 0),
    *("--steps", 2, "--poll-interval", 0.1),
)


def pocketdiff(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def last_line(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


@pytest.fixture
def serial(local_device: LocalDevice) -> Iterator[str]:
    """A device with nothing on it."""
    yield local_device.serial
    pocketdiff("clean", "--force", "--serial", local_device.serial)


def test_a_pushed_bundle_is_there_and_clean_removes_it(
    serial: str, toy_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pocketdiff("push", toy_bundle, "--serial", serial, "--json") == 0
    pushed = last_line(capfd.readouterr().out)
    assert pushed["device"] == serial and pushed["bytes_sent"] == pushed["bytes_total"] > 0
    host, port = serial.split(":")
    with open_tcp(host, int(port)) as transport:
        assert [b.bundle_id for b in deployed(transport)] == [pushed["bundle_id"]]

        assert pocketdiff("push", toy_bundle, "--serial", serial) == 0
        out = capfd.readouterr().out
        assert "nothing, all of it was there" in out and "/s" not in out

        assert pocketdiff("clean", "--bundle-id", pushed["bundle_id"], "--serial", serial) == 0
        assert "removed 1 bundle and 0 runs, " in capfd.readouterr().out
        assert deployed(transport) == []


def test_the_serial_may_come_from_the_environment(
    serial: str,
    toy_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ANDROID_SERIAL", serial)
    assert pocketdiff("push", toy_bundle, "--json") == 0
    assert last_line(capfd.readouterr().out)["device"] == serial


def test_bench_records_reports_resumes_and_ends_stdout_with_one_document(
    serial: str, toy_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results, page = tmp_path / "results.jsonl", tmp_path / "report.html"
    bench = ("bench", toy_bundle, "--serial", serial, "-o", results, *SHORT)
    assert pocketdiff(*bench, "--html", page) == 0
    output = capfd.readouterr()
    assert len(output.out.splitlines()) == 1
    document = last_line(output.out)
    assert (document["runs"], document["failed"]) == (2, 0)
    assert document["configurations"][0]["metrics"]["step_ms"]["steps"] == 2
    assert "2/2 speed 1/1" in output.err
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert [r["pass"] for r in records.read(results)] == ["warm_up", "speed"]

    assert pocketdiff(*bench) == 2  # nothing is mixed unasked
    assert "--resume" in capfd.readouterr().err
    assert pocketdiff(*bench, "--resume") == 0
    assert "2 more are in the results already" in capfd.readouterr().err
    assert len(records.read(results)) == 2

    markdown = tmp_path / "report.md"
    assert pocketdiff("report", results, "--markdown", markdown) == 0
    assert "Denoising step" in capfd.readouterr().out
    assert markdown.read_text().startswith("# Benchmark")
    assert pocketdiff("report", results, "--markdown", markdown) == 2
    assert "--overwrite" in capfd.readouterr().err


def test_a_report_with_a_plan_shows_predicted_beside_measured_in_every_form(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results, markdown, page = (tmp_path / name for name in ("r.jsonl", "r.md", "r.html"))
    for record in sample_bench():
        records.append(results, record)
    plan = ("report", results, "--plan", "diffusiongemma-26b-a4b", "--device", "oneplus-12")
    assert pocketdiff(*plan, "--markdown", markdown, "--html", page) == 0
    told = capfd.readouterr().out
    assert pocketdiff(*plan, "--json") == 0
    (configuration,) = last_line(capfd.readouterr().out)["configurations"]
    step = configuration["forecast"]["quantities"]["step_ms"]
    assert step["measured"] == configuration["metrics"]["step_ms"]["median"]
    assert step["share_of_roofline"] == step["roofline_ms"] / step["measured"]
    for shown in (told, markdown.read_text(), page.read_text()):
        assert f"{100 * step['error']:+.0f} %" in shown
        assert f"{100 * step['share_of_roofline']:.0f} %" in shown
        assert f"({step['bound']})" in shown and "achieved" in shown
        assert "measured faster than the roofline" in " ".join(shown.split()).lower()
    assert pocketdiff("report", results, "--plan", "diffusiongemma-26b-a4b") == 2
    assert "go together" in capfd.readouterr().err


def test_a_failed_run_is_reported_and_the_exit_code_says_so(
    serial: str, toy_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    # The runner needs longer than that to import what it runs with.
    arguments = ("--serial", serial, "-o", results, *SHORT, "--hang-timeout", 0.2)
    assert pocketdiff("bench", toy_bundle, *arguments) == 2
    output = capfd.readouterr()
    document = last_line(output.out)
    assert document["failed"] == document["runs"] > 0
    assert {r["failure"]["reason"] for r in records.read(results)} == {"hang"}
    assert "runs failed" in output.err


def test_puzzles_without_a_tokenizer_are_refused_before_anything_is_hashed(
    toy_programs: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    write_bundle(bare, toy_model.manifest(), toy_programs)
    program = bytearray((bare / "head.pte").read_bytes())
    program[-1] ^= 1  # whoever reads it all would say so
    (bare / "head.pte").write_bytes(program)
    results = tmp_path / "results.jsonl"
    assert pocketdiff("bench", bare, "--puzzles", 2, "-o", results) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "without a tokenizer" in said and "leave out --puzzles" in said
    assert not results.exists()


@pytest.mark.parametrize("verb", ["bench", "push"])
def test_a_device_that_is_being_measured_is_left_alone(
    verb: str,
    serial: str,
    toy_bundle: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    host, port = serial.split(":")
    more = ("-o", tmp_path / "results.jsonl") if verb == "bench" else ()
    with open_tcp(host, int(port)) as transport, DeviceLock(transport, "the-first"):
        assert pocketdiff(verb, toy_bundle, "--serial", serial, *more) == 2
        assert "the-first" in capfd.readouterr().err
        assert deployed(transport) == []
        assert pocketdiff("clean", "--serial", serial) == 2
        assert "the-first" in capfd.readouterr().err


def test_compare_shows_a_ratio_and_refuses_other_conditions(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    paths = {}
    for name, threads in (("a", 2), ("b", 2), ("c", 4)):
        paths[name] = tmp_path / f"{name}.jsonl"
        for record in sample_bench():
            record["conditions"]["threads"] = threads
            records.append(paths[name], record)
    assert pocketdiff("compare", paths["a"], paths["b"], "--json") == 0
    metrics = last_line(capfd.readouterr().out)["metrics"]
    ratios = {row["ratio"] for row in metrics.values()} - {None}  # None: of zeros
    assert ratios == {1.0}
    assert pocketdiff("compare", paths["a"], paths["c"]) == 2
    error = capfd.readouterr().err
    assert "threads" in error and "2" in error and "4" in error
    assert pocketdiff("compare", paths["a"], paths["c"], "--across", "threads") == 0

    both = tmp_path / "both.jsonl"
    both.write_bytes(paths["a"].read_bytes() + paths["c"].read_bytes())
    assert pocketdiff("compare", both, both, "--across", "threads") == 2  # mixed within a side
    sides = ("--a", "threads=2", "--b", "threads=4", "--across", "threads")
    capfd.readouterr()
    assert pocketdiff("compare", both, both, *sides, "--json") == 0
    [difference] = last_line(capfd.readouterr().out)["differences"]
    assert (difference["a"], difference["b"]) == ("2", "4")
    assert pocketdiff("compare", both, both, "--a", "color=red") == 2
    assert "color=red" in capfd.readouterr().err


def test_no_device_is_a_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    assert pocketdiff("devices", "--json") == 0
    assert last_line(capfd.readouterr().out) == {"devices": []}
    assert pocketdiff("clean") == 2
    assert "no device answers adb" in capfd.readouterr().err


def test_a_device_that_does_not_answer_is_a_sentence(
    toy_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        serial = f"127.0.0.1:{free.getsockname()[1]}"
    assert pocketdiff("push", toy_bundle, "--serial", serial) == 2
    assert serial in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--local", "--serial", "x"), "--local and --serial"),
        (("--local", "--via", "server"), "--via server"),
        (("--local", "--speed-runs", "-1"), "-1"),
        (("--local", "--max-temperature", "1000"), "1000"),
        (("--local", "--html", "/nowhere/at/all.html"), "/nowhere"),
        (("--local", "--canvases", "100000"), "canvases"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_a_device_is_touched(
    arguments: tuple[str, ...],
    says: str,
    toy_bundle: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LocalDevice, "start", lambda self: pytest.fail("it was touched"))
    assert pocketdiff("bench", toy_bundle, "-o", tmp_path / "r.jsonl", *arguments) == 2
    assert says in capfd.readouterr().err
