"""What several test files share and takes seconds: the demo model and a toy, lowered once a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from device_tests.local.fixture import (  # noqa: F401
    local_adbd,
    local_device,
    make_local_device,
)
from export.contract.bundle import Bundle, open_bundle
from quantize.quantizer import quantize_checkpoint
from quantize.recipe import preset
from tests.support.browser import chromium  # noqa: F401
from tests.support.demo import DEMO_MODEL
from tests.support.made_once import made_once
from tests.support.private_adb_server import no_server, private_server, shared_server  # noqa: F401

# Tiny eager models gain nothing from a second thread, and on busy cores the threads' spinning for
# each other made such tests twenty times slower.
torch.set_num_threads(1)
if "PYTEST_XDIST_WORKER" in os.environ:  # nor do the processes that tests start beside each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def demo_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as an int4 folder of the default recipe."""
    return made_once(
        tmp_path_factory,
        "demo/int4",  # the device suite shares it
        lambda folder: quantize_checkpoint(DEMO_MODEL, folder, preset()),
    )


@pytest.fixture(scope="session")
def demo_bundle(demo_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The demo model as an int4 bundle for XNNPACK; a minute of lowering."""
    from export.exporter import export_bundle

    return open_bundle(
        made_once(tmp_path_factory, "demo/bundle", lambda folder: export_bundle(demo_int4, folder))
    )


@pytest.fixture(scope="session")
def toy_programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The toy model lowered to ExecuTorch: file name -> bytes. CPU only, portable operators."""
    from export.contract.styles.uniform_diffusion import UniformDiffusion
    from tests.support import toy_model

    def make(folder: Path) -> None:
        folder.mkdir()
        for file, module, inputs in (
            ("layers.pte", toy_model.ToyLayers(), UniformDiffusion.layers_inputs),
            ("head.pte", toy_model.ToyHead(), UniformDiffusion.head_inputs),
        ):
            (folder / file).write_bytes(toy_model.lower(module, inputs))

    folder = made_once(tmp_path_factory, "toy", make)
    return {file: (folder / file).read_bytes() for file in ("layers.pte", "head.pte")}


@pytest.fixture(scope="session")
def toy_tokenizer_json() -> bytes:
    """A character tokenizer of the toy's vocabulary: three special tokens, then a to z."""
    from tests.support import toy_model

    names = ["<pad>", "<eos>", "<bos>", *"abcdefghijklmnopqrstuvwxyz"]
    assert len(names) == toy_model.INFO.vocabulary_size
    special = [
        {"id": i, "content": names[i], "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i in range(3)
    ]  # fmt: skip
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": None, "post_processor": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\s\\S]"},
                          "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {t: i for i, t in enumerate(names)},
                  "unk_token": "<none>"},
    }  # fmt: skip
    return json.dumps(document).encode()


@pytest.fixture
def toy_bundle(tmp_path: Path, toy_programs: dict[str, bytes], toy_tokenizer_json: bytes) -> Path:
    """A whole bundle folder of the toy model, with its tokenizer and a chat template."""
    from export.contract.bundle import write_bundle
    from export.contract.manifest import TokenizerInfo
    from tests.support import toy_model

    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    manifest = toy_model.manifest(tokenizer=TokenizerInfo("tokenizer.json", template))
    files = toy_programs | {"tokenizer.json": toy_tokenizer_json}
    write_bundle(tmp_path / "toy_bundle", manifest, files)
    return tmp_path / "toy_bundle"
