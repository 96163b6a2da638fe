"""What the kernel of query blocks shows: prefill, and the rows of mixed batches that are not decode."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from rpac.contract.arrays import LANES, SUBLANES, align, joins_rows, packing
from rpac.contract.attention import Attention
from rpac.kernels.assemble import Kernel
from rpac.kernels.calls import call_of
from rpac.kernels.constants import Constant, number, tile
from rpac.kernels.model_constants import model_constants
from rpac.kernels.semaphores import BLOCK_SHAPES, window_constants
from rpac.kernels.shared import CLEARED_AT_ONCE, by_head_features, decode_rows, of_kind, scratch_of
from rpac.plan import BlockTiles, KernelPlan, RowDims
from rpac.plan.buffers import new_buffers, page_buffers
from rpac.plan.by_head import SORTED_TOKENS
from rpac.plan.page_table import BlockWindows
from rpac.plan.prefill import PACED_ROWS
from rpac.plan.recipe import BlockRecipe, Recipe
from rpac.spec import Spec

DEINTERLEAVED_ROWS: Final = 512  # bfloat16 rows that are split into K and V at once: 32 registers
SORT_TOKENS: Final = 16  # tokens of a query block that are sorted at once; divides every query block
ONES_ROWS: Final = 16  # of bfloat16: a register of them

_NAMES: Final = {"query_onehot": "query_onehot", "mask_bias": "mask_bias"}
_STATE: Final = {"rows": "Q_ROWS, LANES", "transposed": "SUBLANES, Q_ROWS"}
_SUMMARIES: Final = {
    "prefill": "CHUNK new tokens for each of the sequences [0, distribution[1]).",
    "mixed": "Any number of new tokens for each of the sequences [distribution[0], distribution[2]).",
}


@dataclass(frozen=True)
class QueryBlocks:
    """The ways of a kernel of query blocks that its recipe does not name.

    `walk`: which tiles of a KV block are full and which partial. `full_tiles`: tile after tile, or all at once. `merge`: how
    new tokens get into a page, and `new_rows`: the order in which they come. `q_head_rows`: whether a token's query heads are
    whole sublane tiles. `cleared`: what says which tokens behind a sequence's end are zeroed. `values`: which rows of
    transposed values the MXU takes.
    """

    flash: Literal["plain", "paced"]
    walk: Literal["causal", "local", "lengths"]
    full_tiles: Literal["at_once", "one_by_one"]
    merge: str
    new_rows: Literal["by_token", "by_head"]
    lane_tiles: Literal["one", "several"]
    q_head_rows: Literal["whole", "padded"]
    cleared: Literal["cleared_planes", "cleared_tiles"]
    values: Literal["all", "lower", "upper"]

    @classmethod
    def of(cls, spec: Spec, recipe: BlockRecipe, by_head: tuple[str, ...]) -> QueryBlocks:
        """The ways of a spec's kernel."""
        model = spec.model
        return cls(
            flash="paced" if recipe.pacing else "plain",
            walk="local" if model.late else "causal" if model.causal else "lengths",
            full_tiles="one_by_one" if recipe.read in ("split_words", "split_rows") else "at_once",
            merge="packed" if recipe.write.startswith("packed") else recipe.write,
            new_rows="by_head" if "keys" in by_head else "by_token",
            lane_tiles="one" if RowDims.of(model).lane_tiles == 1 else "several",
            q_head_rows="whole" if model.q_heads % SUBLANES == 0 else "padded",
            cleared="cleared_planes" if recipe.read == "separate" else "cleared_tiles",
            values="all" if not recipe.unpadded_values else "upper" if joins_rows(model) else "lower",
        )

    def own_rows(self, values: str) -> str:
        """Those rows of transposed values that are a head's own, if the MXU takes no others."""
        return values + {"all": "", "lower": "[:HEAD_DIM]", "upper": "[HEAD_DIM:]"}[self.values]


