"""How good a model is at puzzles with one answer: exact match, and mean denoising loss.

The same measurement for any model that the host's loop can run (fp32, int4, a bundle), on the same
puzzles, noise and random numbers, so that what differs is the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from export.contract.manifest import ModelInfo
from export.host.engine import Engine
from export.host.puzzles import Puzzle, is_exact
from export.host.session import Session
from export.host.tokenizer import TextTokenizer
from quantize.errors import InputError

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Tally:
    """Results on the puzzles of one kind (or all).

    `loss` is the mean denoising loss in nats a token: minus the log probability, at temperature 1
    and without self-conditioning, of the right canvas from one that was corrupted at a noise level
    drawn uniformly, averaged over positions and puzzles; None for styles other than uniform
    diffusion, whose noise is another.
    """

    kind: str
    correct: int
    count: int
    loss: float | None
    mean_steps: float

    @property
    def exact_match(self) -> float:
        """Share of puzzles whose answer was exactly right."""
        return self.correct / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `exact_match`. Raises ValueError for a share that cannot be."""
        from scipy.stats import binomtest  # here: it takes a second, which a run need not

        low, high = binomtest(self.correct, self.count).proportion_ci(method="wilson")
        return float(low), float(high)


def evaluate(
    engine: Engine,
    tokenizer: TextTokenizer,
    puzzles: Sequence[Puzzle],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Tally]:
    """Solve every puzzle and score its right answer; a Tally per kind, then one for `all`.

    Puzzle number n is answered as if it were alone, with seed + n, and corrupted by noise of its
    own, the same for every model; each may take as many tokens as the longest answer does. Raises
    InputError for an answer that is longer than a canvas, and what `generate` raises.
    """
    max_new_tokens = room_for_answers(puzzles, tokenizer, engine.info)
    by_kind: dict[str, list[tuple[bool, float | None, int]]] = {}
    for number, puzzle in enumerate(puzzles):
        if progress is not None:
            progress(number, len(puzzles), puzzle.kind)
        prompt = tokenizer.encode_prompt(puzzle.prompt)
        session = engine.session()
        target = target_canvas(session, tokenizer, puzzle)
        result = session.generate(prompt, max_new_tokens, seed + number)
        is_right = is_exact(puzzle, tokenizer.decode(result.answer_tokens))
        loss = session.denoising_loss(prompt, target, seed + number)
        by_kind.setdefault(puzzle.kind, []).append((is_right, loss, len(result.steps)))
    tallies = [_tally(kind, rows) for kind, rows in sorted(by_kind.items())]
    every = [row for rows in by_kind.values() for row in rows]
    return [*tallies, _tally("all", every)] if every else []


def room_for_answers(puzzles: Sequence[Puzzle], tokenizer: TextTokenizer, info: ModelInfo) -> int:
    """New tokens, in whole canvases, that hold the longest answer and its end token.

    Every puzzle gets as many, so that none is told the length of its answer. Raises InputError for
    a text that the tokenizer cannot encode, and for a puzzle that does not fit in the context.
    """
    size = info.canvas_length
    longest = max((len(tokenizer.encode(puzzle.answer)) for puzzle in puzzles), default=0) + 1
    new_tokens = -(-longest // size) * size
    for puzzle in puzzles:
        prompt = len(tokenizer.encode_prompt(puzzle.prompt))
        if prompt + new_tokens > info.maximum_context:
            raise InputError(
                f"the puzzle {puzzle.prompt!r} has {prompt} tokens and its answer needs up to "
                f"{new_tokens}, the context holds {info.maximum_context}; export with a larger "
                "--context"
            )
    return new_tokens


def _tally(kind: str, rows: Sequence[tuple[bool, float | None, int]]) -> Tally:
    right, losses, steps = zip(*rows, strict=True)
    loss = None if None in losses else float(np.mean(losses))
    return Tally(kind, sum(right), len(rows), loss, float(np.mean(steps)))


def target_canvas(session: Session, tokenizer: TextTokenizer, puzzle: Puzzle) -> np.ndarray:
    """What answers a puzzle, int64: answer, the turn's end token, padding to whole canvases.

    Uniform diffusion has one canvas for it, the others as many as it takes.
    """
    special, answer = session.special_tokens, tokenizer.encode(puzzle.answer)
    size = session.target_length(len(answer) + 1)
    if not special.eos or special.pad is None or len(answer) + 1 > size:
        raise InputError(
            f"the answer {puzzle.answer!r} has {len(answer)} tokens; scoring needs an end token, "
            f"a padding token and a canvas that holds all of it, and this one has {size} positions"
        )
    canvas = np.full(size, special.pad, dtype=np.int64)
    # A chat model ends its turn with the last of its end tokens; the first ends a document.
    canvas[: len(answer) + 1] = [*answer, special.eos[-1]]
    return canvas
