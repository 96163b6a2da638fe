"""What a batch that breaks the contract is told: the row, its values, the rule."""

# A case a line, however long its message is.
# ruff: noqa: E501

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rpac.batch import Batch, Limits, validate
from rpac.errors import BatchError, SelectionError

LIMITS = Limits(page_size=4, pages_per_seq=5, max_num_seqs=6, num_pages=40, prefill_chunk=3, token_buckets=(8, 16))


def good() -> dict[str, Any]:
    """Two decode rows, one prefill, one mixed: kv_lens 6, 9, 3, 7, on pages 0, 11; 20, 21, 22; 30; 35, 36."""
    batch = Batch.build(LIMITS, [1, 1, 3, 2], [5, 8, 0, 5], [[0, 11], [20, 21, 22], [30], [35, 36]])
    names = ("kv_lens", "page_indices", "cu_q_lens", "distribution")
    return {"tokens": batch.tokens, **{name: getattr(batch, name).copy() for name in names}}


def put(name: str, at: int | slice, value: int) -> Callable[[dict[str, Any]], None]:
    """An edit: one element of one array, or a few."""

    def edit(arrays: dict[str, Any]) -> None:
        arrays[name][at] = value

    return edit


def swap(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit: one whole argument."""

    def edit(arrays: dict[str, Any]) -> None:
        arrays[name] = value

    return edit


EDITS = {
    "type": (swap("kv_lens", [6, 9, 3, 7, 0, 0]), "kv_lens is a list; must be a numpy array of int32 [6]"),
    "dtype": (swap("cu_q_lens", np.zeros(7, np.int64)), "cu_q_lens has dtype int64; must be int32; convert it with astype(numpy.int32)"),
    "shape": (swap("page_indices", np.zeros((6, 5), np.int32)), "page_indices has shape [6, 5]; must be [30]; pad or flatten it to that"),
    "length": (swap("kv_lens", np.zeros(4, np.int32)), "kv_lens has shape [4]; must be [6]; pad or flatten it to that"),
    "distribution descends": (put("distribution", 0, 4), "distribution is (4, 3, 4); must be 0 <= i <= j <= k <= max_num_seqs (6): the ends of the decode, prefill and mixed rows"),
    "distribution negative": (put("distribution", 0, -1), "distribution is (-1, 3, 4); must be 0 <= i <= j <= k <= max_num_seqs (6): the ends of the decode, prefill and mixed rows"),
    "too many sequences": (put("distribution", 2, 7), "distribution is (2, 3, 7); must be 0 <= i <= j <= k <= max_num_seqs (6): the ends of the decode, prefill and mixed rows"),
    "start": (put("cu_q_lens", 0, 1), "cu_q_lens[0] is 1; must be 0; queries of the first sequence start at row 0"),
    "empty row": (put("cu_q_lens", 1, 0), "row 0 (decode): cu_q_lens goes from 0 to 0; must rise by at least 1 for each live row"),
    "descending": (put("cu_q_lens", 3, 1), "row 2 (prefill): cu_q_lens goes from 2 to 1; must rise by at least 1 for each live row"),
    "wraps around": (put("cu_q_lens", 2, -(2**31)), "row 1 (decode): cu_q_lens goes from 1 to -2147483648; must rise by at least 1 for each live row"),
    "past the queries": (put("cu_q_lens", 4, 9), "cu_q_lens[4] is 9; must be at most 8, the rows of queries"),
    "decode of two": (put("distribution", 0, 3), "row 2 (decode): has 3 new tokens; decode rows must have 1; move it after the decode rows"),
    "prefill off its chunk": (put("distribution", 1, 4), "row 3 (prefill): has 2 new tokens; prefill rows must have prefill_chunk (3); move it after the prefill rows"),
    "several rows": (put("distribution", 0, 1), "row 1 (prefill): has 1 new tokens; prefill rows must have prefill_chunk (3); move it after the prefill rows"),
    "shorter than its queries": (put("kv_lens", 3, 1), "row 3 (mixed): kv_lens[3] is 1, below its 2 new tokens; kv_lens counts context and new tokens together"),
    "zero length": (put("kv_lens", 0, 0), "row 0 (decode): kv_lens[0] is 0, below its 1 new tokens; kv_lens counts context and new tokens together"),
    "past the table": (put("kv_lens", 1, 21), "row 1 (decode): kv_lens[1] is 21; must be at most 20 = pages_per_seq (5) x page_size (4); build with a larger max_model_len"),
    "negative page": (put("page_indices", 6, -1), "row 1 (decode): entry 1 of its page table is -1; must be 0 to 39, the pages of the cache"),
    "page past the cache": (put("page_indices", 15, 40), "row 3 (mixed): entry 0 of its page table is 40; must be 0 to 39, the pages of the cache"),
    "same page twice": (put("page_indices", slice(6, 8), 20), "row 1 (decode): page 20 is in its table twice, at entries 0 and 1; every page of a sequence must be a different one"),
    "writes what another reads": (put("page_indices", 15, 11), "row 0 (decode): writes its new tokens to page 11, which row 3 (mixed) uses too; a page that takes new tokens must belong to one sequence; copy it first"),
    "reads what another writes": (put("page_indices", 0, 30), "row 2 (prefill): writes its new tokens to page 30, which row 0 (decode) uses too; a page that takes new tokens must belong to one sequence; copy it first"),
    "both write": (put("page_indices", 10, 22), "row 1 (decode): writes its new tokens to page 22, which row 2 (prefill) uses too; a page that takes new tokens must belong to one sequence; copy it first"),
}  # fmt: skip


def test_the_good_batch_of_these_tests_is_good() -> None:
    validate(LIMITS, **good())


@pytest.mark.parametrize("edit, message", EDITS.values(), ids=EDITS.keys())
def test_arrays_that_break_the_contract_are_named(edit: Callable[[dict[str, Any]], None], message: str) -> None:
    arrays = good()
    edit(arrays)
    with pytest.raises(BatchError) as caught:
        validate(LIMITS, **arrays)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_a_problem_that_several_rows_share_is_counted() -> None:
    arrays = good()
    arrays["kv_lens"][:] = 100
    with pytest.raises(BatchError, match=r"^row 0 .*kv_lens\[0\] is 100.* \(and 3 more rows\)$"):
        validate(LIMITS, **arrays)
    arrays = good()
    arrays["page_indices"][:] = 99
    with pytest.raises(BatchError, match=r"^row 0 .*entry 0 .* is 99.* \(and 7 more entries\)$"):
        validate(LIMITS, **arrays)


@pytest.mark.parametrize(
    "tokens, lines",
    [(9, "max_num_tokens: 16\n  token_buckets: [8, 9, 16]"), (24, "max_num_tokens: 24\n  token_buckets: [8, 16, 24]")],
)
def test_a_bucket_that_was_not_built_is_answered_with_the_lines_that_add_it(tokens: int, lines: str) -> None:
    with pytest.raises(SelectionError) as caught:
        validate(LIMITS, **{**good(), "tokens": tokens})
    assert str(caught.value) == (
        f"queries have {tokens} rows; the token buckets built are 8, 16; "
        f"pad queries, keys and values to one of them, or build with\nserving:\n  {lines}"
    )


def test_more_tokens_than_any_bucket_are_answered_with_the_lines_that_add_one() -> None:
    with pytest.raises(SelectionError) as caught:
        Batch.build(LIMITS, [17], [0], [[1, 2, 3, 4, 5]])
    assert str(caught.value) == (
        "the batch has 17 new tokens; the largest token bucket built is 16; split the batch, or build with\n"
        "serving:\n  max_num_tokens: 17\n  token_buckets: [8, 16, 17]"
    )


BUILDS = {
    "counts": (([1, 1], [3], [[1], [2]]), "found 2 q_lens, 1 context_lens and 2 page_tables; must be one of each for every sequence"),
    "too many": (([1] * 7, [0] * 7, [[n] for n in range(7)]), "found 7 sequences; must be at most max_num_seqs (6); split the batch"),
    "no tokens": (([0], [3], [[1]]), "q_lens[0] is 0; must be an integer from 1 to 2147483647"),
    "a float": (([1.0], [3], [[1]]), "q_lens[0] is 1.0; must be an integer from 1 to 2147483647"),
    "a bool": (([True], [3], [[1]]), "q_lens[0] is True; must be an integer from 1 to 2147483647"),
    "negative context": (([1], [-1], [[1]]), "context_lens[0] is -1; must be an integer from 0 to 2147483647"),
    "page no number": (([1], [3], [["x"]]), "page_tables[0][0] is x; must be an integer from -2147483648 to 2147483647"),
    "page no int32": (([1], [3], [[2**31]]), "page_tables[0][0] is 2147483648; must be an integer from -2147483648 to 2147483647"),
    "no tables": (([1], [3], None), "page_tables is a NoneType; must be a list of lists of integers"),
    "no lengths": ((1, [3], [[1]]), "q_lens is a int; must be a list of integers"),
    "page no list": (([1], [3], [7]), "page_tables[0] is a int; must be a list of integers"),
    "pages nested": (([1], [3], [[[7]]]), "page_tables[0][0] is [7]; must be an integer from -2147483648 to 2147483647"),
    "pages ragged": (([1], [3], [[1, [7]]]), "page_tables[0][1] is [7]; must be an integer from -2147483648 to 2147483647"),
    "page of another type": (([1], [3], [[1, None]]), "page_tables[0][1] is None; must be an integer from -2147483648 to 2147483647"),
    "table too long": (([1], [3], [[1, 2, 3, 4, 5, 6]]), "sequence 0: page_tables[0] has 6 pages; must be at most pages_per_seq (5); build with a larger max_model_len"),
    "table too short": (([1, 1], [3, 8], [[1], [2, 3]]), "sequence 1: page_tables[1] has 2 pages of 4 tokens; must hold its 8 context and 1 new tokens; give it 3 pages"),
    "full table one short": (([1], [19], [[1, 2, 3, 4]]), "sequence 0: page_tables[0] has 4 pages of 4 tokens; must hold its 19 context and 1 new tokens; give it 5 pages"),
    "too long for any table": (([1], [20], [[1, 2, 3, 4, 5]]), "sequence 0: has 20 context and 1 new tokens; must be at most 20 in all = pages_per_seq (5) x page_size (4); build with a larger max_model_len"),
    "page past the cache": (([1, 2], [3, 0], [[1], [40]]), "row 1 (mixed): entry 0 of its page table is 40; must be 0 to 39, the pages of the cache"),
}  # fmt: skip


@pytest.mark.parametrize("lists, message", BUILDS.values(), ids=BUILDS.keys())
def test_lists_that_make_no_batch_are_named(lists: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(BatchError, match=f"^{re.escape(message)}$"):
        Batch.build(LIMITS, *lists)
