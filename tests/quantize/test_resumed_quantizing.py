"""Quantizing that was killed or interrupted: the next call goes on, to the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantize import quantizer
from quantize.checkpoint import open_checkpoint
from quantize.errors import CheckpointError, OutputError
from quantize.files.atomic_folder import resumable_folder, unfinished_work
from quantize.files.journal import Journal
from quantize.quantizer import quantize_available, quantize_checkpoint
from quantize.recipe import preset
from tests.support.sharded import INDEX, save_shards

ROOT = Path(__file__).parents[2]
_NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.experts.down_proj",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.experts.down_proj",
    "model.norm.weight",
)
_SHARDS = {"model-1-of-2.safetensors": _NAMES[1::2], "model-2-of-2.safetensors": _NAMES[0::2]}


def _source(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "made_up"}')
    generator = torch.Generator().manual_seed(0)
    shapes = dict(
        zip(_NAMES, [(32, 128), (4, 8, 128), (24, 128), (3, 16, 128), (128,)], strict=True)
    )
    tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    save_shards(folder, {f: {n: tensors[n] for n in names} for f, names in _SHARDS.items()})
    return folder


def _change(shard: Path, **changes: torch.Tensor) -> None:
    save_file(load_file(shard) | changes, shard)


def _quantize(tmp_path: Path, name: str, **options) -> list[tuple[int, int, str]]:
    """Quantizes `in` to a folder; gives the calls of progress."""
    calls = []
    quantize_checkpoint(
        tmp_path / "in",
        tmp_path / name,
        options.pop("recipe", preset()),
        progress=lambda *call: calls.append(call),
        **options,
    )
    return calls


def _bytes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def _hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# The progress is called once a piece: 1 + 4 + 1 + 3 + 1 times.
_MOMENTS = {
    "at the first piece": "0",
    "in the first experts": "2",
    "after the first experts": "4",
    "in the second experts": "7",
    "after the last weight": "9",
    "before the recipe is written": "quantizer.write_json",
    "before it gets its name": "atomic_folder._move_into_place",
    "after it got its name": "atomic_folder._remove",
}
# One process imports torch, and a copy of it is killed at each moment.
_KILLED = """
import os, signal, sys
from quantize import quantizer, resuming
from quantize.files import atomic_folder
from quantize.recipe import preset

