"""Selection is total over the contract, and substitutes nothing."""

from __future__ import annotations

import itertools
import timeit
from pathlib import Path
from typing import Any

import pytest
from calls import BUILT, LIMITS, batch_of

from rpac.batch.select import select
from rpac.contract.program import Variant
from rpac.engine import load
from rpac.errors import BatchError, SelectionError


def test_select_is_total() -> None:
    """Over every distribution of up to max_num_seqs sequences and every number of rows."""
    chosen = set()
    for (i, j, k), tokens in itertools.product(itertools.product(range(5), repeat=3), range(34)):
        if not i <= j <= k:
            with pytest.raises(BatchError, match=r"must be 0 <= i <= j <= k"):
                select(BUILT, LIMITS, tokens, (i, j, k))
        elif tokens in LIMITS.token_buckets and (tokens == 32 or not (i == 0 < j == k)):
            variant = select(BUILT, LIMITS, tokens, (i, j, k))
            assert variant in BUILT
            assert variant.tokens == tokens
            chosen.add(variant)
        else:
            with pytest.raises(SelectionError, match="or build with\nserving:\n  "):
                select(BUILT, LIMITS, tokens, (i, j, k))
    assert chosen == BUILT


@pytest.mark.parametrize(
    ("tokens", "distribution", "text"),
    [
        (
            24,
            (2, 2, 2),
            "has 24 query rows; the token buckets built are 8, 32; pad queries, keys and values to one of them, "
            "or build with\nserving:\n  max_num_tokens: 32\n  token_buckets: [8, 24, 32]",
        ),
        (96, (0, 0, 2), "max_num_tokens: 96\n  token_buckets: [8, 32, 96]"),
        (8, (5, 5, 5), "max_num_seqs is 4; split the batch, or build with\nserving:\n  max_num_seqs: 5"),
        (8, (0, 1, 1), "pad to a larger bucket, or build with\nserving:\n  prefill_chunk: 8"),
    ],
)
def test_what_was_not_built_is_refused_with_the_lines_that_add_it(
    tokens: int, distribution: tuple[int, int, int], text: str
) -> None:
    with pytest.raises(SelectionError) as raised:
        select(BUILT, LIMITS, tokens, distribution)
    assert text in str(raised.value)


def test_a_program_that_a_bundle_lacks_is_never_substituted() -> None:
    with pytest.raises(SelectionError, match="needs the program decode/8; this bundle holds mixed/8; build the spec"):
        select({Variant("mixed", 8)}, LIMITS, 8, (1, 1, 1))


@pytest.mark.parametrize(
    ("kind", "tokens", "text"),
    [
        ("decod", 8, "'decod' is no kind of program; must be one of decode, prefill, mixed; write 'decode'"),
        ("Prefill", 32, "write 'prefill'"),
        (3, 8, "3 is no kind of program; must be one of decode, prefill, mixed"),
        ("decode", "8", "the token bucket is '8'; must be an integer, of 8, 32"),
        ("decode", 9, "the token buckets built are 8, 32"),
    ],
)
def test_a_program_that_there_cannot_be_is_not_to_be_built(bundle: Path, kind: Any, tokens: Any, text: str) -> None:
    engine = load(bundle, target="cpu")
    for ask in (lambda: engine.program(kind, tokens), lambda: engine.warm([Variant(kind, tokens)])):
        with pytest.raises(SelectionError) as raised:
            ask()
        assert text in str(raised.value)
        assert "build the spec again" not in str(raised.value)


@pytest.mark.parametrize("variants", [["decode"], ["de"], [8], "decode"])
def test_what_is_no_variant_cannot_be_warmed(bundle: Path, variants: Any) -> None:
    with pytest.raises(SelectionError, match=r"is no program; must be a variant such as Variant\('decode', 8\)"):
        load(bundle, target="cpu").warm(variants)


def test_selection_takes_under_20_microseconds(bundle: Path) -> None:
    engine = load(bundle, target="cpu")
    distribution = batch_of([1, 16, 3]).distribution
    best = min(timeit.repeat(lambda: engine.select(32, distribution), number=500, repeat=20)) / 500
    assert best < 20e-6
