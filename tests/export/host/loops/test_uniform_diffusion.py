"""The host loop does what transformers' generate() does, in PyTorch and in ExecuTorch alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs

from export.contract import philox
from export.contract.styles.uniform_diffusion import UniformDiffusionSettings
from export.host.generation import (
    CanvasCommitted,
    CanvasDenoised,
    CanvasStarted,
    Event,
    PromptEncoded,
)
from export.host.loops.uniform_diffusion import HeadOutput, UniformDiffusionSession, score
from quantize.errors import InputError
from tests.support import toy_model
from tests.support.toy_model import INFO, SPECIAL

T = INFO.canvas_length
SETTINGS = UniformDiffusionSettings(**toy_model.SETTINGS)
PROMPT = [2, 5, 6, 7, 8, 9, 10, 3]


def eager_session(**settings: Any) -> UniformDiffusionSession:
    model = toy_model.eager_model(toy_model.ToyLayers(), toy_model.ToyHead(), INFO)
    return UniformDiffusionSession(model, SPECIAL, replace(SETTINGS, **settings))


class ScriptedModel:
    """A model without weights: its argmax canvases are given, and it notes how it is called."""

    def __init__(self, canvases: list[list[int]], steps_until_finished: int = 1) -> None:
        self.info = INFO
        self.canvases = canvases
        self.steps_until_finished = steps_until_finished
        self.layer_calls: list[tuple[list[int], int, bool, str]] = []
        self.head_calls: list[dict[str, Any]] = []
        self.drawn = 0

    def zero_signal(self) -> str:
        return "zero"

    def layers(self, tokens: np.ndarray, start: int, denoise: bool, signal: str) -> int:
        self.layer_calls.append((tokens.tolist(), start, denoise, signal))
        return len(self.layer_calls)

    def head(self, hidden: int, canvas: np.ndarray, previous_argmax: np.ndarray,
             stable_steps: int, step: int, settings: np.ndarray, uniform: np.ndarray,
             random_tokens: np.ndarray, targets: np.ndarray) -> HeadOutput:  # fmt: skip
        self.head_calls.append(
            {"canvas": canvas, "previous": previous_argmax, "stable": stable_steps, "step": step,
             "settings": settings, "uniform": uniform, "random_tokens": random_tokens}
        )  # fmt: skip
        self.drawn += 1
        is_finished = self.drawn % self.steps_until_finished == 0
        argmax = np.array(self.canvases[(self.drawn - 1) // self.steps_until_finished])
        return HeadOutput(
            next_canvas=random_tokens,
            argmax=argmax,
            entropy=np.full(T, 0.25, dtype=np.float32),
            accepted=np.arange(T) < 2,
            stable_steps=self.drawn,
            finished=is_finished,
            target_log_prob=np.zeros(T, dtype=np.float32),
            signal=f"signal {self.drawn}",
        )

    @property
    def encoded(self) -> list[tuple[list[int], int]]:
        return [(tokens, start) for tokens, start, denoise, _ in self.layer_calls if not denoise]


class Clock:
    """A clock on which a millisecond passes whenever it is read."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.pass_(0.001)
        return self.now_s

    def pass_(self, seconds: float) -> None:
        self.now_s += seconds


def canvas_of(*tokens: int) -> list[int]:
    return [*tokens, *[9] * (T - len(tokens))]


# --- what is encoded, drawn and committed, and when --------------------------------------------


def test_the_prompt_is_encoded_in_chunks_and_every_canvas_but_the_last() -> None:
    model = ScriptedModel([canvas_of(4), canvas_of(5), canvas_of(6)])
    session = UniformDiffusionSession(model, SPECIAL, SETTINGS)
    result = session.generate(PROMPT, 3 * T)
    assert model.encoded == [
        (PROMPT[:6], 0),
        ([*PROMPT[6:], 0, 0, 0, 0], 6),
        (canvas_of(4), 8),
        (canvas_of(5), 8 + T),
    ]
    assert result.tokens == (*canvas_of(4), *canvas_of(5), *canvas_of(6))
    assert session.tokens == (*PROMPT, *result.tokens)
    assert session.cached == len(PROMPT) + 2 * T
    assert [start for _, start, denoise, _ in model.layer_calls if denoise] == [8, 14, 20]