def query_blocks(spec: Spec, plan: KernelPlan, recipe: Recipe) -> Kernel:
    """The prefill or mixed kernel of a plan."""
    tiles, made = plan.block, recipe.block
    assert isinstance(tiles, BlockTiles)
    assert made is not None
    constants = [
        *model_constants(spec, plan),
        *decode_rows(plan),
        *_tile_constants(spec, tiles, made, plan.recipe.by_head),
    ]
    ways = {
        "local": spec.model.late,
        "pipelined": made.pipelined,
        "hbm_table": recipe.page_table == "hbm",
        **by_head_features(recipe),
    }
    context = {
        "features": (*recipe.features, *(way for way, used in ways.items() if used)),
        "call": call_of(spec, plan.kind, recipe),
        "kernel_class": f"{plan.kind.capitalize()}Kernel",
        "summary": _SUMMARIES[plan.kind],
        "block": QueryBlocks.of(spec, made, recipe.by_head),
        "scratch": scratch_of(
            of_kind(plan.kind, tiles.scratch(spec, plan.recipe)), _shapes(spec, plan.recipe), constants, _NAMES
        ),
    }
    return Kernel("skeletons/query_blocks.py.jinja", context, constants, f"{plan.kind.upper()}_")


def _shapes(spec: Spec, recipe: Recipe) -> dict[str, str]:
    """The shape of each scratch array, in constants."""
    assert recipe.block is not None
    separate, transposed = spec.serving.kv_layout == "separate", recipe.block.scores == "transposed"
    state = _STATE[recipe.block.scores]
    step = "TILE, STEP_ROWS" if transposed else "STEP_ROWS, TILE"
    by_token = "Q_BLOCK * PADDED_Q_HEADS, LANES"
    by_head = "MERGE_TOKENS * PADDED_KV_HEADS, LANES"
    if RowDims.of(spec.model).lane_tiles > 1:
        by_token, by_head = f"LANE_TILES, {by_token}", f"LANE_TILES, {by_head}"
    page = "KV_PLANES, KV_HEADS, PAGE_SIZE, HEAD_LANES" if separate else "PAGE_ROWS, LANES"
    block = "BLOCK_PAGES, KV_PLANES, KV_HEADS, PAGE_SIZE, HEAD_LANES" if separate else "KV_BLOCK * TOKEN_ROWS, LANES"
    new = (
        "2 * PAGE_SIZE + NEW_TOKENS, KV_HEADS"
        if "keys" not in recipe.by_head
        else "KV_HEADS, 2 * PAGE_SIZE + NEW_TOKENS"
    )
    new = f"NEW_BUFFERS, {new}, HEAD_DIM"
    queries = "Q_HEADS, Q_BLOCK, HEAD_DIM" if "queries" in recipe.by_head else "Q_BLOCK, Q_HEADS, HEAD_DIM"
    q_rows = "Q_ROWS, HEAD_LANES"
    if recipe.queries_by_lane:
        queries, q_rows = "Q_HEADS, HEAD_DIM, Q_BLOCK", "HEAD_LANES, Q_ROWS"
    words = "TILE // PACKING * WORD_ROWS, LANES"
    return {
        "kv": f"KV_BUFFERS, {block}",
        "k_words": words,
        "v_words": words,
        "row_words": f"PACKING, {words}",
        "new_keys": new,
        "new_values": new,
        "page_rows": f"PAGE_BUFFERS, {page}",
        "packed": "MERGE_TOKENS * WORD_ROWS, LANES",
        "by_head": by_head,
        "q_in": f"KV_BUFFERS, {queries}",
        "by_token": by_token,
        "q_rows": f"KV_HEADS, {q_rows}",
        "query_onehot": "STEP_ROWS, LANES",
        "mask_bias": "DIAGONAL_BLOCKS, ROW_STEPS, DIAGONAL_BLOCK, LANES",
        "next_scores": f"SCORE_BUFFERS, {step}",
        "step_max": "SCORE_BUFFERS, SUBLANES, STEP_ROWS" if transposed else "SCORE_BUFFERS, STEP_ROWS, LANES",
        "sink_rows": "KV_HEADS, SINK_ROWS, LANES",
        "row_max": f"KV_HEADS, {state}",
        "row_sum": f"KV_HEADS, {state}",
        "acc": "KV_HEADS, VALUE_ROWS, Q_ROWS" if transposed else "KV_HEADS, Q_ROWS, HEAD_LANES",
        "out_rows": f"1, {queries}",
        "lse_rows": "Q_BLOCK * PADDED_Q_HEADS, LANES",
        "log_rows": "Q_ROWS, LANES",
        **BLOCK_SHAPES,
        "lse_sem": "1",
    }


