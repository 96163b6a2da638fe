"""Which program a batch is said to run on, and why."""

from __future__ import annotations

import pytest
from command import TINY

from rpac.batch import Limits
from rpac.contract.program import Variant
from rpac.plan.planner import kinds_of
from rpac.spec import load_spec
from rpac.traffic.explain import explain
from rpac.traffic.trace import Workload

SPEC = load_spec(TINY)
LIMITS = Limits.of(SPEC)
BUILT = frozenset(Variant(kind, n) for n in LIMITS.token_buckets for kind in kinds_of(SPEC, n))


@pytest.mark.parametrize(
    ("q_lens", "program", "distribution", "reason"),
    [
        ((1, 1), "decode/8", (2, 2, 2), "decode: every sequence has 1 new token"),
        ((16, 16), "prefill/32", (0, 2, 2), "prefill: every sequence has a prefill chunk of 16 new tokens"),
        (
            (1, 16, 5),
            "mixed/32",
            (1, 2, 3),
            "mixed: the batch is neither all decode rows nor all prefill chunks (1 with 1 new token, 1 with a prefill chunk "
            "of 16 new tokens, 1 with another number of new tokens)",
        ),
    ],
)
def test_a_batch_has_the_program_that_the_engine_selects(
    q_lens: tuple[int, ...], program: str, distribution: tuple[int, int, int], reason: str
) -> None:
    found = explain(BUILT, LIMITS, Workload("a batch", q_lens, q_lens))
    assert (str(found.program), found.distribution) == (program, distribution)
    assert found.reasons[0] == reason
    bucket = found.program.tokens if found.program else 0
    assert f"{bucket} query rows: the smallest of the token buckets 8, 32 that holds {sum(q_lens)}" in found.reasons[1]
    assert f"{bucket - sum(q_lens)} rows" in found.reasons[1]


def test_a_batch_that_is_too_large_has_the_lines_that_would_add_it() -> None:
    found = explain(BUILT, LIMITS, Workload("a batch", (40,), (40,)))
    assert found.program is None
    assert "token_buckets: [8, 32, 40]" in found.reasons[0]


def test_a_program_that_was_not_built_is_none() -> None:
    found = explain(BUILT - {Variant("prefill", 32)}, LIMITS, Workload("a batch", (16, 16), (16, 16)))
    assert found.program is None
    assert found.distribution == (0, 2, 2)
    assert "the batch needs the program prefill/32" in found.reasons[0]
