"""Running in less memory than the model: the same tokens, within the budget, whatever is killed.

CPU only, Linux, tiny random weights; processes of their own where memory is measured.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory_cgroup import CannotLimit, memory_group
from device_tests.bench.deploy import deploy
from device_tests.bench.inventory import clean
from device_tests.bench.measurement import bench
from device_tests.bench.plan import BenchPlan
from device_tests.bench.runner import LinuxRunner
from device_tests.bench.workload import packed_folder
from device_tests.local.device import LocalDevice
from device_tests.results import records
from export.contract.bundle import Bundle, open_bundle
from export.host.bundle_engine import open_engine
from export.host.eager import eager_engine
from export.host.process import resident_bytes
from export.host.streaming import mapped_weights, packed_file, xnnpack_weights
from export.host.streaming.mapped_bytes import MappedBytes
from export.host.streaming.mapped_weights import MemoryOptions
from export.host.streaming.packed_file import (
    DamagedFile,
    Entry,
    PackedFile,
    index_bytes,
    read_index,
)
from export.host.streaming.read_ahead import MARGIN_BYTES, StageWeights, WeightStreamer
from quantize.errors import InputError, OutputError
from tests.support import wide_stages
from tests.support.bench_tools import QUICK, connect
from tests.support.interpreter import interpreter_bytes
from tests.support.wide_stages import LAYERS, PROMPT, STAGE_BYTES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mappings and /proc are Linux's")

NEW_TOKENS = 8
ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return wide_stages.make_bundle(tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """PyTorch's tokens."""
    tokens = eager_engine(wide_stages.staged()).session().generate(PROMPT, NEW_TOKENS).tokens
    assert len(set(tokens)) > 3
    return list(tokens)