def _tile_constants(spec: Spec, tiles: BlockTiles, recipe: BlockRecipe, by_head: tuple[str, ...]) -> list[Constant]:
    """The tiles, and what follows from them."""
    model, page = spec.model, spec.serving.page_size
    rows, block = RowDims.of(model), tiles.diagonal_block(page)
    return [
        tile("Q_BLOCK", tiles.q_block, "query tokens of a query block"),
        tile("Q_ROWS", "GROUP * Q_BLOCK", "their rows of one KV head"),
        tile("KV_BLOCK", tiles.block, "tokens that are fetched at once"),
        tile("BLOCK_PAGES", "KV_BLOCK // PAGE_SIZE"),
        tile("KV_BUFFERS", tiles.buffers, "KV blocks, and query blocks, in VMEM"),
        tile("FETCH_LOOKAHEAD", "KV_BUFFERS - 1", "steps that the fetch runs ahead"),
        tile("COPY_SIZES", tiles.copy_sizes, "tokens: of these is every copy of a query block"),
        tile("STEP_ROWS", tiles.step_rows, "query rows of a flash step"),
        tile("ROW_STEPS", "Q_ROWS // STEP_ROWS", "of a KV head"),
        tile("TILE", tiles.tile, "tokens of a flash step"),
        tile("TILES", "KV_BLOCK // TILE"),
        tile("STEP_HEADS", tiles.heads, "KV heads whose steps are one iteration"),
        tile("ITERATIONS", "KV_HEADS // STEP_HEADS", "of a tile"),
        tile("DIAGONAL_BLOCK", block, "tokens of a flash step where not all of a tile's tokens count"),
        tile("DIAGONAL_BLOCKS", "TILE // DIAGONAL_BLOCK"),
        tile("DIAGONAL_HEADS", tiles.diagonal_heads, "KV heads whose steps are one iteration there"),
        tile("DIAGONAL_ITERATIONS", "KV_HEADS // DIAGONAL_HEADS", "of a diagonal block"),
        *_score_constants(spec, tiles, recipe),
        *_window_constants(model),
        *_order_constants(spec, tiles, recipe),
        tile("TOKENS_APART", "DIAGONAL_BLOCK // PACKING", "two neighbors in a word of a tile that is taken apart"),
        *_deinterleave_constants(block, rows, packing(model.kv_dtype)),
        tile(
            "CLEARED_TILES",
            math.gcd(block // rows.sublane_tile, CLEARED_AT_ONCE),
            "sublane tiles that are zeroed at once",
        ),
        tile("CLEARED_PLANES", "range(KV_PLANES)" if recipe.mask == "matmul" else "(V_PLANE,)"),
        *window_constants(BlockWindows.of_queries(spec, tiles.block, tiles.buffers)),
        tile("PAGE_BUFFERS", page_buffers(tiles.update_lookahead), "pages under update"),
        tile("NEW_BUFFERS", new_buffers(tiles.update_lookahead), "pages whose new tokens are fetched or in use"),
        tile("UPDATE_LOOKAHEAD", tiles.update_lookahead, "pages that their fetch runs ahead"),
        tile("TABLE_ROWS", "UPDATE_LOOKAHEAD + 1", "of the page tables, in SMEM for an update"),
        tile("SORTED_TOKENS", SORTED_TOKENS, "of new keys and values: a copy begins at a multiple of them"),
        tile("NEW_TOKENS", tiles.fetched_new_tokens(by_head), "tokens of such a fetch"),
        tile("MERGE_TOKENS", tiles.merge_tokens, "new tokens that are put into a page at once"),
        tile("MERGE_ROWS", "MERGE_TOKENS * TOKEN_ROWS"),
    ]


def _window_constants(model: Attention) -> list[Constant]:
    if model.sliding_window is None:
        return []
    note = "from a block's first query to its last one's window, rounded up to a tile"
    return [tile("WINDOW_OFFSET", "Q_BLOCK - WINDOW + TILE - 1", note)]


def _score_constants(spec: Spec, tiles: BlockTiles, recipe: BlockRecipe) -> list[Constant]:
    """How far ahead of their use scores are made, and how scores and sums lie."""
    model, transposed = spec.model, recipe.scores == "transposed"
    full, diagonal = recipe.lookahead
    if recipe.pacing is None:
        paced = [tile("SCORE_BUFFERS", "SCORE_LOOKAHEAD")]
    else:
        paced = [
            tile("SCORE_BUFFERS", recipe.pacing.slots, "flash steps whose scores are kept"),
            tile("SCORE_TOKENS", recipe.pacing.tokens, "tokens whose scores are made at once"),
            tile(
                "WAIT_FOR",
                recipe.pacing.wait_for[0],
                "probabilities wait for the scores that are made so many chunks before",
            ),
            tile("DIAGONAL_WAIT_FOR", recipe.pacing.wait_for[1]),
            tile("PACED_ROWS", PACED_ROWS, "rows of probabilities that wait for one register of scores"),
        ]
    partial_sums = recipe.pacing is not None and not transposed
    return [
        tile("SCORE_LOOKAHEAD", full, "flash steps that scores are made ahead"),
        tile("DIAGONAL_LOOKAHEAD", diagonal),
        *paced,
        tile("TOKEN_AXIS", 0 if transposed else 1, "of scores"),
        tile("VALUE_ROWS", "HEAD_DIM" if recipe.unpadded_values else "HEAD_LANES"),
        number("ONES_ROWS", ONES_ROWS, "a register of them"),
        tile("SINK_SUM", "1 / LANES" if partial_sums else "1.0", "what a sink adds to a sum, in every lane"),
        tile("SINK_ROWS", SUBLANES if transposed else align(model.group, SUBLANES)),
    ]


def _order_constants(spec: Spec, tiles: BlockTiles, recipe: BlockRecipe) -> list[Constant]:
    """How the rows of a query block go from their order by token to one by head, and back."""
    model, heads = spec.model, recipe.transposed_heads
    sort_rows = "SORT_TOKENS * Q_HEADS" if recipe.query_order == "strided" else "SORT_TOKENS * GROUP"
    if recipe.query_order in ("by_head", "by_lane"):
        return []
    sort = [
        tile("SORT_TOKENS", SORT_TOKENS, "tokens of a query block that are sorted at once"),
        tile("SORT_STEPS", "Q_BLOCK // SORT_TOKENS"),
        tile("SORT_ROWS", sort_rows),
    ]
    if recipe.query_order == "strided":
        return sort
    # Where rows lie along lanes, whole registers of them are sorted back, several at a time: one hides the other's waits.
    at_once = 2 if recipe.read in ("split_words", "split_rows") else 4
    lanes = recipe.scores == "transposed"
    back = min(at_once * max(LANES // model.group, SORT_TOKENS), tiles.q_block) if lanes else SORT_TOKENS
    pack = packing(model.q_dtype)
    return [
        *sort,
        tile("UNSORT_TOKENS", back, "tokens of the output that are put back in order at once"),
        tile("UNSORT_STEPS", "Q_BLOCK // UNSORT_TOKENS"),
        tile("UNSORT_ROWS", "UNSORT_TOKENS * GROUP"),
        number("TRANSPOSED_HEADS", heads, "KV heads whose queries of one token fill a register"),
        number("TRANSPOSE_DISTANCES", tuple(1 << bit for bit in reversed(range(heads.bit_length() - 1)))),
        number("HEAD_SUBLANES", model.group // pack, "of a register, that one of them has"),
        number("REGISTER_ROWS", SUBLANES * pack, "rows of queries in a register"),
    ]


def _deinterleave_constants(block: int, rows: RowDims, pack: int) -> list[Constant]:
    """How words of K and V are taken apart, some rows of each of the parts that share words at once."""
    part_rows = block // pack * rows.token_rows
    return [
        tile("ROWS_APART", "TOKENS_APART * TOKEN_ROWS"),
        tile("TILE_ROWS", "TILE * TOKEN_ROWS", "rows of a tile in the cache"),
        tile("DIAGONAL_ROWS", "DIAGONAL_BLOCK * TOKEN_ROWS"),
        tile(
            "DEINTERLEAVED_ROWS",
            math.gcd(part_rows, DEINTERLEAVED_ROWS),
            "rows of each part of a word that are taken at once",
        ),
        tile("DEINTERLEAVED_WORDS", "DEINTERLEAVED_ROWS // PACKING"),
        tile("DEINTERLEAVE_STEPS", "ROWS_APART // DEINTERLEAVED_ROWS", "of a diagonal block"),
        tile("PLACE_BITS", pack.bit_length() - 1, "log2(PACKING)"),
    ]
