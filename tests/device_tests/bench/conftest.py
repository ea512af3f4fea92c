"""Fixtures of pushes to a folder and of benchmarks on the local device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device_tests.adb.transport import Transport
from device_tests.bench.events import BenchOutcome
from device_tests.bench.measurement import bench
from device_tests.bench.plan import BenchPlan
from device_tests.bench.run_folder import RUNS_FOLDER
from device_tests.local.device import LocalDevice
from export.contract.bundle import Bundle, write_bundle
from export.contract.manifest import TokenizerInfo
from tests.support import toy_model
from tests.support.bench_tools import DEPLOYMENT, Scripted, connect
from tests.support.folder_transport import FolderTransport
from tests.support.push_tools import CHUNK, make_bundle, random_bytes


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Two files of several chunks, one smaller than a chunk."""
    files = {
        "head.pte": random_bytes(5 * CHUNK + 1000, 1),
        "layers.pte": random_bytes(3 * CHUNK, 2),
        "tokenizer.json": random_bytes(100, 3),
    }
    return make_bundle(tmp_path / "bundle", files)


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "device" / "pocketdiff")


@pytest.fixture
def device() -> FolderTransport:
    return FolderTransport()


@pytest.fixture
def transport(local_device: LocalDevice) -> Iterator[Transport]:
    with connect(local_device) as transport:
        yield transport
        transport.shell(f"rm -rf {RUNS_FOLDER}")


@pytest.fixture
def scripted_bundle(tmp_path: Path) -> Bundle:
    """A bundle that only scripted runners could run."""
    return write_bundle(
        tmp_path / "bundle",
        toy_model.manifest(tokenizer=TokenizerInfo("t.json", None)),
        {"layers.pte": b"layers", "head.pte": b"head", "t.json": b"{}"},
    )


@pytest.fixture
def run_bench(
    transport: Transport, scripted_bundle: Bundle, tmp_path: Path
) -> Callable[..., BenchOutcome]:
    """A bench with scripted runs; records go to results.jsonl."""

    def run(plan: BenchPlan, runner: object = None, **options: object) -> BenchOutcome:
        options = {"transport": transport} | options
        return bench(
            options.pop("transport"), scripted_bundle, DEPLOYMENT, runner or Scripted(), plan,
            tmp_path / "results.jsonl", **options,
        )  # fmt: skip

    return run


@pytest.fixture
def thermometer(tmp_path: Path) -> Path:
    """A thermal zone as sysfs shows it; millidegrees go into the file."""
    zone = tmp_path / "thermal" / "thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("cpu-thermal\n")
    (zone / "temp").write_text("61500\n")
    return zone / "temp"
