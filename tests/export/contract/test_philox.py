"""The generator gives the published numbers, and the streams are laid out as the bundle says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from export.contract import philox

VECTORS = json.loads(
    (Path(philox.__file__).parent / "philox_vectors.json").read_text(encoding="utf-8")
)

# Random123's own `kat_vectors` for philox4x32 with 10 rounds: counter, key, words.
RANDOM123 = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def from_hex(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


@pytest.mark.parametrize(("counter", "key", "expected"), RANDOM123)
def test_the_published_known_answers_come_out(counter: str, key: str, expected: str) -> None:
    assert np.array_equal(philox.philox4x32(from_hex(counter), from_hex(key)), from_hex(expected))


def test_a_batch_of_counters_equals_one_counter_at_a_time() -> None:
    counters = np.arange(40, dtype=np.uint32).reshape(10, 4)
    key = from_hex("a4093822 299f31d0")
    rows = [philox.philox4x32(row, key) for row in counters]
    assert np.array_equal(philox.philox4x32(counters, key), np.stack(rows))


def test_the_committed_vectors_for_other_languages_are_what_this_module_gives() -> None:
    for row in VECTORS["known_answers"]:
        counter, key = from_hex(" ".join(row["counter"])), from_hex(" ".join(row["key"]))
        assert np.array_equal(philox.philox4x32(counter, key), from_hex(" ".join(row["words"])))
    for row in VECTORS["streams"]:
        at = (int(row["seed"]), row["canvas"], row["step"])
        count = len(row["tokens"])
        expected_words = from_hex(" ".join(row["uniform_words"]))
        assert np.array_equal(philox.words(*at, philox.STREAM_UNIFORM, count), expected_words)
        assert philox.uniforms(*at, count).tolist() == row["uniforms"]
        tokens = philox.random_tokens(*at, count, row["vocabulary_size"])
        assert tokens.tolist() == row["tokens"]


def test_key_and_counter_are_laid_out_as_the_contract_says() -> None:
    seed, canvas, step, position = 0x0123456789ABCDEF, 5, 9, 6
    block = philox.philox4x32(
        np.array([position // 4, step, canvas, philox.STREAM_TOKEN]),
        np.array([0x89ABCDEF, 0x01234567]),
    )
    word = int(block[position % 4])
    assert philox.words(seed, canvas, step, philox.STREAM_TOKEN, 8)[position] == word
    assert philox.random_tokens(seed, canvas, step, 8, 1000)[position] == (word * 1000) >> 32


def test_a_longer_canvas_begins_with_the_numbers_of_a_shorter_one() -> None:
    assert np.array_equal(philox.uniforms(3, 1, 2, 256)[:10], philox.uniforms(3, 1, 2, 10))


def test_uniforms_stay_below_one_in_single_precision() -> None:
    largest = (np.uint32(0xFFFFFFFF) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    assert largest < np.float32(1.0)
    drawn = philox.uniforms(1, 0, 1, 100_000)
    assert drawn.dtype == np.float32
    assert drawn.min() >= 0 and drawn.max() < 1


def test_tokens_are_uniform_over_a_vocabulary_that_is_no_power_of_two() -> None:
    tokens = philox.random_tokens(7, 0, 0, 97_000, 97)
    counts = np.bincount(tokens, minlength=97)
    # One fixed draw: p < 1e-3 would mean a wrong mapping, not bad luck.
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_outside_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        philox.uniforms(seed, 0, 0, 4)
