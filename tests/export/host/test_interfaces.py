"""Stages that do not fit each other or their loop are refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from export.contract.bundle import Bundle, write_bundle
from export.host.bundle_engine import open_engine
from quantize.errors import BundleError
from tests.support import toy_model
from tests.support.tiny_decoder import (
    Weights,
    hollow_bundle,
    resized,
    staged,
    with_stage,
)

BLOCKS: dict[str, Any] = {"canvas_length": 8, "block_length": 8, "shift": 1, "prefill_length": 24}


def test_stages_that_do_not_fit_the_loop_are_refused(tmp_path: Path) -> None:
    bundle = hollow_bundle(staged(Weights(0), "masked_diffusion", **BLOCKS), tmp_path)
    info, decoding = bundle.manifest.model, bundle.manifest.decoding
    assert decoding is not None
    cases: list[tuple[Bundle, str]] = [
        (
            with_stage(bundle, 1, lambda s: replace(s, inputs=s.inputs[:-1])),
            "does not understand",
        ),
        (with_stage(bundle, 1, lambda s: resized(s, "hidden", (1, 24, 8))), "is given float32"),
        (with_stage(bundle, 1, lambda s: resized(s, "rows", (4,))), "the loop gives up to 8"),
        (
            with_stage(bundle, 0, lambda s: resized(s, "tokens", (1, 9))),
            "the loop gives up to 24",
        ),
        (bundle, "cannot be loaded by ExecuTorch"),
    ]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"style": "autoregressive"}, "canvas of 8 tokens, expected 1"),
        ({"decoding": None}, "masked_diffusion and does not say how"),
        ({"decoding": replace(decoding, prefill_length=30)}, "up to 30"),
        ({"model": replace(info, canvas_length=5)}, "does not divide"),
    ]
    for change, says in changes:
        cases.append((replace(bundle, manifest=replace(bundle.manifest, **change)), says))
    for changed, says in cases:
        with pytest.raises(BundleError, match=says) as caught:
            open_engine(changed)
        assert "\n" not in str(caught.value)


def test_stages_in_the_wrong_order_or_with_unknown_inputs_are_refused(
    tmp_path: Path, toy_programs: dict[str, bytes]
) -> None:
    layers, head = toy_model.manifest().stages
    renamed = replace(layers, inputs=toy_model.specs(("tokens", "start", "denoise", "entropy")))
    for number, stages in enumerate([(head, layers), (layers,), (head,), (renamed, head)]):
        manifest = replace(toy_model.manifest(), stages=stages)
        bundle = write_bundle(tmp_path / f"bundle{number}", manifest, toy_programs)
        with pytest.raises(BundleError, match="stage"):
            open_engine(bundle)
