"""What of a file is in the page cache is what the system states, and it can be dropped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from export.host.streaming import page_cache


def test_dropped_files_leave_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(2**20))
    before = page_cache.resident_share([file])
    assert before == 1.0
    page_cache.drop([file])
    after = page_cache.resident_share([file])
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True)
    if kind.stdout.strip() in ("tmpfs", "ramfs"):
        assert after == 1.0
    else:
        assert after < before
    file.read_bytes()[: 2**19]
    assert page_cache.resident_share([file]) == 1.0


@pytest.mark.skipif(not shutil.which("fincore"), reason="util-linux has no fincore here")
def test_resident_share_is_that_of_fincore(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(8 * 2**20 + 5))
    page_cache.drop([file])
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        os.pread(opened.fileno(), 2**20, 3 * 2**20)
        told = page_cache.resident_share([file])
        done = subprocess.run(
            ["fincore", "--json", "--bytes", str(file)], capture_output=True, check=True
        )
    pages = int(json.loads(done.stdout)["fincore"][0]["pages"])
    assert told == pytest.approx(pages / 2049, abs=1e-9)


def test_a_share_that_cannot_be_told_is_none(tmp_path: Path) -> None:
    assert page_cache.resident_share([tmp_path / "missing"]) is None
    assert page_cache.resident_share([]) is None
