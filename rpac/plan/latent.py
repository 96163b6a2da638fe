"""Tiles of the kernels of latent attention, and the choice among them. All query heads share a token's row of the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from rpac.contract.arrays import LANES, SUBLANES, Shape, align, latent_lanes, nbytes, packing
from rpac.plan.bounds import query_checks, wave_checks
from rpac.plan.buffers import (
    MERGE_TOKENS,
    SHORTER_LOOKAHEADS,
    UPDATE_LOOKAHEAD,
    Buffer,
    new_buffers,
    page_buffers,
)
from rpac.plan.decode_waves import DecodeWaves
from rpac.plan.page_table import query_windows
from rpac.plan.recipe import BlockRecipe, Chooser, DecodeRecipe, Fetch, Read, Recipe
from rpac.plan.sizes import copy_sizes_of, power_of_two_from, power_of_two_to
from rpac.spec import Spec

DECODE_TILE: Final = 1024  # tokens: long, so that what each tile costs by itself, its merge, is paid seldom
WAVE_TOKENS: Final = 2048  # more are little faster, and every tile is code
IN_FLIGHT_BYTES: Final = 6 << 20  # more than the HBM delivers within one DMA's latency (5.4 MB on TPU7x)
MOST_TILES: Final = 4
LOADS: Final = 6  # of a decode kernel: queries and rotary parts twice, new latent vectors and rotary keys
MXU_TOKENS: Final = 256  # that an MXU of TPU7x takes at once
STAGED_TILES: Final = 4  # of a wave: each step has work of as many tiles
MAX_LOOKAHEAD: Final = 8  # waves: more take buffers and win nothing
WRITE_BUFFERS: Final = 8  # new tokens on their way to the cache: of as many sequences as a wave may end, and more
BLOCK: Final = 512  # tokens of KV of a step of a prefill or mixed kernel
BLOCK_ROWS: Final = (2048, 1024, 512)  # query rows, tokens times heads, of its blocks
STEP_ROWS: Final = 256  # of them computed at once: with fewer, pushing KV into the MXU shows
BUFFERS: Final = 3
TILE_TOKENS: Final = SUBLANES
"""Tokens of a tile of the cache, `[8, 128]` elements in HBM also where two share a word. With tiles of 16 tokens in VMEM, a
copy would have to reorder them: on TPU7x that takes 16 instructions for each page to start, and not 4."""

# Tiles decide nothing here.
BLOCK_RECIPE: Final = BlockRecipe("latent", "latent", "latent")


def _page_tiles(spec: Spec) -> Shape:
    """A page of the cache by its tiles of rows."""
    return (spec.serving.page_size // TILE_TOKENS, TILE_TOKENS, latent_lanes(spec.model))


@dataclass(frozen=True)
class LatentWaves(DecodeWaves):
    """Tiles of a decode kernel of latent attention; the fields are those of `DecodeWaves`."""

    def scratch(self, spec: Spec, recipe: Recipe) -> tuple[Buffer, ...]:
        """The scratch arrays, in the order of the kernel's parameters."""
        model, page_size = spec.model, spec.serving.page_size
        lanes = latent_lanes(model)
        rows = (self.max_rows + 1, model.q_heads)
        new, rope = align(self.max_rows, SUBLANES), model.rope_dim or 0
        buffers = self.wave_buffers * self.tiles_per_wave
        unit = (self.write_buffers, TILE_TOKENS, lanes)
        return (
            Buffer("kv", (buffers, self.tile // page_size, *_page_tiles(spec)), model.kv_dtype, "fetched tiles"),
            Buffer("q_in", (*rows, model.head_dim), model.q_dtype, "queries of every sequence, and of no sequence"),
            Buffer("q_rope_t", (self.max_rows, rope, model.q_heads), model.q_dtype, "their rotary parts, transposed"),
            Buffer("q_rope_in", (*rows, rope), model.q_dtype, "their rotary parts"),
            Buffer("new_latents", (new, model.head_dim), model.kv_dtype, "new latent vectors of every sequence"),
            Buffer("new_ropes", (new, rope), model.kv_dtype, "their rotary keys"),
            Buffer("new_rows", (new, lanes), "float32", "both, as rows of the cache"),
            Buffer("unit_out", unit, model.kv_dtype, "new tokens on their way to the cache"),
            *self._of_tiles(spec, recipe),
            Buffer("row_max", (model.q_heads, LANES), "float32", "running maximum, the same in every lane"),
            Buffer("row_sum", (model.q_heads, LANES), "float32", "running sum, the same in every lane"),
            Buffer("acc", (model.q_heads, model.head_dim), "float32", "running output"),
            Buffer("out_all", (*rows, model.head_dim), model.q_dtype, "outputs of every sequence, and of no sequence"),
            Buffer("tile_seq", (buffers,), "smem", "the sequence of each tile in flight"),
            Buffer("tile_first", (buffers,), "smem", "its first token"),
            Buffer("tile_left", (buffers,), "smem", "tokens of its sequence from there on"),
            Buffer("last_slot", (self.max_rows + 1,), "smem", "the last tile of each sequence so far"),
            *wave_checks(spec, recipe.page_table, buffers, self.max_rows, self.write_buffers),
            *self.windows(spec, recipe),
            Buffer("kv_sem", (self.wave_buffers,), "dma", "fetches"),
            Buffer("load_sem", (LOADS,), "dma", "queries, their rotary parts, new tokens"),
            Buffer("unit_sem", (self.write_buffers,), "dma", "cache writes"),
            Buffer("out_sem", (1,), "dma", "outputs"),
        )

    def _of_tiles(self, spec: Spec, recipe: Recipe) -> tuple[Buffer, ...]:
        """What tiles leave for the next iteration, or in stages for the next step."""
        heads = spec.model.q_heads
        if not is_staged(recipe):
            scores = (self.tiles_per_wave, heads, self.tile)
            return (Buffer("scores", scores, "float32", "scores of a wave, for the next iteration"),)
        latents = (2, self.tile // MXU_TOKENS, spec.model.head_dim // 2, MXU_TOKENS)
        rows = (2, heads, LANES)
        return (
            Buffer("latents_t", latents, "uint32", "transposed latent vectors of two tiles, two lanes in a word"),
            Buffer("scores", (2, heads, self.tile), "float32", "scores of two tiles"),
            Buffer("p", (2, heads, self.tile), spec.model.q_dtype, "probabilities of two tiles"),
            Buffer("tile_max", rows, "float32", "the largest score of two tiles, the same in every lane"),
            Buffer("alpha", rows, "float32", "what the outputs before two tiles are multiplied by"),
            Buffer("inverse_sum", rows, "float32", "1 / the running sum after two tiles"),
        )

    def temporaries(self, spec: Spec, recipe: Recipe) -> int:
        """Bytes of the values of one iteration that registers cannot hold: probabilities, scores on their way, and outputs.

        In stages only what a step has under way.
        """
        tiles = 2 if is_staged(recipe) else self.tiles_per_wave
        return 2 * tiles * nbytes((spec.model.q_heads, self.tile + spec.model.head_dim), "float32")


@dataclass(frozen=True)
class LatentBlockTiles:
    """Tiles of a prefill or mixed kernel, in tokens: `q_block` new ones, of all heads, against `block` cached ones a step.

    `step_rows` query rows (tokens times heads) are computed at once. `update_lookahead`: pages whose new tokens are fetched
    before they are merged.
    """

    q_block: int
    block: int
    step_rows: int
    buffers: int
    merge_tokens: int
    new_tokens: int
    copy_sizes: tuple[int, ...]
    update_lookahead: int = UPDATE_LOOKAHEAD

    def scratch(self, spec: Spec, recipe: Recipe) -> tuple[Buffer, ...]:
        """The scratch arrays, in the order of the kernel's parameters."""
        model, page_size = spec.model, spec.serving.page_size
        lanes, rows = latent_lanes(model), self.q_block * model.q_heads
        fetched, updated = new_buffers(self.update_lookahead), page_buffers(self.update_lookahead)
        new = (fetched, 2 * page_size + self.new_tokens, 1, lanes)
        page = _page_tiles(spec)
        queries = (self.q_block, model.q_heads)
        return (
            Buffer("kv", (self.buffers, self.block // page_size, *page), model.kv_dtype, "fetched blocks"),
            Buffer("new_in", new, model.kv_dtype, "new tokens, around the page they go to"),
            Buffer("page_rows", (updated, *page), model.kv_dtype, "pages to update"),
            Buffer("merged", (self.merge_tokens, lanes), "float32", "new tokens, side by side"),
            Buffer("q_in", (self.buffers, *queries, model.head_dim), model.q_dtype, "query blocks as they come"),
            Buffer("q_rope_in", (self.buffers, *queries, lanes - model.head_dim), model.q_dtype, "their rotary parts"),
            Buffer("row_max", (rows, LANES), "float32", "running maximum, the same in every lane"),
            Buffer("row_sum", (rows, LANES), "float32", "running sum, the same in every lane"),
            Buffer("acc", (rows, model.head_dim), "float32", "running output"),
            Buffer("out_rows", (1, *queries, model.head_dim), model.q_dtype, "an output block on its way out"),
            *query_checks(spec, self.buffers, updated),
            *query_windows(spec, recipe, self.block, self.buffers, self.update_lookahead),
            Buffer("kv_sem", (self.buffers,), "dma", "fetches"),
            Buffer("new_sem", (fetched,), "dma", "new tokens"),
            Buffer("old_sem", (updated,), "dma", "pages that hold old tokens"),
            Buffer("write_sem", (updated,), "dma", "cache writes"),
            Buffer("q_sem", (self.buffers,), "dma", "query blocks"),
            Buffer("out_sem", (1,), "dma", "output blocks"),
        )

    def temporaries(self, spec: Spec, recipe: Recipe) -> int:
        """Bytes of the values of flash steps that registers cannot hold: scores, probabilities and outputs."""
        return 4 * nbytes((self.step_rows, self.block + spec.model.head_dim), "float32")


def is_staged(recipe: Recipe) -> bool:
    """Whether tiles of a decode kernel go through stages."""
    return recipe.decode is not None and recipe.decode.read == "latent_staged"


def decode_recipe(spec: Spec, tiles: LatentWaves, chooser: Chooser) -> DecodeRecipe:
    """The decisions of a decode kernel: stages where the MXU takes longest to transpose keys, if tiles allow them.

    Predicted for 128 heads, 64 x 4096: with stages TPU7x takes 147 us and not 185, and the other targets take as long.
    """
    words = packing(spec.model.kv_dtype) == 2 and packing(spec.model.q_dtype) == 2
    whole = tiles.tile % MXU_TOKENS == 0 and MXU_TOKENS % spec.serving.page_size == 0
    pairs = tiles.tiles_per_wave >= STAGED_TILES and tiles.tiles_per_wave % 2 == 0
    staged = chooser.target == "tpu7x" and words and whole and pairs
    options: tuple[Read, ...] = ("latent_staged", "latent") if staged else ("latent",)
    read = chooser.choose("read", *options)
    between: tuple[Fetch, ...] = ("between",) if read == "latent_staged" else ("before",)
    return DecodeRecipe("waves", read, "latent", "lengths", "as_stored", chooser.choose("fetch", *between))


def decode_choices(spec: Spec, target: str, tokens: int) -> Iterator[LatentWaves]:
    """From the tiles that keep the chip busy down to the smallest that work."""
    serving = spec.serving
    token_bytes = nbytes((latent_lanes(spec.model),), spec.model.kv_dtype)
    # A tile is computed whole, so it is no longer than the sequences; a row of its scores is at least a register wide.
    shortest = max(power_of_two_from(min(serving.context_lens)), LANES)
    tile = max(min(DECODE_TILE, shortest), serving.page_size)
    max_rows = min(tokens, serving.max_num_seqs)
    while tile >= max(serving.page_size, LANES):
        tiles = STAGED_TILES if target == "tpu7x" else min(WAVE_TOKENS // tile, MOST_TILES)
        while tiles:
            most = min(2 + math.ceil(IN_FLIGHT_BYTES / (tiles * tile * token_bytes)), MAX_LOOKAHEAD)
            for lookahead in range(most, 1, -1):
                yield LatentWaves(tile, tiles, lookahead, WRITE_BUFFERS, max_rows)
            tiles //= 2
        tile //= 2


def block_choices(spec: Spec, kind: str, tokens: int) -> Iterator[LatentBlockTiles]:
    """From large to small, and then again with an update that looks less far ahead."""
    yield from _block_choices(spec, kind, tokens)
    for tiles in _block_choices(spec, kind, tokens):
        for lookahead in SHORTER_LOOKAHEADS:
            yield replace(tiles, update_lookahead=lookahead)


def _block_choices(spec: Spec, kind: str, tokens: int) -> Iterator[LatentBlockTiles]:
    """A prefill kernel's query block divides the chunk, so that it has no partial block."""
    model, serving = spec.model, spec.serving
    longest = max(power_of_two_from(max(serving.context_lens)), LANES)
    limit = serving.prefill_chunk if kind == "prefill" else min(tokens, serving.prefill_chunk)
    for rows in BLOCK_ROWS:
        q_block = power_of_two_to(rows // model.q_heads)
        q_block = math.gcd(q_block, limit) if kind == "prefill" else min(q_block, power_of_two_from(limit))
        for block in (BLOCK, BLOCK // 2, LANES):
            yield LatentBlockTiles(
                q_block=q_block,
                block=max(min(block, longest), serving.page_size),
                step_rows=min(power_of_two_to(STEP_ROWS // model.q_heads), q_block) * model.q_heads,
                buffers=BUFFERS,
                merge_tokens=min(MERGE_TOKENS, serving.page_size),
                new_tokens=min(tokens, serving.page_size),
                copy_sizes=copy_sizes_of(kind, q_block, tokens),
            )
