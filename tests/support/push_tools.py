"""What the tests of pushes share: bundles of random bytes, small chunks, what must be there."""

from __future__ import annotations

import random
from pathlib import Path

from device_tests.bench.deploy import deploy
from device_tests.bench.inventory import bundle_id
from export.contract.bundle import Bundle, open_bundle, write_bundle
from export.contract.manifest import Manifest, ModelInfo, Sampler, SpecialTokens, Stage, TensorSpec
from tests.support.folder_transport import FolderTransport

CHUNK = 64 * 1024
ODD_NAMES = (
    "with space.bin", "it's.bin", "$(reboot).bin", "-rf", "ünïcode 模型.bin", "a;b&c`d`.bin",
    "%s%n.bin", "deep/er/-x.bin", "#!.bin", "~", "=", "e{m,p}[t]y!.bin",
)  # fmt: skip


def random_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


def make_bundle(folder: Path, files: dict[str, bytes], name: str = "toy") -> Bundle:
    """A bundle of any files; the stage's program is one of them."""
    spec = (TensorSpec("x", "int64", (1,)),)
    manifest = Manifest(
        model=ModelInfo("toy", name, 29, 8, 6, 40),
        style="uniform_diffusion",
        sampler=Sampler("entropy_bound", {}),
        special_tokens=SpecialTokens(),
        stages=(Stage("head", "head", "portable", next(iter(files)), spec, spec),),
        versions={},
    )
    return write_bundle(folder, manifest, files)


def push(device: FolderTransport, bundle: Bundle, root: str, **options: object):
    return deploy(device, bundle, root=root, chunk_bytes=CHUNK, retry_s=1.0, **options)


def manifest_bytes(bundle: Bundle) -> int:
    return (bundle.folder / "bundle.json").stat().st_size


def whole_bytes(bundle: Bundle) -> int:
    return bundle.total_bytes + manifest_bytes(bundle)


def assert_whole(bundle: Bundle, root: str) -> None:
    """The bundle is on the device as it is here, and nothing is left beside it."""
    (folder,) = (Path(root) / "bundles").iterdir()
    assert folder.name == bundle_id((bundle.folder / "bundle.json").read_bytes())
    assert open_bundle(folder, verify=True).files == bundle.files
    here = sorted(p.relative_to(bundle.folder) for p in bundle.folder.rglob("*"))
    assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == here
    assert list((Path(root) / "staging").iterdir()) == []


def assert_nothing_to_run(root: str) -> None:
    bundles = Path(root) / "bundles"
    assert not bundles.exists() or list(bundles.iterdir()) == []
