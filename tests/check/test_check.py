"""What the check runs, what it holds against what, and what it says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mutation import Bug, retiled
from small import blocks_plan

from rpac.check import CheckBatch, CheckReport, CompileResult, Result, batches_of, check_source, check_spec, run
from rpac.check.arrays import GARBAGE, Arguments, make_arguments
from rpac.check.compare import TOLERANCE, compare, lse_notes
from rpac.contract.program import HEADER_END, Source
from rpac.errors import CheckError
from rpac.kernels import render
from rpac.oracle import attention as reference
from rpac.plan import DecodeWaves, KernelPlan, plan_spec
from rpac.spec import Spec, load_spec

SPECS = Path(__file__).parents[2] / "specs"
SHIPPED = [part for path in sorted(SPECS.glob("*.yaml")) for part in load_spec(path).parts]
TINY = load_spec(SPECS / "tiny.yaml")
SEPARATE = replace(TINY, serving=replace(TINY.serving, kv_layout="separate"))
each_layout = pytest.mark.parametrize("spec", [TINY, SEPARATE], ids=lambda spec: spec.serving.kv_layout)
PAGES = 40
MIXED = CheckBatch("mixed", q_lens=(1, 5, 3), kv_lens=(17, 5, 40), decodes=1)


def serving(targets: tuple[str, ...] = TINY.targets, **changes: object) -> Spec:
    """tiny, served otherwise."""
    return replace(TINY, serving=replace(TINY.serving, **changes), targets=targets)


def plan_of(spec: Spec, kind: str, target: str = "tpu7x") -> KernelPlan:
    return next(plan for plan in plan_spec(spec, target) if plan.kind == kind)


def batches(spec: Spec, plan: KernelPlan, random_batches: int = 3) -> tuple[CheckBatch, ...]:
    return batches_of(spec, plan, np.random.default_rng(0), random_batches)


def arguments(batch: CheckBatch = MIXED, spec: Spec = TINY) -> Arguments:
    return make_arguments(spec, batch, spec.serving.token_buckets[-1], PAGES, np.random.default_rng(0))


# ---- batches


def name_of(spec: Spec) -> str:
    return f"{spec.name} {spec.layer}".strip()


ODD = [
    TINY,
    serving(max_num_seqs=1),
    serving(max_num_seqs=32, token_buckets=(32,)),
    serving(token_buckets=(1, 2, 32), max_num_seqs=2),
    serving(prefill_chunk=32),
    serving(prefill_chunk=1, targets=("cpu",)),
    serving(prefill_chunk=31, targets=("cpu",)),
    serving(max_model_len=48, context_lens=(48,)),
    serving(page_size=256, max_model_len=256, context_lens=(256,)),
    serving(page_size=16, max_model_len=16, prefill_chunk=16, context_lens=(1,)),
    serving(kv_layout="separate"),
    serving(kv_layout="separate", max_num_seqs=1, max_model_len=2064),
    serving(kv_layout="separate", token_buckets=(1, 2, 32), page_size=256, max_model_len=2304),
    *SHIPPED,
]


@pytest.mark.parametrize("target", ["tpu7x", "cpu"])
@pytest.mark.parametrize("spec", ODD, ids=name_of)
def test_every_batch_is_one_that_its_program_may_be_given(spec: Spec, target: str) -> None:
    for plan in plan_spec(spec, target) if target in spec.targets else ():
        found = batches(spec, plan)
        assert len({batch.name for batch in found}) == len(found)
        for batch in found:
            assert batch.new_tokens <= plan.tokens[-1]
            decodes, prefills_end, count = batch.distribution
            if plan.kind == "decode":
                assert decodes == count
            if plan.kind == "prefill":
                assert decodes == 0 and prefills_end == count
            if spec.serving.max_model_len <= 512:  # the arrays of real models are large
                tokens = next(bucket for bucket in plan.tokens if bucket >= batch.new_tokens)
                pages = batch.pages(spec.serving.page_size)
                make_arguments(
                    spec, batch, tokens, pages, np.random.default_rng(0)
                )  # raises where the contract is broken


@pytest.mark.parametrize("target", ["tpu7x", "cpu"])
@pytest.mark.parametrize("spec", SHIPPED, ids=name_of)
def test_decode_batches_hold_every_edge_length(spec: Spec, target: str) -> None:
    plan = plan_of(spec, "decode", target)
    assert plan.decode is not None
    found = batches(spec, plan)
    lengths = {length for batch in found for length in batch.kv_lens}
    group = plan.decode.tiles_per_wave * plan.decode.tile if isinstance(plan.decode, DecodeWaves) else plan.decode.block
    sizes = {spec.serving.page_size, group, getattr(plan.decode, "tile", group)}
    edges = {1, *(size + off for size in sizes for off in (-1, 0, 1)), spec.serving.max_model_len}
    assert {edge for edge in edges if edge <= spec.serving.max_model_len} <= lengths
    counts = {len(batch.q_lens) for batch in found}
    assert {0, 1, spec.serving.max_num_seqs} <= counts
    assert any(batch.shared_pages for batch in found) or group <= spec.serving.page_size


@pytest.mark.parametrize("step", [2, 6])
def test_decode_batches_of_groups_fill_some_to_the_last_token_and_use_all_buffers_again(step: int) -> None:
    spec = load_spec(SPECS / "llama3-8b-separate.yaml")
    plan = plan_of(spec, "decode")
    assert isinstance(plan.decode, DecodeWaves)
    plan = retiled(spec, plan, decode={"tiles_per_wave": step, "lookahead": 3})
    tiles = plan.decode
    assert isinstance(tiles, DecodeWaves)
    found = batches(spec, plan)
    assert any(batch.kv_lens[0] % (tiles.tiles_per_wave * tiles.tile) == 0 for batch in found if batch.kv_lens)
    in_flight = tiles.wave_buffers * tiles.tiles_per_wave
    assert any(sum(-(-length // tiles.tile) for length in batch.kv_lens) > in_flight for batch in found)
    # Where a page table ends within a tile, only the last row could read past it.
    full = spec.serving.max_num_seqs, spec.serving.max_model_len
    assert full in {(len(batch.kv_lens), batch.kv_lens[-1]) for batch in found if batch.kv_lens}


def test_batches_of_groups_too_long_for_any_row_leave_out_whole_ones() -> None:
    plan = plan_of(SEPARATE, "decode")
    assert isinstance(plan.decode, DecodeWaves)
    tiles = SEPARATE.serving.max_model_len // plan.decode.tile + 1
    plan = replace(plan, decode=replace(plan.decode, tiles_per_wave=tiles))
    assert "whole groups" not in {batch.name for batch in batches(SEPARATE, plan)}


@pytest.mark.parametrize("target", ["tpu7x", "cpu"])
@pytest.mark.parametrize("kind", ["prefill", "mixed"])
@pytest.mark.parametrize("spec", SHIPPED, ids=name_of)
def test_other_batches_end_around_pages_tiles_and_blocks(spec: Spec, kind: str, target: str) -> None:
    serving = spec.serving
    for plan in plan_spec(spec, target):
        if plan.kind != kind:
            continue
        assert plan.block is not None
        found = batches(spec, plan)
        ends = [kv for batch in found for q, kv in zip(batch.q_lens, batch.kv_lens, strict=True) if q > 1]
        for size in (serving.page_size, getattr(plan.block, "tile", plan.block.block), plan.block.block):
            for off in (-1, 0, 1):
                reached = any((end - off) % size == 0 for end in ends)
                assert reached or size + off > serving.max_model_len, (plan.path, size, off)
        assert serving.max_model_len in ends
        assert 0 in {len(batch.q_lens) for batch in found}
        assert any(batch.shared_pages for batch in found)
        if kind == "mixed":
            q_lens = {q for batch in found for q in batch.q_lens[batch.decodes :]}
            buckets = {min(plan.block.q_block + off, plan.tokens[0]) for off in (-1, 0, 1)}
            assert {1, *buckets} <= q_lens
            assert any(batch.new_tokens in plan.tokens for batch in found), "a full bucket"
            assert any(batch.decodes == len(batch.q_lens) > 0 for batch in found), "only decode rows"
            assert serving.max_num_seqs in {len(batch.q_lens) for batch in found}
            if plan.tokens[-1] > 2 * serving.prefill_chunk:
                parts = {tuple(np.diff([0, *batch.distribution]) > 0) for batch in found}
                assert {(True, True, True), (False, True, False), (False, False, True)} <= parts
                assert {serving.prefill_chunk - 1, serving.prefill_chunk + 1} <= q_lens


def test_a_seed_gives_the_same_random_batches_again() -> None:
    plan = plan_of(TINY, "mixed")
    assert batches(TINY, plan) == batches(TINY, plan)
    assert batches(TINY, plan) != batches_of(TINY, plan, np.random.default_rng(1), 3)


# ---- arrays


def by_token(spec: Spec, cache: np.ndarray) -> np.ndarray:
    """A view `[pages, page_size, 2 * kv_heads, head_dim]` of a cache of tiny's, in the spec's layout."""
    if spec.serving.kv_layout == "separate":
        return cache.transpose(0, 3, 1, 2, 4)
    return cache


@each_layout
def test_what_nothing_may_read_is_poison(spec: Spec) -> None:
    args = arguments(spec=spec)
    for array in args.by_token.values():
        assert np.isfinite(array[:9].astype(np.float32)).all()
        assert np.isnan(array[9:].astype(np.float32)).all()
    table = args.page_indices.reshape(TINY.serving.max_num_seqs, -1)
    cache = by_token(spec, args.kv_cache).astype(np.float32)
    readable = np.zeros((PAGES, 16), bool)
    for row, context in enumerate((16, 0, 37)):
        for position in range(context):
            readable[table[row, position // 16], position % 16] = True
    np.testing.assert_array_equal(np.isfinite(cache).all(axis=(2, 3, 4)), readable)
    assert np.isnan(cache[~readable]).all()
    for live, row in ((2, 0), (1, 1), (3, 2), (0, 3)):
        assert set(table[row, live:].tolist()) <= set(GARBAGE)
    assert set(args.kv_lens[3:].tolist()) | set(args.cu_q_lens[4:].tolist()) <= set(GARBAGE)


def test_pages_are_shuffled_and_those_of_a_prefix_are_shared() -> None:
    shared = CheckBatch("shared", q_lens=(1, 2), kv_lens=(70, 90), decodes=1, shared_pages=3)
    table = arguments(shared).page_indices.reshape(TINY.serving.max_num_seqs, -1)
    first, second = table[0, :5].tolist(), table[1, :6].tolist()
    assert first[:3] == second[:3]
    assert len({*first, *second}) == 8
    assert first != sorted(first)


# ---- comparison


def judged(change: Callable[[np.ndarray, np.ndarray], None], spec: Spec = TINY) -> tuple[bool, str]:
    """Whether the oracle's own results pass after a change of output or cache, and the notes."""
    args, kv_layout = arguments(spec=spec), spec.serving.kv_layout
    want_out, want_cache = reference.ragged_paged_attention(
        *args.of_batch, sm_scale=TINY.model.sm_scale, kv_layout=kv_layout
    )
    out, cache = want_out.astype(args.queries.dtype), want_cache.copy()
    change(out, cache)
    found = compare(args, out, cache, want_out, want_cache, kv_layout=kv_layout)
    return found.ok, "; ".join(found.notes)


