"""The autoregressive loop gives the tokens of plain greedy decoding, and computes each row once.

CPU, tiny random weights; the references recompute the whole text for every token.
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
from msgspec import structs
from torch import Tensor

from export.contract import philox
from export.contract.bundle import Bundle
from export.contract.manifest import SpecialTokens, Stage
from export.contract.styles.autoregressive import Autoregressive, AutoregressiveSettings
from export.host.bundle_engine import open_engine
from export.host.eager import eager_engine, eager_stages
from export.host.generation import CanvasCommitted, CanvasDenoised, Event, PromptEncoded
from export.host.loops.autoregressive import AutoregressiveModel, AutoregressiveSession
from export.models import stage_model
from export.models.staging import StagedModel
from quantize.checkpoint import open_checkpoint
from quantize.errors import BundleError, InputError
from tests.support import dense_checkpoints
from tests.support.clear_choices import assert_clear, greedy, highest
from tests.support.tiny_decoder import (
    CONTEXT,
    VOCABULARY,
    Weights,
    hollow_bundle,
    lowered_bundle,
    plain_logits,
    staged,
)


class Counted(AutoregressiveModel):
    """Notes the calls of the layers: start, rows, block length."""

    def __init__(self, model: StagedModel) -> None:
        super().__init__(eager_stages(model))
        self.calls: list[tuple[int, int, int]] = []
        self.head_rows: list[int] = []

    def layers(self, tokens: np.ndarray, start: int, block_length: int) -> Tensor:
        self.calls.append((start, len(tokens), block_length))
        return super().layers(tokens, start, block_length)

    def head(self, hidden: Tensor, row: int, *rest: Any) -> Any:
        self.head_rows.append(row)
        return super().head(hidden, row, *rest)


@functools.cache
def weights(seed: int = 0) -> Weights:
    return Weights(seed)


def session(
    seed: int = 0, settings: AutoregressiveSettings | None = None, **options: Any
) -> AutoregressiveSession:
    model = staged(weights(seed), "autoregressive", **options)
    return AutoregressiveSession(
        Counted(model), model.special_tokens, settings or AutoregressiveSettings()
    )


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, VOCABULARY, length).tolist()


def plain(
    prompt: list[int], count: int, seed: int = 0, prefix: int = 0,
    draw: Callable[[int, Tensor], int] | None = None,
) -> list[int]:  # fmt: skip
    """Decoding as everyone states it; the first `prefix` tokens see each other (PrefixLM)."""
    tokens = list(prompt)
    for index in range(count):
        visible = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        visible[:prefix, :prefix] = True
        last = plain_logits(weights(seed), torch.tensor(tokens), visible)[-1]
        tokens.append(int(highest(last, 1)) if draw is None else draw(index, last))
    return tokens[len(prompt) :]


# --- token for token --------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_length", [1, 4, 5, 9, 30])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_decoding_gives_the_tokens_of_a_full_recomputation(
    prompt_length: int, seed: int
) -> None:
    ours = session(seed, prefill_length=4)
    prompt = prompt_of(prompt_length)
    assert list(ours.generate(prompt, 20).tokens) == plain(prompt, 20, seed)


@pytest.mark.parametrize("prompt_length", [1, 9])
def test_a_bidirectional_prompt_and_later_turns_give_the_tokens_of_a_full_recomputation(
    prompt_length: int,
) -> None:
    ours, prompt = session(2, bidirectional_prompt=True), prompt_of(prompt_length)
    first = list(ours.generate(prompt, 8).tokens)
    assert first == plain(prompt, 8, 2, prefix=prompt_length)
    second, known = prompt_of(5, seed=1), [*prompt, *first]
    expected = plain([*known, *second], 8, 2, prefix=prompt_length)
    assert list(ours.generate(second, 8).tokens) == expected
    causal = plain(prompt, 8, 2)
    assert prompt_length == 1 or first != causal


def test_random_tokens_are_drawn_by_inverse_cdf_from_the_number_of_their_canvas() -> None:
    def draw(index: int, logits: Tensor) -> int:
        cumulative = torch.softmax(logits.double() / 0.8, -1).cumsum(-1)
        uniform = float(philox.uniforms(11, index, 1, 1)[0])
        assert_clear((cumulative - uniform).abs())
        return int((cumulative <= uniform).sum())

    ours = session(3, AutoregressiveSettings(temperature=0.8))
    found = list(ours.generate(prompt_of(6), 24, seed=11).tokens)
    assert found == plain(prompt_of(6), 24, 3, draw=draw) != plain(prompt_of(6), 24, 3)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen2", "llama"])
def test_checkpoints_give_the_tokens_of_transformers_generate(
    model_type: str, tmp_path: Path
) -> None:
    reference = dense_checkpoints.write(tmp_path / "hf", model_type)
    ours = eager_engine(stage_model(open_checkpoint(tmp_path / "hf"), maximum_context=96)).session()
    prompt = torch.randint(0, 80, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = greedy(
        reference, prompt, 32, attention_mask=torch.ones_like(prompt), eos_token_id=[-1],
        pad_token_id=0,
    )  # fmt: skip
    found = ours.generate(prompt[0].tolist(), 32, force_steps=1)
    assert list(found.tokens) == expected


# --- what is computed ---------------------------------------------------------------------------


def test_the_prompt_is_encoded_in_chunks_and_no_row_is_computed_twice() -> None:
    ours = session(prefill_length=4)
    ours.generate(prompt_of(10), 3)
    assert ours.model.calls == [(0, 4, 1), (4, 4, 1), (8, 1, 1), (9, 1, 1), (10, 1, 1), (11, 1, 1)]
    assert ours.cached == 12 and len(ours.tokens) == 13
    # The last token and the next prompt but its last one.
    ours.generate(prompt_of(3), 1)
    assert ours.model.calls[6:] == [(12, 3, 1), (15, 1, 1)]
    assert ours.model.head_rows == [0] * 4


def test_a_bidirectional_prompt_is_one_call_whose_last_row_gives_the_first_token() -> None:
    ours = session(bidirectional_prompt=True)
    result = ours.generate(prompt_of(10), 3)
    assert ours.model.calls == [(0, 10, CONTEXT), (10, 1, 1), (11, 1, 1)]
    assert ours.model.head_rows == [9, 0, 0]
    assert [step.layers_ms > 0 for step in result.steps] == [False, True, True]


def test_a_bidirectional_prompt_that_is_cut_is_encoded_again() -> None:
    ours = session(2, bidirectional_prompt=True)
    ours.generate(prompt_of(10), 2)
    ours.truncate(7)
    assert ours.cached == 0
    expected = plain([*prompt_of(10)[:7], 5], 4, 2, prefix=8)
    assert list(ours.generate([5], 4).tokens) == expected


# --- what the caller sees and can do ------------------------------------------------------------


def test_events_tell_of_every_token() -> None:
    events: list[Event] = []
    result = session(prefill_length=4).generate(prompt_of(7), 2, on_event=events.append)
    kinds = [type(event) for event in events]
    assert kinds == [PromptEncoded] * 2 + [CanvasDenoised, CanvasCommitted] * 2
    encoded = [event for event in events if isinstance(event, PromptEncoded)]
    assert [(event.done, event.total) for event in encoded] == [(4, 6), (6, 6)]
    for token, event in zip(result.tokens, events[2::2], strict=True):
        assert isinstance(event, CanvasDenoised)
        assert (event.step, event.max_steps, event.finished) == (1, 1, True)
        assert event.tokens.tolist() == event.draft.tolist() == [token]
        assert event.accepted.tolist() == [True] and event.entropy[0] > 0
    committed = [event for event in events if isinstance(event, CanvasCommitted)]
    assert [event.is_last for event in committed] == [False, True]
    assert result.prompt_ms > 0 and result.encode_ms == 0
    assert result.tokens_per_forward == 1


def test_an_end_token_ends_the_text_unless_steps_are_forced() -> None:
    tokens = session(1).generate(prompt_of(6), 12).tokens
    special = SpecialTokens(eos=(tokens[4],), pad=0)
    ended = session(1, special=special).generate(prompt_of(6), 12)
    first = tokens.index(tokens[4])
    assert ended.finish_reason == "eos"
    assert ended.tokens == tokens[: first + 1] and ended.answer_tokens == tokens[:first]
    forced = session(1, special=special).generate(prompt_of(6), 12, force_steps=1)
    assert forced.finish_reason == "length" and forced.tokens == tokens


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("after", range(7))
def test_cancelling_before_any_run_returns_what_was_committed(
    bidirectional: bool, after: int
) -> None:
    ours = session(2, bidirectional_prompt=bidirectional)
    asked = iter(range(100))
    result = ours.generate(prompt_of(6), 9, cancel=lambda: next(asked) >= after)
    assert result.finish_reason == "cancelled"
    expected = plain(prompt_of(6), 9, 2, prefix=6 if bidirectional else 0)
    done = len(result.tokens)
    assert list(result.tokens) == expected[:done]
    assert list(ours.generate([], 9 - done).tokens) == expected[done:]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_exception_leaves_the_session_as_it_was(bidirectional: bool) -> None:
    ours = session(2, bidirectional_prompt=bidirectional)

    def interrupt(event: Event) -> None:
        if isinstance(event, CanvasCommitted):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours.generate(prompt_of(6), 3, on_event=interrupt)
    assert (ours.tokens, ours.canvases, ours.cached) == ((), 0, 0)
    first = list(ours.generate(prompt_of(6), 3).tokens)
    state = ours.tokens, ours.canvases
    with pytest.raises(KeyboardInterrupt):
        ours.generate(prompt_of(5), 3, on_event=interrupt)
    assert (ours.tokens, ours.canvases) == state
    # What was encoded meanwhile of the tokens that stay is right and is kept.
    assert ours.cached == len(ours.tokens)
    known = [*prompt_of(6), *first, 7]
    expected = plain(known, 3, 2, prefix=6 if bidirectional else 0)
    assert list(ours.generate([7], 3).tokens) == expected


# --- what is refused ----------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[AutoregressiveSession], object], str]] = {
    "an id at the end of the vocabulary": (
        lambda s: s.generate([VOCABULARY], 1),
        f"id {VOCABULARY}",
    ),
    "an empty prompt": (lambda s: s.generate([], 1), "prompt is empty"),
    "no new tokens": (lambda s: s.generate([2], 0), "max_new_tokens is 0"),
    "a prompt of the whole context": (lambda s: s.generate([2] * 64, 1), "64 tokens.*of 64"),
    "more new tokens than fit": (lambda s: s.generate([2] * 60, 5), "only 4 fit"),
    "no steps": (lambda s: s.generate([2], 1, force_steps=0), "force_steps is 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_runs(case: str) -> None:
    act, says = REFUSED[case]
    ours = session()
    with pytest.raises(InputError, match=says):
        act(ours)
    assert ours.model.calls == [] and ours.tokens == ()


def test_a_bidirectional_prompt_longer_than_a_call_is_refused_and_a_later_turn_is_not() -> None:
    ours = session(bidirectional_prompt=True, prefill_length=8)
    with pytest.raises(InputError, match=r"the prompt has 9 tokens.*at most 8 of the first turn"):
        ours.generate(prompt_of(9), 1)
    assert ours.tokens == ()
    ours.generate(prompt_of(8), 1)
    ours.generate(prompt_of(20), 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("temperature", float("inf")), ("top_p", 0.0), ("top_p", 1.5),
     ("top_k", -1), ("top_k", 0.5)],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}"):
        replace(AutoregressiveSettings(), **{name: value})


def test_lengths_that_do_not_go_together_are_refused() -> None:
    for options, says in (
        ({"canvas_length": 2}, "a canvas of 2 tokens, expected 1"),
        ({"shift": 0}, "a token shift of 0, expected 1"),
    ):
        with pytest.raises(BundleError, match=says):
            eager_engine(staged(weights(), "autoregressive", **options))


# --- ExecuTorch ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bundle_gives_the_tokens_of_a_full_recomputation(tmp_path: Path) -> None:
    bundle = lowered_bundle(
        staged(weights(), "autoregressive", prefill_length=8, bidirectional_prompt=True), tmp_path
    )
    found = open_engine(bundle, threads=1).session().generate(prompt_of(7), 20)
    assert list(found.tokens) == plain(prompt_of(7), 20, prefix=7)


def test_the_stages_are_those_of_the_heads(tmp_path: Path) -> None:
    model = staged(weights(), "autoregressive")
    assert model.stages[0].input_names == Autoregressive.layers_inputs
    assert model.stages[1].input_names == Autoregressive.head_inputs
    assert model.stages[1].output_names == Autoregressive.head_outputs
    bundle: Bundle = hollow_bundle(model, tmp_path)
    layers, head = bundle.manifest.stages
    other: Stage = structs.replace(head, outputs=head.outputs[:-1])
    manifest = structs.replace(bundle.manifest, stages=(layers, other))
    with pytest.raises(BundleError, match="does not understand"):
        open_engine(structs.replace(bundle, manifest=manifest))
