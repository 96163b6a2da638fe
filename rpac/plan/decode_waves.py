"""Decode by waves of tiles of any sequences, where K and V are separate: tiles, recipe, and the choice among them."""

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
from rpac.plan.access import decode_mask_of, kv_matmul_options, write_of
from rpac.plan.buffers import (
    Buffer,
    load_sem,
    lse_rows,
    lse_sem,
    needed,
    new_dtype,
    query_row_arguments,
    sublane_tile_tokens,
)
from rpac.plan.query_rows import Sets, sublane_tiles_by_sequence
from rpac.plan.recipe import Chooser, DecodeRecipe, Fetch, Read, Recipe
from rpac.plan.sizes import IN_FLIGHT_BYTES, MIB, power_of_two_from, power_of_two_to, visible_tokens
from rpac.spec import Spec

WRITE_BUFFERS: Final = 16  # outputs and cache rows on their way: as many sequences as a wave may end
TILE_BYTES: Final = MIB  # K and V of one tile: long enough that its DMA hides what it costs by itself
LEAST_TILE_BYTES: Final = MIB // 2
WAVE_BYTES: Final = 8 * MIB  # fetched in a few times the DMA's latency
MOST_TILES: Final[Mapping[str, int]] = {"decode": 6, "mixed": 4}  # of a wave: more are little faster, and each is code
LOADED_BYTES: Final = MIB // 2  # of K and V that the compiler may load early, beside its fetches
# Where a tile has more pages than a few, fetching them takes so long that more tiles pay.
FEW_PAGES: Final = 4
MORE_TILES: Final = 8


