"""A plan's bytes against the programs that the exporter writes, and the warnings before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from device_tests.bench.memory_budget import (
    available_bytes,
    parse_available,
    run_budget,
    warning_of,
)
from device_tests.results import report
from device_tests.results.planned import with_forecasts
from device_tests.results.summary import summarize
from export.contract.bundle import Bundle
from export.contract.manifest import FileEntry
from export.families import read_shape
from export.host.program_file import ProgramMemory, read_program_memory
from export.plan.budget import LINUX_RUNNER, budget_of_bundle
from export.plan.device import open_device
from export.plan.layout import Layout, lay_out
from export.plan.presets import read_config
from quantize.errors import BundleError, InputError
from quantize.quantizer import quantize_checkpoint
from quantize.recipe import preset
from tests.support import dense_checkpoints, record_samples
from tests.support.folder_transport import FolderTransport

DEMO = Path(__file__).parents[3] / "scripts" / "demo_model"
INT4 = preset("int4-g32")


def programs(bundle: Bundle) -> dict[str, ProgramMemory]:
    return {
        stage.name: read_program_memory(bundle.path(stage.file)) for stage in bundle.manifest.stages
    }


def total(found: dict[str, ProgramMemory], field: str) -> int:
    return sum(getattr(memory, field) for memory in found.values())


def check(layout: Layout, found: dict[str, ProgramMemory], caches: int) -> None:
    """The plan's bytes are the programs' within what their graphs and small constants take."""
    assert layout.weight_bytes("mapped") == pytest.approx(total(found, "constant_bytes"), rel=0.05)
    stored = sum(i.file_bytes for i in layout.stored if i.where == "packed")
    assert stored == pytest.approx(total(found, "weight_bytes"), rel=0.05)
    # Where the memory planner puts what lives shortly is modelled roughly (docs/plan.md); at these
    # sizes masks and block sums, which do not grow with the model, are a third of it.
    planned = total(found, "planned_bytes")
    assert caches < planned
    assert layout.planned_bytes == pytest.approx(planned, rel=0.5)


# --- program files ---


def test_the_runtime_says_the_same_of_a_program_as_its_header(
    toy_programs: dict[str, bytes], tmp_path: Path
) -> None:
    """ExecuTorch's own reader is the reference."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    for name, content in toy_programs.items():
        path = tmp_path / name
        path.write_bytes(content)
        memory = read_program_memory(path)
        program = deserialize_pte_binary(content)
        program = getattr(program, "program", program)
        planned = sum(sum(plan.non_const_buffer_sizes) for plan in program.execution_plan)
        assert memory.planned_bytes == planned > 0
        assert memory.file_bytes == len(content)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has 0 bytes"),
        (b"nothing" * 20, "in place of b'ET12'"),
        (b"\x40\x00\x00\x00ET12" + bytes(92), "no whole ExecuTorch program"),
        (b"\xff\xff\xff\xffET12" + bytes(92), "no whole ExecuTorch program"),
        (b"\x20\x00\x00\x00ET12" + b"\xff" * 92, "no whole ExecuTorch program"),
    ],
)
def test_what_is_no_program_is_refused_in_a_sentence(
    content: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "layers.pte"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=said):
        read_program_memory(path)


def test_a_program_that_was_cut_off_is_refused_or_read_within_its_file(
    toy_programs: dict[str, bytes], tmp_path: Path
) -> None:
    content = toy_programs["head.pte"]
    path = tmp_path / "head.pte"
    for length in range(64, len(content), 997):
        path.write_bytes(content[:length])
        try:
            assert read_program_memory(path).file_bytes == length
        except BundleError:
            continue


# --- against the exporter ---


@pytest.mark.slow
def test_the_demo_bundle_is_stored_as_planned(demo_bundle: Bundle) -> None:
    shape = read_shape(json.loads((DEMO / "config.json").read_text()))
    context = demo_bundle.manifest.model.maximum_context
    layout = lay_out(shape, INT4, context=context)
    found = programs(demo_bundle)
    assert layout.weight_bytes("mapped") == pytest.approx(total(found, "constant_bytes"), rel=0.6)
    assert total(found, "planned_bytes") > shape.kv_bytes(context)
    budget = budget_of_bundle(demo_bundle, None, 2**30, runtime=LINUX_RUNNER)
    assert budget.verdict == "fits"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a2d-qwen3", "qwen3"])
def test_a_dense_bundle_is_stored_as_planned(kind: str, tmp_path: Path) -> None:
    from export.exporter import export_bundle

    shape = {
        "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    folder = tmp_path / f"tiny-{kind}-bd3lm"
    changes = {"block_size": 16} if kind.startswith("a2d") else {}
    dense_checkpoints.write(folder, kind, vocabulary=4096, shape=shape, changes=changes)
    quantize_checkpoint(folder, tmp_path / "int4", INT4)
    bundle = export_bundle(tmp_path / "int4", tmp_path / "bundle", maximum_context=512)
    planned = read_shape(json.loads((folder / "config.json").read_text()))
    check(lay_out(planned, INT4, context=512), programs(bundle), planned.kv_bytes(512))


# --- before a run ---


def test_a_device_says_what_is_available() -> None:
    assert parse_available("MemAvailable:   12345678 kB\n") == 12_345_678 * 1024
    assert parse_available("") is None
    assert parse_available("MemAvailable: \x1b[31m9 kB") is None
    assert available_bytes(FolderTransport()) > 2**20  # of this machine


def test_a_run_that_cannot_fit_is_warned_of_and_one_that_fits_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, toy_programs: dict[str, bytes]
) -> None:
    bundle = _bundle(tmp_path, toy_programs)
    transport = FolderTransport()
    found = run_budget(transport, bundle)
    assert found is not None and found.warning is None
    assert found.to_json()["verdict"] == "fits"
    monkeypatch.setattr(
        "device_tests.bench.memory_budget.available_bytes", lambda transport: 50 * 2**20
    )
    found = run_budget(transport, bundle)
    assert found is not None and found.budget.verdict == "refuses"
    assert "memory on folder: refuses" in found.warning
    assert "can be expected to be killed" in found.warning
    tight = budget_of_bundle(bundle, None, found.budget.anonymous_bytes + 1, runtime=LINUX_RUNNER)
    assert "may be slow or be killed" in warning_of(tight, "folder")