def test_the_next_turn_encodes_the_last_canvas_together_with_its_prompt() -> None:
    model = ScriptedModel([canvas_of(4), canvas_of(5, 1), canvas_of(6)])
    session = UniformDiffusionSession(model, SPECIAL, SETTINGS)
    session.generate(PROMPT, 2 * T)
    before = len(model.encoded)
    session.generate([20, 21], T)
    last_canvas = [5, 1, *[SPECIAL.pad] * (T - 2)]
    assert model.encoded[before:] == [(last_canvas, 14), ([20, 21, 0, 0, 0, 0], 20)]
    assert session.tokens == (*PROMPT, *canvas_of(4), *last_canvas, 20, 21, *canvas_of(6))


def test_padding_can_be_dropped_before_the_next_turn() -> None:
    model = ScriptedModel([canvas_of(5, 1), canvas_of(6)])
    session = UniformDiffusionSession(model, SPECIAL, SETTINGS)
    session.generate(PROMPT, T)
    session.truncate(len(PROMPT) + 2)
    before = len(model.encoded)
    session.generate([20], T)
    assert model.encoded[before:] == [([5, 1, 20, 0, 0, 0], 8)]


def test_generation_ends_after_a_canvas_with_an_end_token_and_pads_behind_it() -> None:
    model = ScriptedModel([canvas_of(4), [7, 1, 8, 1, 8, 8], canvas_of(6)])
    result = UniformDiffusionSession(model, SPECIAL, SETTINGS).generate(PROMPT, 3 * T)
    assert result.finish_reason == "eos"
    assert result.canvases[1].tokens == (7, 1, 0, 0, 0, 0)
    assert result.answer_tokens == (*canvas_of(4), 7)
    # As transformers counts: the end token, but no padding, by the denoising steps.
    assert result.new_tokens == T + 2
    assert result.tokens_per_forward == (T + 2) / 2


def test_without_a_padding_token_what_follows_the_end_stays() -> None:
    model = ScriptedModel([[7, 1, 8, 1, 8, 8]])
    session = UniformDiffusionSession(model, structs.replace(SPECIAL, pad=None), SETTINGS)
    assert session.generate(PROMPT, 2 * T).tokens == (7, 1, 8, 1, 8, 8)


def test_any_of_several_end_tokens_ends() -> None:
    model = ScriptedModel([canvas_of(7, 22)])
    session = UniformDiffusionSession(model, structs.replace(SPECIAL, eos=(1, 22)), SETTINGS)
    assert session.generate(PROMPT, 2 * T).answer_tokens == (7,)


def test_new_tokens_are_rounded_up_to_whole_canvases() -> None:
    model = ScriptedModel([canvas_of(4), canvas_of(5), canvas_of(6)])
    result = UniformDiffusionSession(model, SPECIAL, SETTINGS).generate(PROMPT, T + 1)
    assert len(result.tokens) == 2 * T
    assert result.finish_reason == "length"


def test_steps_count_down_and_the_random_numbers_are_those_of_the_contract() -> None:
    model = ScriptedModel([canvas_of(4)] * 2, steps_until_finished=3)
    session = UniformDiffusionSession(model, SPECIAL, SETTINGS)
    session.generate(PROMPT, 2 * T, seed=77)
    assert [call["step"] for call in model.head_calls] == [5, 4, 3, 5, 4, 3]
    vocabulary = INFO.vocabulary_size
    for number, call in enumerate(model.head_calls):
        canvas, step = divmod(number, 3)
        at = (77, canvas, step + 1, T)
        assert np.array_equal(call["uniform"], philox.uniforms(*at))
        assert np.array_equal(call["random_tokens"], philox.random_tokens(*at, vocabulary))
    first, second, third = model.head_calls[:3]
    assert np.array_equal(first["canvas"], philox.random_tokens(77, 0, 0, T, vocabulary))
    assert np.array_equal(second["canvas"], first["random_tokens"])
    assert first["previous"].tolist() == [-1] * T and third["previous"].tolist() == canvas_of(4)
    assert [call["stable"] for call in model.head_calls[:3]] == [0, 1, 2]
    assert first["settings"] == pytest.approx([5, 0.4, 0.8, 0.5, 1, 0.005])


def test_self_conditioning_starts_from_zero_on_every_canvas_and_never_reaches_encoding() -> None:
    model = ScriptedModel([canvas_of(4)] * 2, steps_until_finished=2)
    UniformDiffusionSession(model, SPECIAL, SETTINGS).generate(PROMPT, 2 * T)
    denoising = [signal for _, _, denoise, signal in model.layer_calls if denoise]
    assert denoising == ["zero", "signal 1", "zero", "signal 3"]
    assert {signal for _, _, denoise, signal in model.layer_calls if not denoise} == {"zero"}


