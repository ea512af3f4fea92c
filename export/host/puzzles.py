"""Puzzles with one checkable answer that the demo model is trained and measured on.

Pure Python, no model and no tokenizer: a puzzle is a prompt and its answer as text. Held-out
prompts are set apart by a hash of the prompt, so they cannot occur in training whatever the seed.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

Split = Literal["train", "held_out"]

HELD_OUT_ONE_IN = 16
"""One prompt in this many, chosen by hash, belongs to the held-out split."""

SORT_DIGITS = 8
ADD_DIGITS = 4
SUDOKU_BLANKS = (6, 9)
"""Fewest and most blank cells of a 4x4 sudoku."""


@dataclass(frozen=True)
class Puzzle:
    """One prompt, as the user would type it, and its only right answer."""

    kind: str
    prompt: str
    answer: str


@cache
def _sudoku_grids() -> tuple[str, ...]:
    """All 288 solved 4x4 sudoku grids, each as 16 digits in row order."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    grids = []
    for four in itertools.product(rows, repeat=4):
        columns = ("".join(column) for column in zip(*four, strict=True))
        boxes = (four[r][c : c + 2] + four[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2))
        if all(len(set(group)) == 4 for group in itertools.chain(columns, boxes)):
            grids.append("".join(four))
    return tuple(grids)


@cache
def _grids_with() -> dict[tuple[int, str], int]:
    """By cell and digit, the solved grids that have it, as a bit set."""
    with_digit: dict[tuple[int, str], int] = {}
    for number, grid in enumerate(_sudoku_grids()):
        for key in enumerate(grid):
            with_digit[key] = with_digit.get(key, 0) | 1 << number
    return with_digit


def count_sudoku_solutions(cells: str) -> int:
    """Count the solved grids that agree with `cells` (16 characters, `.` is a blank)."""
    agreeing = (1 << len(_sudoku_grids())) - 1
    for cell, digit in enumerate(cells):
        if digit != ".":
            agreeing &= _grids_with().get((cell, digit), 0)
    return agreeing.bit_count()


def _rows(cells: str) -> str:
    return " ".join(cells[start : start + 4] for start in range(0, 16, 4))


def make_sudoku(rng: random.Random) -> Puzzle:
    """Draw a 4x4 sudoku with 6 to 9 blanks and exactly one solution."""
    grid = rng.choice(_sudoku_grids())
    while True:
        blanks = set(rng.sample(range(16), rng.randint(*SUDOKU_BLANKS)))
        cells = "".join("." if cell in blanks else digit for cell, digit in enumerate(grid))
        if count_sudoku_solutions(cells) == 1:
            return Puzzle("sudoku", f"sudoku {_rows(cells)}", _rows(grid))


def make_sort(rng: random.Random) -> Puzzle:
    """Draw eight digits, repeats allowed, to be put in ascending order."""
    digits = rng.choices("0123456789", k=SORT_DIGITS)
    return Puzzle("sort", f"sort {''.join(digits)}", "".join(sorted(digits)))


def make_add(rng: random.Random) -> Puzzle:
    """Draw two four-digit numbers to be added; the sum is written with five digits."""
    low, high = 10 ** (ADD_DIGITS - 1), 10**ADD_DIGITS - 1
    first, second = rng.randint(low, high), rng.randint(low, high)
    return Puzzle("add", f"add {first}+{second}", f"{first + second:0{ADD_DIGITS + 1}d}")


KINDS: dict[str, Callable[[random.Random], Puzzle]] = {
    "sudoku": make_sudoku,
    "sort": make_sort,
    "add": make_add,
}
"""The puzzle kinds: a new one is a function that draws it and one line here."""


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to, by its text alone."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest) % HELD_OUT_ONE_IN == 0 else "train"


def stream(kind: str, seed: int, split: Split = "train") -> Iterator[Puzzle]:
    """Puzzles of one kind and split without end; the same seed yields the same ones.

    Raises ValueError for a kind or a split that is not known.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown puzzle kind {kind!r}; choose one of {', '.join(KINDS)}.")
    if split not in ("train", "held_out"):
        raise ValueError(f"Unknown split {split!r}; choose train or held_out.")
    rng = random.Random(f"{kind} {split} {seed}")
    while True:
        puzzle = KINDS[kind](rng)
        if split_of(puzzle.prompt) == split:
            yield puzzle


def generate(kind: str, count: int, seed: int, split: Split = "train") -> list[Puzzle]:
    """`count` puzzles of one kind and split, which may repeat; raises ValueError as `stream`."""
    if count < 0:
        raise ValueError(f"The number of puzzles must not be negative, not {count}.")
    return list(itertools.islice(stream(kind, seed, split), count))


def held_out(count: int, seed: int) -> list[Puzzle]:
    """`count` held-out puzzles of each kind, kind by kind: what models are measured on."""
    return [puzzle for kind in KINDS for puzzle in generate(kind, count, seed, "held_out")]


def is_exact(puzzle: Puzzle, text: str) -> bool:
    """Whether a generated text, white space around it apart, is exactly the answer."""
    return text.strip() == puzzle.answer
