"""Batches in the command line's notation, and what is said where they are none."""

from __future__ import annotations

import pytest
from command import TINY

from rpac.batch import Limits
from rpac.errors import BatchError, RpacError, SelectionError
from rpac.predict import Workload, expected, parse_decode, parse_prefill
from rpac.predict.batches import MAX_ROWS
from rpac.spec import load_spec

LIMITS = Limits.of(load_spec(TINY))


def test_decode_and_prefill_say_how_many_sequences_of_what_length() -> None:
    assert parse_decode("3x100") == Workload("decode 3x100", (1, 1, 1), (100, 100, 100))
    assert parse_prefill("2x16/64") == Workload("prefill 2x16/64", (16, 16), (64, 64))


@pytest.mark.parametrize("text", ["", "4", "4x", "x4", "0x4", "4x0", "-1x4", "4x1.5", "4 x 4", "4x4x4", "٤x4"])
def test_a_decode_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BatchError, match=r"--decode: found .*; must be SEQUENCESxCONTEXT, such as 64x1024"):
        parse_decode(text)


@pytest.mark.parametrize("text", ["", "4x512", "4x512/", "4x512/511", "0x1/1", "1x0/1", "4x512/4096/1"])
def test_a_prefill_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BatchError, match=r"--prefill: found .*; must be SEQUENCESxNEW/END with NEW at most END"):
        parse_prefill(text)


@pytest.mark.parametrize("make", [lambda: parse_decode("99999999999x1"), lambda: parse_prefill(f"{MAX_ROWS + 1}x1/1")])
def test_a_slip_of_the_finger_does_not_fill_the_memory(make: object) -> None:
    with pytest.raises(BatchError, match="must be at most 65536"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("workload", "error", "message"),
    [
        (parse_decode("5x40"), BatchError, "decode 5x40: found 5 sequences; must be at most max_num_seqs .4."),
        (parse_decode(f"{MAX_ROWS}x4096"), BatchError, "found 65536 sequences"),
        (parse_decode("1x513"), BatchError, "has 512 context and 1 new tokens; must be at most 512 in all"),
        (parse_decode("1x99999999999999"), BatchError, "must be an integer from 0 to 2147483647"),
        (parse_prefill("3x16/64"), SelectionError, "48 new tokens; the largest token bucket built is 32"),
    ],
)
def test_a_batch_outside_the_contract_is_refused(workload: Workload, error: type[RpacError], message: str) -> None:
    with pytest.raises(error, match=message):
        workload.batch(LIMITS)


def test_sequences_lie_on_pages_of_their_own_even_where_the_cache_has_fewer() -> None:
    batch = Workload("", (1, 1, 2), (33, 16, 20)).batch(LIMITS)
    pages = [page for row in batch for page in row.pages]
    assert sorted(pages) == list(range(3 + 1 + 2))
    assert batch.kind == "mixed"
    roomy = parse_decode("4x512").batch(Limits(**{**LIMITS.as_dict(), "num_pages": 1, "token_buckets": (8,)}))
    assert [row.kv_len for row in roomy] == [512] * 4


def test_decode_rows_have_as_many_new_tokens_as_the_program_takes() -> None:
    assert parse_decode("2x100", 4) == Workload("decode 2x100", (4, 4), (100, 100))
    with pytest.raises(BatchError, match="found '2x3'; must be of 4 tokens at least"):
        parse_decode("2x3", 4)
    drafting = Limits(**{**LIMITS.as_dict(), "token_buckets": (8, 32), "decode_len": 4})
    assert [one.q_lens for one in expected(drafting, (2, 40))] == [(4,) * 4, (4,) * 4, (16,)]
    assert parse_decode("4x40", 4).batch(drafting).kind == "decode"


def test_a_spec_expects_all_sequences_decoding_and_a_chunk_up_to_each_length() -> None:
    labels = [workload.label for workload in expected(LIMITS, (8, 40, 100))]
    assert labels == [
        "decode 4x8", "decode 4x40", "decode 4x100", "prefill 1x16/40", "prefill 1x16/100"
    ]  # fmt: skip