def test_the_canvas_index_goes_on_over_turns_so_no_random_number_is_used_twice() -> None:
    model = ScriptedModel([canvas_of(4)] * 3)
    session = UniformDiffusionSession(model, SPECIAL, SETTINGS)
    session.generate(PROMPT, 2 * T, seed=5)
    session.generate([3], T, seed=5)
    assert np.array_equal(model.head_calls[2]["uniform"], philox.uniforms(5, 2, 1, T))


def test_a_canvas_that_never_finishes_is_committed_after_the_last_step() -> None:
    model = ScriptedModel([canvas_of(4)], steps_until_finished=1000)
    result = UniformDiffusionSession(model, SPECIAL, SETTINGS).generate(PROMPT, T)
    assert len(result.canvases[0].steps) == SETTINGS.max_steps
    assert not result.canvases[0].converged


def test_forced_steps_run_exactly_so_many_whatever_the_stop_test_says() -> None:
    model = ScriptedModel([canvas_of(4)] * 7, steps_until_finished=1)
    session = UniformDiffusionSession(model, SPECIAL, SETTINGS)
    result = session.generate(PROMPT, T, force_steps=7)
    assert len(result.steps) == 7
    assert [call["step"] for call in model.head_calls] == [7, 6, 5, 4, 3, 2, 1]
    assert model.head_calls[0]["settings"][0] == 7


# --- what the caller sees and can do -----------------------------------------------------------


def test_events_tell_the_whole_story_in_order() -> None:
    events: list[Event] = []
    result = eager_session().generate(PROMPT, 2 * T, seed=3, on_event=events.append)
    kinds = [type(event) for event in events]
    counts = [len(canvas.steps) for canvas in result.canvases]
    assert kinds == [
        PromptEncoded,
        PromptEncoded,
        CanvasStarted,
        *[CanvasDenoised] * counts[0],
        CanvasCommitted,
        PromptEncoded,
        CanvasStarted,
        *[CanvasDenoised] * counts[1],
        CanvasCommitted,
    ]
    committed = [event for event in events if isinstance(event, CanvasCommitted)]
    assert [tuple(event.tokens.tolist()) for event in committed] == [
        canvas.tokens for canvas in result.canvases
    ]
    assert [event.is_last for event in committed] == [False, True]
    denoised = [event for event in events if isinstance(event, CanvasDenoised)]
    assert [int(event.accepted.sum()) for event in denoised] == [s.accepted for s in result.steps]


def test_times_are_ordered_and_leave_out_what_the_watcher_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr("export.host.session.perf_counter", clock)
    result = eager_session().generate(PROMPT, 2 * T, seed=3, on_event=lambda event: clock.pass_(60))
    assert 0 < result.prompt_ms < result.first_draft_ms <= result.first_commit_ms
    assert result.first_commit_ms < result.total_ms
    # At least eight events took a minute each; none of it may count.
    work_ms = sum(step.ms for step in result.steps) + result.prompt_ms + result.encode_ms
    assert result.encode_ms > 0 and work_ms < result.total_ms < 1000
    assert result.tokens_per_second == pytest.approx(1000 * result.new_tokens / result.total_ms)
    assert result.peak_rss_bytes > 10 * 2**20


def test_cancelling_returns_what_was_committed_and_the_session_goes_on() -> None:
    session, twin = eager_session(), eager_session()
    committed: list[CanvasCommitted] = []

    def watch(event: Event) -> None:
        if isinstance(event, CanvasCommitted):
            committed.append(event)

    result = session.generate(
        PROMPT, 3 * T, seed=3, on_event=watch, cancel=lambda: len(committed) == 1
    )
    whole = twin.generate(PROMPT, 2 * T, seed=3)
    assert result.finish_reason == "cancelled"
    assert result.canvases[0].tokens == whole.canvases[0].tokens and len(result.canvases) == 1
    assert session.generate([], T, seed=3).canvases[0].tokens == whole.canvases[1].tokens


def test_an_exception_leaves_the_session_as_it_was() -> None:
    session = eager_session()
    session.generate(PROMPT, T, seed=3)
    state = session.tokens, session.canvases

    def interrupt(event: Event) -> None:
        if isinstance(event, CanvasDenoised):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.generate([4, 5], T, seed=3, on_event=interrupt)
    assert (session.tokens, session.canvases) == state
    twin = eager_session()
    twin.generate(PROMPT, T, seed=3)
    assert session.generate([4, 5], T, seed=3).tokens == twin.generate([4, 5], T, seed=3).tokens


