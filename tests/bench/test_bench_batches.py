"""Which batches a program is timed on."""

from __future__ import annotations

import pytest
from command import TINY

from rpac.batch import Limits
from rpac.bench.batches import Case, batch_of, cases_asked, cases_of_programs
from rpac.contract.kind import KINDS
from rpac.contract.program import Variant
from rpac.errors import BatchError, SelectionError
from rpac.predict import parse_decode, parse_prefill
from rpac.spec import load_spec

LIMITS = Limits.of(load_spec(TINY))
VARIANTS = {
    Variant(kind, tokens): None for kind in KINDS for tokens in LIMITS.token_buckets if (kind, tokens) != ("prefill", 8)
}


def limits(**changes: object) -> Limits:
    return Limits(**{**LIMITS.as_dict(), "token_buckets": LIMITS.token_buckets, **changes})  # type: ignore[arg-type]


def test_every_program_is_filled_at_every_length() -> None:
    cases = cases_of_programs("", VARIANTS, LIMITS, (40, 100))
    assert [str(case) for case in cases] == [
        "decode/8, decode 4x40", "decode/8, decode 4x100", "decode/32, decode 4x40", "decode/32, decode 4x100",
        "prefill/32, prefill 2x16/40", "prefill/32, prefill 2x16/100",
        "mixed/8, mixed 1x6+2x1/40", "mixed/8, mixed 1x6+2x1/100",
        "mixed/32, mixed 1x29+3x1/40", "mixed/32, mixed 1x29+3x1/100",
    ]  # fmt: skip


@pytest.mark.parametrize("case", cases_of_programs("", VARIANTS, LIMITS, (40, 100, 5000)), ids=str)
def test_a_batch_is_one_that_its_program_takes(case: Case) -> None:
    batch, pages = batch_of(LIMITS, case)
    assert batch.kind == case.variant.kind
    assert batch.num_tokens <= case.variant.tokens
    assert len(set(pages.tolist())) == len(pages) <= LIMITS.num_pages


def test_a_length_that_no_chunk_ends_at_is_left_out() -> None:
    cases = cases_of_programs("", VARIANTS, LIMITS, (8,))
    assert "prefill" not in {case.variant.kind for case in cases}


def test_a_batch_takes_at_most_the_pages_of_the_cache() -> None:
    few = limits(num_pages=8)  # 100 tokens are 7 pages
    labels = [case.workload.label for case in cases_of_programs("", VARIANTS, few, (100,))]
    assert labels == ["decode 1x100", "decode 1x100", "prefill 1x16/100", "mixed 1x6/100", "mixed 1x29/100"]


def test_decode_rows_have_as_many_new_tokens_as_the_program_takes() -> None:
    cases = cases_of_programs("", [Variant("decode", 8), Variant("mixed", 32)], limits(decode_len=4), (40,))
    assert [case.workload.q_lens for case in cases] == [(4, 4), (24, 4, 4)]


def test_a_batch_that_is_asked_for_runs_on_the_program_that_it_selects() -> None:
    cases = cases_asked("", VARIANTS, LIMITS, [parse_decode("4x100"), parse_prefill("2x16/64"), parse_prefill("1x9/9")])
    assert [case.variant for case in cases] == [Variant("decode", 8), Variant("prefill", 32), Variant("mixed", 32)]


def test_a_batch_larger_than_the_cache_is_refused() -> None:
    with pytest.raises(BatchError, match=r"decode 4x512: takes 128 pages; must be at most 100, .* `num_pages: 128`"):
        cases_asked("", VARIANTS, limits(num_pages=100), [parse_decode("4x512")])


def test_a_batch_without_a_program_is_refused() -> None:
    with pytest.raises(SelectionError):
        cases_asked("", {Variant("decode", 8): None}, LIMITS, [parse_prefill("2x16/64")])