@pytest.fixture(scope="module")
def packed(wide: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the weights are packed already."""
    folder = tmp_path_factory.mktemp("packed")
    open_engine(wide, memory=MemoryOptions(folder=folder))
    return folder


def tokens_of(bundle: Bundle, memory: MemoryOptions | None) -> list[int]:
    return list(open_engine(bundle, memory=memory).session().generate(PROMPT, NEW_TOKENS).tokens)


MORE = 12 << 20
"""Bytes of budget above what the refusal of a budget of nothing asks for, which is one stage's
weights: the backend's workspace is in them. With all it is half of what the stages take."""

ANSWER = """
import json, sys
from pathlib import Path
from export.contract.bundle import open_bundle
from export.host.streaming.mapped_weights import MemoryOptions
from export.host.process import peak_rss_bytes
from export.host.bundle_engine import open_engine
from quantize.errors import InputError
folder, packed, more, prompt, new_tokens = sys.argv[1:]
bundle, packed = open_bundle(folder, verify=False), Path(packed)
try:
    open_engine(bundle, 1, memory=MemoryOptions(1, packed))
except InputError as error:
    budget = int(str(error).split()[-1]) + int(more)
engine = open_engine(bundle, 1, memory=MemoryOptions(budget, packed))
session = engine.session()
tokens = list(session.generate(json.loads(prompt), int(new_tokens)).tokens)
print(json.dumps({"tokens": tokens, "report": engine.weights.report(),
                  "peak": peak_rss_bytes(), "budget": budget}))
"""


def begin(
    bundle: Bundle, folder: Path, enter: Callable[[], None] | None = None
) -> subprocess.Popen[bytes]:
    """A process that answers within a budget; `enter` is called in it before it begins."""
    arguments = (bundle.folder, folder, MORE, json.dumps(PROMPT), NEW_TOKENS)
    return subprocess.Popen(
        [sys.executable, "-c", ANSWER, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=enter,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def answer_of(process: subprocess.Popen[bytes]) -> dict:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()[-2000:]
    return json.loads(output.decode().splitlines()[-1])


def test_a_budget_gives_the_same_tokens_in_no_more_memory(
    wide: Bundle, packed: Path, expected: list[int]
) -> None:
    answer = answer_of(begin(wide, packed))
    report = answer["report"]
    assert answer["tokens"] == expected
    assert answer["peak"] <= answer["budget"]
    # A part of every pass came from the file, and what is kept did not.
    assert 0 < report["kept_bytes"] + report["pass_bytes"] < 2 * report["weights_bytes"]
    assert report["pass_bytes"] > 0
    assert report["streamed_bytes"] >= (NEW_TOKENS - 1) * report["pass_bytes"]
    assert [stage["name"] for stage in report["stages"]] == [*LAYERS, "head"]
    assert all(stage["bytes"] >= STAGE_BYTES for stage in report["stages"][:-1])
    assert report["kept_bytes"] + report["window_bytes"] < report["weights_bytes"]


PLAIN_ANSWER = """
import json, sys
from export.contract.bundle import open_bundle
from export.host.bundle_engine import open_engine
session = open_engine(open_bundle(sys.argv[1], verify=False), 1).session()
print(list(session.generate(json.loads(sys.argv[2]), int(sys.argv[3])).tokens))
"""


def test_a_hard_limit_that_kills_a_plain_run_is_held_with_a_budget(
    wide: Bundle, packed: Path, expected: list[int]
) -> None:
    """The limit is 2 MiB above what a run with a budget took, which holds half the weights."""
    plain = [sys.executable, "-c", PLAIN_ANSWER, str(wide.folder), str(PROMPT), str(NEW_TOKENS)]
    try:
        with memory_group(1 << 30) as group:
            assert answer_of(begin(wide, packed, group.enter))["tokens"] == expected
            limit = group.peak_bytes + (2 << 20)
    except CannotLimit as error:
        pytest.skip(str(error))
    with memory_group(limit) as group:
        assert answer_of(begin(wide, packed, group.enter))["tokens"] == expected
    for limit_bytes, code in ((1 << 30, 0), (limit, -signal.SIGKILL)):
        with memory_group(limit_bytes) as group:
            ran = subprocess.run(
                plain,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                preexec_fn=group.enter,
                capture_output=True,
                check=False,
            )
        assert ran.returncode == code
        if code == 0:
            assert json.loads(ran.stdout) == expected


def test_packed_weights_without_a_budget_give_the_same_tokens(
    wide: Bundle, packed: Path, expected: list[int]
) -> None:
    assert tokens_of(wide, None) == expected
    assert tokens_of(wide, MemoryOptions(folder=packed)) == expected


def test_a_budget_that_cannot_be_held_is_refused_before_anything_is_packed(
    wide: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"budget of 1000 bytes is too small: .* give at least \d"):
        open_engine(wide, memory=MemoryOptions(1000, tmp_path / "packed"))
    assert not (tmp_path / "packed").exists()
    with pytest.raises(InputError, match="memory budget is 0 bytes"):
        MemoryOptions(0)


def test_one_session_at_a_time_has_mapped_weights(
    wide: Bundle, packed: Path, expected: list[int]
) -> None:
    memory = MemoryOptions(folder=packed)
    session = open_engine(wide, memory=memory).session()
    with pytest.raises(InputError, match="end that session first"):
        open_engine(wide, memory=memory)
    # Another without them is its own affair.
    assert tokens_of(wide, None) == expected
    assert list(session.generate(PROMPT, NEW_TOKENS).tokens) == expected
    del session
    assert tokens_of(wide, memory) == expected


def test_two_processes_share_one_file(wide: Bundle, tmp_path: Path, expected: list[int]) -> None:
    """Both begin before there is one: one packs, the other waits, and both map it at once."""
    processes = [begin(wide, tmp_path), begin(wide, tmp_path)]
    assert [answer_of(process)["tokens"] for process in processes] == [expected, expected]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".lock", ".packed"]


@pytest.mark.parametrize("victim", ["the runner", "the packer"])
def test_a_kill_while_packing_leaves_nothing_that_is_taken_for_whole(
    wide: Bundle, tmp_path: Path, expected: list[int], victim: str
) -> None:
    process = begin(wide, tmp_path)
    packer = _wait_for_packer(process, tmp_path)
    os.kill(process.pid if victim == "the runner" else packer, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    _wait_until(lambda: not Path(f"/proc/{packer}").exists() or _is_zombie(packer))
    assert not list(tmp_path.glob("*.packed"))
    assert tokens_of(wide, MemoryOptions(folder=tmp_path)) == expected
    assert not list(tmp_path.glob("*.partial"))


def _wait_for_packer(process: subprocess.Popen[bytes], folder: Path) -> int:
    def child() -> list[str]:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return listed if list(folder.glob("*.partial")) else []

    _wait_until(lambda: child() or process.poll() is not None)
    assert process.poll() is None
    return int(child()[0])


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _wait_until(condition: object, seconds: float = 60.0) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.002)


def _copied(packed: Path, folder: Path, bundle: Bundle) -> PackedFile:
    """A sealed file of the bundle that a test may damage."""
    for path in packed.iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(content)
        status = path.stat()
        os.utime(folder / path.name, ns=(status.st_atime_ns, status.st_mtime_ns))
    file = PackedFile(bundle, folder)
    assert file.packing(verify=True) is not None
    return file


@pytest.fixture
def copied(packed: Path, tmp_path: Path, wide: Bundle) -> Iterator[PackedFile]:
    yield _copied(packed, tmp_path, wide)


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x40]))


def test_a_changed_file_is_made_again(
    wide: Bundle, copied: PackedFile, expected: list[int]
) -> None:
    good = copied.path.read_bytes()
    _flip(copied.path, 1000)
    assert copied.packing(verify=False) is None
    assert tokens_of(wide, MemoryOptions(folder=copied.folder)) == expected
    assert copied.path.read_bytes() == good


