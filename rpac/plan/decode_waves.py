"""Decode by waves of tiles of any sequences: tiles, recipe, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from rpac.contract.arrays import (
    LANES,
    SUBLANES,
    align,
    head_lanes,
    joins_rows,
    kv_page_shape,
    nbytes,
    packing,
)
from rpac.plan.access import decode_mask_of, kv_matmul_options, reads_all_heads, write_of
from rpac.plan.bounds import wave_checks
from rpac.plan.buffers import (
    Buffer,
    RowDims,
    all_heads_rows,
    load_sem,
    lse_rows,
    lse_sem,
    needed,
    new_dtype,
    query_row_arguments,
    sublane_tile_tokens,
    word_dtype,
)
from rpac.plan.by_head import SORTED_TOKENS, laid_out_by_head
from rpac.plan.page_table import WaveWindows
from rpac.plan.query_rows import Sets, sublane_tiles_by_sequence
from rpac.plan.recipe import Chooser, DecodeRecipe, Fetch, Read, Recipe
from rpac.plan.sizes import (
    IN_FLIGHT_BYTES,
    MIB,
    largest_divisor,
    most_visible_tokens,
    power_of_two_from,
    power_of_two_to,
    visible_tokens,
)
from rpac.spec import Spec

WRITE_BUFFERS: Final = 16  # of new tokens, where not every sequence has one: as many as a wave may end
TILE_BYTES: Final = MIB  # K and V of one tile: long enough that its DMA hides what it costs by itself
LEAST_TILE_BYTES: Final = MIB // 2
LEAST_TILE_TOKENS: Final = (
    1024  # of K and V of few bytes: a longer tile costs sequences of this length more than it gains
)
PACKED_BYTES: Final = 4 * MIB  # of new tokens, made ahead
STEPS_BYTES: Final = 2 * MIB  # of a wave: of less, the DMA is shorter than the latencies of steps
WRITE_BYTES: Final = 4 * MIB  # of new tokens on their way to the cache, of all sequences
MOST_SHORT_TILES: Final = 16  # of a wave where a sequence is one tile or two
WAVE_BYTES: Final = 8 * MIB  # fetched in a few times the DMA's latency
MOST_TILES: Final[Mapping[str, int]] = {"decode": 6, "mixed": 4}  # of a wave: more are little faster, and each is code
LOADED_BYTES: Final = MIB // 2  # of K and V that the compiler may load early, beside its fetches
FETCH_BETWEEN_HEADS: Final = 2  # KV heads of interleaved words; with 8, 64 x 4096 takes 327 us on TPU7x, not 306
# Where a tile has more pages than a few, fetching them takes so long that more tiles pay.
FEW_PAGES: Final = 4
MORE_TILES: Final = 8


@dataclass(frozen=True)
class DecodeWaves:
    """Tiles of a decode kernel by waves: a wave has `tiles_per_wave` tiles of `tile` tokens, of any
    sequences, and is fetched `lookahead` waves before it is computed.

    `write_buffers`: sequences whose new tokens are on their way to the cache; `max_rows`: those of the largest batch, whose
    queries are loaded at once. `starts_early`: the scores of the first wave are made before the loop, while it arrives.
    """

    tile: int
    tiles_per_wave: int
    lookahead: int
    write_buffers: int
    max_rows: int
    starts_early: bool = False

    @property
    def wave_buffers(self) -> int:
        """Waves that are fetched or in use at once."""
        return self.lookahead + 1

    def packs_ahead(self, spec: Spec) -> bool:
        """Whether the words or rows of all new tokens are made before the first wave has arrived: where they are few bytes."""
        model = spec.model
        if spec.serving.decode_len > 1 or not model.update_cache or spec.serving.kv_layout == "latent":
            return False
        if spec.serving.kv_layout == "interleaved":
            rows = RowDims.of(model)
            of_token = nbytes((rows.sublane_tile * rows.packed_rows, LANES), "float32")
        else:
            kinds, heads, _, lanes = kv_page_shape(spec)
            of_token = nbytes((kinds, align(heads, SUBLANES), lanes), "float32")
        return self.max_rows * of_token <= PACKED_BYTES

    def writes_apart(self, spec: Spec) -> bool:
        """Whether each sequence has a buffer of its own for its new token, so that no write is waited for before the last."""
        return spec.serving.decode_len == 1 and self.write_buffers >= self.max_rows

    def tiles_loaded(self, spec: Spec) -> int:
        """Tiles that fill the registers twice: as many hide the latency of the MXU, and more would be spilled."""
        of_bytes = LOADED_BYTES // (self.tile * _token_bytes(spec))
        return max(min(of_bytes, self.tiles_per_wave - 1), 1)

    @property
    def first_tiles(self) -> int:
        """Tiles of the first wave whose scores are made at once, while the others are on their way."""
        return self.tiles_per_wave // largest_divisor(self.tiles_per_wave, 4)

    def first_steps(self, recipe: Recipe) -> int:
        """In how many steps the first wave is waited for before the loop; 0 where the loop does it, as for token pairs."""
        assert recipe.decode is not None
        starts_early = self.starts_early and recipe.decode.read != "token_pairs"
        return self.tiles_per_wave // self.first_tiles if starts_early else 0

    def scratch(self, spec: Spec, recipe: Recipe) -> tuple[Buffer, ...]:
        """The scratch arrays, in the order of the kernel's parameters."""
        assert recipe.decode is not None
        model = spec.model
        drafts = spec.serving.decode_len
        sets, query_rows = Sets.of(spec, recipe.decode.read), self._query_rows(spec, recipe)
        new = (self.max_rows * drafts, model.kv_heads, model.head_dim)
        queries = ((self.max_rows + 1) * drafts, model.q_heads, model.head_dim)
        buffers = self.wave_buffers * self.tiles_per_wave
        kv, unit, *others = self._of_cache(spec, recipe)
        return needed(
            spec,
            kv,
            *_by_head(spec, recipe, self.max_rows * drafts),
            Buffer("q_in", queries, model.q_dtype, "queries of every sequence, and of no sequence"),
            Buffer("new_keys", new, new_dtype(model), "new keys of every sequence"),
            Buffer("new_values", new, new_dtype(model), "new values of every sequence"),
            unit,
            *others,
            Buffer(
                "scores",
                (self.tiles_per_wave, *self._scores(spec, recipe)),
                "float32",
                "scores of a wave, for the next iteration",
            ),
            *query_row_arguments(spec, (query_rows, LANES)),
            Buffer("row_max", (query_rows, LANES), "float32", "running maximum, the same in every lane"),
            Buffer("row_sum", (query_rows, LANES), "float32", "running sum, the same in every lane"),
            Buffer("acc", (query_rows, head_lanes(model) // sets.halves), "float32", "running output"),
            Buffer("out_all", queries, model.q_dtype, "outputs of every sequence, and of no sequence"),
            *lse_rows(spec, (queries[0], align(model.q_heads, SUBLANES), LANES)),
            Buffer("tile_seq", (buffers,), "smem", "the sequence of each tile in flight"),
            Buffer("tile_first", (buffers,), "smem", "its first token"),
            Buffer("tile_left", (buffers,), "smem", "tokens of its sequence from there on"),
            Buffer("last_slot", (self.max_rows + 1,), "smem", "the last tile of each sequence so far"),
            *wave_checks(spec, recipe.page_table, buffers, self.max_rows, self.write_buffers),
            *self.windows(spec, recipe),
            Buffer("kv_sem", (self.wave_buffers + self.first_steps(recipe),), "dma", "fetches"),
            *load_sem(spec),
            Buffer("unit_sem", (1 if self.writes_apart(spec) else self.write_buffers,), "dma", "cache writes"),
            Buffer("out_sem", (1,), "dma", "outputs"),
            *lse_sem(spec, 1),
        )

    def windows(self, spec: Spec, recipe: Recipe) -> tuple[Buffer, ...]:
        """The scratch arrays of page tables in HBM; none where they are in SMEM."""
        if recipe.page_table == "smem":
            return ()
        windows = WaveWindows.of(spec, self.tile, self.tiles_per_wave, self.lookahead)
        return windows.buffers(self.tiles_per_wave, self.wave_buffers * self.tiles_per_wave)

    def temporaries(self, spec: Spec, recipe: Recipe) -> int:
        """Bytes of the values of one iteration that registers cannot hold: probabilities, and scores on their way."""
        scores = self._scores(spec, recipe)
        return 2 * self.tiles_per_wave * nbytes(scores, "float32")

    def columns(self, spec: Spec, recipe: Recipe) -> int:
        """Scores of a query row in a tile: one for each token, or for each token and KV head."""
        assert recipe.decode is not None
        return self.tile * (all_heads_rows(spec.model) if recipe.decode.read == "all_heads" else 1)

    def _query_rows(self, spec: Spec, recipe: Recipe) -> int:
        assert recipe.decode is not None
        sets = Sets.of(spec, recipe.decode.read)
        return sets.count * sets.halves * sets.rows

    def _scores(self, spec: Spec, recipe: Recipe) -> tuple[int, int]:
        """The scores of a tile that are kept, rows and columns."""
        assert recipe.decode is not None
        sets = Sets.of(spec, recipe.decode.read)
        return sets.kept * sets.rows, self.columns(spec, recipe)

    def _of_cache(self, spec: Spec, recipe: Recipe) -> tuple[Buffer, ...]:
        """Fetched tiles, new tokens on their way to the cache, and what only one way to read has."""
        assert recipe.decode is not None
        model = spec.model
        buffers = self.wave_buffers * self.tiles_per_wave
        if spec.serving.kv_layout == "interleaved":
            rows = RowDims.of(model)
            kv: tuple[int, ...] = (buffers, self.tile * rows.token_rows, LANES)
            tiles = sublane_tiles_by_sequence(spec, self.write_buffers, rows.sublane_tile)
            unit: tuple[int, ...] = (*tiles, rows.sublane_tile_rows, LANES)
            packed: tuple[int, ...] = (rows.sublane_tile * rows.packed_rows, LANES)
            if self.packs_ahead(spec):
                packed = (self.max_rows, *packed)
            query_rows = self._query_rows(spec, recipe)
            tile_max = self.tiles_per_wave, query_rows, LANES
            others = [
                Buffer("packed", packed, word_dtype(model), "new tokens in the cache's form"),
                Buffer("tile_max", tile_max, "float32", "the largest score of each tile, the same in every lane"),
                Buffer(
                    "column_token", self._scores(spec, recipe), "int32", "the token of each score of an own KV head"
                ),
            ]
            if model.kv_scale is not None:
                scales = query_rows, LANES
                others += [
                    Buffer(
                        "key_scale_rows", scales, "float32", "scales of K and of the softmax, the same in every lane"
                    ),
                    Buffer("value_scale_rows", scales, "float32", "scales of V, the same in every lane"),
                ]
        else:
            kinds, heads, _, lanes = kv_page_shape(spec)
            kv = (buffers, self.tile // spec.serving.page_size, *kv_page_shape(spec))
            tokens = sublane_tile_tokens(model)
            unit = (*sublane_tiles_by_sequence(spec, self.write_buffers, tokens), kinds, heads, tokens, lanes)
            words = (self.tiles_per_wave, heads, self.tile // 2 // packing(model.kv_dtype), lanes)
            swapped = Buffer("kv_swapped", words, "uint32", "second halves of a wave's tiles, K and V swapped")
            others = [swapped] if recipe.decode.read == "token_pairs" else []
            if self.packs_ahead(spec):
                new = self.max_rows, kinds, heads, lanes
                others.append(Buffer("packed", new, word_dtype(model), "rows of new tokens, in every place of a word"))
        return (
            Buffer("kv", kv, model.kv_dtype, "fetched tiles"),
            Buffer("unit_out", unit, model.kv_dtype, "new tokens on their way to the cache"),
            *others,
        )


def _by_head(spec: Spec, recipe: Recipe, tokens: int) -> tuple[Buffer, ...]:
    """What comes or goes by head."""
    model = spec.model
    arrays = {
        "queries": ("q_by_head", model.q_heads, model.q_dtype, "queries as they come, then outputs as they go"),
        "keys": ("k_by_head", model.kv_heads, new_dtype(model), "new keys as they come"),
        "values": ("v_by_head", model.kv_heads, new_dtype(model), "new values as they come"),
    }
    return tuple(
        Buffer(name, (heads, tokens, model.head_dim), dtype, note)
        for name, heads, dtype, note in map(arrays.__getitem__, recipe.by_head)
    )


def by_head(spec: Spec, tiles: DecodeWaves) -> tuple[str, ...]:
    """The arrays that the kernel takes by head: all, where the new tokens that are loaded at once are whole sublane tiles."""
    whole = tiles.max_rows * spec.serving.decode_len % SORTED_TOKENS == 0
    return laid_out_by_head(spec) if whole else ()


def recipe(spec: Spec, tiles: DecodeWaves, chooser: Chooser) -> DecodeRecipe:
    """The decisions of the kernel.

    Token pairs: where K and V of a head share a row of 128 lanes (head_dim 64), the MXU takes rows of K alone, and of V
    alone, that two tokens share, one of either half of a tile. Halves must be whole registers of scores.
    """
    pairs = joins_rows(spec.model) and tiles.tile % (2 * LANES) == 0
    options: tuple[Read, ...] = ("token_pairs", "separate") if pairs else ("separate",)
    if spec.serving.kv_layout == "interleaved":
        options = ("all_heads",)
    read = chooser.choose("read", *options)
    return DecodeRecipe(
        "waves",
        read,
        write_of(spec),
        decode_mask_of(spec),
        chooser.choose("kv_matmul", *kv_matmul_options(spec, chooser.target)),
        chooser.choose("fetch", *_fetch_options(spec, read)),
    )


def _fetch_options(spec: Spec, read: Read) -> tuple[Fetch, ...]:
    """Where fetches may start. In between they need no time of their own: the MXU takes K and V meanwhile.

    Where words of many heads are split in registers, too many of these would be spilled. With head_dim 256 a tile is so large
    that the compiler may load only one before a fetch: 64 x 4096 of 32/2 heads take 208 us on TPU7x, not 158. Token pairs have
    an order of their own.
    """
    if read == "token_pairs":
        return ("before",)
    if head_lanes(spec.model) > LANES:
        return "before", "between"
    few_heads = spec.model.kv_heads <= FETCH_BETWEEN_HEADS
    return ("between", "before") if read == "separate" or few_heads else ("before", "between")


def is_legal(spec: Spec, tiles: DecodeWaves) -> bool:
    """Whether the kernel works with these tiles at all."""
    pages = tiles.tile // spec.serving.page_size
    whole_pages = (
        tiles.tile % spec.serving.page_size == 0 and pages & (pages - 1) == 0
    )  # kernels divide by tiles with shifts
    return whole_pages and (spec.serving.kv_layout != "interleaved" or reads_all_heads(spec))


def is_short(spec: Spec, kind: str, tiles: DecodeWaves) -> bool:
    """Whether a wave has no more tiles than the rules may give it."""
    most = max(most_tiles(spec, kind, tiles.tile), MORE_TILES if kind == "decode" else 0)
    return tiles.tiles_per_wave <= most


def most_tiles(spec: Spec, kind: str, tile: int) -> int:
    """Tiles that a wave may have: each is code, which an executable pays for in size.

    More pay where a tile has many pages, or where interleaved heads are two registers: then an iteration waits longer at
    its end. 64 x 4096 of 32/2 heads take 159 us on TPU7x, not 163. Where each sequence is one tile or two, because its window
    is short, an iteration has little else than waits: 64 windows of 128 take 16 us, not 19.
    """
    if kind == "decode" and most_visible_tokens(spec, spec.serving.decode_len) <= 2 * tile:
        return MOST_SHORT_TILES
    many_pages = tile > FEW_PAGES * spec.serving.page_size
    return MORE_TILES if kind == "decode" and (many_pages or _scores_halves(spec)) else MOST_TILES[kind]


def _scores_halves(spec: Spec) -> bool:
    """Whether a head is two registers, interleaved, so that its halves are scored apart."""
    return reads_all_heads(spec) and head_lanes(spec.model) > LANES


def _token_bytes(spec: Spec) -> int:
    """Bytes of K and V of one token in the cache."""
    return nbytes(kv_page_shape(spec), spec.model.kv_dtype) // spec.serving.page_size


def _write_buffers(spec: Spec, max_rows: int) -> int:
    """One for each sequence where that is little memory: writes wait behind all fetches that were started before them."""
    separate = spec.serving.kv_layout == "separate"
    tokens = sublane_tile_tokens(spec.model) if separate else RowDims.of(spec.model).sublane_tile
    return max_rows if max_rows * tokens * _token_bytes(spec) <= WRITE_BYTES else WRITE_BUFFERS


def _starts_early(spec: Spec, wave_tokens: int) -> bool:
    """Where the DMA of a wave takes longer than the latencies of scoring it in steps."""
    return wave_tokens * _token_bytes(spec) >= STEPS_BYTES


def choices(spec: Spec, kind: str, tokens: int) -> Iterator[DecodeWaves]:
    """From the tiles that keep the chip busy down to the smallest that work."""
    serving = spec.serving
    token_bytes = _token_bytes(spec)
    # A tile is computed whole, so it is no longer than the shortest sequences, unless it would be so small that the latency
    # of its matmuls shows; a row of its scores is at least a register wide.
    seen = [power_of_two_from(tokens) for tokens in visible_tokens(spec, serving.decode_len)]
    least = min(power_of_two_to(LEAST_TILE_BYTES // token_bytes), LEAST_TILE_TOKENS)
    shortest = max(min(seen), min(max(seen), least), LANES)
    tile = max(min(power_of_two_to(TILE_BYTES // token_bytes), shortest), serving.page_size, LANES)
    max_rows = min(tokens // serving.decode_len, serving.max_num_seqs)
    longest = most_visible_tokens(spec, serving.decode_len)
    while tile >= max(serving.page_size, LANES):
        tiles = min(max(WAVE_BYTES // (tile * token_bytes), 1), most_tiles(spec, kind, tile))
        tiles = min(tiles, max_rows * math.ceil(max(seen) / tile))
        while tiles:
            most = 2 + math.ceil(IN_FLIGHT_BYTES / (tiles * tile * token_bytes))
            # With 4 buffers 64 x 4096 of 32/2 heads of 256 take 165 us on TPU7x, with 5 158: fewer registers are spilled.
            most += _scores_halves(spec)
            # No more than the largest batch has: fetching none takes time, too.
            most = max(min(most, math.ceil(max_rows * math.ceil(longest / tile) / tiles)), 2)
            early = _starts_early(spec, tiles * tile)
            for lookahead in range(most, 1, -1):
                yield DecodeWaves(tile, tiles, lookahead, _write_buffers(spec, max_rows), max_rows, early)
            tiles //= 2
        tile //= 2