@dataclass(frozen=True)
class DecodeWaves:
    """Tiles of a decode kernel where K and V are separate: a wave has `tiles_per_wave` tiles of `tile` tokens, of any
    sequences, and is fetched `lookahead` waves before it is computed.

    `write_buffers`: sequences whose new tokens are on their way to the cache; `max_rows`: those of the largest batch, whose
    queries are loaded at once.
    """

    tile: int
    tiles_per_wave: int
    lookahead: int
    write_buffers: int
    max_rows: int

    @property
    def wave_buffers(self) -> int:
        """Waves that are fetched or in use at once."""
        return self.lookahead + 1

    def tiles_loaded(self, spec: Spec) -> int:
        """Tiles that fill the registers twice: as many hide the latency of the MXU, and more would be spilled."""
        return max(LOADED_BYTES // (self.tile * _token_bytes(spec)), 1)

    def scratch(self, spec: Spec, recipe: Recipe) -> tuple[Buffer, ...]:
        """The scratch arrays, in the order of the kernel's parameters."""
        assert recipe.decode is not None
        model, page_size = spec.model, spec.serving.page_size
        drafts = spec.serving.decode_len
        sets = Sets.of(spec)
        query_rows = sets.count * sets.rows
        new = (self.max_rows * drafts, model.kv_heads, model.head_dim)
        queries = ((self.max_rows + 1) * drafts, model.q_heads, model.head_dim)
        buffers = self.wave_buffers * self.tiles_per_wave
        kv = (buffers, self.tile // page_size, *kv_page_shape(spec))
        kinds, heads, _, lanes = kv_page_shape(spec)
        tokens = sublane_tile_tokens(model)
        unit = (*sublane_tiles_by_sequence(spec, self.write_buffers, tokens), kinds, heads, tokens, lanes)
        swapped: tuple[Buffer, ...] = ()
        if recipe.decode.read == "token_pairs":
            words = self.tile // 2 // packing(model.kv_dtype)
            shape = (self.tiles_per_wave, heads, words, lanes)
            swapped = (Buffer("kv_swapped", shape, "uint32", "second halves of a wave's tiles, K and V swapped"),)
        return needed(
            spec,
            Buffer("kv", kv, model.kv_dtype, "fetched tiles"),
            Buffer("q_in", queries, model.q_dtype, "queries of every sequence, and of no sequence"),
            Buffer("new_keys", new, new_dtype(model), "new keys of every sequence"),
            Buffer("new_values", new, new_dtype(model), "new values of every sequence"),
            Buffer("unit_out", unit, model.kv_dtype, "new tokens on their way to the cache"),
            *swapped,
            Buffer(
                "scores",
                (self.tiles_per_wave, query_rows, self.tile),
                "float32",
                "scores of a wave, for the next iteration",
            ),
            *query_row_arguments(spec, (query_rows, LANES)),
            Buffer("row_max", (query_rows, LANES), "float32", "running maximum, the same in every lane"),
            Buffer("row_sum", (query_rows, LANES), "float32", "running sum, the same in every lane"),
            Buffer("acc", (query_rows, head_lanes(model)), "float32", "running output"),
            Buffer("out_all", queries, model.q_dtype, "outputs of every sequence, and of no sequence"),
            *lse_rows(spec, (queries[0], align(model.q_heads, SUBLANES), LANES)),
            Buffer("tile_seq", (buffers,), "smem", "the sequence of each tile in flight"),
            Buffer("tile_first", (buffers,), "smem", "its first token"),
            Buffer("tile_left", (buffers,), "smem", "tokens of its sequence from there on"),
            Buffer("kv_sem", (self.wave_buffers,), "dma", "fetches"),
            *load_sem(spec),
            Buffer("unit_sem", (self.write_buffers,), "dma", "cache writes"),
            Buffer("out_sem", (1,), "dma", "outputs"),
            *lse_sem(spec, 1),
        )

    def temporaries(self, spec: Spec, recipe: Recipe) -> int:
        """Bytes of the values of one iteration that registers cannot hold: probabilities, and scores on their way."""
        sets = Sets.of(spec)
        return 2 * self.tiles_per_wave * nbytes((sets.count * sets.rows, self.tile), "float32")


def recipe(spec: Spec, tiles: DecodeWaves, chooser: Chooser) -> DecodeRecipe:
    """The decisions of the kernel.

    Token pairs: where K and V of a head share a row of 128 lanes (head_dim 64), the MXU takes rows of K alone, and of V
    alone, that two tokens share, one of either half of a tile. Halves must be whole registers of scores.
    """
    pairs = joins_rows(spec.model) and tiles.tile % (2 * LANES) == 0
    options: tuple[Read, ...] = ("token_pairs", "separate") if pairs else ("separate",)
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

    Token pairs have an order of their own.
    """
    return ("before",) if read == "token_pairs" else ("between", "before")


def is_legal(spec: Spec, tiles: DecodeWaves) -> bool:
    """Whether the kernel works with these tiles at all."""
    return tiles.tile % spec.serving.page_size == 0


def is_short(kind: str, tiles: DecodeWaves) -> bool:
    """Whether a wave has no more tiles than the rules may give it."""
    return tiles.tiles_per_wave <= (MORE_TILES if kind == "decode" else MOST_TILES[kind])


def most_tiles(spec: Spec, kind: str, tile: int) -> int:
    """Tiles that a wave may have: each is code, which an executable pays for in size."""
    return MORE_TILES if kind == "decode" and tile > FEW_PAGES * spec.serving.page_size else MOST_TILES[kind]


def _token_bytes(spec: Spec) -> int:
    """Bytes of K and V of one token in the cache."""
    return nbytes(kv_page_shape(spec), spec.model.kv_dtype) // spec.serving.page_size


def choices(spec: Spec, kind: str, tokens: int) -> Iterator[DecodeWaves]:
    """From the tiles that keep the chip busy down to the smallest that work."""
    serving = spec.serving
    token_bytes = _token_bytes(spec)
    # A tile is computed whole, so it is no longer than the shortest sequences, unless it would be so small that the latency
    # of its matmuls shows; a row of its scores is at least a register wide.
    seen = [power_of_two_from(tokens) for tokens in visible_tokens(spec, serving.decode_len)]
    shortest = max(min(seen), min(max(seen), power_of_two_to(LEAST_TILE_BYTES // token_bytes)), LANES)
    tile = max(min(power_of_two_to(TILE_BYTES // token_bytes), shortest), serving.page_size, LANES)
    max_rows = min(tokens // serving.decode_len, serving.max_num_seqs)
    while tile >= max(serving.page_size, LANES):
        tiles = min(max(WAVE_BYTES // (tile * token_bytes), 1), most_tiles(spec, kind, tile))
        while tiles:
            most = 2 + math.ceil(IN_FLIGHT_BYTES / (tiles * tile * token_bytes))
            for lookahead in range(most, 1, -1):
                yield DecodeWaves(tile, tiles, lookahead, WRITE_BUFFERS, max_rows)
            tiles //= 2
        tile //= 2
