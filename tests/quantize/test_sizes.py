"""Numbers of bytes as an option takes them."""

from __future__ import annotations

import pytest

from quantize.errors import InputError
from quantize.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("512M", 512 << 20), ("1.5GiB", 3 << 29), ("2 kb", 2048), ("7B", 7)],
)
def test_bytes_are_read_with_their_units(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "-1", "two", "1 X", "1e9", "1M2"])
def test_what_is_no_number_of_bytes_is_told(text: str) -> None:
    with pytest.raises(InputError, match="is no number of bytes; give one such as 512M"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(7, "7 B"), (1536, "1.5 KiB"), (3 << 29, "1.5 GiB"), (5 << 42, "20480.0 GiB")],
)
def test_bytes_are_shown_with_a_unit_and_read_back(count: int, text: str) -> None:
    assert format_bytes(count) == text and parse_bytes(text) == count
