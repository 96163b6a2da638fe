"""The tiles of each kernel, and the buffers that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rpac.contract.arrays import LANES, SUBLANES, align, head_lanes, joins_rows, kv_page_shape, nbytes, packing
from rpac.contract.attention import Attention
from rpac.plan.buffers import (
    Buffer,
    RowDims,
    load_sem,
    lse_rows,
    lse_sem,
    needed,
    new_dtype,
    sink_rows,
    split_words,
    splits_words,
    unit_tokens,
    word_dtype,
)
from rpac.plan.query_rows import Sets, by_sequence, head_rows, units_by_sequence
from rpac.spec import Spec

MERGE_TOKENS = 16  # new tokens that are put into a page at once
# Pages under update: new tokens are fetched four steps ahead, and pages written out in four, which hides the latency of DMAs.
UPDATE_AHEAD = 4
NEW_BUFFERS = UPDATE_AHEAD + 1
PAGE_BUFFERS = NEW_BUFFERS + 4
SCORES_AHEAD = 3  # flash steps whose scores are made before they are weighed: as many as keep the MXU busy meanwhile
SCORES_AHEAD_AT_MOST = 3 * 256 * 512  # of them all: more are moved in and out of registers more often than it helps
STEPS_PER_SCORE = 2  # at least: scores made ahead are code too
PIECE = 256  # tokens, if whole pages: a tile on the diagonal is computed by pieces, of no fewer than the MXU is wide
LONG_PIECE = 512  # likewise of a long tile, where what a step costs by itself is more
LONG_TILE = 1024  # tokens of a flash step whose weights are tied to the scores that the MXU makes meanwhile
TIED_AHEAD = 2  # steps whose scores are made before they are weighed, where they are tied
SCORE_SLOTS = 4  # steps whose scores are kept then: a power of two above those, so that a turn's steps come out even
TIED_TO = 3  # and the scores that weights wait for: the third last that are made
TIED_ROWS = 32  # rows of weights that wait for one register of scores
TURNED_AHEAD, TURNED_DIAGONAL_AHEAD, TURNED_SLOTS = 3, 6, 8  # likewise where scores lie with queries along lanes


@dataclass(frozen=True)
class DecodeTiles:
    """Tiles of a decode kernel: `block` tokens are fetched at once and computed at once, `buffers` of them in flight.

    `pair` KV heads share a matrix product, side by side: as many as fill the width of the MXU.
    """

    block: int
    pair: int
    buffers: int
    writes: int
    loaded: int

    def scratch(self, spec: Spec) -> tuple[Buffer, ...]:
        """The scratch arrays, in the order of the kernel's parameters."""
        model = spec.model
        rows = RowDims.of(model)
        query_rows = model.kv_heads * head_rows(spec)
        loaded = self.loaded * spec.serving.decode_len
        new = (loaded, model.kv_heads, model.head_dim)
        units = units_by_sequence(spec, self.writes, rows.unit)
        out = by_sequence(spec, self.writes)
        return needed(
            spec,
            Buffer("kv", (self.buffers, self.block * rows.token_rows, LANES), model.kv_dtype, "fetched blocks"),
            *split_words(spec, self.block, 2),
            Buffer("q_all", (loaded, model.q_heads, model.head_dim), model.q_dtype, "queries of every sequence"),
            Buffer("new_keys", new, new_dtype(model), "new keys of every sequence"),
            Buffer("new_values", new, new_dtype(model), "new values of every sequence"),
            Buffer(
                "packed", (rows.unit * rows.packed_rows, LANES), word_dtype(model), "a new token in the cache's form"
            ),
            Buffer("unit_out", (*units, rows.unit_rows, LANES), model.kv_dtype, "rows on their way to the cache"),
            Buffer(
                "q_rows", (query_rows, self.pair * head_lanes(model)), "float32", "queries of one sequence by KV head"
            ),
            *sink_rows(model, (query_rows, LANES)),
            Buffer("row_max", (query_rows, LANES), "float32", "running maximum, the same in every lane"),
            Buffer("row_sum", (query_rows, LANES), "float32", "running sum, the same in every lane"),
            Buffer("acc", (query_rows, head_lanes(model)), "float32", "running output"),
            Buffer("out_rows", (*out, model.q_heads, model.head_dim), model.q_dtype, "outputs on their way out"),
            *lse_rows(spec, (*out, align(model.q_heads, SUBLANES), LANES)),
            Buffer("kv_sem", (self.buffers,), "dma", "fetches"),
            *load_sem(spec),
            Buffer("unit_sem", (self.writes,), "dma", "cache writes"),
            Buffer("out_sem", (self.writes,), "dma", "outputs"),
            *lse_sem(spec, self.writes),
        )

    def temporaries(self, spec: Spec) -> int:
        """Bytes of the values of one flash step that registers cannot hold: scores and weights."""
        return 2 * nbytes((spec.model.kv_heads * head_rows(spec), self.block), "float32")