def test_a_bundle_without_programs_of_executorch_has_no_budget(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path, {"layers.pte": b"nothing" * 20, "head.pte": b"nothing" * 20})
    assert run_budget(FolderTransport(), bundle) is None


def _bundle(folder: Path, contents: dict[str, bytes]) -> Bundle:
    from tests.support import toy_model

    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = {name: FileEntry(len(content), "0" * 64) for name, content in contents.items()}
    return Bundle(folder, toy_model.manifest(), files, verified=False)


# --- beside the measured ---


def _summary(family: str) -> Any:
    found = record_samples.bench()
    for record in found:
        record["conditions"]["bundle"]["family"] = family
    return summarize(found)


def test_predicted_stands_beside_measured_with_its_error() -> None:
    shape = read_shape(read_config("qwen3-0.6b-bd3lm")[1])
    summary = with_forecasts(_summary("a2d-qwen3"), shape, INT4, open_device("oneplus-12"))
    forecast = summary.groups[0].forecast
    assert forecast is not None and "oneplus-12, int4-g32, KV cache of" in forecast.basis
    found = forecast.rows
    by_name = {item.name: item for item in found}
    assert set(by_name) == {"peak_rss_bytes", "step_ms"}
    for item in found:
        assert item.measured and item.error == pytest.approx(item.predicted / item.measured - 1)
    assert by_name["step_ms"].share == pytest.approx(
        by_name["step_ms"].predicted / by_name["step_ms"].measured
    )  # without measured rates the prediction is the roofline itself
    assert by_name["peak_rss_bytes"].share is None
    assert by_name["step_ms"].roofline.bound in ("memory", "arithmetic")


def test_every_form_of_the_report_shows_the_same_rows_of_its_own_configuration() -> None:
    shape = read_shape(read_config("qwen3-0.6b-bd3lm")[1])
    records = [*record_samples.bench(), *record_samples.bench(threads=4, step_ms=80.0)]
    for record in records:
        record["conditions"]["bundle"]["family"] = "a2d-qwen3"
    other = record_samples.bench(bench_id="other")
    plain = summarize([*records, *other])
    summary = with_forecasts(plain, shape, INT4, open_device("oneplus-12"))
    fast, slow, not_planned = summary.groups
    assert not_planned.forecast is None and not_planned == plain.groups[2]
    shares = [group.forecast.rows[1].share for group in (fast, slow)]
    assert shares[0] / shares[1] == pytest.approx(2.0, rel=0.1), "a step of 40 ms and one of 80"
    document = report.to_json(summary)["configurations"]
    assert [
        part["forecast"]["quantities"]["step_ms"]["share_of_roofline"] for part in document[:2]
    ] == shares
    assert "forecast" not in document[2]
    page, text = report.to_html(summary), report.to_text(summary)
    for shown in (page, report.to_markdown(summary), text):
        assert shown.lower().count("predicted and measured") == 2
        for row in (*fast.forecast.rows, *slow.forecast.rows):
            assert all(cell in shown for cell in row.cells), row.name
    assert all(len(line) <= 100 for line in text.splitlines())
    assert page.count("share of the roofline") == 2
    for shown in (report.to_html(plain), report.to_markdown(plain), report.to_text(plain)):
        assert "roofline" not in shown


def test_a_plan_for_another_recipe_is_noted() -> None:
    shape = read_shape(read_config("qwen3-0.6b-bd3lm")[1])
    for recipe, is_noted in ((INT4, False), (preset("int4-g64"), True), (None, True)):
        found = with_forecasts(_summary("a2d-qwen3"), shape, recipe, open_device("oneplus-12"))
        assert any("--recipe" in note for note in found.groups[0].notes) is is_noted


def test_what_was_not_measured_has_no_error_and_no_share() -> None:
    shape = read_shape(read_config("qwen3-0.6b-bd3lm")[1])
    found = [record_samples.run("natural")]
    found[0]["conditions"]["bundle"]["family"] = "a2d-qwen3"
    summary = with_forecasts(summarize(found), shape, INT4, open_device("oneplus-12"))
    for row in summary.groups[0].forecast.rows:
        assert (row.measured, row.error, row.share) == (None, None, None)
        assert row.cells[2:4] == ("-", "-") and row.cells[1] != "-"
    assert "share of the roofline" not in report.to_html(summary), "no card without a number"


def test_a_plan_of_another_family_is_refused() -> None:
    shape = read_shape(read_config("qwen3-0.6b-bd3lm")[1])
    with pytest.raises(InputError, match="the results are of llada and the plan is of a2d-qwen3"):
        with_forecasts(_summary("llada"), shape, INT4, open_device("oneplus-12"))
