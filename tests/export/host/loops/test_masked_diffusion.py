"""The masked-diffusion loop gives the tokens of plain samplers, and computes no more than it says.

CPU, tiny random weights. The references (`masked_reference`) recompute everything each step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.contract.manifest import SpecialTokens
from export.contract.styles.masked_diffusion import MaskedDiffusion, MaskedDiffusionSettings
from export.heads.samplers import masked
from export.host.bundle_engine import open_engine
from export.host.eager import eager_engine, eager_stages
from export.host.generation import (
    CanvasCommitted,
    CanvasDenoised,
    CanvasStarted,
    Event,
    PromptEncoded,
)
from export.host.loops.masked_diffusion import (
    MaskedDiffusionModel,
    MaskedDiffusionSession,
    split_evenly,
    spread_evenly,
)
from export.models import stage_model
from export.models.staging import StagedModel
from quantize.checkpoint import open_checkpoint
from quantize.errors import BundleError, InputError
from tests.support import dense_checkpoints
from tests.support import masked_reference as reference
from tests.support.tiny_decoder import (
    CONTEXT,
    MASK_TOKEN,
    NO_END,
    SPECIAL,
    VOCABULARY,
    Weights,
    lowered_bundle,
    plain_logits,
    resized,
    staged,
    with_stage,
)

Session = MaskedDiffusionSession
Call = tuple[int, int, int]  # start, rows, block length


class Counted(MaskedDiffusionModel):
    """Notes the calls of the layers and the rows of the head."""

    def __init__(self, model: StagedModel) -> None:
        super().__init__(eager_stages(model))
        self.calls: list[Call] = []
        self.head_rows: list[int] = []

    def layers(self, tokens: np.ndarray, start: int, block_length: int) -> torch.Tensor:
        self.calls.append((start, len(tokens), block_length))
        return super().layers(tokens, start, block_length)

    def head(self, hidden: torch.Tensor, rows: np.ndarray, *rest: Any) -> Any:
        self.head_rows.append(len(rows))
        return super().head(hidden, rows, *rest)


@functools.cache
def weights(seed: int = 0) -> Weights:
    return Weights(seed)


def session(seed: int = 0, special: SpecialTokens | None = None, **options: Any) -> Session:
    """A session with a counted model; options of `staged`."""
    settings = options.pop("settings", {})
    model = staged(weights(seed), "masked_diffusion", **options)
    size = options["canvas_length"]
    given = MaskedDiffusionSettings(**({"steps_per_canvas": size} | settings))
    return Session(Counted(model), special or model.special_tokens, given)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCABULARY - 1, length).tolist()


def logits(seed: int) -> reference.Logits:
    return functools.partial(plain_logits, weights(seed))


# --- token for token --------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_model_that_sees_everything_gives_the_tokens_of_llada(seed: int, steps: int) -> None:
    prompt = prompt_of(5 + seed, seed)
    ours = session(seed, canvas_length=8, block_length=0,
                   settings={"steps_per_canvas": steps, "prefix_cache": 0})  # fmt: skip
    assert list(ours.generate(prompt, 24).tokens) == reference.llada(
        logits(seed), prompt, 24, 8, steps
    )


@pytest.mark.parametrize("order", ["entropy", "margin"])
@pytest.mark.parametrize(("canvas", "steps"), [(24, 24), (24, 5), (8, 4)])
def test_a_shifted_model_gives_the_tokens_of_dream(order: str, canvas: int, steps: int) -> None:
    prompt = prompt_of(7)
    ours = session(3, canvas_length=canvas, block_length=0, shift=1,
                   settings={"steps_per_canvas": steps, "prefix_cache": 0,
                             "order": {"entropy": 1, "margin": 2}[order]})  # fmt: skip
    assert list(ours.generate(prompt, 24).tokens) == reference.dream(
        logits(3), prompt, 24, canvas, steps, order
    )


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("prompt_length", [1, 6])
def test_the_prefix_cache_gives_the_tokens_of_fast_dllm(shift: int, prompt_length: int) -> None:
    prompt = prompt_of(prompt_length)
    made = {}
    for prefix_cache in (0, 1):
        ours = session(4, canvas_length=8, block_length=0, shift=shift,
                       settings={"steps_per_canvas": 4, "prefix_cache": prefix_cache})  # fmt: skip
        made[prefix_cache] = list(ours.generate(prompt, 32).tokens)
    assert made[1] == reference.fast_dllm_prefix_cache(weights(4), prompt, 32, 8, 4, shift)
    # It is an approximation: on these weights one can tell.
    assert made[1] != made[0]


@pytest.mark.parametrize("threshold", [0.3, 0.9, 2.0])
@pytest.mark.parametrize("prompt_length", [1, 7, 8, 13])
@pytest.mark.parametrize("steps", [8, 3])
def test_a_block_model_gives_the_tokens_of_sdar(
    threshold: float, prompt_length: int, steps: int
) -> None:
    prompt = prompt_of(prompt_length)
    ours = session(1, canvas_length=8, block_length=8,
                   settings={"steps_per_canvas": steps, "threshold": threshold})  # fmt: skip
    result = ours.generate(prompt, 20)
    assert list(result.tokens) == reference.sdar(logits(1), prompt, 20, 8, steps, threshold)
    assert (len(prompt) + len(result.tokens)) % 8 == 0


@pytest.mark.parametrize("threshold", [0.3, 0.9])
@pytest.mark.parametrize("prompt_length", [1, 3, 4, 10, 16])
def test_small_blocks_and_a_shift_give_the_tokens_of_fast_dllm_v2(
    threshold: float, prompt_length: int
) -> None:
    prompt = prompt_of(prompt_length)
    ours = session(2, canvas_length=4, block_length=16, shift=1,
                   settings={"threshold": threshold})  # fmt: skip
    assert list(ours.generate(prompt, 22).tokens) == reference.fast_dllm_v2(
        logits(2), prompt, 22, 16, 4, threshold
    )


@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_random_tokens_depend_on_seed_canvas_step_and_position_alone(temperature: float) -> None:
    prompt, settings = prompt_of(5), {"steps_per_canvas": 3, "temperature": temperature}
    blocks = session(1, canvas_length=8, block_length=8, settings=settings)
    assert list(blocks.generate(prompt, 20, seed=9).tokens) == reference.sdar(
        logits(1), prompt, 20, 8, 3, 2.0, temperature, seed=9
    )
    settings["prefix_cache"] = 0
    everything = session(1, canvas_length=8, block_length=0, settings=settings)
    assert list(everything.generate(prompt, 24, seed=9).tokens) == reference.llada(
        logits(1), prompt, 24, 8, 3, temperature, seed=9
    )


@pytest.mark.parametrize("kind", ["blocks", "small blocks", "everything"])
def test_two_turns_give_what_one_turn_with_all_tokens_gives(kind: str) -> None:
    options: dict[str, Any] = {
        "blocks": {"canvas_length": 8, "block_length": 8},
        "small blocks": {"canvas_length": 4, "block_length": 16, "shift": 1},
        "everything": {"canvas_length": 8, "block_length": 0},
    }[kind]
    ours = session(5, **options)
    ours.generate(prompt_of(6), 9)
    ours.truncate(len(ours.tokens) - 3)  # as the command line forgets padding
    known, second = list(ours.tokens), prompt_of(5, seed=1)
    fresh = session(5, **options)
    assert ours.generate(second, 8).tokens == fresh.generate(known + second, 8).tokens


# Format: keys of config.json, new tokens, and its reference on logits and prompt. Dream's one
# canvas is half of the context.
CHECKPOINTS: dict[str, tuple[dict[str, Any], int, Callable[..., list[int]]]] = {
    "llada": ({}, 32, lambda *a, **k: reference.llada(*a, 32, 32, 32, **k)),
    "Dream": ({}, 48, lambda *a, **k: reference.dream(*a, 48, 48, 48, "entropy", **k)),
    "sdar": ({}, 32, lambda *a, **k: reference.sdar(*a, 32, 4, 4, 0.9, **k)),
    "Fast_dLLM_Qwen": (
        {"mask_token_id": dense_checkpoints.MASK},
        32,
        lambda *a, **k: reference.fast_dllm_v2(*a, 32, 32, 8, 0.9, **k),
    ),
}


@pytest.mark.parametrize("model_type", CHECKPOINTS)
def test_public_formats_give_their_samplers_tokens_over_the_model_of_transformers(
    model_type: str, tmp_path: Path
) -> None:
    changes, answer, sampler = CHECKPOINTS[model_type]
    plain = dense_checkpoints.write(tmp_path / "hf", model_type, changes=changes)

    def logits_of(tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        with torch.no_grad():
            return plain(tokens[None], attention_mask=mask).logits[0]

    engine = eager_engine(stage_model(open_checkpoint(tmp_path / "hf"), maximum_context=96))
    plainest = {"temperature": 0.0, "top_p": 1.0, "prefix_cache": 0}
    settings = engine.settings_with({k: v for k, v in plainest.items() if k in engine.settable})
    ours = engine.session()
    prompt = np.random.default_rng(2).integers(0, 80, 21).tolist()
    ours.special_tokens = NO_END
    found = ours.generate(prompt, answer, settings=settings)
    expected = sampler(logits_of, prompt, mask=dense_checkpoints.MASK)
    assert list(found.tokens) == expected


# --- what is computed ---------------------------------------------------------------------------


def test_committed_blocks_are_computed_once_and_steps_run_one_block() -> None:
    ours = session(canvas_length=8, block_length=8, prefill_length=20)
    model = ours.model
    ours.generate(prompt_of(28), 4 + 16)
    # The prompt's whole blocks, two in a call; then its tail with the first canvas.
    canvas_calls = [(24, 8, 8)] * 4 + [(24, 8, 8)] + [(32, 8, 8)] * 8 + [(32, 8, 8)]
    canvas_calls += [(40, 8, 8)] * 8
    assert model.calls == [(0, 16, 8), (16, 8, 8), *canvas_calls]
    # Only what is still masked goes to the head.
    assert model.head_rows == [4, 3, 2, 1, *range(8, 0, -1), *range(8, 0, -1)]
    # The last block is committed by the next turn.
    assert ours.cached == 40
    before = len(model.calls)
    ours.generate(prompt_of(3), 1)
    assert model.calls[before:][:2] == [(40, 8, 8), (48, 8, 8)]
    assert ours.cached == 48


def test_a_shift_costs_one_row_and_the_first_block_has_none_before_it() -> None:
    ours = session(canvas_length=4, block_length=8, shift=1)
    ours.generate(prompt_of(3), 9)
    assert set(ours.model.calls) == {(0, 8, 8), (7, 9, 8)}


def test_a_model_that_sees_everything_runs_all_rows_or_those_from_the_canvas_on() -> None:
    for prefix_cache, later in ((0, (0, 21, CONTEXT)), (1, None)):
        ours = session(canvas_length=8, block_length=0, settings={"prefix_cache": prefix_cache,
                       "steps_per_canvas": 4})  # fmt: skip
        ours.generate(prompt_of(5), 16)
        whole = (0, 21, CONTEXT)
        first, second = [later or (5, 16, CONTEXT)] * 3, [later or (13, 8, CONTEXT)] * 3
        assert ours.model.calls == [whole, *first, whole, *second]
        assert ours.model.head_rows == [8, 6, 4, 2] * 2
        assert ours.cached == 0


@pytest.mark.parametrize("steps", [1, 3, 8, 20])
@pytest.mark.parametrize("block", [0, 8])
def test_forced_steps_run_exactly_so_many_whatever_the_threshold_says(
    steps: int, block: int
) -> None:
    ours = session(canvas_length=8, block_length=block, settings={"threshold": 0.0})
    result = ours.generate(prompt_of(8), 16, force_steps=steps)
    assert [len(canvas.steps) for canvas in result.canvases] == [steps, steps]
    for canvas in result.canvases:
        accepted = [step.accepted for step in canvas.steps]
        assert sum(accepted) == 8 and max(accepted) - min(accepted) <= 1
        assert canvas.converged
    unforced = ours.generate([], 8)
    assert len(unforced.steps) == 1  # everything is above a threshold of 0


def test_the_counts_of_steps_are_lladas() -> None:
    for positions in range(1, 20):
        for steps in range(1, 25):
            plain = reference.get_num_transfer_tokens(positions, steps)
            assert split_evenly(positions, steps) == [count for count in plain if count]
            spread = spread_evenly(positions, steps)
            assert len(spread) == steps and sum(spread) == positions and spread[-1] > 0
            assert max(spread) - min(spread) <= 1


# --- what the caller sees and can do ------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 8])
def test_events_show_the_canvas_as_it_fills(block: int) -> None:
    ours, events = session(canvas_length=8, block_length=block), list[Event]()
    result = ours.generate(prompt_of(11), 13, on_event=events.append)
    kinds = [type(event) for event in events if not isinstance(event, PromptEncoded)]
    expected: list[type] = []
    for canvas in result.canvases:
        expected += [CanvasStarted, *[CanvasDenoised] * len(canvas.steps), CanvasCommitted]
    assert kinds == expected
    canvas: np.ndarray = np.array([])
    for event in events:
        if isinstance(event, CanvasStarted):
            canvas = event.tokens
            assert (canvas == MASK_TOKEN).all()
        elif isinstance(event, CanvasDenoised):
            was_masked = canvas == MASK_TOKEN
            # What was decided stays, and costs no entropy; the draft has no masks.
            assert (event.tokens[~was_masked] == canvas[~was_masked]).all()
            assert (event.entropy[~was_masked] == 0).all() and (event.entropy[was_masked] > 0).all()
            assert np.array_equal(event.accepted, event.tokens != MASK_TOKEN)
            assert (event.draft != MASK_TOKEN).all()
            assert (event.draft[event.accepted] == event.tokens[event.accepted]).all()
            assert event.finished == (event.step == event.max_steps)
            canvas = event.tokens
        elif isinstance(event, CanvasCommitted):
            assert (event.tokens == canvas).all()
    encoded = [event for event in events if isinstance(event, PromptEncoded)]
    assert [(event.done, event.total) for event in encoded] == ([(8, 8), (8, 8)] if block else [])
    lengths = [len(canvas.tokens) for canvas in result.canvases]
    assert lengths == ([5, 8] if block else [8, 8])


@pytest.mark.parametrize("block", [0, 8])
def test_generation_ends_after_a_canvas_with_an_end_token_and_pads_behind_it(block: int) -> None:
    plain = session(canvas_length=8, block_length=block).generate(prompt_of(8), 8).tokens
    ended = session(canvas_length=8, block_length=block, special=SpecialTokens((plain[3],), 0))
    result = ended.generate(prompt_of(8), 24) if block else ended.generate(prompt_of(8), 8)
    first = plain.index(plain[3])
    assert result.finish_reason == "eos"
    assert result.tokens == (*plain[: first + 1], *[0] * (7 - first))
    assert result.answer_tokens == plain[:first]


@pytest.mark.parametrize("block", [0, 8])
def test_cancelling_returns_what_was_committed_and_the_session_goes_on(block: int) -> None:
    options: dict[str, Any] = {"canvas_length": 8, "block_length": block}
    events = list[Event]()
    ours, twin = session(6, **options), session(6, **options)
    result = ours.generate(
        prompt_of(6), 18, on_event=events.append,
        cancel=lambda: any(isinstance(event, CanvasCommitted) for event in events),
    )  # fmt: skip
    assert result.finish_reason == "cancelled" and len(result.canvases) == 1
    again = ours.generate([3], 8)
    assert again.tokens == twin.generate([*prompt_of(6), *result.tokens, 3], 8).tokens
    assert not session(6, **options).generate([3], 1, cancel=lambda: True).canvases


@pytest.mark.parametrize("block", [0, 8])
def test_an_exception_leaves_the_session_as_it_was(block: int) -> None:
    ours = session(7, canvas_length=8, block_length=block)
    ours.generate(prompt_of(5), 8)
    ours.truncate(len(ours.tokens) - 2)
    state = ours.tokens, ours.canvases, ours.cached

    def interrupt(event: Event) -> None:
        if isinstance(event, CanvasCommitted) and event.canvas > state[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours.generate(prompt_of(9, seed=1), 16, on_event=interrupt)
    assert (ours.tokens, ours.canvases, ours.cached) == state
    fresh = session(7, canvas_length=8, block_length=block)
    assert ours.generate([4], 8).tokens == fresh.generate([*state[0], 4], 8).tokens


def test_of_a_block_that_is_cut_nothing_stays_cached() -> None:
    ours = session(canvas_length=8, block_length=8)
    ours.generate(prompt_of(16), 8)
    ours.truncate(13)
    assert ours.cached == 8


# --- what is refused ----------------------------------------------------------------------------


def test_the_rest_of_a_block_counts_as_room() -> None:
    ours = session(canvas_length=8, block_length=8)
    assert ours.room(CONTEXT - 3) == 3
    result = ours.generate(prompt_of(CONTEXT - 3), 3)
    assert len(result.tokens) == 3 and ours.room() == 0
    with pytest.raises(InputError, match="the prompt has 1 tokens after 64 of earlier turns"):
        ours.generate([3], 1)
    with pytest.raises(InputError, match="only 3 fit in the context of 64 after 61 tokens"):
        session(canvas_length=8, block_length=8).generate(prompt_of(CONTEXT - 3), 4)


def test_a_model_that_sees_everything_has_room_for_whole_canvases() -> None:
    ours = session(canvas_length=8, block_length=0)
    assert [ours.room(n) for n in (48, 49, 56, 57)] == [16, 8, 8, 0]
    ours.generate(prompt_of(49), 5)
    with pytest.raises(InputError, match="only 8 fit"):
        session(canvas_length=8, block_length=0).generate(prompt_of(49), 9)


REFUSED: dict[str, tuple[Callable[[Session], object], str]] = {
    "an id at the end of the vocabulary": (
        lambda s: s.generate([VOCABULARY], 8),
        f"id {VOCABULARY}",
    ),
    "an empty prompt": (lambda s: s.generate([], 8), "prompt is empty"),
    "no new tokens": (lambda s: s.generate([2], 0), "max_new_tokens is 0"),
    "no steps": (lambda s: s.generate([2], 8, force_steps=0), "force_steps is 0"),
    "a prompt of the whole context": (lambda s: s.generate([2] * 64, 1), "64 tokens.*of 64"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("block", [0, 8])
def test_refused_before_anything_runs(case: str, block: int) -> None:
    act, says = REFUSED[case]
    ours = session(canvas_length=8, block_length=block)
    with pytest.raises(InputError, match=says):
        act(ours)
    assert ours.model.calls == [] and ours.tokens == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps_per_canvas", 0),
        ("steps_per_canvas", 1.5),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("threshold", float("nan")),
        ("order", 3),
        ("prefix_cache", 2),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}"):
        replace(MaskedDiffusionSettings(8), **{name: value})


DECODING: dict[str, tuple[dict[str, Any], str]] = {
    "no mask token": ({"mask_token": None}, "names no mask token"),
    "a canvas that does not divide its block": ({"block_length": 12}, "does not divide"),
    "calls that are too short": ({"prefill_length": 8, "shift": 1}, "a denoising step needs 9"),
    "calls that do not hold the context": (
        {"prefill_length": 32, "block_length": 0},
        "a denoising step needs 64",
    ),
}


@pytest.mark.parametrize("case", DECODING)
def test_lengths_that_do_not_go_together_are_refused(case: str) -> None:
    changes, says = DECODING[case]
    options = {"canvas_length": 8, "block_length": 8} | changes
    with pytest.raises(BundleError, match=says):
        eager_engine(staged(weights(), "masked_diffusion", **options))


def test_settings_of_a_checkpoint_that_cannot_be_are_refused() -> None:
    model = staged(weights(), "masked_diffusion", canvas_length=8, block_length=8,
                   settings={"order": 7})  # fmt: skip
    with pytest.raises(BundleError, match="order is 7"):
        eager_engine(model)


BLOCKS: dict[str, Any] = {"canvas_length": 8, "block_length": 8, "shift": 1, "prefill_length": 24}


@pytest.mark.slow
def test_the_bundle_gives_the_tokens_of_the_eager_model(tmp_path: Path) -> None:
    model = staged(weights(8), "masked_diffusion", special=SPECIAL, **BLOCKS)
    bundle = lowered_bundle(model, tmp_path)
    engine, eager = open_engine(bundle, threads=1), eager_engine(model).session()
    assert engine.threads == 1
    program = engine.session()
    for number, length in enumerate((29, 2, 0)):
        prompt = prompt_of(length, seed=number)
        found, expected = program.generate(prompt, 8), eager.generate(prompt, 8)
        assert found.tokens == expected.tokens
        assert len(found.steps) == len(expected.steps)
    # A manifest whose lengths are not those of the program.
    longer = with_stage(bundle, 0, lambda stage: resized(stage, "tokens", (1, 25)))
    with pytest.raises(BundleError, match=r"layers\.pte has inputs.*bundle.json says"):
        open_engine(longer)


def test_the_stages_are_those_of_the_heads() -> None:
    layers, head = staged(weights(8), "masked_diffusion", **BLOCKS).stages
    assert layers.input_names == MaskedDiffusion.layers_inputs
    assert head.input_names == MaskedDiffusion.head_inputs
    assert head.output_names == MaskedDiffusion.head_outputs
    assert MaskedDiffusionSettings.array_fields() == masked.SETTINGS