def test_the_oracle_rounded_to_the_output_dtype_passes() -> None:
    assert judged(lambda out, cache: None) == (True, "")


def test_an_lse_that_is_off_or_missing_fails_and_is_named() -> None:
    args = arguments()
    _, _, want = reference.attention_with_lse(*args.of_batch, sm_scale=TINY.model.sm_scale)
    assert lse_notes(args, want, want) == ()
    assert lse_notes(args, None, want) == ("the program returns no lse",)
    for value in (want[7, 2] + 0.01, np.nan, -np.inf):
        lse = want.copy()
        lse[7, 2] = value
        (note,) = lse_notes(args, lse, want)
        assert note.startswith("lse of query head 2 at row ")


def test_padding_rows_of_the_output_are_not_compared() -> None:
    def change(out: np.ndarray, cache: np.ndarray) -> None:
        out[9:] = np.nan

    assert judged(change) == (True, "")


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_one_bad_head_of_one_token_fails_and_is_named(value: float) -> None:
    def change(out: np.ndarray, cache: np.ndarray) -> None:
        out[7, 2] = value

    ok, notes = judged(change)
    assert not ok
    assert notes.startswith("attention of query head 2 at row 2, position 38 is off by ")


def test_an_output_off_by_little_more_than_the_tolerance_fails() -> None:
    def scaled(by: float) -> Callable[[np.ndarray, np.ndarray], None]:
        def change(out: np.ndarray, cache: np.ndarray) -> None:
            out[3] = (out[3].astype(np.float32) * by).astype(out.dtype)

        return change

    assert judged(scaled(1 + TOLERANCE["bfloat16"] / 2))[0]
    assert not judged(scaled(1 + TOLERANCE["bfloat16"] * 2))[0]


