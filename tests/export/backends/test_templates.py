"""Programs from a template against those lowered in full, and cut bundles against whole ones."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from export.backends import lower_stage
from export.backends.xnnpack import templates
from export.backends.xnnpack.templates import Place, ProgramTemplate, make_template
from export.contract.bundle import Bundle, open_bundle
from export.contract.styles.uniform_diffusion import UniformDiffusionSettings
from export.exporter import export_bundle
from export.host.bundle_engine import open_engine
from export.host.eager import eager_engine, eager_stages
from export.host.program_file import read_program_layout
from export.models import stage_model
from export.models.staging import StageModule, Template
from export.models.weights import RandomWeights
from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.errors import CheckpointError, LoweringError
from quantize.quantizer import quantize_checkpoint
from quantize.recipe import preset
from tests.support import dense_checkpoints, hf_reference
from tests.support.digests import digests
from tests.support.forked import DEADLINE_S, forked, wait_for

CONTEXT = 96
CUT = {"maximum_context": CONTEXT, "experts": "gather", "layers_per_stage": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of two layers of one template, and the same in int4."""
    root = tmp_path_factory.mktemp("templates")
    config = hf_reference.two_equal_layers()
    hf_reference.save(hf_reference.random_model(config, seed=5), root / "fp32")
    quantize_checkpoint(root / "fp32", root / "int4", preset("int4-g32"))
    return {"fp32": root / "fp32", "int4": root / "int4", "root": root}


def cut_layers(checkpoint: Checkpoint, experts: str = "gather") -> list[StageModule]:
    staged = stage_model(checkpoint, maximum_context=CONTEXT, experts=experts, layers_per_stage=1)
    return [stage for stage in staged.stages if stage.template is not None]


class Cut(NamedTuple):
    """A bundle of single layers, and the template that they were made from."""

    bundle: Bundle
    template: ProgramTemplate


@pytest.fixture(scope="module")
def cut(folders: dict[str, Path]) -> Cut:
    made = []

    def keep(stage: StageModule, template: Template, file: Path) -> tuple:
        program, lowered = make_template(stage, template, file)
        kept = shutil.copyfile(file, folders["root"] / file.name)
        made.append(replace(program, file=kept))
        return program, lowered

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(templates, "make_template", keep)
        bundle = export_bundle(folders["int4"], folders["root"] / "cut.bundle", **CUT)
    (program,) = made
    return Cut(bundle, program)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "experts"), [("int4", "gather"), ("fp32", "dense")])
def test_a_program_from_a_template_is_the_lowered_one_byte_for_byte(
    cut: Cut, folders: dict[str, Path], kind: str, experts: str, tmp_path: Path
) -> None:
    first, second = cut_layers(open_checkpoint(folders[kind]), experts)
    if kind == "int4":  # that of the bundle, made in the same way
        template = replace(cut.template, file=tmp_path / "template.pte")
        shutil.copyfile(cut.template.file, template.file)
    else:
        template, _ = make_template(first, first.template, tmp_path / "template.pte")
    template.instantiate(second.template.weights, tmp_path / "made.pte")
    lower_stage(second, "xnnpack").write(tmp_path / "lowered.pte")
    assert (tmp_path / "made.pte").read_bytes() == (tmp_path / "lowered.pte").read_bytes()
    assert (tmp_path / "made.pte").read_bytes() != (tmp_path / "template.pte").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"template.pte", "made.pte", "lowered.pte"}

    # Equal tensors keep keys of their own, so that each has its own bytes in the file.
    class Same(RandomWeights):
        def _make(self, name: str, index: int | None) -> torch.Tensor:
            weight = super()._make(name, index)
            if type(weight) is torch.Tensor:
                return torch.ones_like(weight)
            weight.qdata.fill_(3)
            return weight

    template.instantiate(Same(first.template.weights), tmp_path / "same.pte")
    layout = read_program_layout(tmp_path / "same.pte")
    assert len(layout.named) == len(read_program_layout(tmp_path / "template.pte").named)
    assert all(
        path.stat().st_size == (tmp_path / "template.pte").stat().st_size
        for path in tmp_path.iterdir()
    )


