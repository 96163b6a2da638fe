"""Likewise of prefill and mixed kernels that exchange parts of registers, mask by the MXU and take turns of heads."""

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
    Mutation("limit one too far", r"where\(token <= query, 0", "where(token <= query + 1, 0"),
    Mutation("halves of a register exchanged the wrong way", r"low = (.*) == 0$", r"low = \1 != 0"),
    Mutation("next scores of this turn", r"jnp\.minimum\(turn \+ 1, (?:turns - 1|last_turn)\)", "turn"),
]
MASKS = [
    Mutation("limit one short", r"where\(token <= query, 0", "where(token < query, 0"),
    Mutation("limits of another step", r"rows\.start // 64\]", "1 - rows.start // 64]"),
    Mutation("limits of the first rows", r"first_query \+ query_of\(row\) \+", "first_query +"),
    Mutation("limits of the first piece", r"\(first_piece \+ piece\) \* 256", "first_piece * 256"),
    Mutation("the first piece's limits for both", r"limits\[lax\.div\(first, 256\) - first_piece,", "limits[0,"),
    Mutation("lane of the next query", r"query_of\(row\) == lane", "query_of(row) + 1 == lane"),
    Mutation("rows by head", r"query_of\(row\) == lane", "lax.rem(row, 16) == lane"),
    dropped("clear_tail removed", r"clear_tail\(slot, valid\)"),
]
ROWS = [
    Mutation("parts rolled too far", r"pltpu\.roll\(b, apart \* 2,", "pltpu.roll(b, apart * 2 + 1,"),
    Mutation("parts rolled the wrong way", r"8 - apart \* 2", "apart * 2"),
    Mutation("an exchange left out", r"for apart in \(2, 1\)", "for apart in (2,)"),
    Mutation("sorted in another order", r"q_rows\[first \+ i, rows\]", "q_rows[first + 3 - i, rows]"),
    Mutation("unsorted in another order", r"outs = \[out_of\(first \+ i\)", "outs = [out_of(first + 3 - i)"),
    Mutation("first tokens sorted for all", r"(def sort\(piece\):\n.*multiple_of\()piece", r"\1 0"),
    Mutation("sorted over the first rows", r"(def sort\(piece\):\n.*\n.*multiple_of\()piece", r"\1 0"),
    Mutation("output of the first rows for all", r"(def unsort\(piece\):\n.*\n.*multiple_of\()piece", r"\1 0"),
    Mutation("old sum stays", r"jnp\.where\(begins, 0\.0, row_sum\[head, rows\]\)", "row_sum[head, rows]"),
    Mutation("old output stays", r"jnp\.where\(begins, 0\.0, acc\[head, rows\]\)", "acc[head, rows]"),
    Mutation("begins at every tile", r"begins & \(first == place\(0\)\[0\]\)", "begins"),
    Mutation("begins at the first tile of each block", r"(plain_tiles\(slot, plain, )block == 0", r"\1 block >= 0"),
    Mutation("begins on the diagonal", r"block \+ tile == 0", "block == 0"),
    dropped("maximum not cleared at first", r"clear_all\(\)(?!:)"),
    Mutation("maximum of the first rows cleared", r"rows = pl\.ds\(lax\.rem\(piece, 2\) \* 64,", "rows = pl.ds(0,"),
    Mutation("maximum of the first heads cleared", r"loop\(KV_HEADS \* 2, one\)", "loop(KV_HEADS, one)"),
]
STALE_MAXIMUM = dropped("maximum of the block before stays", r"(?<=^                )clear\(head, rows\)")
TURNS = [
    Mutation(
        "next scores of the turn before the last", r"(jnp\.minimum\(turn \+ 1, (?:turns - 1|last_turn))\)", r"\1 - 1)"
    ),
    Mutation("next scores in another order", r"next_scores\[later - len\(steps\)", "next_scores[len(steps) - 1 - i"),
    Mutation("scores of the first turn", r"first, head = place\(turn\)", "first, head = place(0)"),
    Mutation("the first scores for all", r"= scores_of\(0, i\)", "= scores_of(0, 0)"),
    dropped("first scores not made", r"next_scores\[i, :, :tokens\] = scores_of\(0, i\)"),
    Mutation("weighed as the first heads", r"first_head \+ head, rows, ", "head, rows, "),
    Mutation("heads that overlap", r"(head = first_tile.*lax\.rem\(turn, 2\)) \* 2", r"\1"),
    Mutation("heads that overlap on the diagonal", r"(return piece \* 256, lax\.rem\(turn, 2\)) \* 2", r"\1"),
    Mutation("a turn too few on the diagonal", r"flash_turns\(pieces \* 2,", "flash_turns(pieces * 2 - 1,"),
    Mutation("plain tiles one too many", r"lax\.div\(seen \+ 1, 512\)", "lax.div(seen + 1, 512) + 1"),
    Mutation("plain tiles seen by the second query", r"lax\.div\(seen \+ 1, 512\)", "lax.div(seen + 2, 512)"),
    Mutation("plain tiles past the block", r"(seen \+ 1, 512\), 0,) 2\)", r"\1 3)"),
    Mutation("plain tiles taken twice", r"lax\.fori_loop\(plain, ", "lax.fori_loop(0, "),
    Mutation("the last tile left out", r"pl\.cdiv\(valid, 512\), diagonal", "valid // 512, diagonal"),
    Mutation("pieces of another tile", r"first_piece = tile \* 2", "first_piece = tile"),
    Mutation("the last piece left out", r"pl\.cdiv\(valid, 256\) - first", "valid // 256 - first"),
    Mutation("the last piece of a tile left out", r"jnp\.minimum\(2, pl", "jnp.minimum(1, pl"),
    Mutation("the first piece again", r"piece = first_piece \+ lax\.div\(turn, 2\)", "piece = first_piece"),
]
UPDATE = [
    dropped("no wait for a cache write before its buffer is used again", r"page_write\(seq, page, slot\)\.wait\(\).*"),
    Mutation("a buffer used again a page too early", r"step >= 9", "step > 9"),
    Mutation("a page of the step after", r"load_page\(step \+ 4,", "load_page(step + 5,", hangs=True),
    Mutation("a page too few at first", r"range\(4\)(?=:\n.* load_page)", "range(3)", hangs=True),
    Mutation("the oldest of the last cache writes not waited for", r"minimum\(steps, 9\)", "minimum(steps, 8)"),
]
BLOCK = [*FEW, *MASKS, *ROWS, *TURNS]
BLOCK_APART = [
    *BLOCK,
    Mutation("keys of the tail not cleared", r"for kind in range\(2\):", "for kind in range(1, 2):"),
    Mutation("values of the tail not cleared", r"for kind in range\(2\):", "for kind in range(1):"),
    Mutation("plain turns of the first tile", r"first_tile \+ lax\.div\(turn, 2\)", "first_tile"),
    Mutation("plain tiles of the next", r"place_from\(0\)", "place_from(1)"),
    Mutation("a plain turn too few", r"turns = count \* 2", "turns = count * 2 - 1"),
    Mutation("scores of this block for the next", r"jnp\.where\(goes_on, turns, turns - 1\)", "turns - 1"),
    Mutation("scores of this block's start for the next", r"jnp\.where\(beyond, lax\.rem.*, slot\)", "slot"),
    Mutation("next block not waited for", r"(^ *)pl\.when\(goes_on & \(turn.*$", r"\1pass"),
    Mutation("next block waited for a turn late", r"(goes_on & )\(turn == turns - 1\)", r"\1(turn == turns)"),
]
WORDS = [
    Mutation("a plain tile of other words", r"(def one\(tile, _\):\n.*split_tile\(slot,) tile", r"\1 0"),
    dropped("words not split on the diagonal", r"(?<=^        )split_tile\(slot, tile\)"),
    Mutation("words of the first piece split for all", r"\+ piece \* \d+ \+ part", "+ part"),
    Mutation("words of the first piece", r"lax\.div\(lax\.rem\(first, 512\), 2\)", "0"),
    Mutation("tokens of a piece by half", r"\(index & 1\) \* 128", "(index & 1) * 127"),
]


def small_plan(spec: Spec, kind: str) -> KernelPlan:
    """A plan by which a chunk is two query blocks, these two steps a head, a tile two turns and two pieces, a block two tiles."""
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
def test_without_a_bug_there_is_nothing_to_catch_by_turns(spec: Spec, kind: str) -> None:
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
        # Their kernel is made by the template that makes the prefill kernel.
        *cases("interleaved", "mixed", FEW, pytest.mark.slow),
    ],
)
def test_a_bug_of_turns_is_caught(spec: Spec, kind: str, mutation: Mutation) -> None:
    check_bug(spec, small_plan(spec, kind), mutation)


def holds_far_above(spec: Spec, plan: KernelPlan, source: Source) -> bool:
    """Whether it holds against the oracle where the first block's scores are far above all others: a maximum that stays is
    seen only where all weights of the block after it vanish.
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
