"""Where the elements of an array lie in memory, by XLA's layouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from rpac.schedule.hlo import parse_module
from rpac.schedule.layout import Image, is_linear, places, words


def lay_out(values: list[int], dims: list[int], layout: str, dtype: str = "s32") -> Sequence[int | None]:
    text = f"ENTRY %m {{\n  %a = {dtype}[{','.join(map(str, dims))}]{{{layout}}} parameter(0)\n}}\n"
    return words(values, parse_module(text)["a"].shapes[0])


def test_a_list_lies_in_memory_as_it_is() -> None:
    values = [3, 1, -2]
    assert lay_out(values, [3], "0:T(128)") is values
    assert lay_out(values, [3], "0:T(128)S(6)") is values


def test_rows_are_padded_to_lanes() -> None:
    found = lay_out([1, 2, 3, 4, 5, 6], [2, 3], "1,0:T(2,128)S(1)")
    assert isinstance(found, Image)
    assert len(found) == 2 * 128
    assert (found[:4], found[128:132]) == ([1, 2, 3, 0], [4, 5, 6, 0])


def test_tiles_of_eight_rows_follow_each_other() -> None:
    found = lay_out(list(range(16 * 256)), [16, 256], "1,0:T(8,128)")
    assert found[128] == 256  # the second row of the first tile
    assert found[8 * 128] == 128  # the second tile of the same rows
    assert found[2 * 8 * 128] == 8 * 256


def test_another_order_of_dimensions_is_transposed() -> None:
    found = lay_out([1, 2, 3, 4, 5, 6], [2, 3], "0,1:T(1,128)")
    assert (found[0], found[1], found[128], found[257]) == (1, 4, 2, 6)


@pytest.mark.parametrize(
    ("itemsize", "layout", "word"),
    [(1, "1,0:T(4,128)(4,1)", 0x07050301), (2, "1,0:T(4,128)(2,1)", 0x00030001)],
)
def test_rows_of_narrow_elements_share_words(itemsize: int, layout: str, word: int) -> None:
    """Four rows of bytes, or two of halves, lie side by side in a word, the first in its lowest bits."""
    found = lay_out([1, 2, 3, 4, 5, 6, 7, -1], [4, 2], layout, {1: "s8", 2: "s16"}[itemsize])
    assert found[0] == word
    assert len(found) == 128 * itemsize


def test_a_negative_byte_keeps_its_bits() -> None:
    assert lay_out([-1, -1, -1, -2], [4, 1], "1,0:T(4,128)(4,1)", "s8")[0] == -(1 << 24) - 1


@pytest.mark.parametrize("layout", ["1,0:T(8,128)", "0,1:T(8,128)", "1,0:T(4,128)(4,1)"])
def test_each_element_has_a_place_of_its_own(layout: str) -> None:
    array = parse_module(f"ENTRY %m {{\n  %a = s32[5,200]{{{layout}}} parameter(0)\n}}\n")["a"].shapes[0]
    found = places(array)
    assert found.shape == (5, 200)
    assert len(np.unique(found)) == 1000
    assert not is_linear(array)