@dataclass(frozen=True)
class GroupTiles:
    """Tiles of a decode kernel where K and V lie apart: a turn takes `step` tiles of `tile` tokens of any sequences, the
    fetch runs `ahead` turns before it.
    """

    tile: int
    step: int
    ahead: int
    writes: int
    loaded: int

    @property
    def groups(self) -> int:
        """Groups of `step` tiles that are fetched or in use at once."""
        return self.ahead + 1

    def halves(self, model: Attention) -> bool:
        """Whether the MXU takes rows of K alone, and of V alone, that two tokens share, half as many as there are: with
        head_dim 64, one of either half of a tile, if those are whole registers of scores.
        """
        return joins_rows(model) and self.tile % (2 * LANES) == 0

    def scratch(self, spec: Spec) -> tuple[Buffer, ...]:
        """The scratch arrays, in the order of the kernel's parameters."""
        model, page_size = spec.model, spec.serving.page_size
        drafts = spec.serving.decode_len
        sets = Sets.of(spec)
        query_rows = sets.count * sets.rows
        new = (self.loaded * drafts, model.kv_heads, model.head_dim)
        queries = ((self.loaded + 1) * drafts, model.q_heads, model.head_dim)
        slots = self.groups * self.step
        kv = (slots, self.tile // page_size, *kv_page_shape(spec))
        kinds, heads, _, lanes = kv_page_shape(spec)
        unit_size = unit_tokens(model)
        unit = (*units_by_sequence(spec, self.writes, unit_size), kinds, heads, unit_size, lanes)
        halves: tuple[Buffer, ...] = ()
        if self.halves(model):
            words = self.tile // 2 // packing(model.kv_dtype)
            shape = (self.step, heads, words, lanes)
            halves = (Buffer("swapped", shape, "uint32", "second halves of a group's tiles, K and V swapped"),)
        return needed(
            spec,
            Buffer("kv", kv, model.kv_dtype, "fetched tiles"),
            Buffer("q_in", queries, model.q_dtype, "queries of every sequence, and of none"),
            Buffer("new_keys", new, new_dtype(model), "new keys of every sequence"),
            Buffer("new_values", new, new_dtype(model), "new values of every sequence"),
            Buffer("unit_out", unit, model.kv_dtype, "new tokens on their way to the cache"),
            *halves,
            Buffer("scores", (self.step, query_rows, self.tile), "float32", "scores of a group, from turn to turn"),
            *sink_rows(model, (query_rows, LANES)),
            Buffer("row_max", (query_rows, LANES), "float32", "running maximum, the same in every lane"),
            Buffer("row_sum", (query_rows, LANES), "float32", "running sum, the same in every lane"),
            Buffer("acc", (query_rows, head_lanes(model)), "float32", "running output"),
            Buffer("out_all", queries, model.q_dtype, "outputs of every sequence, and of none"),
            *lse_rows(spec, (queries[0], align(model.q_heads, SUBLANES), LANES)),
            Buffer("tile_seq", (slots,), "smem", "the sequence of each tile in flight"),
            Buffer("tile_first", (slots,), "smem", "its first token"),
            Buffer("tile_left", (slots,), "smem", "tokens of its sequence from there on"),
            Buffer("kv_sem", (self.groups,), "dma", "fetches"),
            *load_sem(spec),
            Buffer("unit_sem", (self.writes,), "dma", "cache writes"),
            Buffer("out_sem", (1,), "dma", "outputs"),
            *lse_sem(spec, 1),
        )

    def temporaries(self, spec: Spec) -> int:
        """Bytes of the values of one turn that registers cannot hold: weights, and scores on their way."""
        sets = Sets.of(spec)
        return 2 * self.step * nbytes((sets.count * sets.rows, self.tile), "float32")


@dataclass(frozen=True)
class Tie:
    """Weights that wait for scores which the MXU makes meanwhile, so that the compiler does not make and spill them early.

    The scores of `slots` steps are kept, made `tokens` tokens at a time, `ahead` steps before they are weighed: of whole tiles,
    and on the diagonal. Weights wait for the `to`-th last that are made, of either.
    """

    slots: int
    tokens: int
    ahead: tuple[int, int]
    to: tuple[int, int]


@dataclass(frozen=True)
class BlockTiles:
    """Tiles of a prefill or mixed kernel, in tokens.

    `step_rows` are query rows (tokens times group) of one flash step, `heads` the KV heads whose steps are one piece of
    code, `diagonal_heads` likewise on the diagonal. `spare`: the MXU is wider than a head, with room for 128 more lanes.
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
    spare: bool

    @property
    def long(self) -> bool:
        """Whether a head fills a wide MXU, and steps are long for it."""
        return self.tile == LONG_TILE and not self.spare

    def piece(self, page_size: int) -> int:
        """Tokens of a part of a tile that is computed where the whole would reach past the diagonal."""
        size = LONG_PIECE if self.long else PIECE
        return size if self.tile % size == 0 and size % page_size == 0 else self.tile

    def steps(self, model: Attention, heads: int) -> int:
        """Flash steps of a piece of code that has those of `heads` heads."""
        return heads * (model.group * self.q_block // self.step_rows)

    def turned(self, spec: Spec) -> bool:
        """Whether scores lie with query rows along lanes, which fill the width of the MXU where a head does not: rows must be
        whole registers and those of a query side by side, and the steps of every turn go around the scores that are kept.
        """
        whole = self.step_rows % LANES == 0 and LANES % spec.model.group == 0 and exchange_of(spec.model) > 0
        return self.spare and whole and self._slots(spec.model, TURNED_SLOTS) > TURNED_AHEAD

    def own_values(self, spec: Spec) -> bool:
        """Whether the MXU takes no more of a row than a head's own values: turned, these are whole registers of rows."""
        model = spec.model
        own = model.head_dim != head_lanes(model) and model.head_dim % (SUBLANES * packing(model.q_dtype)) == 0
        return own and self.turned(spec)

    def _slots(self, model: Attention, most: int) -> int:
        return math.gcd(self.steps(model, self.heads), self.steps(model, self.diagonal_heads), most)

    def tie(self, spec: Spec) -> Tie | None:
        """How weights are tied to scores that are made meanwhile, which keeps the compiler from spilling them; None if not.
        Where a head fills the MXU, steps are long and go around the scores that are kept.
        """
        if self.turned(spec):
            piece = self.piece(spec.serving.page_size)
            slots = self._slots(spec.model, TURNED_SLOTS)
            diagonal = min(TURNED_DIAGONAL_AHEAD, slots - 1)
            parts = self.tile // piece
            return Tie(slots, piece, (TURNED_AHEAD, diagonal), (parts * TURNED_AHEAD - (parts - 1), diagonal))
        whole = self._slots(spec.model, SCORE_SLOTS) == SCORE_SLOTS and self.step_rows % TIED_ROWS == 0
        if self.long and whole and PIECE % spec.serving.page_size == 0 and not splits_words(spec):
            return Tie(SCORE_SLOTS, PIECE, (TIED_AHEAD, TIED_AHEAD), (TIED_TO, TIED_TO))
        return None

    def carries(self, spec: Spec) -> bool:
        """Whether the last tile of a block makes the first scores of the next block's: not where other tiles come between, nor
        where words are split tile by tile.
        """
        return not spec.model.late and not splits_words(spec)

    def masks_by_mxu(self, model: Attention) -> bool:
        """Whether queries differ in what they see, each of a step's has a lane in what the MXU has to spare, and nothing undoes
        the mask.
        """
        return (
            model.causal
            and self.spare
            and model.soft_cap is None
            and exchange_of(model) > 0
            and self.step_rows // model.group <= LANES
        )

    def scores_ahead(self, model: Attention, heads: int) -> int:
        """Flash steps whose scores are made before they are weighed, where a piece of code has the steps of `heads` heads."""
        steps = self.steps(model, heads)
        most = SCORES_AHEAD_AT_MOST // (self.step_rows * self.tile)
        return max(min(SCORES_AHEAD, most, steps // STEPS_PER_SCORE), 1)

    def scratch(self, spec: Spec) -> tuple[Buffer, ...]:
        """The scratch arrays, in the order of the kernel's parameters."""
        model, page_size = spec.model, spec.serving.page_size
        rows = RowDims.of(model)
        q_rows = model.group * self.q_block
        new = (NEW_BUFFERS, 2 * page_size + self.new_tokens, model.kv_heads, model.head_dim)
        queries = (self.q_block, model.q_heads, model.head_dim)
        limits: tuple[Buffer, ...] = ()
        if self.masks_by_mxu(model):
            piece = self.piece(page_size)
            parts = (self.tile // piece, q_rows // self.step_rows, piece, LANES)
            limits = (
                Buffer("which_query", (self.step_rows, LANES), model.q_dtype, "a 1 where a lane is the row's query"),
                Buffer("limits", parts, model.q_dtype, "by token and query: 0, or what masks a score"),
            )
        turned, tie = self.turned(spec), self.tie(spec)
        ahead = tie.slots if tie else self.scores_ahead(model, self.heads)
        kept = "scores of the next steps" if tie else "the first scores of the next turn"
        scores, acc = (self.step_rows, self.tile), (q_rows, head_lanes(model))
        most, state, sinks = (self.step_rows, LANES), (q_rows, LANES), (align(model.group, SUBLANES), LANES)
        same = "a part in every lane" if tie else "the same in every lane"
        if turned:  # rows along lanes
            scores, acc = (
                (self.tile, self.step_rows),
                (model.head_dim if self.own_values(spec) else head_lanes(model), q_rows),
            )
            most, state, sinks = (SUBLANES, self.step_rows), (SUBLANES, q_rows), (SUBLANES, LANES)
            same = "the same in every sublane"
        log_rows = (Buffer("log_rows", (q_rows, LANES), "float32", "logarithms of sums of one KV head, by row"),)
        by_token: tuple[Buffer, ...] = ()
        if not exchange_of(model):
            shape: tuple[int, ...] = (self.q_block * align(model.q_heads, SUBLANES), LANES)
            if rows.lane_tiles > 1:  # a strided load or store is of 128 lanes
                shape = (rows.lane_tiles, *shape)
            by_token = (Buffer("by_token", shape, "float32", "one by token"),)
        kv: tuple[int, ...] = (self.buffers, self.block * rows.token_rows, LANES)
        page: tuple[int, ...] = (PAGE_BUFFERS, page_size * rows.token_rows, LANES)
        packed = (self.merge_tokens * rows.packed_rows, LANES)
        merged: tuple[Buffer, ...] = (Buffer("packed", packed, word_dtype(model), "new tokens in the cache's form"),)
        if spec.serving.kv_layout == "separate":
            kv = (self.buffers, self.block // page_size, *kv_page_shape(spec))
            page = (PAGE_BUFFERS, *kv_page_shape(spec))
            merged = ()
            if model.quantized:
                shape = (self.merge_tokens * align(model.kv_heads, SUBLANES), LANES)
                if rows.lane_tiles > 1:
                    shape = (rows.lane_tiles, *shape)
                merged = (Buffer("by_head", shape, "float32", "new tokens, to be read by head"),)
        return needed(
            spec,
            Buffer("kv", kv, model.kv_dtype, "fetched blocks"),
            *split_words(spec, self.tile),
            Buffer("new_keys", new, new_dtype(model), "new keys, around the page they go to"),
            Buffer("new_values", new, new_dtype(model), "new values, likewise"),
            Buffer("page_rows", page, model.kv_dtype, "pages to update"),
            *merged,
            Buffer("q_in", (self.buffers, *queries), model.q_dtype, "query blocks as they come"),
            *by_token,
            Buffer("q_rows", (model.kv_heads, q_rows, head_lanes(model)), model.q_dtype, "one by KV head"),
            *limits,
            Buffer("next_scores", (ahead, *scores), "float32", kept),
            *((Buffer("step_max", (tie.slots, *most), "float32", "their largest"),) if tie else ()),
            *(sink_rows(model, (model.kv_heads, *sinks)) if exchange_of(model) else ()),
            Buffer("row_max", (model.kv_heads, *state), "float32", "running maximum"),
            Buffer("row_sum", (model.kv_heads, *state), "float32", f"running sum, {same}"),
            Buffer("acc", (model.kv_heads, *acc), "float32", "running output"),
            Buffer("out_rows", (1, *queries), model.q_dtype, "an output block on its way out"),
            *lse_rows(spec, (self.q_block * align(model.q_heads, SUBLANES), LANES)),
            *(log_rows if turned and spec.serving.log_sum_exp else ()),
            Buffer("kv_sem", (self.buffers,), "dma", "fetches"),
            Buffer("new_sem", (NEW_BUFFERS,), "dma", "new keys and values"),
            Buffer("old_sem", (PAGE_BUFFERS,), "dma", "pages that hold old tokens"),
            Buffer("write_sem", (PAGE_BUFFERS,), "dma", "cache writes"),
            Buffer("q_sem", (self.buffers,), "dma", "query blocks"),
            Buffer("out_sem", (1,), "dma", "output blocks"),
            *lse_sem(spec, 1),
        )

    def temporaries(self, spec: Spec) -> int:
        """Bytes of the values of one flash step that registers cannot hold: scores and weights."""
        tiles = 4 if self.tie(spec) else 8  # scores that are kept have an array of their own
        return tiles * nbytes((self.step_rows, self.tile), "float32")


def exchange_of(model: Attention) -> int:
    """KV heads whose queries of a token fill one register, where sorting queries by KV head is an exchange of registers'
    parts; 0 where it is not, for parts of a word or of several registers' would have to move.
    """
    pack = packing(model.q_dtype)
    if model.kv_heads == 1 and model.group % SUBLANES == 0:
        return 1
    if model.group % pack or SUBLANES % (model.group // pack) or model.q_heads % (SUBLANES * pack):
        return 0
    return SUBLANES // (model.group // pack)


@dataclass(frozen=True)
class XlaTiles:
    """Tiles of a portable program: `block` tokens of KV a step; `blocks` of them (decode), or `q_block` queries."""

    block: int
    blocks: int = 1
    q_block: int = 1