def test_a_file_changed_behind_its_time_is_found_when_the_bundle_is_verified(
    wide: Bundle, copied: PackedFile, expected: list[int]
) -> None:
    status = copied.path.stat()
    _flip(copied.path, 1000)
    os.utime(copied.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert copied.packing(verify=False) is not None
    assert copied.packing(verify=True) is None
    verified = open_bundle(wide.folder)
    assert tokens_of(verified, MemoryOptions(folder=copied.folder)) == expected


@pytest.mark.parametrize("damage", ["a cut file", "no seal", "another seal", "a seal of rubbish"])
def test_what_is_not_the_file_that_was_made_is_none(copied: PackedFile, damage: str) -> None:
    seal = copied.path.with_suffix(".json")
    if damage == "a cut file":
        os.truncate(copied.path, copied.path.stat().st_size - 1)
    elif damage == "no seal":
        seal.unlink()
    elif damage == "another seal":
        seal.write_text(json.dumps(json.loads(seal.read_text()) | {"processor": "another"}))
    else:
        seal.write_text("[1, 2")
    assert copied.packing(verify=False) is None


def test_a_folder_that_cannot_be_written_is_told(wide: Bundle, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot be written .* another folder"):
        open_engine(wide, memory=MemoryOptions(folder=tmp_path / "taken"))


def test_a_disk_without_room_is_told_before_packing(
    wide: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert usage.f_bavail > 0
    with pytest.raises(OutputError, match=r"has 1000 bytes free and packing .* takes about"):
        open_engine(wide, memory=MemoryOptions(folder=tmp_path))


def test_another_version_of_executorch_is_refused_in_a_sentence(
    wide: Bundle, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xnnpack_weights, "VERSION", "0.0.1")
    with pytest.raises(InputError, match=r"version is .*, expected 0.0.1.* without a"):
        open_engine(wide, memory=MemoryOptions(folder=packed))


def test_a_missing_symbol_is_refused_in_a_sentence(
    wide: Bundle, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    symbols = xnnpack_weights._BACKEND_SYMBOLS | {"set_path": "_Znone"}
    monkeypatch.setattr(xnnpack_weights, "_BACKEND_SYMBOLS", symbols)
    with pytest.raises(InputError, match=r"_Znone.*run without a memory budget"):
        open_engine(wide, memory=MemoryOptions(folder=packed))


def test_the_file_is_one_that_xnnpack_wrote_in_another_order(packed: Path, wide: Bundle) -> None:
    """Every weight is there once, in whole pages, inside the span of its stage."""
    file = PackedFile(wide, packed)
    packing = file.packing(verify=True)
    entries = read_index(file.path)
    assert file.path.stat().st_mode & 0o777 == 0o600
    spans = [packing.stages[name] for name in (*LAYERS, "head")]
    assert len({entry.name for entry in entries}) == len(entries) == 2 * len(spans)
    assert all(entry.offset % 4096 == 0 for entry in entries)
    assert all(span.offset % packed_file.STAGE_ALIGNMENT == 0 for span in spans)
    for entry in entries:
        assert any(
            s.offset <= entry.offset and entry.offset + entry.bytes <= s.offset + s.bytes
            for s in spans
        )


def test_an_index_reads_back_as_it_was_written(tmp_path: Path) -> None:
    entries = (Entry(b"first", 0, 5000, 7), Entry(b"second+bias", 8192, 1, 2**32 - 1))
    path = tmp_path / "file"
    path.write_bytes(bytes(12288) + index_bytes(entries, 12288))
    assert read_index(path) == entries
    whole = path.read_bytes()
    for cut in (0, 10, 12288, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DamagedFile):
            read_index(path)
    # An entry that lies in the index.
    path.write_bytes(bytes(8192) + index_bytes(entries, 8192))
    with pytest.raises(DamagedFile, match="behind the weights"):
        read_index(path)


def test_a_mapped_file_is_the_bytes_that_are_in_it(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(10_001)
    (tmp_path / "file").write_bytes(content)
    mapped = MappedBytes(tmp_path / "file")
    assert type(mapped.content) is bytes
    assert mapped.content == content and hash(mapped.content) == hash(content)
    assert mapped.region(4096, 1).offset == 4096 and mapped.region(4097, 4096).bytes == 8192
    (tmp_path / "file").write_bytes(b"")
    assert MappedBytes(tmp_path / "file").content == b""


def test_large_tables_lie_where_the_programs_are_mapped(
    wide: Bundle, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stage's embedding table, taken for a large one, is found by its values."""
    monkeypatch.setattr(mapped_weights, "LARGE_TABLES_BYTES", 1000)
    engine = open_engine(wide, memory=MemoryOptions(folder=packed))
    first = wide.manifest.stages[0]
    region = engine.weights._tables(first)
    found = wide.path(first.file).read_bytes()[region.offset : region.offset + region.bytes]
    assert wide_stages.FirstMlp(0).table.numpy().tobytes() in found
    assert ctypes.string_at(region.address, region.bytes) == found.ljust(region.bytes, b"\0")
    assert engine.weights._tables(wide.manifest.stages[1]) is None


def test_the_stage_that_runs_is_in_memory_and_all_are_within_their_room(tmp_path: Path) -> None:
    """Passes that end early among them, as those that encode a prompt do."""
    stage_bytes, count = 6 << 20, 8
    content = random.Random(0).randbytes(count * stage_bytes)
    (tmp_path / "weights").write_bytes(content)
    mapped = MappedBytes(tmp_path / "weights")
    stages = [
        StageWeights(str(i), (mapped.region(i * stage_bytes, stage_bytes),)) for i in range(count)
    ]
    kinds: tuple[Any, ...] = ("RssAnon", "RssFile", "RssShmem")
    taken = sum(map(resident_bytes, kinds))
    streamer = WeightStreamer(stages, range(count), taken + MARGIN_BYTES + (33 << 20))
    seen = set()

    def passes(*lengths: int) -> None:
        for stage in (stage for length in lengths for stage in range(length)):

            def compute(stage: int = stage) -> None:
                resident = _resident_of(mapped)
                # A fault maps what is cached around it, 64 KiB.
                most = streamer.residency.resident_bytes + (64 << 10)
                assert stage_bytes <= resident <= most
                begin = stage * stage_bytes
                assert mapped.content[begin : begin + 4096] == content[begin : begin + 4096]
                seen.add((streamer.residency.ahead, sum(streamer.residency.kept) > 0))

            streamer.run(stage, compute)

    passes(8, 8, 3, 8, 7, 7, 8, 1, 8)
    assert seen == {(False, False), (True, True)}, "first lean, then by what was measured"
    kept = streamer.residency.kept
    ballast = b"1" * (5 << 20)
    passes(1, 8, 8)  # planned anew in the first, with the same outcome; and not once more
    assert streamer.residency.kept == kept and len(ballast) == 5 << 20


def _resident_of(mapped: MappedBytes) -> int:
    """Rss of the mapping, from smaps."""
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split(maxsplit=1)[0]
        if not name.endswith(":"):
            low, high = (int(part, 16) for part in name.split("-"))
            ours = low <= mapped.address < high
        elif ours and name == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("the file is not mapped")


def test_what_runs_a_bundle_imports_nothing_that_only_makes_one() -> None:
    """torchao and the compiler are 80 MB of every budget, and need not be on a device."""
    code = "import sys, export.host.bundle_engine; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert not {"torchao", "executorch.exir"} & set(ran.stdout.decode().split())


def test_a_run_on_a_device_holds_its_budget_and_records_what_it_read(
    wide: Bundle, local_device: LocalDevice, tmp_path: Path
) -> None:
    """The second run finds what the first has packed; both are within a budget that is too small
    for the weights."""
    budget_bytes = interpreter_bytes() + (64 << 20)
    packed_files: set[str] = set()

    def look(_event: object) -> None:
        listed = another.shell(f"ls -i {packed_folder(deployment)} 2>/dev/null").text
        packed_files.update(line for line in listed.splitlines() if line.endswith(".packed"))

    with connect(local_device) as transport, connect(local_device) as another:
        deployment = deploy(transport, wide)
        plan = BenchPlan(
            passes={"speed": 1, "natural": 1},
            threads=(1,),
            memory_budget_bytes=budget_bytes,
            **QUICK,
        )
        bench(transport, wide, deployment, LinuxRunner(), plan, tmp_path / "r.jsonl", on_event=look)
        clean(transport, deployment.bundle_id)
        assert transport.shell(f"ls {packed_folder(deployment)}").text == ""
    speed, natural = records.read(tmp_path / "r.jsonl")
    assert speed["status"] == natural["status"] == "ok"
    assert speed["conditions"]["workload"]["memory_budget_bytes"] == budget_bytes
    assert speed["result"]["memory"]["peak_rss_bytes"] <= budget_bytes
    assert speed["metrics"]["kept_weights_bytes"] == speed["result"]["weights"]["kept_bytes"]
    assert natural["metrics"]["storage_bytes_per_token"] >= 0
    assert len(packed_files) == 1, "a second file has another inode"


def test_the_order_of_a_pass_is_that_of_the_schedule(wide: Bundle) -> None:
    assert mapped_weights._order(wide) == (0, 1, 2, 3, 4, 5)
