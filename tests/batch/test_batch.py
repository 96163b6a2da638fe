"""Batches are built in the contract's order, read back whole, and accepted exactly when the contract holds."""

from __future__ import annotations

import re
import subprocess
import sys
import timeit
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpac.batch import Batch, Limits, validate
from rpac.contract import arrays as layout
from rpac.contract.kind import select_kind
from rpac.errors import BatchError, SelectionError
from rpac.spec import Spec, load_spec

SPECS = Path(__file__).parents[2] / "specs"
SPEC = load_spec(SPECS / "tiny.yaml")
LIMITS = Limits(page_size=4, pages_per_seq=5, max_num_seqs=6, num_pages=40, prefill_chunk=3, token_buckets=(4, 8, 24))


def metadata(batch: Batch) -> dict[str, Any]:
    """What `validate` takes, in arrays that can be written."""
    names = ("kv_lens", "page_indices", "cu_q_lens", "distribution")
    return {"limits": batch.limits, "tokens": batch.tokens, **{name: getattr(batch, name).copy() for name in names}}


@dataclass(frozen=True)
class Lists:
    """The caller's side of a batch."""

    q_lens: list[int]
    context_lens: list[int]
    page_tables: list[list[int]]

    def build(self) -> Batch:
        return Batch.build(LIMITS, self.q_lens, self.context_lens, self.page_tables)


@st.composite
def lists(draw: st.DrawFn) -> Lists:
    """Sequences that fit LIMITS, on pages in random order, at times with spare pages at the end of a table."""
    count = draw(st.integers(0, LIMITS.max_num_seqs))
    q_lens = draw(st.lists(st.integers(1, 4), min_size=count, max_size=count))
    context_lens = [draw(st.integers(0, LIMITS.max_kv_len - q_len)) for q_len in q_lens]
    pages = iter(draw(st.permutations(range(LIMITS.num_pages))))
    needs = [layout.cdiv(q + context, LIMITS.page_size) for q, context in zip(q_lens, context_lens, strict=True)]
    sizes = [draw(st.integers(need, LIMITS.pages_per_seq)) for need in needs]
    return Lists(q_lens, context_lens, [[next(pages) for _ in range(size)] for size in sizes])


@given(lists())
def test_a_batch_gives_back_the_sequences_that_it_was_built_of(given: Lists) -> None:
    batch = given.build()
    assert len(batch) == len(given.q_lens)
    assert sorted(batch.order) == list(range(len(batch)))
    for row, index in zip(batch, batch.order, strict=True):
        assert row.q_len == given.q_lens[index]
        assert row.context_len == given.context_lens[index]
        assert row.kv_len == row.context_len + row.q_len
        assert row.pages == tuple(given.page_tables[index][: layout.cdiv(row.kv_len, LIMITS.page_size)])


@given(lists())
def test_rows_lie_in_the_order_of_the_distribution(given: Lists) -> None:
    batch = given.build()
    kinds = [row.kind for row in batch]
    assert kinds == sorted(kinds, key=["decode", "prefill", "mixed"].index)
    decode, prefill, count = (int(end) for end in batch.distribution)
    assert (kinds.count("decode"), kinds.count("prefill"), len(kinds)) == (decode, prefill - decode, count)
    assert all(row.q_len == 1 for row in batch if row.kind == "decode")
    assert all(row.q_len == LIMITS.prefill_chunk for row in batch if row.kind == "prefill")


@given(lists())
def test_sequences_of_one_kind_keep_the_callers_order(given: Lists) -> None:
    batch = given.build()
    for kind in ("decode", "prefill", "mixed"):
        indices = [index for row, index in zip(batch, batch.order, strict=True) if row.kind == kind]
        assert indices == sorted(indices)


@given(lists())
def test_queries_are_packed_without_gaps_into_the_smallest_bucket(given: Lists) -> None:
    batch = given.build()
    rows = [position for row in batch for position in row.queries]
    assert rows == list(range(batch.num_tokens))
    assert batch.num_tokens == sum(given.q_lens) <= batch.tokens
    assert not any(batch.num_tokens <= bucket < batch.tokens for bucket in LIMITS.token_buckets)


@given(lists())
def test_arrays_have_the_shapes_and_dtypes_of_the_layout(given: Lists) -> None:
    batch = given.build()
    for dims in layout.metadata_specs(LIMITS):
        array = getattr(batch, dims.name)
        assert (array.shape, array.dtype) == (dims.shape, np.dtype(dims.dtype))


