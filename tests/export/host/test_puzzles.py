"""The puzzles are right, have one answer, and keep held-out prompts out of training."""

import random

import pytest

from export.host import puzzles
from export.host.puzzles import KINDS, generate, is_exact, split_of


def solve_by_search(cells: list[str]) -> list[str]:
    """Return every completion of a 4x4 grid, by plain backtracking (no table of grids)."""
    if "." not in cells:
        return ["".join(cells)]
    at = cells.index(".")
    row, column = divmod(at, 4)
    solutions = []
    for digit in "1234":
        seen = {
            cells[4 * r + c]
            for r in range(4)
            for c in range(4)
            if r == row or c == column or (r // 2, c // 2) == (row // 2, column // 2)
        }
        if digit not in seen:
            solutions += solve_by_search([*cells[:at], digit, *cells[at + 1 :]])
    return solutions


def test_every_sudoku_has_exactly_one_solution_and_it_is_the_answer():
    for puzzle in generate("sudoku", 100, seed=1):
        cells = list(puzzle.prompt.removeprefix("sudoku ").replace(" ", ""))
        assert len(cells) == 16
        assert puzzles.SUDOKU_BLANKS[0] <= cells.count(".") <= puzzles.SUDOKU_BLANKS[1]
        assert solve_by_search(cells) == [puzzle.answer.replace(" ", "")]


def test_there_are_288_solved_sudoku_grids_and_an_empty_one_leaves_all_open():
    assert puzzles.count_sudoku_solutions("." * 16) == 288
    assert len(solve_by_search(["."] * 16)) == 288


def test_a_contradictory_sudoku_has_no_solution():
    assert puzzles.count_sudoku_solutions("11" + "." * 14) == 0


def test_sort_answers_are_the_prompt_digits_in_order():
    for puzzle in generate("sort", 200, seed=2):
        digits = puzzle.prompt.removeprefix("sort ")
        assert len(digits) == puzzles.SORT_DIGITS
        assert puzzle.answer == "".join(sorted(digits))


def test_add_answers_are_the_five_digit_sum_and_carries_occur():
    carries = 0
    for puzzle in generate("add", 200, seed=3):
        first, second = puzzle.prompt.removeprefix("add ").split("+")
        assert len(first) == len(second) == puzzles.ADD_DIGITS
        assert int(puzzle.answer) == int(first) + int(second)
        assert len(puzzle.answer) == 5
        carries += int(first[-1]) + int(second[-1]) >= 10
    assert carries > 50


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_puzzles_and_another_seed_others(kind):
    assert generate(kind, 50, seed=4) == generate(kind, 50, seed=4)
    assert generate(kind, 50, seed=4) != generate(kind, 50, seed=5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_held_out_prompt_is_ever_drawn_for_training(kind):
    held_out = {puzzle.prompt for puzzle in generate(kind, 500, seed=6, split="held_out")}
    training = {puzzle.prompt for puzzle in generate(kind, 5000, seed=6)}
    assert not held_out & training
    assert all(split_of(prompt) == "held_out" for prompt in held_out)


def test_about_one_prompt_in_sixteen_is_held_out():
    rng = random.Random(7)
    share = sum(split_of(puzzles.make_add(rng).prompt) == "held_out" for _ in range(8000)) / 8000
    # Binomial with p = 1/16: standard deviation 0.0027; five of them on either side.
    assert abs(share - 1 / 16) < 0.0135


FROZEN_HELD_OUT = ["sort 66403971", "sort 69236858", "sort 52242983"]


def test_the_split_of_a_prompt_never_changes():
    """The checkpoint in the repository was trained with this very split."""
    assert split_of("add 1234+5678") == "train"
    assert [p.prompt for p in generate("sort", 3, seed=0, split="held_out")] == FROZEN_HELD_OUT


def test_only_the_whole_answer_is_exact_and_surrounding_space_is_forgiven():
    puzzle = generate("add", 1, seed=8)[0]
    assert is_exact(puzzle, puzzle.answer)
    assert is_exact(puzzle, f" {puzzle.answer}\n")
    assert not is_exact(puzzle, puzzle.answer + "0")
    assert not is_exact(puzzle, puzzle.answer[:-1])
    assert not is_exact(puzzle, "")


def test_unknown_kinds_splits_and_negative_counts_are_refused():
    with pytest.raises(ValueError, match=r"'chess'.*sudoku"):
        generate("chess", 1, seed=0)
    with pytest.raises(ValueError, match="'test'"):
        generate("add", 1, seed=0, split="test")
    with pytest.raises(ValueError, match="-1"):
        generate("add", -1, seed=0)
