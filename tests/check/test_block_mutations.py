"""Bugs of prefill and mixed kernels that transpose heads, mask in the matmul and take several iterations a tile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mutation import SEED, Mutation, check_bug, dropped, retiled

from rpac.check import CheckBatch, check_source
from rpac.check.arrays import make_arguments
from rpac.check.compare import compare
from rpac.check.execute import prepare_run
from rpac.contract.attention import Attention
from rpac.contract.program import Source
from rpac.kernels import render
from rpac.oracle.expected import oracle
from rpac.plan import BlockTiles, DecodeBlocks, DecodeWaves, KernelPlan, plan_spec
from rpac.spec import Spec, load_spec

TINY = load_spec(Path(__file__).parents[2] / "specs" / "tiny.yaml")
INTERLEAVED = replace(
    TINY,
    name="wide",
    model=Attention(16, 4, 128, "bfloat16", "bfloat16", 128**-0.5),
    serving=replace(
        TINY.serving,
        page_size=128,
        max_model_len=1664,  # the last queries see whole tiles beyond the first block
        max_num_tokens=256,
        token_buckets=(256,),
        max_num_seqs=6,
        prefill_chunk=64,
        context_lens=(100, 1000),
    ),
)
APART = replace(INTERLEAVED, serving=replace(INTERLEAVED.serving, kv_layout="separate"))
SPECS = {"interleaved": INTERLEAVED, "apart": APART}
# More pages to update than there are buffers for.
SMALL_PAGES = replace(APART, serving=replace(APART.serving, page_size=16))

FEW = [
    Mutation("bias one too far", r"return token <= query$", "return token <= query + 1"),
    Mutation("halves of a register transposed the wrong way", r"low = (.*) == 0$", r"low = \1 != 0"),
    Mutation(
        "next scores of this iteration",
        r"jnp\.minimum\(iteration \+ 1, (?:tiles\.iterations - 1|tiles\.last)\)",
        "iteration",
    ),
]
MASKS = [
    Mutation("bias one short", r"return token <= query$", "return token < query"),
    Mutation("bias of another step", r"rows\.start // STEP_ROWS\]", "1 - rows.start // STEP_ROWS]"),
    Mutation("bias of the first rows", r"self\.first_query \+ kernel\.query_of\(row\) \+", "self.first_query +"),
    Mutation(
        "bias of the first diagonal block",
        r"\(self\.first_block \+ block\) \* DIAGONAL_BLOCK",
        "self.first_block * DIAGONAL_BLOCK",
    ),
    Mutation(
        "the first diagonal block's bias for both",
        r"mask_bias\[lax\.div\(first, DIAGONAL_BLOCK\) - self\.first_block,",
        "mask_bias[0,",
    ),
    Mutation("lane of the next query", r"self\.query_of\(row\) == lane", "self.query_of(row) + 1 == lane"),
    Mutation("rows by head", r"self\.query_of\(row\) == lane", "lax.rem(row, 16) == lane"),
    dropped("clear_tail removed", r"pl\.when\(last\)\(functools\.partial\(self\.clear_tail, buffer, valid\)\)"),
]
ROWS = [
    Mutation(
        "parts rolled too far", r"pltpu\.roll\(b, apart \* HEAD_SUBLANES,", "pltpu.roll(b, apart * HEAD_SUBLANES + 1,"
    ),
    Mutation("parts rolled the wrong way", r"SUBLANES - apart \* HEAD_SUBLANES", "apart * HEAD_SUBLANES"),
    Mutation("a distance left out", r"in TRANSPOSE_DISTANCES:", "in TRANSPOSE_DISTANCES[:1]:"),
    Mutation("sorted in another order", r"q_rows\[first \+ i, rows\]", "q_rows[first + 3 - i, rows]"),
    Mutation("unsorted in another order", r"take_output\(first \+ i, rows\)", "take_output(first + 3 - i, rows)"),
    Mutation("first tokens sorted for all", r"(def sort_tokens.*\n.*\n.*multiple_of\()step", r"\1 0"),
    Mutation("sorted over the first rows", r"(def sort_tokens.*\n.*\n.*\n.*multiple_of\()step", r"\1 0"),
    Mutation("output of the first rows for all", r"(def unsort_tokens.*\n.*\n.*\n.*multiple_of\()step", r"\1 0"),
    Mutation("old sum stays", r"jnp\.where\(begins, 0\.0, (self\.row_sum\[.*\])\)$", r"\1"),
    Mutation("old output stays", r"jnp\.where\(begins, 0\.0, (self\.acc\[.*\])\)$", r"\1"),
    Mutation("begins at every tile", r"tiles\.begins & \(first == tiles\.tile_of\(0\)\[0\]\)", "tiles.begins"),
    Mutation("begins at the first tile of each block", r"(FullTiles\(self, buffer, block) == 0", r"\1 >= 0"),
    Mutation("begins on the diagonal", r"block \+ tile == 0", "block == 0"),
    dropped("maximum not cleared at first", r"self\.clear_all\(\)"),
    Mutation(
        "maximum of the first rows cleared",
        r"rows = pl\.ds\(lax\.rem\(step, ROW_STEPS\) \* STEP_ROWS,",
        "rows = pl.ds(0,",
    ),
    Mutation("maximum of the first heads cleared", r"for_each\(0, KV_HEADS \* ROW_STEPS,", "for_each(0, KV_HEADS,"),
]
STALE_MAXIMUM = dropped("maximum of the block before stays", r"self\.clear_max\(head, rows\)")
ITERATIONS = [
    Mutation(
        "next scores of the iteration before the last",
        r"(jnp\.minimum\(iteration \+ 1, (?:tiles\.iterations - 1|tiles\.last))\)",
        r"\1 - 1)",
    ),
    Mutation("next scores in another order", r"next_scores\[later - len\(steps\)", "next_scores[len(steps) - 1 - i"),
    Mutation("scores of the first iteration", r"tiles\.tile_of\(iteration\)(?=\n *head, rows)", "tiles.tile_of(0)"),
    Mutation("the first scores for all", r"self\.step_scores\(tiles, 0, i\)", "self.step_scores(tiles, 0, 0)"),
    dropped("first scores not made", r"self\.next_scores\[i, :, : tiles\.tokens\] = .*"),
    Mutation("accumulated as the first heads", r"first_head \+ head, rows, begins", "head, rows, begins"),
    Mutation("heads that overlap", r"(lax\.rem\(iteration, ITERATIONS\)) \* STEP_HEADS", r"\1"),
    Mutation(
        "heads that overlap on the diagonal", r"(lax\.rem\(iteration, DIAGONAL_ITERATIONS\)) \* DIAGONAL_HEADS", r"\1"
    ),
    Mutation(
        "an iteration too few on the diagonal", r"blocks \* DIAGONAL_ITERATIONS$", "blocks * DIAGONAL_ITERATIONS - 1"
    ),
    Mutation("full tiles one too many", r"lax\.div\(first_query \+ 1, TILE\)", "lax.div(first_query + 1, TILE) + 1"),
    Mutation(
        "full tiles seen by the second query", r"lax\.div\(first_query \+ 1, TILE\)", "lax.div(first_query + 2, TILE)"
    ),
    Mutation("full tiles past the block", r"(first_query \+ 1, TILE\), 0, TILES)\)", r"\1 + 1)"),
    Mutation("full tiles taken twice", r"for_each\(full, ", "for_each(0, "),
    Mutation("the last tile left out", r"for_each\(full, pl\.cdiv\(valid, TILE\),", "for_each(full, valid // TILE,"),
    Mutation("diagonal blocks of another tile", r"self\.tile \* DIAGONAL_BLOCKS", "self.tile"),
    Mutation(
        "the last diagonal block left out", r"pl\.cdiv\(self\.valid, DIAGONAL_BLOCK\)", "self.valid // DIAGONAL_BLOCK"
    ),
    Mutation("the last diagonal block of a tile left out", r"jnp\.minimum\(DIAGONAL_BLOCKS, pl", "jnp.minimum(1, pl"),
    Mutation(
        "the first diagonal block again",
        r"block = self\.first_block \+ lax\.div\(iteration, DIAGONAL_ITERATIONS\)",
        "block = self.first_block",
    ),
]
UPDATE = [
    dropped(
        "no wait for a cache write before its buffer is used again",
        r"self\.page_write\(seq, page, buffer\)\.wait\(\).*",
    ),
    Mutation("a buffer used again a page too early", r"step >= PAGE_BUFFERS", "step > PAGE_BUFFERS"),
    Mutation(
        "a page of the step after",
        r"load_page\(step \+ UPDATE_LOOKAHEAD,",
        "load_page(step + UPDATE_LOOKAHEAD + 1,",
        hangs=True,
    ),
    Mutation("a page too few at first", r"range\(UPDATE_LOOKAHEAD\)", "range(UPDATE_LOOKAHEAD - 1)", hangs=True),
    Mutation(
        "the oldest of the last cache writes not waited for",
        r"minimum\(steps, PAGE_BUFFERS\)",
        "minimum(steps, PAGE_BUFFERS - 1)",
    ),
]
BLOCK = [*FEW, *MASKS, *ROWS, *ITERATIONS]
BLOCK_APART = [
    *BLOCK,
    Mutation("keys of the tail not cleared", r"cleared_planes = CLEARED_PLANES", "cleared_planes = (V_PLANE,)"),
    Mutation("values of the tail not cleared", r"cleared_planes = CLEARED_PLANES", "cleared_planes = (K_PLANE,)"),
    Mutation(
        "iterations of the first tile", r"self\.first_tile \+ lax\.div\(iteration, ITERATIONS\)", "self.first_tile"
    ),
    Mutation("full tiles of the next", r"(FullTiles\(self, buffer, block == 0,) 0,", r"\1 1,"),
    Mutation("an iteration too few", r"self\.count \* ITERATIONS", "self.count * ITERATIONS - 1"),
    Mutation(
        "scores of this block for the next",
        r"jnp\.where\(self\.goes_on, self\.iterations, self\.iterations - 1\)",
        "self.iterations - 1",
    ),
    Mutation(
        "scores of this block's start for the next", r"jnp\.where\(beyond, lax\.rem.*, self\.buffer\)", "self.buffer"
    ),
    Mutation("next block not waited for", r"(^ *)pl\.when\(self\.goes_on & .*$", r"\1pass"),
    Mutation(
        "next block waited for an iteration late",
        r"(self\.goes_on & )\(iteration == self\.iterations - 1\)",
        r"\1(iteration == self.iterations)",
    ),
]
WORDS = [
    Mutation(
        "a full tile of other words", r"(def take_tile\(.*\n.*\n.*deinterleave_tile\(self\.buffer,) tile", r"\1 0"
    ),
    dropped("words not taken apart on the diagonal", r"self\.kernel\.deinterleave_tile\(self\.buffer, self\.tile\)"),
    Mutation("words of the first diagonal block taken apart for all", r"\+ block \* DIAGONAL_ROWS \+", "+"),
    Mutation("words of the first diagonal block", r"lax\.div\(lax\.rem\(first, TILE\), PACKING\)", "0"),
    Mutation(
        "tokens of a diagonal block by half", r"\(index & 1\) \* TOKENS_APART", "(index & 1) * (TOKENS_APART - 1)"
    ),
]


def small_plan(spec: Spec, kind: str) -> KernelPlan:
    """A chunk is two query blocks, these two steps a head, a tile two iterations and two diagonal blocks, a block two tiles."""
    plan = next(plan for plan in plan_spec(spec, "tpu7x") if plan.kind == kind)
    if isinstance(plan.decode, DecodeBlocks):
        plan = retiled(spec, plan, decode={"block": 128})
    if isinstance(plan.decode, DecodeWaves):
        plan = retiled(spec, plan, decode={"tile": 128, "tiles_per_wave": 2, "lookahead": 2, "write_buffers": 4})
    assert isinstance(plan.block, BlockTiles)
    tiles = {"q_block": 32, "step_rows": 64, "heads": 2, "diagonal_heads": 2, "block": 1024, "tile": 512}
    return retiled(spec, plan, block=tiles)


def cases(layout: str, kind: str, mutations: list[Mutation], *marks: pytest.MarkDecorator) -> list[object]:
    return [
        pytest.param(
            SPECS.get(layout, SMALL_PAGES), kind, mutation, id=f"{kind}, {layout}: {mutation.bug}", marks=marks
        )
        for mutation in mutations
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefill", "mixed"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_without_a_bug_there_is_nothing_to_catch_in_iterations(spec: Spec, kind: str) -> None:
    plan = small_plan(spec, kind)
    assert plan.recipe.block is not None
    assert plan.recipe.block.mask == "matmul"
    failed = [result for result in check_source(spec, plan, render(spec, plan), seed=SEED) if not result.ok]
    assert not failed


@pytest.mark.parametrize(
    ("spec", "kind", "mutation"),
    [
        *cases("interleaved", "prefill", FEW),
        *cases("interleaved", "prefill", WORDS, pytest.mark.slow),
        *cases("apart", "prefill", BLOCK_APART, pytest.mark.slow),
        *cases("small pages", "prefill", UPDATE, pytest.mark.slow),
        # Their kernel is made by the skeleton that makes the prefill kernel.
        *cases("interleaved", "mixed", FEW, pytest.mark.slow),
    ],
)
def test_a_bug_of_iterations_is_caught(spec: Spec, kind: str, mutation: Mutation) -> None:
    check_bug(spec, small_plan(spec, kind), mutation)


def holds_far_above(spec: Spec, plan: KernelPlan, source: Source) -> bool:
    """Whether it holds against the oracle where the first block's scores are far above all others: a maximum that stays is
    seen only where all probabilities of the block after it vanish.
    """
    chunk = spec.serving.prefill_chunk
    batch = CheckBatch("far above", (chunk, chunk), (chunk, chunk), 0, 2)
    args = make_arguments(spec, batch, plan.tokens[-1], batch.pages(128) + 1, np.random.default_rng(SEED))
    args.queries[:chunk] *= 1000
    wanted, cache, _ = oracle(spec.model, "separate", args.of_batch, args.extra)
    found = prepare_run(plan, source)(args, "on_wait")
    assert found.out is not None
    assert found.kv_cache is not None
    return compare(args, found.out, found.kv_cache, wanted, cache, kv_layout="separate").ok


@pytest.mark.parametrize("mutation", [None, STALE_MAXIMUM], ids=["as it is", STALE_MAXIMUM.bug])
def test_scores_far_above_those_of_the_next_block_do_not_reach_it(mutation: Mutation | None) -> None:
    plan = small_plan(APART, "prefill")
    source = render(APART, plan)
    assert holds_far_above(APART, plan, mutation.apply(source) if mutation else source) == (mutation is None)