@given(lists())
def test_arrays_that_validate_make_the_same_batch(given: Lists) -> None:
    batch = given.build()
    again = Batch.of_arrays(**metadata(batch))
    assert list(again) == list(batch)
    assert (again.tokens, again.kind) == (batch.tokens, batch.kind)
    assert again.order == tuple(range(len(batch)))


def test_a_batch_cannot_be_changed_nor_changes_with_its_source() -> None:
    batch = Batch.build(SPEC, [1], [3], [[5]])
    with pytest.raises(ValueError, match="read-only"):
        batch.kv_lens[0] = 9
    with pytest.raises(FrozenInstanceError):
        batch.tokens = 9  # type: ignore[misc]
    arrays = metadata(batch)
    again = Batch.of_arrays(**arrays)
    arrays["kv_lens"][0] = 9
    assert again.kv_lens[0] == 4


def test_numpy_values_build_as_plain_ones_do() -> None:
    plain = Batch.build(SPEC, [1, 16], [3, 0], [[5], [7]])
    numpy = Batch.build(SPEC, np.array([1, 16]), np.array([3, 0], np.int32), np.array([[5], [7]], np.uint8))
    assert list(numpy) == list(plain)
    whole = Batch.build(SPEC, [1, 16], [3, 0], np.array([[5], [7]]))
    assert list(whole) == list(plain)
    with pytest.raises(BatchError, match=re.escape("page_tables[0][0] is 5.0; must be an integer from")):
        Batch.build(SPEC, [1], [3], np.array([[5.0]]))


def test_spare_entries_of_a_table_may_hold_any_int32() -> None:
    batch = Batch.build(LIMITS, [1], [3], [[5, -1, 2**31 - 1, -(2**31)]])
    assert next(iter(batch)).pages == (5,)


def test_dead_rows_are_built_as_zeros_behind_the_last_query() -> None:
    batch = Batch.build(LIMITS, [2, 1], [3, 3], [[5, 6], [7]])
    assert batch.kv_lens.tolist() == [4, 5, 0, 0, 0, 0]
    assert batch.cu_q_lens.tolist() == [0, 1, 3, 3, 3, 3, 3]
    assert batch.page_indices.tolist() == [7, 0, 0, 0, 0, 5, 6, 0, 0, 0, *[0] * 20]


KINDS = {
    (0, 0, 0): "decode",
    (1, 1, 1): "decode",
    (4, 4, 4): "decode",
    (0, 1, 1): "prefill",
    (0, 4, 4): "prefill",
    (0, 0, 1): "mixed",
    (1, 2, 2): "mixed",
    (1, 1, 2): "mixed",
    (0, 1, 2): "mixed",
    (1, 2, 3): "mixed",
}


@pytest.mark.parametrize("distribution, kind", KINDS.items(), ids=str)
def test_a_distribution_selects_its_kind(distribution: tuple[int, int, int], kind: str) -> None:
    assert select_kind(distribution) == kind
    assert select_kind(np.array(distribution, np.int32)) == kind


@given(lists())
def test_a_kind_is_selected_only_where_its_program_can_take_the_batch(given: Lists) -> None:
    batch = given.build()
    kinds = {row.kind for row in batch}
    if batch.kind == "decode":
        assert kinds <= {"decode"}
    elif batch.kind == "prefill":
        assert kinds == {"prefill"}
    else:
        assert kinds not in ({"decode"}, {"prefill"}, set())


