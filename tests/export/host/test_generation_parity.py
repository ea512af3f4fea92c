"""The whole loop against transformers' `generate()`, fed the same random numbers: CPU, fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSamplerConfig,
)

from export.contract import philox
from export.contract.manifest import SpecialTokens
from export.contract.styles.uniform_diffusion import UniformDiffusionSettings
from export.host.eager import eager_engine
from export.host.generation import CanvasDenoised
from export.host.loops.uniform_diffusion import UniformDiffusionSession
from export.host.puzzles import generate
from export.host.tokenizer import TextTokenizer, tokenizer_files
from export.models import stage_model
from quantize.checkpoint import open_checkpoint
from tests.support import hf_reference
from tests.support.demo import DEMO_MODEL


class RecordingStreamer:
    """Collects transformers' drafts, one argmax canvas for each denoising step."""

    def __init__(self) -> None:
        self.drafts: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        pass

    def put_draft(self, value: torch.Tensor) -> None:
        self.drafts.append(value[0].tolist())

    def end(self) -> None:
        pass


@contextmanager
def philox_instead_of_torch(
    monkeypatch: pytest.MonkeyPatch, seed: int, canvas_length: int, vocabulary: int
) -> Iterator[None]:
    """Replace `torch.randint` and `torch.multinomial` by the contract's numbers.

    transformers draws, for each canvas, one random canvas, then for each step one sample and one
    random canvas; a canvas begins when a random canvas is drawn with no sample before it.
    """
    state = {"canvas": -1, "step": 0, "sampled": False}

    def randint(*, low: int, high: int, size: tuple[int, int], device: object) -> torch.Tensor:
        assert (low, high, tuple(size)) == (0, vocabulary, (1, canvas_length))
        if not state["sampled"]:
            state.update(canvas=state["canvas"] + 1, step=0)
        state["sampled"] = False
        tokens = philox.random_tokens(
            seed, state["canvas"], state["step"], canvas_length, vocabulary
        )
        return torch.from_numpy(tokens)[None]

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        state.update(step=state["step"] + 1, sampled=True)
        uniform = philox.uniforms(seed, state["canvas"], state["step"], canvas_length)
        cumulative = probabilities.double().cumsum(-1).numpy()
        draws = [
            min(int(np.searchsorted(row, u * row[-1], side="right")), len(row) - 1)
            for row, u in zip(cumulative, uniform, strict=True)
        ]
        return torch.tensor(draws)[:, None]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", randint)
        patch.setattr(torch, "multinomial", multinomial)
        yield


def open_session(
    folder: Path, special: SpecialTokens, settings: UniformDiffusionSettings, context: int
) -> UniformDiffusionSession:
    """Our eager model of the same checkpoint."""
    staged = stage_model(open_checkpoint(folder), maximum_context=context)
    return UniformDiffusionSession(eager_engine(staged).model, special, settings)


def run_reference(
    reference: DiffusionGemmaForBlockDiffusion,
    prompt: list[int],
    settings: UniformDiffusionSettings,
    special: SpecialTokens,
    max_new_tokens: int,
    cache: object = None,
):
    """transformers' generate(): new tokens, drafts of every step, tokens per forward, cache."""
    streamer = RecordingStreamer()
    output = reference.generate(
        torch.tensor([prompt]),
        past_key_values=cache,
        streamer=streamer,
        max_new_tokens=max_new_tokens,
        max_denoising_steps=settings.max_steps,
        t_min=settings.t_min,
        t_max=settings.t_max,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=settings.entropy_bound),
        stability_threshold=settings.stability_threshold,
        confidence_threshold=settings.confidence_threshold,
        eos_token_id=list(special.eos),
        pad_token_id=special.pad,
    )
    new = output.sequences[0, len(prompt) :].tolist()
    return new, streamer.drafts, float(output.tokens_per_forward[0]), output.past_key_values


RANDOM_CASES = {
    "released_settings": UniformDiffusionSettings(max_steps=6),
    "accepts_many": UniformDiffusionSettings(max_steps=6, entropy_bound=20.0),
    "accepts_one": UniformDiffusionSettings(max_steps=6, entropy_bound=1e-6),
    "stops_without_stability": UniformDiffusionSettings(
        max_steps=6, stability_threshold=0, confidence_threshold=50.0
    ),
    "stops_after_two_stable_steps": UniformDiffusionSettings(
        max_steps=20, t_min=0.01, t_max=0.02, stability_threshold=2, confidence_threshold=50.0,
        entropy_bound=100.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RANDOM_CASES)
def test_random_models_give_the_same_tokens_step_by_step(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, special = RANDOM_CASES[case], SpecialTokens(eos=(1,), pad=0)
    canvas, vocabulary, prompt_length, new_tokens, seed = 16, 64, 29, 40, 1234
    reference = hf_reference.random_model(hf_reference.tiny_config(canvas), seed=11)
    folder = hf_reference.save(reference, tmp_path / "hf")
    prompt = torch.randint(2, vocabulary, (prompt_length,)).tolist()
    with philox_instead_of_torch(monkeypatch, seed, canvas, vocabulary):
        expected, expected_drafts, tokens_per_forward, _ = run_reference(
            reference, prompt, settings, special, new_tokens
        )
    drafts: list[list[int]] = []
    result = open_session(folder, special, settings, context=96).generate(
        prompt,
        new_tokens,
        seed,
        on_event=lambda event: (
            drafts.append(event.draft.tolist()) if isinstance(event, CanvasDenoised) else None
        ),
    )
    assert drafts == expected_drafts
    assert list(result.tokens) == expected
    assert result.tokens_per_forward == pytest.approx(tokens_per_forward)
    if case.startswith("stops"):
        assert len(drafts) < settings.max_steps * len(result.canvases)


def test_trained_model_gives_the_same_answers_over_two_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """End tokens inside a canvas, early stops, and the KV cache used again by a second turn."""
    reference = DiffusionGemmaForBlockDiffusion.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    reference.eval()
    checkpoint = open_checkpoint(DEMO_MODEL)
    staged = stage_model(checkpoint)
    special, info = staged.special_tokens, staged.info
    settings = UniformDiffusionSettings(**staged.sampler.settings)
    model = eager_engine(staged).model
    files = tokenizer_files(DEMO_MODEL)
    tokenizer = TextTokenizer(
        files.file,
        info.vocabulary_size,
        chat_template=files.chat_template,
        special_tokens=special,
    )
    ended_early = 0
    for seed, kind in enumerate(("sudoku", "sort", "add")):
        turns = [tokenizer.encode_prompt(p.prompt) for p in generate(kind, 2, 0, split="held_out")]
        session = UniformDiffusionSession(model, special, settings)
        ours, theirs, cache, pending = [], [], None, []
        with philox_instead_of_torch(monkeypatch, seed, info.canvas_length, info.vocabulary_size):
            for turn in turns:
                new, _, _, cache = run_reference(
                    reference, pending + turn, settings, special, info.canvas_length, cache
                )
                theirs.append(new)
                pending = new  # transformers leaves the last canvas out of the cache, as we do
        for turn in turns:
            result = session.generate(turn, info.canvas_length, seed)
            ours.append(list(result.tokens))
            ended_early += len(result.steps) < settings.max_steps
        assert ours == theirs
    assert ended_early > 0
