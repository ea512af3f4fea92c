"""A bundle in ExecuTorch gives the tokens of the eager model, and what cannot run is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from export.contract.bundle import open_bundle, write_bundle
from export.contract.manifest import Sampler, Stage
from export.contract.styles.uniform_diffusion import UniformDiffusionSettings
from export.host.bundle_engine import open_engine
from export.host.loops.uniform_diffusion import UniformDiffusionSession
from quantize.errors import BundleError, InputError
from tests.support import toy_model
from tests.support.toy_model import INFO, SPECIAL

T = INFO.canvas_length
SETTINGS = UniformDiffusionSettings(**toy_model.SETTINGS)
PROMPT = [2, 5, 6, 7, 8, 9, 10, 3]


def eager_session() -> UniformDiffusionSession:
    model = toy_model.eager_model(toy_model.ToyLayers(), toy_model.ToyHead(), INFO)
    return UniformDiffusionSession(model, SPECIAL, SETTINGS)


def test_the_bundle_gives_the_tokens_of_the_eager_model(toy_bundle: Path) -> None:
    session = open_engine(open_bundle(toy_bundle), threads=1).session()
    for turn in (PROMPT, [4, 5]):
        found = session.generate(turn, 2 * T if turn is PROMPT else T, seed=3)
        assert len(found.steps) >= 2
        if turn is PROMPT:
            reference = eager_session()
        expected = reference.generate(turn, 2 * T if turn is PROMPT else T, seed=3)
        assert found.tokens == expected.tokens
        assert [len(c.steps) for c in found.canvases] == [len(c.steps) for c in expected.canvases]
        for ours, theirs in zip(found.steps, expected.steps, strict=True):
            # Portable kernels and PyTorch sum in different orders.
            assert ours.mean_entropy == pytest.approx(theirs.mean_entropy, abs=1e-4)


def test_layers_can_be_cut_into_several_stages(
    tmp_path: Path, toy_programs: dict[str, bytes]
) -> None:
    class Second(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
            return hidden * 2.0 + start.to(torch.float32)

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = toy_model.ToyLayers(), Second()

        def forward(self, tokens, start, denoise, signal):  # type: ignore[no-untyped-def]
            return self.second(self.first(tokens, start, denoise, signal), start)

    manifest = toy_model.manifest()
    layers, head = manifest.stages
    second = Stage("second", "layers", "portable", "second.pte",
                   toy_model.specs(("hidden", "start")),
                   toy_model.specs(("hidden",)))  # fmt: skip
    files = toy_programs | {"second.pte": toy_model.lower(Second(), ("hidden", "start"))}
    bundle = write_bundle(tmp_path / "cut", replace(manifest, stages=(layers, second, head)), files)
    found = open_engine(bundle).session().generate(PROMPT, 2 * T, seed=3)
    model = toy_model.eager_model(Both(), toy_model.ToyHead(), INFO)
    expected = UniformDiffusionSession(model, SPECIAL, SETTINGS).generate(PROMPT, 2 * T, seed=3)
    assert found.tokens == expected.tokens


def test_a_style_that_is_not_run_yet_is_refused(toy_bundle: Path) -> None:
    bundle = open_bundle(toy_bundle)
    other = replace(bundle, manifest=replace(bundle.manifest, style="masked_diffusion"))
    with pytest.raises(BundleError, match="masked_diffusion"):
        open_engine(other)


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler("roulette", toy_model.SETTINGS),
        Sampler("entropy_bound", {"colour": 1.0}),
        Sampler("entropy_bound", toy_model.SETTINGS | {"t_min": -1.0}),
    ],
)
def test_a_sampler_that_is_not_understood_is_refused(toy_bundle: Path, sampler: Sampler) -> None:
    bundle = open_bundle(toy_bundle)
    other = replace(bundle, manifest=replace(bundle.manifest, sampler=sampler))
    with pytest.raises(BundleError, match="sampler"):
        open_engine(other)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.99])
def test_a_program_that_was_truncated_before_it_was_sealed_is_refused(
    tmp_path: Path, toy_programs: dict[str, bytes], kept: float
) -> None:
    whole = toy_programs["head.pte"]
    cut = whole[: kept if isinstance(kept, int) else int(kept * len(whole))]
    bundle = write_bundle(
        tmp_path / "bundle", toy_model.manifest(), toy_programs | {"head.pte": cut}
    )
    with pytest.raises(BundleError, match=r"head\.pte cannot be loaded by ExecuTorch") as caught:
        open_engine(bundle)
    assert "\n" not in str(caught.value)


def test_a_program_that_is_not_what_the_manifest_says_is_refused(
    tmp_path: Path, toy_programs: dict[str, bytes]
) -> None:
    info = replace(INFO, canvas_length=T + 2)
    bundle = write_bundle(tmp_path / "bundle", toy_model.manifest(info), toy_programs)
    with pytest.raises(BundleError, match=r"layers\.pte has inputs"):
        open_engine(bundle)


def test_no_threads_are_refused(toy_bundle: Path) -> None:
    with pytest.raises(InputError, match="threads is 0"):
        open_engine(open_bundle(toy_bundle), threads=0)
