"""The rehearsal of a tiny model, killed again and again, against the same commands in one go."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export.exporter import export_bundle
from quantize.quantizer import quantize_checkpoint
from quantize.recipe import preset
from scripts.training.make_checkpoint import plan_checkpoint, write_checkpoint
from tests.support import hf_reference
from tests.support.digests import digests

ROOT = Path(__file__).parents[2]
CONTEXT = 64
SHARD_BYTES = 150_000


@pytest.mark.slow
def test_a_killed_rehearsal_ends_with_the_bundle_of_an_undisturbed_one(tmp_path: Path) -> None:
    config = hf_reference.two_equal_layers().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    work = tmp_path / "work"
    command = [
        sys.executable, "-m", "benchmarks.rehearsal", str(work),
        "--model", str(tmp_path / "config.json"), "--recipe", "int4-g32",
        "--context", str(CONTEXT), "--max-shard-size", str(SHARD_BYTES),
    ]  # fmt: skip

    def steps() -> list[str]:
        log = work / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return [json.loads(line)["step"] for line in lines[1:]]  # the first names the work

    # Each time in the step behind the one that is named.
    for last in ("make 1", "quantize 2", "export"):
        process = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 300
            while last not in steps():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(0.5)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    ended = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    records = json.loads(ended.stdout.splitlines()[-1])["steps"]
    checkpoint = plan_checkpoint(config, max_shard_bytes=SHARD_BYTES)
    count = len(checkpoint.shards)
    assert count == 3
    made = [f"{step} {number}" for number in range(1, count + 1) for step in ("make", "quantize")]
    assert [record["step"] for record in records] == [*made, "export", "check", "inspect"]
    assert any(record["resumed"] for record in records)
    assert {path.name for path in work.iterdir()} == {"begun", "bundle", "log.jsonl"}
    largest = max((record["peak_disk_bytes"] for record in records[: 2 * count]), default=0)
    assert 0 < largest < checkpoint.total_bytes

    write_checkpoint(checkpoint, tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "int4", preset("int4-g32"))
    shutil.rmtree(tmp_path / "source")
    whole = export_bundle(
        tmp_path / "int4", tmp_path / "bundle", maximum_context=CONTEXT, layers_per_stage=1
    )
    assert digests(work / "bundle") == digests(whole.folder)