@pytest.mark.slow
def test_a_program_with_a_weight_that_is_not_found_is_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is injected: the module changes a weight after it was read."""
    (first, _) = cut_layers(open_checkpoint(folders["fp32"]), "dense")
    build = first.template.build

    def changed(weights: RandomWeights) -> torch.nn.Module:
        module = build(weights)
        module.layers[0].mlp.up_proj.weight.mul_(2.0)
        return module

    template = replace(first.template, build=changed)
    with pytest.raises(LoweringError, match=r"up_proj.* 0 times"):
        make_template(first, template, tmp_path / "template.pte")


@pytest.mark.slow
def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    """A hand-made template: the check itself needs no lowering."""

    class Scalar:
        def get_packed(self, name: str, index: int | None = None) -> None:
            return None

        def get(self, name: str, index: int | None = None) -> torch.Tensor:
            return torch.ones(2)

    file = tmp_path / "template.pte"
    shutil.copyfile(_any_program(tmp_path), file)
    template = ProgramTemplate(file, (Place("a", None, "plain", 64, 4, None),))
    with pytest.raises(LoweringError, match="8 bytes of plain"):
        template.instantiate(Scalar(), tmp_path / "made.pte")
    assert not (tmp_path / "made.pte").exists()
    assert not list(tmp_path.glob(".*"))


def _any_program(folder: Path) -> Path:
    stage = StageModule(
        "one", "layers", torch.nn.Linear(8, 8), (torch.zeros(4, 8),), ("x",), ("y",)
    )
    lower_stage(stage, "xnnpack").write(folder / "one.pte")
    return folder / "one.pte"


@pytest.mark.slow
def test_a_cut_bundle_generates_the_tokens_of_the_whole_one(
    cut: Cut, folders: dict[str, Path], tmp_path: Path
) -> None:
    cut_bundle = cut.bundle
    whole = export_bundle(
        folders["int4"], tmp_path / "whole", maximum_context=CONTEXT, experts="gather"
    )
    names = [stage.name for stage in cut_bundle.manifest.stages]
    assert names == ["entry", "layers_00", "layers_01", "norm", "head"]
    assert all(stage.delegation is not None for stage in cut_bundle.manifest.stages)
    for seed, prompt in enumerate([[1, 2, 3], list(range(40)), [63] * 17]):
        answers = []
        for bundle in (whole, cut_bundle):
            session = open_engine(bundle).session()
            settings = UniformDiffusionSettings(**bundle.manifest.sampler.settings)
            result = session.generate(prompt, max_new_tokens=32, seed=seed, settings=settings)
            answers.append(list(result.tokens))
        assert answers[0] == answers[1]
        assert len(answers[0]) > 0


def test_cut_layers_compute_what_the_whole_model_does(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["int4"])
    whole = eager_engine(stage_model(checkpoint, maximum_context=CONTEXT)).model
    torch.manual_seed(0)
    calls = [
        (
            torch.randint(0, 64, (1, 16)),
            torch.tensor([start]),
            torch.tensor([denoise]),
            torch.randn(1, 16, 64),
        )
        for start, denoise in [(0, 0), (16, 0), (32, 1), (32, 1), (32, 0), (48, 1)]
    ]
    expected = [whole.run_layers(*call) for call in calls]
    for count in (1, 2, 5):
        cut = eager_engine(
            stage_model(checkpoint, maximum_context=CONTEXT, layers_per_stage=count)
        ).model
        for call, hidden in zip(calls, expected, strict=True):
            assert torch.equal(cut.run_layers(*call), hidden)


@pytest.mark.parametrize("kind", ["sdar", "llada", "qwen2"])
def test_cut_layers_of_dense_decoders_compute_the_same(kind: str, tmp_path: Path) -> None:
    dense_checkpoints.write(tmp_path, kind, seed=2)
    checkpoint = open_checkpoint(tmp_path)
    whole, cut = (
        eager_stages(stage_model(checkpoint, maximum_context=64, layers_per_stage=count))
        for count in (None, 1)
    )
    torch.manual_seed(0)
    for rows, first, block in [(32, 0, 32), (5, 32, 1), (32, 32, 64)]:
        call = {
            "tokens": torch.randint(0, 90, (1, rows)),
            "start": torch.tensor([first]),
            "block_length": torch.tensor([block]),
        }
        assert torch.equal(whole.layers(call), cut.layers(call))


@pytest.mark.slow
def test_a_cut_dense_decoder_has_a_template_and_takes_any_length(tmp_path: Path) -> None:
    dense_checkpoints.write(tmp_path / "hf", "sdar", seed=2)
    quantize_checkpoint(tmp_path / "hf", tmp_path / "int4", preset("int4-g32"))
    first, second = cut_layers(open_checkpoint(tmp_path / "int4"))
    template, _ = make_template(first, first.template, tmp_path / "template.pte")
    template.instantiate(second.template.weights, tmp_path / "made.pte")
    lower_stage(second, "xnnpack").write(tmp_path / "lowered.pte")
    assert (tmp_path / "made.pte").read_bytes() == (tmp_path / "lowered.pte").read_bytes()


def test_a_family_whose_layers_cannot_be_cut_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hrm_text"}))
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be cut into stages of 1"):
        stage_model(open_checkpoint(tmp_path), layers_per_stage=1)


@pytest.mark.slow
def test_a_killed_export_goes_on_to_the_same_bytes(
    cut: Cut, folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def export() -> int:
        export_bundle(folders["int4"], out / "cut.bundle", **CUT)
        return 0

    # Killed while the template is lowered, then after a stage was made from it.
    for until in ("entry.pte", "layers_00.pte"):
        with forked(export, tmp_path / "stderr") as process:
            wait_for(process, lambda until=until: list(out.rglob(until)))
            time.sleep(0.1)
        assert not (out / "cut.bundle").exists()
    (template,) = out.rglob(".templates/xnnpack/*.pte")
    made = template.stat().st_mtime_ns
    with forked(export, tmp_path / "stderr") as process:
        deadline = time.monotonic() + DEADLINE_S
        while process.exitcode is None and time.monotonic() < deadline:
            with suppress(FileNotFoundError):  # it goes before the bundle is sealed
                assert template.stat().st_mtime_ns == made
            time.sleep(0.05)
        assert process.exitcode == 0, (tmp_path / "stderr").read_text()
    assert [path.name for path in out.iterdir()] == ["cut.bundle"]
    assert digests(out / "cut.bundle") == digests(cut.bundle.folder)
    open_bundle(out / "cut.bundle")