def test_two_turns_over_the_cache_equal_one_turn_that_is_given_everything() -> None:
    session = eager_session()
    session.generate(PROMPT, T, seed=3)
    second = session.generate([4, 5], T, seed=3)
    fresh = eager_session()
    fresh.append_canvas(np.array([], dtype=np.int64))  # both draw the same random numbers
    everything = [*session.tokens[: -T - 2], 4, 5]
    assert fresh.generate(everything, T, seed=3).tokens == second.tokens


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    first, again, other = (
        eager_session(confidence_threshold=0).generate(PROMPT, 2 * T, seed=s).tokens
        for s in (3, 3, 4)
    )
    assert first == again != other


# --- what is refused, before anything runs -----------------------------------------------------

REFUSED: dict[str, tuple[Callable[[UniformDiffusionSession], object], str]] = {
    "an id at the end of the vocabulary": (
        lambda s: s.generate([2, 29], T),
        "token 1 of the prompt has id 29, the vocabulary ends at 28",
    ),
    "a negative id": (lambda s: s.generate([-1], T), "id -1"),
    "an empty prompt": (lambda s: s.generate([], T), "prompt is empty"),
    "a prompt that leaves no room for a canvas": (
        lambda s: s.generate([3] * 35, T),
        "35 tokens.*context of 40",
    ),
    "more new tokens than fit": (lambda s: s.generate(PROMPT, 5 * T + 1), "only 30 fit"),
    "no new tokens": (lambda s: s.generate(PROMPT, 0), "max_new_tokens is 0"),
    "a negative seed": (lambda s: s.generate(PROMPT, T, seed=-1), "seed is -1"),
    "a seed over 64 bits": (lambda s: s.generate(PROMPT, T, seed=1 << 64), "seed"),
    "no steps": (lambda s: s.generate(PROMPT, T, force_steps=0), "max_steps is 0"),
    "more than there is to forget": (lambda s: s.truncate(1), "cannot keep 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_runs(case: str) -> None:
    act, says = REFUSED[case]
    model = ScriptedModel([canvas_of(4)])
    session = UniformDiffusionSession(model, SPECIAL, SETTINGS)
    with pytest.raises(InputError, match=says):
        act(session)
    assert model.layer_calls == [] and session.tokens == ()


def test_a_prompt_that_just_fits_runs_and_one_token_more_does_not() -> None:
    model = ScriptedModel([canvas_of(4)])
    UniformDiffusionSession(model, SPECIAL, SETTINGS).generate([3] * 34, T)
    assert max(start for _, start, _, _ in model.layer_calls) + T == INFO.maximum_context
    # The padded chunks stay inside of the cache as well.
    assert all(start + T <= INFO.maximum_context for _, start, _, _ in model.layer_calls)


def test_the_context_is_counted_over_turns() -> None:
    session = eager_session()
    session.generate(PROMPT, 4 * T)
    with pytest.raises(InputError, match="after 32 of earlier turns"):
        session.generate([3, 3, 3], T)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0),
        ("max_steps", 2.5),
        ("t_min", -0.1),
        ("t_max", 0.3),
        ("t_max", float("inf")),
        ("t_min", float("nan")),
        ("entropy_bound", -1),
        ("stability_threshold", -1),
        ("confidence_threshold", float("nan")),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}"):
        replace(SETTINGS, **{name: value})


# --- scoring -----------------------------------------------------------------------------------


def test_scoring_gives_the_log_softmax_of_the_uncorrupted_tokens_at_temperature_one() -> None:
    layers, head = toy_model.ToyLayers(), toy_model.ToyHead()
    noisy, targets = [4, 9, 13, 22, 7, 5], [4, 8, 13, 21, 7, 5]
    found = score(toy_model.eager_model(layers, head, INFO), PROMPT, noisy, targets)
    zero = torch.zeros(1, T, INFO.hidden_size)
    hidden = layers(torch.tensor([noisy]), torch.tensor([8]), torch.tensor([1]), zero)
    expected = torch.log_softmax(2.0 * hidden[0] @ head.table.t(), dim=-1)
    expected = expected[torch.arange(T), torch.tensor(targets)]
    # Two ways to round the same fp32 arithmetic.
    assert np.allclose(found, expected.numpy(), atol=1e-5)


def test_scoring_refuses_a_canvas_of_another_length() -> None:
    with pytest.raises(InputError, match="give 6 tokens each"):
        score(ScriptedModel([]), PROMPT, [1, 2], [1, 2])
