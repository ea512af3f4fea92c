"""Measuring a model on puzzles counts what is right, and the same noise meets every model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from export.contract.manifest import ModelInfo, SpecialTokens
from export.contract.styles.uniform_diffusion import UniformDiffusionSettings
from export.host.engine import Engine
from export.host.evaluation import Tally, evaluate, target_canvas
from export.host.loops.uniform_diffusion import HeadOutput, UniformDiffusionSession, corrupt
from export.host.puzzles import Puzzle, generate
from export.host.tokenizer import TextTokenizer
from quantize.errors import InputError

DEMO = Path(__file__).parents[3] / "scripts" / "demo_model"
INFO = ModelInfo("fake", "fake", 64, 4, 20, 120)
SPECIAL = SpecialTokens(eos=(1, 5), pad=0, bos=2)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(
        DEMO / "tokenizer.json",
        64,
        chat_template="{{ messages[0].content }}",
        special_tokens=SPECIAL,
    )


class Oracle:
    """Answers each prompt as `answers` says; the canvases it was asked to score are kept."""

    def __init__(self, answers: dict[tuple[int, ...], np.ndarray]) -> None:
        self.info = INFO
        self.answers = answers
        self.context: dict[int, int] = {}
        self.scored: list[np.ndarray] = []

    def zero_signal(self) -> None:
        return None

    def layers(self, tokens: np.ndarray, start: int, denoise: bool, signal: None) -> np.ndarray:
        if denoise:
            return self.answers[tuple(self.context[i] for i in range(start))]
        self.context |= {start + i: int(token) for i, token in enumerate(tokens)}
        return tokens

    def head(self, hidden: np.ndarray, canvas: np.ndarray, *rest: Any) -> HeadOutput:
        targets = rest[-1]
        if targets.any():
            self.scored.append(canvas)
        return HeadOutput(
            next_canvas=hidden,
            argmax=hidden,
            entropy=np.zeros(20, dtype=np.float32),
            accepted=np.ones(20, dtype=bool),
            stable_steps=1,
            finished=True,
            target_log_prob=np.where(targets == hidden, -0.5, -2.5).astype(np.float32),
            signal=None,
        )


def engine_of(oracle: Oracle) -> Engine:
    settings = UniformDiffusionSettings(max_steps=1)
    return Engine(UniformDiffusionSession, oracle, SPECIAL, settings)


def engine_that_answers(tokenizer: TextTokenizer, puzzles: list[Puzzle], wrong: set[str]) -> Engine:
    engine = engine_of(Oracle({}))
    for puzzle in puzzles:
        canvas = target_canvas(engine.session(), tokenizer, puzzle)
        if puzzle.kind in wrong:
            canvas[0] = tokenizer.encode("9" if puzzle.answer[0] != "9" else "8")[0]
        engine.model.answers[tuple(tokenizer.encode_prompt(puzzle.prompt))] = canvas
    return engine


def test_right_and_wrong_answers_are_counted_by_kind(tokenizer: TextTokenizer) -> None:
    puzzles = [p for kind in ("add", "sort") for p in generate(kind, 5, 0, "held_out")]
    engine = engine_that_answers(tokenizer, puzzles, wrong={"sort"})
    add, sort, every = evaluate(engine, tokenizer, puzzles)
    assert (add.kind, add.correct, add.count, add.exact_match) == ("add", 5, 5, 1.0)
    assert (sort.kind, sort.correct, sort.count) == ("sort", 0, 5)
    assert (every.kind, every.correct, every.count) == ("all", 5, 10)
    # The oracle gives 0.5 nats for its own tokens and 2.5 for the one of twenty it has wrong.
    assert add.loss == pytest.approx(0.5) and sort.loss == pytest.approx(0.6)
    assert every.loss == pytest.approx(0.55) and every.mean_steps == 1


def test_every_model_is_scored_on_the_same_corrupted_canvases(tokenizer: TextTokenizer) -> None:
    puzzles = generate("add", 4, 0, "held_out")
    seen = []
    for wrong in (set(), {"add"}):
        engine = engine_that_answers(tokenizer, puzzles, wrong)
        evaluate(engine, tokenizer, puzzles, seed=9)
        seen.append(np.stack(engine.model.scored))
    assert seen[0].shape == (4, 20) and np.array_equal(*seen)


def test_the_target_canvas_is_the_answer_its_end_and_padding(tokenizer: TextTokenizer) -> None:
    session = engine_of(Oracle({})).session()
    canvas = target_canvas(session, tokenizer, Puzzle("add", "add 1+1", "00002"))
    assert tokenizer.decode(canvas[:5]) == "00002"
    assert canvas[5:].tolist() == [5] + [0] * 14
    with pytest.raises(InputError, match="20 positions"):
        target_canvas(session, tokenizer, Puzzle("add", "add 1+1", "0" * 20))


def test_corruption_has_every_level_and_only_tokens_of_the_vocabulary() -> None:
    clean = np.full(1000, 63)
    shares = []
    for seed in range(300):
        noisy = corrupt(clean, 64, seed)
        assert noisy.min() >= 0 and noisy.max() < 64
        shares.append((noisy != clean).mean())
    # A replaced token is the same by chance once in 64; 1000 tokens blur the level by 1.6 %.
    assert stats.kstest(np.array(shares) * 64 / 63, "uniform").pvalue > 1e-3
    assert np.array_equal(corrupt(clean, 64, 7), corrupt(clean, 64, 7))


@pytest.mark.parametrize(("correct", "count"), [(0, 10), (10, 10), (97, 100), (1, 1)])
def test_the_interval_is_wilsons(correct: int, count: int) -> None:
    """Its ends are the shares that the one seen is 1.96 standard deviations away from."""
    tally = Tally("add", correct, count, None, 1.0)
    low, high = tally.interval
    assert 0 <= low <= tally.exact_match <= high <= 1 and low < high
    for end in (low, high):
        deviations = 1.959964 * (end * (1 - end) / count) ** 0.5
        assert abs(tally.exact_match - end) == pytest.approx(deviations, abs=1e-6)


@pytest.mark.parametrize(("correct", "count"), [(1, 0), (-1, 3), (4, 3)])
def test_a_share_that_cannot_be_has_no_interval(correct: int, count: int) -> None:
    with pytest.raises(ValueError):
        _ = Tally("add", correct, count, None, 1.0).interval