def holds(limits: Limits, tokens: int, kv_lens: Any, page_indices: Any, cu_q_lens: Any, distribution: Any) -> bool:
    """The contract, said slowly and by itself."""
    i, j, k = (int(end) for end in distribution)
    if tokens not in limits.token_buckets or not 0 <= i <= j <= k <= limits.max_num_seqs or cu_q_lens[0] != 0:
        return False
    readers: dict[int, list[tuple[int, bool]]] = {}
    for row in range(k):
        q_len = int(cu_q_lens[row + 1]) - int(cu_q_lens[row])
        kv_len = int(kv_lens[row])
        if q_len < 1 or (row < i and q_len != 1) or (i <= row < j and q_len != limits.prefill_chunk):
            return False
        if not q_len <= kv_len <= limits.page_size * limits.pages_per_seq:
            return False
        table = page_indices[row * limits.pages_per_seq : (row + 1) * limits.pages_per_seq]
        first_new = kv_len - q_len
        seen = 0 if limits.sliding_window is None else max(first_new + 1 - limits.sliding_window, 0)
        if limits.attention_chunk is not None:
            seen = first_new - first_new % limits.attention_chunk
        for entry in range(seen // limits.page_size, (kv_len + limits.page_size - 1) // limits.page_size):
            if not 0 <= table[entry] < limits.num_pages:
                return False
            last_token = (entry + 1) * limits.page_size - 1
            readers.setdefault(int(table[entry]), []).append((row, last_token >= kv_len - q_len))
    for uses in readers.values():
        if len({row for row, _ in uses}) < len(uses) or (len(uses) > 1 and any(writes for _, writes in uses)):
            return False
    return bool(cu_q_lens[k] <= tokens)


WINDOW = Limits(16, 32, 4, 64, 16, (8,), sliding_window=32)
CHUNK = Limits(16, 32, 4, 64, 16, (8,), attention_chunk=64)


@pytest.mark.parametrize("null", [0, -1, 9, 2**31 - 1])
@pytest.mark.parametrize("limits, context, unseen", [(WINDOW, 300, 16), (CHUNK, 300, 16), (CHUNK, 255, 12)])
def test_pages_before_what_any_new_token_sees_may_be_anything(
    limits: Limits, context: int, unseen: int, null: int
) -> None:
    pages = list(range(20, 20 + layout.cdiv(context + 1, 16) - unseen))
    # Page 9 is one that another row writes: a server gave it to that after the window had passed it.
    batch = Batch.build(limits, [1, 1], [context, 0], [[null] * unseen + pages, [9]])
    assert [row.pages[-1] for row in batch] == [pages[-1], 9]
    with pytest.raises(BatchError, match=f"entry {unseen} of its page table is -1"):
        Batch.build(limits, [1], [context], [[null] * unseen + [-1] + pages[1:]])
    with pytest.raises(BatchError, match=f"writes its new tokens to page 9, which row 0|page {null} is in its table"):
        Batch.build(limits, [1, 1], [context, 0], [[null] * unseen + [9] + pages[1:], [9]])
    with pytest.raises(BatchError):
        Batch.build(
            replace(limits, sliding_window=None, attention_chunk=None), [1], [context], [[null] * unseen + pages]
        )


EXTREMES = st.sampled_from([-(2**31), 2**31 - 1])


@given(st.data())
def test_arrays_are_accepted_exactly_when_the_contract_holds(data: st.DataObject) -> None:
    arrays = metadata(data.draw(lists()).build())
    for _ in range(data.draw(st.integers(0, 3))):
        name = data.draw(st.sampled_from(["kv_lens", "page_indices", "cu_q_lens", "distribution"]))
        at = data.draw(st.integers(0, len(arrays[name]) - 1))
        arrays[name][at] = data.draw(st.integers(-1, 41) | EXTREMES)
    arrays["tokens"] = data.draw(st.sampled_from([arrays["tokens"], *LIMITS.token_buckets, 5]))
    seen = data.draw(st.sampled_from([{}, *({"sliding_window": size} for size in (1, 4, 7)), {"attention_chunk": 8}]))
    arrays["limits"] = replace(LIMITS, **seen)
    try:
        validate(**arrays)
    except (BatchError, SelectionError):
        assert not holds(**arrays)
    else:
        assert holds(**arrays)


@given(lists(), st.integers(-(2**31), 2**31 - 1))
def test_dead_rows_and_unused_entries_may_hold_anything(given: Lists, garbage: int) -> None:
    batch = given.build()
    arrays = metadata(batch)
    arrays["kv_lens"][len(batch) :] = garbage
    arrays["cu_q_lens"][len(batch) + 1 :] = garbage
    table = arrays["page_indices"].reshape(LIMITS.max_num_seqs, -1)
    table[len(batch) :] = garbage
    for row in batch:
        table[row.row, len(row.pages) :] = garbage
    validate(**arrays)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pages_that_are_only_read_may_be_shared(k: int) -> None:
    """A common prefix of two full pages under `k` sequences that write behind it."""
    batch = Batch.build(LIMITS, [1] * k, [8] * k, [[7, 8, 10 + row] for row in range(k)])
    assert [row.pages[:2] for row in batch] == [(7, 8)] * k


@pytest.mark.parametrize("q_lens, context_lens", [([1, 1], [7, 8]), ([1, 1], [8, 7]), ([2, 1], [7, 8])])
def test_a_shared_page_that_one_sequence_writes_is_refused(q_lens: list[int], context_lens: list[int]) -> None:
    with pytest.raises(BatchError, match="page 8"):
        Batch.build(LIMITS, q_lens, context_lens, [[1, 8, 10], [2, 8, 11]])


def test_limits_survive_a_manifest() -> None:
    for limits in (Limits.of(SPEC), Limits(1, 1, 1, 1, 1, (1,))):
        assert Limits.from_dict(limits.as_dict()) == limits
    assert Limits.of(SPEC).max_kv_len == SPEC.serving.max_model_len
    assert Limits.from_dict(WINDOW.as_dict()) == replace(WINDOW, sliding_window=None)  # the manifest's model has it


def test_the_limits_of_a_spec_know_what_its_layers_see() -> None:
    spec = load_spec(SPECS / "gemma3-27b.yaml")
    local, whole = (Limits.of(spec.part(name)) for name in ("local", "global"))
    assert (local.sliding_window, local.layer, whole.sliding_window, whole.layer) == (1024, "local", None, "global")
    assert Limits.of(spec) == Limits.joint([local, whole])
    assert not Limits.of(spec).is_local


@pytest.mark.parametrize(
    "change",
    [
        {"page_size": 0},
        {"page_size": True},
        {"page_size": "16"},
        {"num_pages": 1.0},
        {"token_buckets": []},
        {"token_buckets": 8},
        {"token_buckets": [8, "x"]},
        {"token_buckets": [32, 8]},
        {"token_buckets": [8, 8]},
        {"token_buckets": [0, 8]},
        {"extra": 1},
    ],
    ids=str,
)
def test_limits_of_a_damaged_manifest_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^limits.*found.*must"):
        Limits.from_dict(Limits.of(SPEC).as_dict() | change)


def test_limits_of_a_manifest_with_an_entry_missing_are_refused() -> None:
    data = Limits.of(SPEC).as_dict()
    del data["num_pages"]
    with pytest.raises(ValueError, match="num_pages"):
        Limits.from_dict(data)


@pytest.mark.parametrize("tokens, bucket", [(0, 4), (1, 4), (4, 4), (5, 8), (8, 8), (9, 24), (24, 24)])
def test_the_smallest_bucket_that_fits_is_taken(tokens: int, bucket: int) -> None:
    assert LIMITS.bucket(tokens) == bucket


def fastest(limits: Limits, table: Sequence[Sequence[int]]) -> float:
    """Seconds that one `validate` takes on a full decode batch, the least of many."""
    batch = Batch.build(limits, [1] * 64, [limits.max_kv_len - 1] * 64, table)
    arrays = metadata(batch)
    return min(timeit.repeat(lambda: validate(**arrays), number=20, repeat=40)) / 20


def test_validation_of_64_full_sequences_takes_no_time_that_a_server_would_notice() -> None:
    """Around 70 us, and 250 us where pages are shared; the bounds leave room for a slow, busy machine."""
    limits = Limits(128, 64, 64, num_pages=4096, prefill_chunk=512, token_buckets=(64,))
    pages = np.random.default_rng(0).permutation(4096).reshape(64, 64)
    assert fastest(limits, pages.tolist()) < 300e-6
    pages[:, :32] = pages[0, :32]
    assert fastest(limits, pages.tolist()) < 1000e-6


def test_serving_needs_neither_jax_nor_yaml_to_build_a_batch() -> None:
    code = (
        "import sys, rpac.batch, rpac.contract.arrays, rpac.errors; "
        "sys.exit(sorted({'jax', 'yaml', 'jinja2', 'click', 'libtpu', 'rpac.spec'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SPECS.parent)


def test_a_batch_is_told_in_a_line(tiny: Spec) -> None:
    assert repr(Batch.build(tiny, [1, 16, 1], [3, 4, 9], [[0], [1, 2], [3]])) == (
        "<Batch for mixed/32; 2 decode, 1 prefill; 18 new tokens; lengths 4 to 20>"
    )
    assert repr(Batch.build(tiny, [], [], [])) == "<Batch for decode/8; empty>"
