"""What can go wrong in quantizing: refused in one sentence, and nothing half made is left."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch

from quantize.checkpoint import open_checkpoint
from quantize.errors import CheckpointError, OutputError, RecipeError
from quantize.quantizer import quantize_checkpoint
from quantize.recipe import preset
from tests.support.digests import digests
from tests.support.small_checkpoint import (
    EMBEDDING,
    EXPERTS,
    LINEAR,
    random_weight,
    small_tensors,
    write_source,
)

_PAGE = os.sysconf("SC_PAGE_SIZE")
_DISK_BYTES = 64 * _PAGE


def _left_over(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"in"}


def _fails(error: type[BaseException], tmp_path: Path, *args, **kwargs) -> str:
    before = _left_over(tmp_path)
    with pytest.raises(error) as caught:
        quantize_checkpoint(tmp_path / "in", *args, **kwargs)
    assert _left_over(tmp_path) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_existing_folder_is_not_overwritten_unasked(tmp_path):
    write_source(tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", preset())
    before = digests(tmp_path / "out")
    message = _fails(OutputError, tmp_path, tmp_path / "out", preset("int4-g64"))
    assert "exists already" in message
    assert digests(tmp_path / "out") == before


def test_an_earlier_result_is_overwritten_when_asked(tmp_path):
    write_source(tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", preset())
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", preset("int4-g64"), overwrite=True)
    assert open_checkpoint(tmp_path / "out").recipe["recipe"]["name"] == "int4-g64"
    assert _left_over(tmp_path) == {"out"}


def test_a_failed_overwrite_leaves_the_earlier_result(tmp_path):
    write_source(tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", preset())
    before = digests(tmp_path / "out")

    def fail(done, total, name):
        raise OSError(5, "Input/output error")

    _fails(OutputError, tmp_path, tmp_path / "out", preset(), overwrite=True, progress=fail)
    assert digests(tmp_path / "out") == before


def test_a_folder_of_other_files_is_never_overwritten(tmp_path):
    write_source(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    message = _fails(OutputError, tmp_path, tmp_path / "out", preset(), overwrite=True)
    assert "did not write" in message
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    message = _fails(OutputError, tmp_path, tmp_path / "in", preset(), overwrite=True)
    assert "did not write" in message


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    write_source(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    quantize_checkpoint(tmp_path / "in", tmp_path / "empty", preset())
    quantize_checkpoint(tmp_path / "in", tmp_path / "new" / "deep" / "out", preset())
    assert open_checkpoint(tmp_path / "empty").is_quantized
    assert open_checkpoint(tmp_path / "new" / "deep" / "out").is_quantized


@pytest.mark.parametrize("occupant", ["file", "dangling link"])
def test_a_destination_that_is_no_folder_is_refused(tmp_path, occupant):
    write_source(tmp_path / "in")
    if occupant == "file":
        (tmp_path / "out").write_text("x")
    else:
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    message = _fails(OutputError, tmp_path, tmp_path / "out", preset(), overwrite=True)
    assert "is no folder" in message


def test_a_parent_that_cannot_hold_a_folder_is_named(tmp_path):
    write_source(tmp_path / "in")
    (tmp_path / "file").write_text("x")
    message = _fails(OutputError, tmp_path, tmp_path / "file" / "out", preset())
    assert str(tmp_path / "file" / "out") in message


@pytest.mark.parametrize("room", ["for nothing", "for configs", "for less than the weights"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, room):
    source = write_source(tmp_path / "in")
    (source / "tokenizer.json").write_text(json.dumps({"padding": "x" * 2000}))
    room_bytes = {"for nothing": 0, "for configs": 2100, "for less than the weights": 9000}[room]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel itself refuses to let any file grow beyond this size.
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, hard))
    try:
        with pytest.raises(OutputError) as caught:
            quantize_checkpoint(source, tmp_path / "out", preset())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert "does not fit on the disk" in message
    assert str(tmp_path / "out") in message
    assert _left_over(tmp_path) == set()


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 64 pages, where this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "room",
    ["nothing", "the configs", "half of the weights", "the weights", "all but a page", "all"],
)
def test_a_really_full_disk_leaves_nothing(tmp_path, small_disk, room):
    source = write_source(tmp_path / "in")
    quantize_checkpoint(source, tmp_path / "model", preset())
    config, weights, recipe = (
        -(-(tmp_path / "model" / name).stat().st_size // _PAGE)
        for name in ("config.json", "model.safetensors", "recipe.json")
    )
    config += 1  # the journal
    pages = {
        "nothing": 0,
        "the configs": config,
        "half of the weights": config + weights // 2,
        "the weights": config + weights,
        "all but a page": config + weights + recipe - 1,
        "all": config + weights + recipe,
    }[room]
    (small_disk / "other").write_bytes(b"x" * (_DISK_BYTES - pages * _PAGE))
    if room == "all":
        quantize_checkpoint(source, small_disk / "out", preset())
        assert open_checkpoint(small_disk / "out").is_quantized
        return
    with pytest.raises(OutputError, match="does not fit on the disk"):
        quantize_checkpoint(source, small_disk / "out", preset())
    assert [path.name for path in small_disk.iterdir()] == ["other"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [LINEAR, EXPERTS, EMBEDDING])
def test_a_weight_that_is_not_finite_is_named(tmp_path, name, value):
    tensors = small_tensors()
    tensors[name].view(-1)[-1] = value
    write_source(tmp_path / "in", tensors)
    message = _fails(CheckpointError, tmp_path, tmp_path / "out", preset())
    assert f"{name} of" in message
    assert "not finite" in message


def test_weights_of_a_type_that_cannot_be_quantized_are_named(tmp_path):
    write_source(tmp_path / "in", {LINEAR: torch.zeros(4, 32, dtype=torch.float8_e4m3fn)})
    message = _fails(CheckpointError, tmp_path, tmp_path / "out", preset())
    assert "F8_E4M3" in message
    assert LINEAR in message


def test_a_quantized_checkpoint_is_not_quantized_again(tmp_path):
    write_source(tmp_path / "in")
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", preset())
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "again", preset())


def test_a_recipe_that_fits_no_weight_is_refused(tmp_path):
    write_source(
        tmp_path / "in", {"transformer.h.0.attn.c_attn.weight": random_weight(4, 32, seed=0)}
    )
    message = _fails(RecipeError, tmp_path, tmp_path / "out", preset())
    assert "int4-g32" in message


def test_a_row_that_no_group_divides_is_refused_before_any_work(tmp_path):
    write_source(tmp_path / "in", {LINEAR: random_weight(4, 48, seed=0)})
    message = _fails(RecipeError, tmp_path, tmp_path / "out", preset())
    assert LINEAR in message
    assert "48" in message


def test_matrices_that_no_rule_names_are_kept_with_a_note(tmp_path):
    tensors = small_tensors() | {"model.novel.mixer": random_weight(4, 32, seed=6)}
    report = quantize_checkpoint(write_source(tmp_path / "in", tensors), tmp_path / "out", preset())
    assert any("model.novel.mixer" in note for note in report.notes)
    assert torch.equal(
        open_checkpoint(tmp_path / "out").get("model.novel.mixer"), tensors["model.novel.mixer"]
    )
