"""Lowered programs against the eager modules they were made from, through the real runtime."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export.backends import lower_stage
from export.backends.xnnpack import lowering
from export.backends.xnnpack.lowering import QUANTIZED_LINEAR
from export.contract.bundle import Bundle, open_bundle
from export.contract.styles.uniform_diffusion import UniformDiffusionSettings
from export.exporter import export_bundle
from export.host.bundle_engine import open_engine
from export.host.eager import eager_engine
from export.host.generation import CanvasDenoised
from export.host.loops.uniform_diffusion import UniformDiffusionSession
from export.host.puzzles import KINDS, generate
from export.host.tokenizer import open_tokenizer
from export.models import stage_model
from export.models.staging import StagedModel, StageModule
from quantize.checkpoint import open_checkpoint
from quantize.errors import LoweringError
from quantize.quantizer import quantize_checkpoint
from quantize.recipe import preset
from scripts.pocketdiff import run
from tests.support import hf_reference
from tests.support.forked import DEADLINE_S, forked, wait_for

# fp32 differs only by the order of sums.
FP32_TOLERANCE = 1e-4


def layer_errors(bundle: Bundle, staged: StagedModel) -> torch.Tensor:
    """|program - eager| of the hidden states over encode, denoise, commit; NaN would show."""
    torch.manual_seed(0)
    eager, program = eager_engine(staged).model, open_engine(bundle).model
    info = staged.info
    canvas = info.canvas_length
    errors = []
    # The last encode overwrites a denoising step's scratch, the last denoise reads what it wrote.
    for position, denoise in [(0, 0), (canvas, 0), (2 * canvas - 3, 1), (2 * canvas - 3, 1),
                           (2 * canvas - 3, 0), (3 * canvas - 3, 1)]:  # fmt: skip
        inputs = (
            torch.randint(0, info.vocabulary_size, (1, canvas)),
            torch.tensor([position]),
            torch.tensor([denoise]),
            torch.randn(1, canvas, info.hidden_size),
        )
        errors.append((program.run_layers(*inputs) - eager.run_layers(*inputs)).abs())
    return torch.cat(errors)


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["dense", "gather"])
def test_fp32_program_equals_the_eager_model(experts: str, tmp_path: Path) -> None:
    config = hf_reference.tiny_config(
        16, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
    )
    folder = hf_reference.save(hf_reference.random_model(config, seed=3), tmp_path / "hf")
    bundle = export_bundle(folder, tmp_path / "bundle", maximum_context=96, experts=experts)
    staged = stage_model(open_checkpoint(folder), maximum_context=96)
    assert layer_errors(bundle, staged).max() <= FP32_TOLERANCE
    assert bundle.manifest.experts.computation == experts
    assert bundle.manifest.recipe is None
    assert bundle.manifest.tokenizer is None


@pytest.mark.slow
def test_int4_program_equals_the_eager_int4_model(demo_bundle: Bundle, demo_int4: Path) -> None:
    """Most passes agree to fp32 rounding; a sum that rounds the other way costs an int8 step.

    Hidden states are normed to a scale of 1, and later layers carry such a step on to all rows.
    """
    errors = layer_errors(demo_bundle, stage_model(open_checkpoint(demo_int4)))
    medians = errors.flatten(1).median(dim=1).values
    assert (medians <= 1e-5).sum() >= len(medians) / 2, medians
    assert (medians <= 1e-2).all(), medians


@pytest.mark.slow
def test_int4_embedding_program_equals_the_eager_model(tmp_path: Path) -> None:
    """The 4-bit lookup has a kernel and a scale format of its own; one layer, so no int8 drift."""
    source, int4 = tiny_checkpoint(tmp_path / "hf"), tmp_path / "int4"
    quantize_checkpoint(source, int4, preset("int4-g32-embed4"))
    bundle = export_bundle(int4, tmp_path / "bundle", maximum_context=96)
    staged = stage_model(open_checkpoint(int4), maximum_context=96)
    assert layer_errors(bundle, staged).flatten(1).median(dim=1).values.max() <= 1e-4


@pytest.mark.slow
def test_head_program_equals_the_eager_head(demo_bundle: Bundle, demo_int4: Path) -> None:
    staged = stage_model(open_checkpoint(demo_int4))
    eager, program = eager_engine(staged).model, open_engine(demo_bundle).model
    info = staged.info
    torch.manual_seed(1)
    tokens = torch.randint(0, info.vocabulary_size, (3, 1, info.canvas_length))
    inputs = (
        torch.randn(1, info.canvas_length, info.hidden_size),
        tokens[0],
        tokens[1],
        torch.tensor([0]),
        torch.tensor([17]),
        torch.from_numpy(UniformDiffusionSettings().as_array()),
        torch.rand(1, info.canvas_length),
        tokens[2],
        tokens[1],
    )
    ours, expected = program.run_head(*inputs), eager.run_head(*inputs)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(ours[name].double(), value.double(), atol=1e-4), name


@pytest.mark.slow
def test_bundle_generates_the_tokens_of_the_eager_int4_model(
    demo_bundle: Bundle, demo_int4: Path
) -> None:
    """Drafts agree step by step until a near-tie decides, and nearly all answers agree."""
    staged = stage_model(open_checkpoint(demo_int4))
    tokenizer = open_tokenizer(demo_bundle)
    settings = UniformDiffusionSettings(**staged.sampler.settings)
    models = {"eager": eager_engine(staged).model, "bundle": open_engine(demo_bundle).model}
    same_answers = total = 0
    for kind in KINDS:
        for seed, puzzle in enumerate(generate(kind, 5, seed=3, split="held_out")):
            prompt = tokenizer.encode_prompt(puzzle.prompt)
            runs = {}
            for name, model in models.items():
                events: list[CanvasDenoised] = []
                session = UniformDiffusionSession(model, staged.special_tokens, settings)
                result = session.generate(
                    prompt,
                    staged.info.canvas_length,
                    seed,
                    on_event=lambda event, keep=events: (
                        keep.append(event) if isinstance(event, CanvasDenoised) else None
                    ),
                )
                runs[name] = (events, result)
            eager_first, bundle_first = (runs[name][0][0] for name in ("eager", "bundle"))
            # On the first step both see the same canvas and nothing has been decided yet.
            decided = eager_first.entropy < 0.5
            assert np.array_equal(bundle_first.draft[decided], eager_first.draft[decided])
            same_answers += runs["eager"][1].tokens == runs["bundle"][1].tokens
            total += 1
    assert same_answers >= 0.9 * total


@pytest.mark.slow
def test_manifest_says_what_was_lowered(demo_bundle: Bundle, demo_int4: Path) -> None:
    manifest = open_bundle(demo_bundle.folder).manifest
    staged = stage_model(open_checkpoint(demo_int4))
    assert manifest.experts.computation == "dense"
    assert set(manifest.experts.estimated_ms_per_layer) == {"dense", "gather"}
    for stage, described in zip(staged.stages, manifest.stages, strict=True):
        quantized = sum(
            getattr(weight, "activation_quantization", None) is not None
            for weight in stage.load().parameters()
        )
        assert quantized > 0
        assert described.delegation.delegated[QUANTIZED_LINEAR] == quantized
    assert manifest.recipe is not None
    assert manifest.versions.keys() == {"executorch", "torch", "torchao"}


def tiny_checkpoint(folder: Path) -> Path:
    """One layer of the architecture: seconds to lower."""
    config = hf_reference.tiny_config(
        16, num_hidden_layers=1, layer_types=["full_attention"], num_experts=2
    )
    return hf_reference.save(hf_reference.random_model(config, seed=0), folder)


@pytest.mark.slow
def test_a_full_disk_during_export_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "hf")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel itself refuses to write a file beyond this size.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        code = run(["export", str(checkpoint), str(tmp_path / "bundle")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert "disk" in err.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.slow
def test_an_export_interrupted_between_two_stages_says_that_it_can_go_on(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "hf")
    destination = tmp_path / "out" / "bundle"
    destination.parent.mkdir()
    arguments = ["export", str(checkpoint), str(destination)]
    with forked(lambda: run(arguments), tmp_path / "stderr") as process:
        wait_for(process, lambda: list(destination.parent.rglob("layers.pte")))
        assert not destination.exists()
        os.kill(process.pid, signal.SIGINT)
        process.join(DEADLINE_S)
        assert process.exitcode == 130
    err = (tmp_path / "stderr").read_text()
    assert "Traceback" not in err
    assert "the same command goes on from there" in err
    assert [path.name for path in destination.parent.iterdir()] == [".bundle.partial"]


class _PlainLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@pytest.mark.slow
def test_a_product_that_is_not_delegated_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is injected: a partitioner that takes no products."""
    from executorch.backends.xnnpack.partition.config.generic_node_configs import AddConfig

    original = lowering.XnnpackPartitioner
    monkeypatch.setattr(lowering, "XnnpackPartitioner", lambda: original(configs=[AddConfig]))
    stage = StageModule("layers", "layers", _PlainLinear(), (torch.zeros(4, 8),), ("x",), ("y",))
    with pytest.raises(LoweringError, match=r"aten::(addmm|linear)"):
        lower_stage(stage, "xnnpack")


def test_an_unknown_backend_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="'npu' is not known; supported: xnnpack"):
        export_bundle(tmp_path / "nowhere", tmp_path / "bundle", backend="npu")
    assert not list(tmp_path.iterdir())
