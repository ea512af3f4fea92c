"""A hash taken behind a file's writer: never ahead of it, right at the end, or none.

CPU only; the device is a folder of this machine, its shell and tools also those of small systems.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device_tests.bench.background_hash import BackgroundHash
from device_tests.remote.files import SHA256SUM, Run
from device_tests.remote.shell import quote, run_checked
from tests.support.folder_transport import FolderTransport
from tests.support.push_tools import random_bytes
from tests.support.small_systems import SMALL_SYSTEMS, small_device

CHUNK = 1 << 20
CHUNKS = 4
CONTENT = random_bytes((CHUNKS - 1) * CHUNK + 1000, 7)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(scope="session", params=["this machine", *SMALL_SYSTEMS])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    transport = FolderTransport()
    if request.param != "this machine":
        transport = small_device(request.param, tmp_path_factory.mktemp("system"))
    return lambda command, timeout_s: run_checked(transport, command, timeout_s)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "it's a file.part"


@pytest.fixture
def following(run: Run, path: Path, tmp_path: Path) -> Iterator[BackgroundHash]:
    following = start(run, path, tmp_path)
    yield following
    Path(following.sum_path).unlink(missing_ok=True)
    wait_until(lambda: not is_alive(following))


def start(run: Run, path: Path, folder: Path) -> BackgroundHash:
    stem = str(folder / "it's a file")
    return BackgroundHash.start(run, str(path), stem, len(CONTENT), CHUNK, SHA256SUM)


def finish(run: Run, following: BackgroundHash) -> str:
    """The hash as whoever moves the file takes it, "" if there is none."""
    path = quote(following.path)
    command = (
        f'i=$(stat -c %i {path}); {following.finish_command(len(CONTENT))} echo "<${{h%% *}}>"'
    )
    return run(command, 30.0).text.strip()[1:-1]


def append(path: Path, begin: int, end: int) -> None:
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(CONTENT[begin:end])


def position(following: BackgroundHash) -> int:
    """How far the process on the device has read its standard input."""
    first = Path(f"/proc/{following.process}/fdinfo/0").read_text().splitlines()[0]
    return int(first.split()[1])


def is_alive(following: BackgroundHash) -> bool:
    try:
        state = Path(f"/proc/{following.process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.02)


def test_chunks_are_read_when_the_next_one_has_begun(
    run: Run, path: Path, following: BackgroundHash
) -> None:
    append(path, 0, CHUNK)
    time.sleep(0.5)
    assert position(following) == 0, "a chunk was read that nobody said was whole"
    append(path, CHUNK, CHUNK + 1)
    wait_until(lambda: position(following) == CHUNK)
    append(path, CHUNK + 1, len(CONTENT))
    wait_until(lambda: position(following) == (CHUNKS - 1) * CHUNK)
    assert finish(run, following) == SHA256
    assert list(path.parent.iterdir()) == [path]


def test_what_was_there_already_is_hashed_too(run: Run, path: Path, tmp_path: Path) -> None:
    path.write_bytes(CONTENT[: CHUNK + 5])
    following = start(run, path, tmp_path)
    append(path, CHUNK + 5, len(CONTENT))
    assert finish(run, following) == SHA256


def test_a_process_that_was_killed_gives_no_hash(
    run: Run, path: Path, following: BackgroundHash
) -> None:
    os.killpg(int(following.process), signal.SIGKILL)
    append(path, 0, len(CONTENT))
    assert finish(run, following) == ""


def test_another_file_of_the_name_is_not_vouched_for(
    run: Run, path: Path, following: BackgroundHash
) -> None:
    append(path, 0, len(CONTENT))
    other = path.with_name("other")
    other.write_bytes(CONTENT)
    other.rename(path)
    assert finish(run, following) == ""


def test_no_hash_while_another_writes_the_same(
    run: Run, path: Path, following: BackgroundHash, tmp_path: Path
) -> None:
    second = start(run, path, tmp_path)
    append(path, 0, len(CONTENT))
    assert finish(run, following) == ""
    assert finish(run, second) == SHA256


def test_a_process_whose_files_are_cleaned_away_ends(path: Path, following: BackgroundHash) -> None:
    append(path, 0, CHUNK + 1)
    Path(following.sum_path).unlink()
    wait_until(lambda: not is_alive(following))
    assert list(path.parent.iterdir()) == [path]