@each_layout
@pytest.mark.parametrize(
    ("row", "position", "kind"),
    [(2, 39, "new"), (2, 5, "old"), (2, 40, "past its end"), (None, None, "of no sequence")],
)
def test_one_flipped_bit_of_the_cache_fails_and_its_place_is_named(
    row: int | None, position: int, kind: str, spec: Spec
) -> None:
    table = arguments(spec=spec).page_indices.reshape(TINY.serving.max_num_seqs, -1)
    if row is None:
        live = {*table[0, :2].tolist(), *table[1, :1].tolist(), *table[2, :3].tolist()}
        page, slot = next(page for page in range(PAGES) if page not in live), 0
    else:
        page, slot = int(table[row, position // 16]), position % 16

    def change(out: np.ndarray, cache: np.ndarray) -> None:
        by_token(spec, cache.view(np.uint16))[page, slot, 0, 1, 7] ^= 1

    ok, notes = judged(change, spec)
    assert not ok
    assert notes.startswith(f"cache differs in 1 tokens, first at page {page}, slot {slot}: ")
    assert notes.endswith(f"({kind})" if row is not None else kind)


# ---- runs


@each_layout
def test_the_portable_programs_of_tiny_pass(spec: Spec) -> None:
    report = check_spec(spec, targets=["cpu"])
    print(report.table())
    assert {result.kind for result in report.results} == {"decode", "prefill", "mixed"}
    assert {result.mode for result in report.results} == {"compiled"}
    assert not report.failed


@pytest.mark.interpreter
@pytest.mark.parametrize("kinds", [["decode"], pytest.param(["decode", "prefill", "mixed"], marks=pytest.mark.slow)])
def test_the_kernels_of_tiny_pass_in_both_modes_once_for_all_targets_that_share_them(kinds: list[str]) -> None:
    report = check_spec(TINY, targets=["tpu7x", "v6e"], kinds=kinds, random_batches=1)
    print(report.table())
    assert not report.failed
    assert {result.kind for result in report.results} == set(kinds)
    assert {result.mode for result in report.results} == {"eager", "on_wait"}
    assert {result.targets for result in report.results} == {("tpu7x", "v6e")}
    rows_with_poison = [result for result in report.results if result.batch.startswith("neighbors, ")]
    with_wrong_numbers = [result for result in report.results if "] = " in result.batch]
    compared = [*rows_with_poison, *with_wrong_numbers]
    assert {result.kind for result in rows_with_poison} == {result.kind for result in with_wrong_numbers} == set(kinds)
    assert all(result.error == result.tolerance == 0 for result in compared)
    others = [result for result in report.results if result.batch != "empty" and result not in compared]
    assert all(result.error < result.tolerance for result in others)
    # A random batch may be one token long, and then its attention is exact.
    assert all(result.error > 0 for result in others if not result.batch.startswith("random"))


def test_kinds_choose_what_is_checked_and_processes_change_nothing() -> None:
    alone = check_spec(TINY, targets=["cpu"], kinds=["decode", "prefill"], seed=3)
    beside = check_spec(TINY, targets=["cpu"], kinds=["decode", "prefill"], seed=3, jobs=2)

    def rows(report: CheckReport) -> list[tuple[object, ...]]:
        return [(r.source, r.batch, r.error, r.cache_ok) for r in report.results]

    assert rows(alone) == rows(beside)
    assert {result.kind for result in alone.results} == {"decode", "prefill"}


def test_processes_hand_back_each_result_as_it_comes() -> None:
    came: dict[str, float] = {}

    def progress(row: Result | CompileResult) -> None:
        assert isinstance(row, Result)
        came[row.batch] = time.monotonic()

    report = check_spec(TINY, targets=["cpu"], kinds=["decode"], seed=3, jobs=2, progress=progress)
    assert set(came) == {result.batch for result in report.results}
    # All at once at the end, they would come in no time.
    assert max(came.values()) - min(came.values()) > sum(result.seconds for result in report.results[1:]) / 2


def test_a_checking_process_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def deadly(spec: Spec, plan: KernelPlan) -> Source:
        return replace(render(spec, plan), text=f"""\"\"\"Deadly.{HEADER_END}import os\nos._exit(1)\n""")

    monkeypatch.setattr(run, "render", deadly)
    with pytest.raises(CheckError, match="a checking process died"):
        check_spec(TINY, targets=["cpu"], kinds=["decode", "prefill"], jobs=2)


def test_a_seed_is_drawn_and_reported_where_none_is_given() -> None:
    one, other = (check_spec(TINY, targets=["cpu"], kinds=["decode"], random_batches=0) for _ in range(2))
    assert one.seed != other.seed
    assert f"(seed {one.seed})" in one.summary()


def test_a_kernel_that_cannot_be_loaded_fails_and_does_not_raise() -> None:
    plan = plan_of(TINY, "decode")
    results = list(check_source(TINY, plan, Source(plan.path, "import no_such_module"), random_batches=0))
    assert results
    assert all(result.notes == ("raised No module named 'no_such_module'",) for result in results)


@pytest.mark.interpreter
def test_after_a_kernel_that_raised_the_next_one_runs_as_if_nothing_were() -> None:
    # With bounds checks a page id from behind the table's end would be a wrong one like any other.
    spec = replace(TINY, serving=replace(TINY.serving, bounds_checks=False))
    plan = blocks_plan(spec)
    source = render(spec, plan)
    batch = CheckBatch("short", (1, 1), (17, 3), 2)
    entry = "entry + block * self.block_pages"
    outside = Bug("pages past the table's end", "PagedKernel.start_block", entry, f"{entry} + BLOCK_PAGES").apply(
        source
    )
    (bad,) = check_source(spec, plan, outside, batches=[batch], modes=["eager"])
    assert "Out-of-bounds read" in bad.notes[0]
    assert not bad.ok
    (good,) = check_source(spec, plan, source, batches=[batch], modes=["eager"])
    assert good.ok


@pytest.mark.interpreter
def test_an_output_that_is_not_waited_for_shows_where_copies_are_made_late() -> None:
    """The two modes are two: both run what was compiled once."""
    plan = blocks_plan(TINY)
    source = render(TINY, plan)
    wait = "self.out_copy(self.num_seqs - 1 - index).wait()"
    hasty = Bug("no wait for the last outputs", "DecodeKernel.drain", wait).apply(source)
    batch = CheckBatch("short", (1, 1), (17, 3), 2)
    eager, on_wait = check_source(TINY, plan, hasty, batches=[batch])
    assert eager.error < eager.tolerance, "it was written when the copy was started"
    # One race, which the interpreter misses in one run of some twenty; what was not waited for it always counts.
    assert len(eager.races) <= 1
    assert any("non-zero count" in note for note in eager.notes)
    assert not eager.ok
    assert math.isinf(on_wait.error), "it was never written"
