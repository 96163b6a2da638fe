"""Prefill and mixed batches, by blocks of queries: tiles, recipe, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from rpac.contract.arrays import LANES, SUBLANES, align, head_lanes, joins_rows, kv_page_shape, nbytes, packing
from rpac.contract.attention import Attention
from rpac.devices.chip import Chip
from rpac.plan.access import read_of, write_of
from rpac.plan.bounds import query_checks
from rpac.plan.buffers import (
    MERGE_TOKENS,
    SHORTER_LOOKAHEADS,
    UPDATE_LOOKAHEAD,
    Buffer,
    RowDims,
    lse_rows,
    lse_sem,
    needed,
    new_buffers,
    new_dtype,
    page_buffers,
    sink_rows,
    split_buffers,
    sublane_tile_tokens,
    word_dtype,
)
from rpac.plan.by_head import SORTED_TOKENS, laid_out_by_head
from rpac.plan.page_table import query_windows
from rpac.plan.recipe import SPLIT, BlockMask, BlockRecipe, Chooser, QueryOrder, Read, Recipe, Scores, SoftmaxPacing
from rpac.plan.sizes import copy_sizes_of, largest_divisor, power_of_two_from, visible_tokens
from rpac.spec import Spec

MIN_Q_BLOCK: Final = 16
Q_BLOCKS: Final = (256, 128, 64, 32, MIN_Q_BLOCK)
STEP_ROWS: Final = 256  # query rows of a flash step: with fewer, pushing K and V into the MXU shows
# Tokens of a flash step. Where a head fills a wide MXU, its vector work must be less for each score: a longer step,
# LONG_TILE, moves the running state less often.
TILE: Final = 512
LONG_TILE: Final = 1024
# Tokens, if whole pages: a tile on the diagonal is computed by blocks, of no fewer than the MXU is wide; of a long tile by
# longer ones, because what a step costs by itself is more.
DIAGONAL_BLOCK: Final = 256
LONG_DIAGONAL_BLOCK: Final = 512
# Flash steps that are one piece of code, because the units wait at its ends; and those on the diagonal.
MOST_STEPS: Final = (32, 16)
# Where code is scarce: a narrow MXU takes twice as much for a matmul, and splitting words takes much by itself.
FEWER_STEPS: Final[Mapping[str, tuple[int, int]]] = {"prefill": (16, 8), "mixed": (4, 2)}

LOOKAHEAD: Final = (
    3  # flash steps whose scores are made before their probabilities: as many as keep the MXU busy meanwhile
)
LOOKAHEAD_SCORES: Final = 3 * 256 * 512  # of them all: more are moved in and out of registers more often than it helps
STEPS_PER_SCORE: Final = 2  # at least: scores made ahead are code too
# Where softmax is paced: the lookahead; the steps whose scores are kept, a power of two above it, so that the steps of an
# iteration come out even; and the scores that probabilities wait for, the third last that are made.
PACED_LOOKAHEAD: Final = 2
PACED_SLOTS: Final = 4
PACED_WAIT: Final = 3
PACED_ROWS: Final = 32  # rows of probabilities that wait for one register of scores
# The same for transposed scores, with a longer lookahead on the diagonal.
TRANSPOSED_LOOKAHEAD: Final = 3
TRANSPOSED_DIAGONAL_LOOKAHEAD: Final = 6
TRANSPOSED_SLOTS: Final = 8


@dataclass(frozen=True)
class BlockTiles:
    """Tiles of a prefill or mixed kernel, in tokens.

    `step_rows` are query rows (tokens times group) of one flash step; `heads` the KV heads whose steps are one piece of code,
    and `diagonal_heads` those on the diagonal. `spare_mxu_lanes`: the MXU is wider than a head, with room for
    128 more lanes. `update_lookahead`: pages whose new tokens are fetched before they are merged.
    """

    q_block: int
    block: int
    tile: int
    step_rows: int
    heads: int
    diagonal_heads: int
    buffers: int
    merge_tokens: int
    new_tokens: int
    copy_sizes: tuple[int, ...]
    spare_mxu_lanes: bool
    update_lookahead: int = UPDATE_LOOKAHEAD

    @property
    def long(self) -> bool:
        """Whether a head fills a wide MXU, and steps are long for it."""
        return self.tile == LONG_TILE and not self.spare_mxu_lanes

    def diagonal_block(self, page_size: int) -> int:
        """Tokens of a part of a tile that is computed at once where the whole tile would reach past the diagonal."""
        size = LONG_DIAGONAL_BLOCK if self.long else DIAGONAL_BLOCK
        return size if self.tile % size == 0 and size % page_size == 0 else self.tile

    def fetched_new_tokens(self, by_head: Collection[str]) -> int:
        """New tokens that a copy for one page has: if keys come `by_head`, it begins at a multiple of SORTED_TOKENS."""
        return self.new_tokens + (SORTED_TOKENS if "keys" in by_head else 0)

    def steps(self, model: Attention, heads: int) -> int:
        """Flash steps of a piece of code that has those of `heads` heads."""
        return heads * (model.group * self.q_block // self.step_rows)

    def scratch(self, spec: Spec, recipe: Recipe) -> tuple[Buffer, ...]:
        """The scratch arrays, in the order of the kernel's parameters."""
        kernel = recipe.block
        assert kernel is not None
        model, page_size = spec.model, spec.serving.page_size
        rows = RowDims.of(model)
        q_rows = model.group * self.q_block
        fetched, updated = new_buffers(self.update_lookahead), page_buffers(self.update_lookahead)
        new = (fetched, 2 * page_size + self.fetched_new_tokens(recipe.by_head), model.kv_heads, model.head_dim)
        queries = (self.q_block, model.q_heads, model.head_dim)
        if "keys" in recipe.by_head:
            new = (fetched, model.kv_heads, new[1], model.head_dim)
        if "queries" in recipe.by_head:
            queries = (model.q_heads, self.q_block, model.head_dim)
        rows_of_head: tuple[int, ...] = (q_rows, head_lanes(model))
        if recipe.queries_by_lane:
            queries, rows_of_head = (model.q_heads, model.head_dim, self.q_block), (head_lanes(model), q_rows)
        mask: tuple[Buffer, ...] = ()
        if kernel.mask == "matmul":
            tokens = self.diagonal_block(page_size)
            parts = (self.tile // tokens, q_rows // self.step_rows, tokens, LANES)
            mask = (
                Buffer("query_onehot", (self.step_rows, LANES), model.q_dtype, "1 where a lane is the row's query"),
                Buffer("mask_bias", parts, model.q_dtype, "0, or what masks a score, by token and query"),
            )
        transposed, pacing = kernel.scores == "transposed", kernel.pacing
        ahead = pacing.slots if pacing else kernel.lookahead[0]
        kept = "scores of the next steps" if pacing else "the first scores of the next iteration"
        scores, acc = (self.step_rows, self.tile), (q_rows, head_lanes(model))
        most, state, sinks = (self.step_rows, LANES), (q_rows, LANES), (align(model.group, SUBLANES), LANES)
        same = "a part in every lane" if pacing else "the same in every lane"
        if transposed:  # rows along lanes
            scores, acc = (
                (self.tile, self.step_rows),
                (model.head_dim if kernel.unpadded_values else head_lanes(model), q_rows),
            )
            most, state, sinks = (SUBLANES, self.step_rows), (SUBLANES, q_rows), (SUBLANES, LANES)
            same = "the same in every sublane"
        log_rows = (Buffer("log_rows", (q_rows, LANES), "float32", "log-sum-exps of one KV head, by row"),)
        by_token: tuple[Buffer, ...] = ()
        if kernel.query_order == "strided":
            shape: tuple[int, ...] = (self.q_block * align(model.q_heads, SUBLANES), LANES)
            if rows.lane_tiles > 1:  # a strided load or store is of 128 lanes
                shape = (rows.lane_tiles, *shape)
            by_token = (Buffer("by_token", shape, "float32", "a query block by token"),)
        kv: tuple[int, ...] = (self.buffers, self.block * rows.token_rows, LANES)
        page: tuple[int, ...] = (updated, page_size * rows.token_rows, LANES)
        packed = (self.merge_tokens * rows.packed_rows, LANES)
        merged: tuple[Buffer, ...] = (Buffer("packed", packed, word_dtype(model), "new tokens in the cache's form"),)
        if spec.serving.kv_layout == "separate":
            kv = (self.buffers, self.block // page_size, *kv_page_shape(spec))
            page = (updated, *kv_page_shape(spec))
            merged = ()
            if model.quantized:
                shape = (self.merge_tokens * align(model.kv_heads, SUBLANES), LANES)
                if rows.lane_tiles > 1:
                    shape = (rows.lane_tiles, *shape)
                merged = (Buffer("by_head", shape, "float32", "new tokens, to be read by head"),)
        return needed(
            spec,
            Buffer("kv", kv, model.kv_dtype, "fetched blocks"),
            *split_buffers(spec, kernel.read, self.tile),
            Buffer("new_keys", new, new_dtype(model), "new keys, around the page they go to"),
            Buffer("new_values", new, new_dtype(model), "new values, around the page they go to"),
            Buffer("page_rows", page, model.kv_dtype, "pages to update"),
            *merged,
            Buffer("q_in", (self.buffers, *queries), model.q_dtype, "query blocks as they come"),
            *by_token,
            Buffer("q_rows", (model.kv_heads, *rows_of_head), model.q_dtype, "a query block by KV head"),
            *mask,
            Buffer("next_scores", (ahead, *scores), "float32", kept),
            *((Buffer("step_max", (pacing.slots, *most), "float32", "largest score of each row"),) if pacing else ()),
            *(sink_rows(model, (model.kv_heads, *sinks)) if kernel.transposed_heads else ()),
            Buffer("row_max", (model.kv_heads, *state), "float32", "running maximum"),
            Buffer("row_sum", (model.kv_heads, *state), "float32", f"running sum, {same}"),
            Buffer("acc", (model.kv_heads, *acc), "float32", "running output"),
            Buffer("out_rows", (1, *queries), model.q_dtype, "an output block on its way out"),
            *lse_rows(spec, (self.q_block * align(model.q_heads, SUBLANES), LANES)),
            *(log_rows if transposed and spec.serving.log_sum_exp else ()),
            *query_checks(spec, self.buffers, updated),
            *query_windows(spec, recipe, self.block, self.buffers, self.update_lookahead),
            Buffer("kv_sem", (self.buffers,), "dma", "fetches"),
            Buffer("new_sem", (fetched,), "dma", "new keys and values"),
            Buffer("old_sem", (updated,), "dma", "pages that hold old tokens"),
            Buffer("write_sem", (updated,), "dma", "cache writes"),
            Buffer("q_sem", (self.buffers,), "dma", "query blocks"),
            Buffer("out_sem", (1,), "dma", "output blocks"),
            *lse_sem(spec, 1),
        )

    def temporaries(self, spec: Spec, recipe: Recipe) -> int:
        """Bytes of the values of one flash step that registers cannot hold: scores and probabilities."""
        assert recipe.block is not None
        tiles = 4 if recipe.block.pacing else 8  # scores that are kept have an array of their own
        return tiles * nbytes((self.step_rows, self.tile), "float32")


def transposed_heads(model: Attention) -> int:
    """KV heads whose queries of a token fill one register, where sorting queries by KV head transposes registers' parts; 0
    where it does not, because parts of a word or of several registers would have to move.
    """
    pack = packing(model.q_dtype)
    if model.kv_heads == 1 and model.group % SUBLANES == 0:
        return 1
    if model.group % pack or SUBLANES % (model.group // pack) or model.q_heads % (SUBLANES * pack):
        return 0
    return SUBLANES // (model.group // pack)


def queries_by_lane(spec: Spec, tiles: BlockTiles) -> bool:
    """Whether a prefill kernel takes queries with tokens along lanes, and leaves the output so. XLA lays them out so where
    head_dim is half a row and there are many tokens. Scores are transposed then, so that queries go as they come.
    """
    model, serving = spec.model, spec.serving
    buckets = (tokens for tokens in serving.token_buckets if tokens >= serving.prefill_chunk)
    whole = (
        tiles.copy_sizes[-1] == tiles.q_block and tiles.q_block % tiles.step_rows == 0 and tiles.step_rows % LANES == 0
    )
    return (
        joins_rows(model)
        and model.q_dtype == "bfloat16"
        and not (model.alibi or serving.log_sum_exp)
        and whole
        and all(tokens % LANES == 0 for tokens in buckets)
        and tiles.spare_mxu_lanes
        and _slots(tiles, model, TRANSPOSED_SLOTS) > TRANSPOSED_LOOKAHEAD
    )


def by_head(spec: Spec, tiles: BlockTiles) -> tuple[str, ...]:
    """The arrays that a prefill kernel takes by head, if rows are whole registers: queries, unless their rows are told apart
    by more than the query; keys and values, if a copy for a page can begin a few tokens early.
    """
    model, serving = spec.model, spec.serving
    if tiles.copy_sizes[-1] < MIN_Q_BLOCK or model.head_dim % LANES:
        return ()
    sizes = (serving.page_size, *serving.token_buckets)
    early = serving.prefill_chunk >= serving.page_size + SORTED_TOKENS and all(
        size % SORTED_TOKENS == 0 for size in sizes
    )
    taken = {
        "queries": not (model.sinks or model.alibi or serving.log_sum_exp),
        **dict.fromkeys(("keys", "values"), early),
    }
    return tuple(name for name in laid_out_by_head(spec) if taken[name])


def recipe(spec: Spec, tiles: BlockTiles, chooser: Chooser) -> BlockRecipe:
    """The decisions of the kernel. Raises ValueError where `chooser` wants what these tiles do not allow."""
    model, read = spec.model, read_of(spec)
    order = _query_order(spec, tiles)
    heads = transposed_heads(model) if order == "transpose" else 0
    scores = chooser.choose("scores", *_scores(tiles, model, order, heads))
    pacing, lookahead = None, _lookahead(tiles, model)
    paced = _paced(spec, tiles, read, scores)
    if chooser.choose("paced", *paced):
        pacing, lookahead = _pacing(spec, tiles, scores)
    transposed = scores == "transposed"
    unpadded = model.head_dim != head_lanes(model) and model.head_dim % (SUBLANES * packing(model.q_dtype)) == 0
    # Not where other tiles come between, nor where words are split tile by tile.
    pipelines = not model.late and read not in SPLIT
    return BlockRecipe(
        skeleton="query_blocks",
        read=read,
        write=write_of(spec),
        scores=scores,
        lookahead=lookahead,
        pacing=pacing,
        mask=chooser.choose("mask", *_masks(tiles, model, heads)),
        query_order=order,
        transposed_heads=heads,
        pipelined=chooser.choose("pipelined", *((True, False) if pipelines else (False,))),
        sums="matmul" if transposed or (tiles.spare_mxu_lanes and not pacing) else "vector",
        unpadded_values=transposed and unpadded,
    )


def _query_order(spec: Spec, tiles: BlockTiles) -> QueryOrder:
    if queries_by_lane(spec, tiles):
        return "by_lane"
    if "queries" in by_head(spec, tiles):
        return "by_head"
    return "transpose" if transposed_heads(spec.model) else "strided"


def _scores(tiles: BlockTiles, model: Attention, order: QueryOrder, heads: int) -> tuple[Scores, ...]:
    """Transposed scores have query rows along lanes, which fill the width of the MXU where a head does not. Rows must be whole
    registers, and those of a query, or those of a query head, side by side; and the steps of every iteration go around the
    scores that are kept.
    """
    if order == "by_lane":
        return ("transposed",)
    by_query = LANES % model.group == 0 and heads > 0
    by_query_head = order == "by_head" and tiles.q_block % LANES == 0
    whole = tiles.step_rows % LANES == 0 and (by_query or by_query_head)
    if tiles.spare_mxu_lanes and whole and _slots(tiles, model, TRANSPOSED_SLOTS) > TRANSPOSED_LOOKAHEAD:
        return "transposed", "rows"
    return ("rows",)


def _paced(spec: Spec, tiles: BlockTiles, read: Read, scores: Scores) -> tuple[bool, ...]:
    """Probabilities wait for scores, which keeps the compiler from spilling them: wherever scores are transposed; and where a
    head fills the MXU, steps are long, and they go around the scores that are kept.
    """
    if scores == "transposed":
        return (True,)
    whole = _slots(tiles, spec.model, PACED_SLOTS) == PACED_SLOTS and tiles.step_rows % PACED_ROWS == 0
    if tiles.long and whole and DIAGONAL_BLOCK % spec.serving.page_size == 0 and read not in SPLIT:
        return True, False
    return (False,)


def _pacing(spec: Spec, tiles: BlockTiles, scores: Scores) -> tuple[SoftmaxPacing, tuple[int, int]]:
    """How probabilities wait, and the lookahead of that."""
    if scores == "rows":
        pacing = SoftmaxPacing(PACED_SLOTS, DIAGONAL_BLOCK, (PACED_WAIT, PACED_WAIT))
        return pacing, (PACED_LOOKAHEAD, PACED_LOOKAHEAD)
    tokens = tiles.diagonal_block(spec.serving.page_size)
    slots = _slots(tiles, spec.model, TRANSPOSED_SLOTS)
    diagonal = min(TRANSPOSED_DIAGONAL_LOOKAHEAD, slots - 1)
    parts = tiles.tile // tokens
    wait = parts * TRANSPOSED_LOOKAHEAD - (parts - 1), diagonal
    return SoftmaxPacing(slots, tokens, wait), (TRANSPOSED_LOOKAHEAD, diagonal)


def _slots(tiles: BlockTiles, model: Attention, most: int) -> int:
    return largest_divisor(math.gcd(tiles.steps(model, tiles.heads), tiles.steps(model, tiles.diagonal_heads)), most)


def _lookahead(tiles: BlockTiles, model: Attention) -> tuple[int, int]:
    """Of plain softmax: as far as the steps of a piece of code, in full tiles and on the diagonal, allow."""
    most = LOOKAHEAD_SCORES // (tiles.step_rows * tiles.tile)
    full, diagonal = (
        max(min(LOOKAHEAD, most, tiles.steps(model, heads) // STEPS_PER_SCORE), 1)
        for heads in (tiles.heads, tiles.diagonal_heads)
    )
    return full, diagonal


def _masks(tiles: BlockTiles, model: Attention, heads: int) -> tuple[BlockMask, ...]:
    """The matmul masks where each query of a step has a lane in what the MXU has to spare, and nothing undoes the mask."""
    if not model.causal:
        return ("lengths",)
    if tiles.spare_mxu_lanes and model.soft_cap is None and heads > 0 and tiles.step_rows // model.group <= LANES:
        return "matmul", "compare"
    return ("compare",)


def is_legal(spec: Spec, kind: str, buckets: Sequence[int], tiles: BlockTiles) -> bool:
    """Whether the kernel works with these tiles at all."""
    model, serving = spec.model, spec.serving
    whole_pages = tiles.block % serving.page_size == 0 and tiles.block <= power_of_two_from(serving.max_model_len)
    whole_tiles = tiles.block % tiles.tile == 0 and tiles.tile % serving.page_size == 0
    copies = {copy_sizes_of(kind, tiles.q_block, tokens) for tokens in buckets}
    if kind == "prefill":
        fitting = serving.prefill_chunk % tiles.q_block == 0
    else:
        fitting = tiles.q_block <= max(power_of_two_from(buckets[-1]), MIN_Q_BLOCK)
    whole_iterations = model.kv_heads % tiles.heads == 0 and model.kv_heads % tiles.diagonal_heads == 0
    two_chunks = tiles.q_block <= (model.attention_chunk or tiles.q_block)  # in which a block lies, at most
    whole_steps = model.group * tiles.q_block % tiles.step_rows == 0
    whole = whole_pages and whole_tiles and whole_iterations and whole_steps
    return whole and fitting and two_chunks and copies == {tiles.copy_sizes}


def most_steps(device: Chip, kind: str, read: Read, scores: Scores) -> tuple[int, int]:
    """Flash steps that one piece of a kernel's code may have, and those on the diagonal: there longer pieces do not spill more
    where scores are transposed.
    """
    if device.mxu_size <= LANES or read in SPLIT:
        return FEWER_STEPS[kind]
    return (MOST_STEPS[0], MOST_STEPS[0]) if scores == "transposed" else MOST_STEPS


def is_short(spec: Spec, device: Chip, kind: str, tiles: BlockTiles, recipe: BlockRecipe) -> bool:
    """Whether no piece of code has more steps than the rules may give it, unless it is one head's."""
    limits = most_steps(device, kind, recipe.read, recipe.scores)
    return all(
        heads == 1 or tiles.steps(spec.model, heads) <= most
        for heads, most in zip((tiles.heads, tiles.diagonal_heads), limits, strict=True)
    )


def heads_of(model: Attention, steps: int, most: int) -> int:
    """KV heads of a piece of code that may have `most` steps, `steps` of each head."""
    return largest_divisor(model.kv_heads, max(most // steps, 1))


def choices(spec: Spec, device: Chip, kind: str, tokens: int) -> Iterator[BlockTiles]:
    """From the tiles that keep the chip busy down to the smallest that work, and then again with an update that looks less
    far ahead.
    """
    yield from _choices(spec, device, kind, tokens)
    if spec.model.update_cache:
        for tiles in _choices(spec, device, kind, tokens):
            for lookahead in SHORTER_LOOKAHEADS:
                yield replace(tiles, update_lookahead=lookahead)


def _choices(spec: Spec, device: Chip, kind: str, tokens: int) -> Iterator[BlockTiles]:
    """A prefill kernel's query block divides the chunk, so that it has no partial block."""
    model, serving, read = spec.model, spec.serving, read_of(spec)
    most = max(power_of_two_from(max(visible_tokens(spec, Q_BLOCKS[0]))), LANES)
    new_tokens = min(tokens, serving.page_size)
    merge_tokens = min(max(MERGE_TOKENS, sublane_tile_tokens(model)), serving.page_size)
    limits = most_steps(device, kind, read, "rows")
    spare = device.mxu_size > head_lanes(model) and packing(model.kv_dtype) > 1
    long = limits == MOST_STEPS and not spare and packing(model.kv_dtype) > 1
    # A long block saves scores that wait for nothing at its start; where words are split, they do at every tile's.
    blocks = (1024, 512, 256, LANES) if read in SPLIT else (2048, 1024, 512, 256, LANES)
    for tile in (LONG_TILE, TILE) if long and most >= LONG_TILE else (TILE,):
        for q_block in _q_blocks(spec, kind, tokens):
            rows = model.group * q_block
            step_rows = largest_divisor(rows, STEP_ROWS)
            heads, diagonal_heads = (heads_of(model, rows // step_rows, steps) for steps in limits)
            copy_sizes = copy_sizes_of(kind, q_block, tokens)
            for block in blocks:
                if block < tile == LONG_TILE:
                    continue
                block = max(min(block, most), serving.page_size)
                for buffers in (3, 2):
                    tiles = BlockTiles(
                        q_block,
                        block,
                        min(tile, block),
                        step_rows,
                        heads,
                        diagonal_heads,
                        buffers,
                        merge_tokens,
                        new_tokens,
                        copy_sizes,
                        spare,
                    )
                    scores = recipe(spec, tiles, Chooser(device.target)).scores
                    most_diagonal = most_steps(device, kind, read, scores)[1]
                    yield replace(tiles, diagonal_heads=heads_of(model, rows // step_rows, most_diagonal))


def _q_blocks(spec: Spec, kind: str, tokens: int) -> Iterator[int]:
    """Query blocks from the largest down; in a mixed batch, where a block is computed whole, none longer than a chunk."""
    for q_block in Q_BLOCKS:
        if q_block > (spec.model.attention_chunk or q_block):
            continue  # a block lies in two chunks at most
        if kind != "prefill":
            yield min(q_block, max(power_of_two_from(min(tokens, spec.serving.prefill_chunk)), MIN_Q_BLOCK))
        elif spec.serving.prefill_chunk % q_block == 0:
            yield q_block
