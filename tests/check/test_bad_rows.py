"""Wrong numbers of a batch stay in their rows: those get NaN, and nobody else's pages are read or written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mutation import Bug
from small import INTERLEAVED, SEPARATE, SPECS, small_plan
from test_features import KINDS, LAYOUTS, SLOW
from test_poisoned_rows import EVERY, LATENT, plan_of

from rpac.check import check_bad_rows
from rpac.check.arrays import Arguments, make_arguments
from rpac.check.bad_rows import Wrong, contained, rows_of, with_wrong
from rpac.check.batches import neighbors_of
from rpac.check.execute import COMPILED, Outcome, prepare_run
from rpac.contract.program import Source
from rpac.kernels import render
from rpac.plan import KernelPlan
from rpac.spec import Spec

EVERY_KIND = [
    pytest.param(
        spec, kind, id=f"{name}, {kind}", marks=[] if kind == "mixed" and name == "interleaved, plain" else SLOW
    )
    for name, spec in EVERY.items()
    for kind in KINDS
]
IN_INTERPRETER = [
    pytest.param(spec, kind, id=f"{name}, {kind}", marks=[] if name == "interleaved" and kind == "decode" else SLOW)
    for name, spec in {**SPECS, "latent": LATENT, "drafts": EVERY["interleaved, drafts"]}.items()
    for kind in KINDS
]


def failures(spec: Spec, plan: KernelPlan, count: int, source: Source | None = None) -> list[str]:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    results = list(check_bad_rows(spec, plan, source or render(spec, plan), count=count, seed=seed, time_limit=60.0))
    assert len(results) == count + 1
    return [f"{result.batch}: {result.notes or result.races}" for result in results if not result.ok]


def trusting(spec: Spec) -> Spec:
    return replace(spec, serving=replace(spec.serving, bounds_checks=False))


@pytest.mark.parametrize(("spec", "kind"), EVERY_KIND)
def test_a_portable_program_contains_wrong_numbers(spec: Spec, kind: str) -> None:
    assert failures(spec, plan_of(spec, kind), count=10) == []


@pytest.mark.interpreter
@pytest.mark.parametrize(("spec", "kind"), IN_INTERPRETER)
def test_a_kernel_contains_wrong_numbers(spec: Spec, kind: str) -> None:
    plan = small_plan(spec, kind) if spec in SPECS.values() else plan_of(spec, kind, "tpu7x")
    assert failures(spec, plan, count=3) == []


def test_a_program_without_bounds_checks_is_caught() -> None:
    """By one page id: other wrong numbers make such a program run forever."""
    spec = EVERY["interleaved, plain"]
    plan = plan_of(trusting(spec), "decode")
    batch = neighbors_of(spec, plan)
    assert batch is not None
    args = make_arguments(
        spec, batch, plan.tokens[-1], batch.pages(spec.serving.page_size) + 2, np.random.default_rng(0)
    )
    written = (int(args.kv_lens[0]) - 1) // spec.serving.page_size
    spoiled = with_wrong(args, [Wrong("page_indices", written, -1)])
    run = prepare_run(plan, render(trusting(spec), plan))
    assert not contained(spec, "decode", args, run(args, COMPILED), spoiled, run(spoiled, COMPILED)).ok


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_bounds_checks_no_program_shows_a_trace_of_them(layout: str) -> None:
    spec = trusting(SPECS[layout])
    for target in ("cpu", "tpu7x"):
        for kind in KINDS:
            text = render(spec, plan_of(spec, kind, target)).text
            assert not any(name in text for name in ("bad_row", "good_rows", "is_page", "ROW_TOKENS"))


# Bugs of the checks, each in a kernel's source.

IS_PAGE = "physical.astype(jnp.uint32) < jnp.uint32(cache.shape[0])"
PAGE_BUGS = (
    Bug("page ids below zero not checked", "is_page", IS_PAGE, "physical < cache.shape[0]"),
    Bug("page ids past the cache not checked", "is_page", IS_PAGE, "physical >= 0"),
)
DECODE_BUGS = (
    *PAGE_BUGS,
    Bug("lengths past the page table not checked", "DecodeKernel.is_row", "ROW_TOKENS - LEAST_LEN", "2 * ROW_TOKENS"),
    Bug("a bad sequence written", "DecodeKernel.is_good", "left > 0", "left >= 0"),
    Bug(
        "a bad sequence not spoiled",
        "DecodeKernel.write_results",
        "self.good_rows[0] < self.num_seqs",
        "self.num_seqs < 0",
    ),
)
MIXED_BUGS = (
    Bug(
        "a page written for a bad sequence",
        "MixedKernel.check_page",
        "self.bad_row[seq] == 0",
        "self.bad_row[seq] >= 0",
    ),
    Bug(
        "a bad sequence of blocks not spoiled",
        "MixedKernel.store_query_block",
        "self.bad_row[seq] > 0",
        "self.bad_row[seq] > 1",
    ),
    Bug(
        "ends of new tokens past the queries",
        "MixedKernel.check_row",
        "jnp.clip(self.cu_q_lens[seq + 1], start, self.num_tokens())",
        "jnp.maximum(self.cu_q_lens[seq + 1], start)",
    ),
    Bug(
        "lengths of sequences of blocks not checked",
        "MixedKernel.check_row",
        "self.kv_lens[seq] <= ROW_TOKENS",
        "self.kv_lens[seq] >= least",
    ),
    Bug(
        "a distribution that falls",
        "MixedKernel.checked_sequences",
        "jnp.clip(self.distribution[2], first, MAX_SEQS)",
        "self.distribution[2]",
    ),
)
BUGS = [
    *(pytest.param(INTERLEAVED, "decode", bug, id=bug.name) for bug in DECODE_BUGS),
    *(pytest.param(SEPARATE, "mixed", bug, id=f"mixed, {bug.name}") for bug in (*PAGE_BUGS, *MIXED_BUGS)),
]


@pytest.mark.parametrize(("spec", "kind", "bug"), BUGS)
def test_every_bug_is_one_edit_of_its_kernel(spec: Spec, kind: str, bug: Bug) -> None:
    bug.apply(render(spec, small_plan(spec, kind)))


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize(("spec", "kind", "bug"), BUGS)
def test_a_bug_of_the_checks_is_caught(spec: Spec, kind: str, bug: Bug) -> None:
    plan = small_plan(spec, kind)
    assert failures(spec, plan, count=60, source=bug.apply(render(spec, plan))) != []


# What the comparison itself says, of results that are made up.

SPEC = EVERY["interleaved, plain"]


@pytest.fixture(scope="module")
def call() -> Arguments:
    batch = neighbors_of(SPEC, plan_of(SPEC, "decode"))
    assert batch is not None
    return make_arguments(SPEC, batch, 16, batch.pages(SPEC.serving.page_size) + 2, np.random.default_rng(0))


def outcome_of(args: Arguments) -> Outcome:
    return Outcome(np.ones(args.queries.shape, np.float32), args.kv_cache.copy())


def test_a_row_with_a_wrong_page_id_must_be_nan(call: Arguments) -> None:
    spoiled = with_wrong(call, [Wrong("page_indices", 0, -1)])
    clean, found = outcome_of(call), outcome_of(call)
    assert found.out is not None
    difference = contained(SPEC, "decode", call, clean, spoiled, found)
    assert difference.notes == ("attention of row 0 is not NaN, though its numbers cannot be",)
    found.out[0] = np.nan
    assert contained(SPEC, "decode", call, clean, spoiled, found).ok


def test_a_row_with_right_numbers_must_not_change(call: Arguments) -> None:
    spoiled = with_wrong(call, [Wrong("kv_lens", 0, 0)])
    clean, found = outcome_of(call), outcome_of(call)
    assert found.out is not None
    found.out[:2] = np.nan
    difference = contained(SPEC, "decode", call, clean, spoiled, found)
    assert difference.notes == ("attention of row 1 changes, whose numbers are right",)


def test_a_page_of_another_row_must_not_change(call: Arguments) -> None:
    spoiled = with_wrong(call, [Wrong("kv_lens", 0, -1)])
    clean, found = outcome_of(call), outcome_of(call)
    assert found.out is not None and found.kv_cache is not None
    found.out[0] = np.nan
    found.kv_cache[call.page_indices[SPEC.serving.pages_per_seq]] = 0  # of row 1
    difference = contained(SPEC, "decode", call, clean, spoiled, found)
    assert not difference.cache_ok and "1 pages of the cache change" in difference.notes[0]


def test_edges_that_fall_take_no_row_of_a_sequence_before(call: Arguments) -> None:
    args = call._replace(
        cu_q_lens=np.array([0, 1, 9, 5, 12, 99, 99], np.int32), distribution=np.array([1, 1, 5], np.int32)
    )
    rows = rows_of(SPEC, "mixed", args)
    assert rows.end == 5
    assert rows.edges.tolist() == [0, 1, 9, 9, 12, 16, 16]
    assert rows.is_decode.tolist() == [True, False, False, False, False]


def test_a_distribution_that_cannot_be_is_cut(call: Arguments) -> None:
    for distribution, end in (((-5, 0, 2), 0), ((2**31 - 1, 0, 0), INTERLEAVED.serving.max_num_seqs), ((3, -1, -9), 3)):
        args = call._replace(distribution=np.array(distribution, np.int32))
        assert rows_of(SPEC, "decode", args).end == end