def kill(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def quantize(folder, moment):
    calls = []
    def progress(*call):
        if moment == str(len(calls)):
            kill()
        calls.append(call)
    if not moment.isdigit():
        module, name = moment.split(".")
        setattr({"quantizer": quantizer, "atomic_folder": atomic_folder}[module], name, kill)
    resuming._FLUSH_AFTER_S = 0.0
    quantizer.quantize_checkpoint(
        sys.argv[1] + "/in", sys.argv[1] + "/" + folder, preset(), progress=progress,
    )

for number, moment in enumerate(sys.argv[2:]):
    child = os.fork()
    if child == 0:
        quantize("out-%d" % number, moment)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A folder with the source `in`, the uninterrupted `whole`, and `out-N` of moment N."""
    folder = tmp_path_factory.mktemp("killed")
    _source(folder / "in")
    _quantize(folder, "whole")
    ended = subprocess.run(
        [sys.executable, "-c", _KILLED, str(folder), *_MOMENTS.values()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.split() == [str(int(signal.SIGKILL))] * len(_MOMENTS), ended.stderr
    return folder


@pytest.mark.parametrize("moment", _MOMENTS)
def test_what_a_kill_leaves_is_finished_to_the_same_bytes(killed, moment, monkeypatch):
    name = f"out-{list(_MOMENTS).index(moment)}"
    if moment == "after it got its name":
        # It is whole; only a hidden rest is left, which the next call clears away.
        assert _bytes(killed / name) == _bytes(killed / "whole")
        assert f".{name}.partial" in _hidden(killed)
        with pytest.raises(OutputError, match="exists already"):
            _quantize(killed, name)
        assert f".{name}.partial" not in _hidden(killed)
        return
    assert not (killed / name).exists()
    worked_on = []
    quantize_piece = quantizer.quantize_piece

    def counted(checkpoint, piece):
        worked_on.append(piece.weight.name)
        return quantize_piece(checkpoint, piece)

    monkeypatch.setattr(quantizer, "quantize_piece", counted)
    calls = _quantize(killed, name)
    assert _bytes(killed / name) == _bytes(killed / "whole")
    assert f".{name}.partial" not in _hidden(killed)
    # No weight that was whole is worked on again, and progress begins behind them.
    whole = {
        "at the first piece": 1,
        "in the first experts": 1,
        "after the first experts": 2,
        "in the second experts": 3,
    }.get(moment, 5)
    assert sorted(set(worked_on)) == sorted(_NAMES[whole:])
    sizes = [open_checkpoint(killed / "in").stored_bytes(name) for name in _NAMES]
    assert calls[0][:2] == (sum(sizes[:whole]), sum(sizes))
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)


def _interrupt(tmp_path: Path, after: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    calls = []

    def progress(*call):
        calls.append(call)
        if len(calls) == after:
            raise error

    with pytest.raises(error):
        quantize_checkpoint(tmp_path / "in", tmp_path / "out", preset(), progress=progress)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interruption_keeps_what_is_whole(tmp_path, error):
    _source(tmp_path / "in")
    _interrupt(tmp_path, 6, error)
    assert _hidden(tmp_path) == [".out.partial"]
    assert unfinished_work(tmp_path / "out")
    # Without a flush in between, for less than a second has passed.
    calls = _quantize(tmp_path, "out")
    assert {call[2] for call in calls} == {"done before", *_NAMES[3:]}
    assert not unfinished_work(tmp_path / "out")
    assert _hidden(tmp_path) == []


def test_an_interrupted_overwrite_leaves_the_earlier_result_until_it_is_whole(tmp_path):
    _source(tmp_path / "in")
    _quantize(tmp_path, "out", recipe=preset("int4-g64"))
    _quantize(tmp_path, "whole")
    before = _bytes(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(
            tmp_path / "in", tmp_path / "out", preset(), progress=_raise, overwrite=True
        )
    assert _bytes(tmp_path / "out") == before
    # Unasked it still is not overwritten, and the work is still kept.
    with pytest.raises(OutputError, match="exists already"):
        _quantize(tmp_path, "out")
    assert unfinished_work(tmp_path / "out")
    _quantize(tmp_path, "out", overwrite=True)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")
    assert _hidden(tmp_path) == []


def _raise(*call):
    raise KeyboardInterrupt


@pytest.mark.parametrize("change", ["recipe", "config", "index"])
def test_other_work_is_begun_anew(tmp_path, change):
    source = _source(tmp_path / "in")
    _interrupt(tmp_path, 6)
    recipe = preset()
    if change == "recipe":
        recipe = preset("int4-g64")
    elif change == "config":
        (source / "config.json").write_text('{"model_type": "other"}')
    else:
        (source / INDEX).write_text((source / INDEX).read_text() + " ")
    calls = _quantize(tmp_path, "out", recipe=recipe)
    assert {call[2] for call in calls} == set(_NAMES)
    _quantize(tmp_path, "whole", recipe=recipe)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_of_a_shard_that_changed_nothing_is_kept(tmp_path):
    source = _source(tmp_path / "in")
    _interrupt(tmp_path, 9)
    first = next(iter(_SHARDS))
    # Smaller than before, and of other weights.
    _change(source / first, **{_NAMES[1]: torch.randn(3, 4, 64)})
    calls = _quantize(tmp_path, "out")
    assert {call[2] for call in calls} == {"done before", *_SHARDS[first], _NAMES[4]}
    _quantize(tmp_path, "whole")
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_a_wrong_weight_removes_what_was_done(tmp_path):
    source = _source(tmp_path / "in")
    _spoil(source)
    with pytest.raises(CheckpointError, match="not finite"):
        _quantize(tmp_path, "out")
    assert _hidden(tmp_path) == []


def _spoil(source: Path) -> None:
    shard = source / "model-1-of-2.safetensors"
    weight = load_file(shard)[_NAMES[3]]
    weight[1, 2, 3] = float("nan")
    _change(shard, **{_NAMES[3]: weight})


# Shard by shard.


def _available(tmp_path: Path, recipe=None, **options) -> tuple[str, ...]:
    return quantize_available(tmp_path / "in", tmp_path / "out", recipe or preset(), **options)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_shards_that_come_and_go_give_the_bytes_of_the_whole(tmp_path, order):
    source = _source(tmp_path / "in")
    _quantize(tmp_path, "whole")
    away = tmp_path / "away"
    away.mkdir()
    files = [list(_SHARDS)[number] for number in order]
    for file in files:
        (source / file).rename(away / file)
    assert _available(tmp_path) == tuple(_SHARDS)
    for number, file in enumerate(files):
        shutil.copyfile(away / file, source / file)
        assert _available(tmp_path) == tuple(files[number + 1 :])
        (source / file).unlink()
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")
    assert _hidden(tmp_path) == []


def test_a_shard_that_an_interruption_cut_short_is_gone_on_with(tmp_path):
    source = _source(tmp_path / "in")
    _quantize(tmp_path, "whole")
    second = source / "model-2-of-2.safetensors"
    data = second.read_bytes()
    second.unlink()
    calls = []

    def interrupt(*call):
        calls.append(call)
        if call[2] == _NAMES[3]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _available(tmp_path, progress=interrupt)
    calls.clear()
    assert _available(tmp_path, progress=lambda *call: calls.append(call)) == (second.name,)
    assert {call[2] for call in calls} == {"done before", _NAMES[3]}
    (source / "model-1-of-2.safetensors").unlink()
    second.write_bytes(data)
    assert _available(tmp_path) == ()
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_a_shard_that_went_before_it_was_done_is_asked_for(tmp_path):
    source = _source(tmp_path / "in")
    first = source / "model-1-of-2.safetensors"
    data = first.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        _available(tmp_path, progress=_raise)
    first.unlink()
    assert _available(tmp_path) == (first.name,)
    first.write_bytes(data)
    assert _available(tmp_path) == ()
    _quantize(tmp_path, "whole")
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_work_whose_source_may_be_gone_is_not_thrown_away(tmp_path):
    source = _source(tmp_path / "in")
    second = source / "model-2-of-2.safetensors"
    data = second.read_bytes()
    second.unlink()
    _available(tmp_path)
    first = (source / "model-1-of-2.safetensors").read_bytes()
    with pytest.raises(OutputError, match="unfinished work of another recipe"):
        _available(tmp_path, preset("int4-g64"))
    _spoil(source)
    with pytest.raises(CheckpointError, match="not finite"):
        _available(tmp_path)
    # The changed shard is what is lost.
    (source / "model-1-of-2.safetensors").write_bytes(first)
    second.write_bytes(data)
    calls = []
    assert _available(tmp_path, progress=lambda *call: calls.append(call)) == ()
    assert {call[2] for call in calls} == set(_NAMES)
    _quantize(tmp_path, "whole")
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_without_being_asked_for_parts_a_missing_shard_is_an_error(tmp_path):
    source = _source(tmp_path / "in")
    (source / "model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is missing, though"):
        _quantize(tmp_path, "out")
    assert _hidden(tmp_path) == []


def test_two_processes_do_not_write_one_folder(tmp_path):
    _source(tmp_path / "in")
    messages = []

    def second(*call):
        if not messages:
            with pytest.raises(OutputError) as caught:
                _quantize(tmp_path, "out")
            messages.append(str(caught.value))

    quantize_checkpoint(tmp_path / "in", tmp_path / "out", preset(), progress=second)
    assert "Another process is writing" in messages[0]
    assert open_checkpoint(tmp_path / "out").is_quantized


def test_the_number_of_processors_changes_no_bit(tmp_path, monkeypatch):
    _source(tmp_path / "in")
    for count in (1, 2, 5):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=count: range(n))
        _quantize(tmp_path, str(count))
    assert _bytes(tmp_path / "1") == _bytes(tmp_path / "2") == _bytes(tmp_path / "5")


def test_threads_of_torch_are_as_before(tmp_path):
    before = torch.get_num_threads()
    _source(tmp_path / "in")
    _interrupt(tmp_path, 2)
    assert torch.get_num_threads() == before


# The journal by itself.


def test_half_a_line_of_a_journal_is_cut_off(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, "work")
    journal.begin()
    journal.append([{"n": 1}, {"n": 2}])
    journal.close()
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        journal = Journal(path, "work")
        lines = whole[:end].count(b"\n")
        assert journal.is_new == (lines == 0)
        assert journal.records == [{"n": 1}, {"n": 2}][: max(0, lines - 1)]
        if not journal.is_new:
            journal.append([{"n": 3}])
            assert json.loads(path.read_text().splitlines()[-1]) == {"n": 3}
            assert len(path.read_text().splitlines()) == lines + 1
        journal.close()


def test_a_kill_between_two_renames_brings_the_earlier_result_back(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with (
        pytest.raises(KeyboardInterrupt),
        resumable_folder(tmp_path / "out", "work", overwrite=True, is_ours=lambda _: True) as (
            folder,
            journal,
        ),
    ):
        (folder / "new").touch()
        journal.append([{"done": "new"}])
        raise KeyboardInterrupt
    os.rename(tmp_path / "out", tmp_path / ".out.partial" / "replaced")
    with (
        pytest.raises(OutputError, match="exists already"),
        resumable_folder(tmp_path / "out", "work"),
    ):
        pass
    assert (tmp_path / "out" / "old").exists()
    with resumable_folder(tmp_path / "out", "work", overwrite=True, is_ours=lambda _: True) as (
        folder,
        journal,
    ):
        assert journal.records == [{"done": "new"}]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert _hidden(tmp_path) == []
