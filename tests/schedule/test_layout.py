"""Where the elements of an array lie in memory, by XLA's layouts."""

from __future__ import annotations

import pytest

from rpac.schedule.layout import Image, words


def test_a_list_lies_in_memory_as_it_is() -> None:
    values = [3, 1, -2]
    assert words(values, [3], "0:T(128)", 4) is values
    assert words(values, [3], "0:T(128)S(6)", 4) is values


def test_rows_are_padded_to_lanes() -> None:
    found = words([1, 2, 3, 4, 5, 6], [2, 3], "1,0:T(2,128)S(1)", 4)
    assert isinstance(found, Image)
    assert len(found) == 2 * 128
    assert (found[:4], found[128:132]) == ([1, 2, 3, 0], [4, 5, 6, 0])


def test_tiles_of_eight_rows_follow_each_other() -> None:
    found = words(list(range(16 * 256)), [16, 256], "1,0:T(8,128)", 4)
    assert found[128] == 256  # the second row of the first tile
    assert found[8 * 128] == 128  # the second tile of the same rows
    assert found[2 * 8 * 128] == 8 * 256


def test_another_order_of_dimensions_is_transposed() -> None:
    found = words([1, 2, 3, 4, 5, 6], [2, 3], "0,1:T(1,128)", 4)
    assert (found[0], found[1], found[128], found[257]) == (1, 4, 2, 6)


@pytest.mark.parametrize(
    ("itemsize", "layout", "word"),
    [(1, "1,0:T(4,128)(4,1)", 0x07050301), (2, "1,0:T(4,128)(2,1)", 0x00030001)],
)
def test_rows_of_narrow_elements_share_words(itemsize: int, layout: str, word: int) -> None:
    """Four rows of bytes, or two of halves, lie side by side in a word, the first in its lowest bits."""
    found = words([1, 2, 3, 4, 5, 6, 7, -1], [4, 2], layout, itemsize)
    assert found[0] == word
    assert len(found) == 128 * itemsize


def test_a_negative_byte_keeps_its_bits() -> None:
    assert words([-1, -1, -1, -2], [4, 1], "1,0:T(4,128)(4,1)", 1)[0] == -(1 << 24) - 1
