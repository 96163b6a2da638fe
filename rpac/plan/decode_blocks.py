"""Decode by blocks of one sequence, where K and V are interleaved: tiles, recipe, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from rpac.contract.arrays import LANES, SUBLANES, align, head_lanes, nbytes
from rpac.devices.chip import Chip
from rpac.plan.access import decode_mask_of, read_of, write_of
from rpac.plan.bounds import block_checks
from rpac.plan.buffers import (
    Buffer,
    RowDims,
    load_sem,
    lse_rows,
    lse_sem,
    needed,
    new_dtype,
    query_row_arguments,
    split_buffers,
    word_dtype,
)
from rpac.plan.page_table import BlockWindows
from rpac.plan.query_rows import by_sequence, head_rows, sublane_tiles_by_sequence
from rpac.plan.recipe import DecodeRecipe, KvMatmul, Recipe
from rpac.plan.sizes import IN_FLIGHT_BYTES, power_of_two_from, power_of_two_to, visible_tokens
from rpac.spec import Spec

MIN_BUFFERS: Final = 3
MAX_BUFFERS: Final = 16
WRITE_BUFFERS: Final = 4  # outputs and cache rows of sequences that may still be on their way
LONGEST_BLOCK: Final = 1024  # tokens
SCORE_TOKENS: Final = 8192  # of all KV heads: scores of more do not stay in registers


@dataclass(frozen=True)
class DecodeBlocks:
    """Tiles of a decode kernel: `block` tokens are fetched at once and computed at once, `buffers` of them in flight.

    `heads_per_matmul` KV heads lie side by side in a matmul: as many as fill the width of the MXU. `write_buffers`: sequences
    whose results are on their way out; `max_rows`: those of the largest batch, whose queries are loaded at once.
    """

    block: int
    heads_per_matmul: int
    buffers: int
    write_buffers: int
    max_rows: int

    def scratch(self, spec: Spec, recipe: Recipe) -> tuple[Buffer, ...]:
        """The scratch arrays, in the order of the kernel's parameters."""
        assert recipe.decode is not None
        model = spec.model
        rows = RowDims.of(model)
        query_rows = model.kv_heads * head_rows(spec)
        new_tokens = self.max_rows * spec.serving.decode_len
        new = (new_tokens, model.kv_heads, model.head_dim)
        units = sublane_tiles_by_sequence(spec, self.write_buffers, rows.sublane_tile)
        out = by_sequence(spec, self.write_buffers)
        return needed(
            spec,
            Buffer("kv", (self.buffers, self.block * rows.token_rows, LANES), model.kv_dtype, "fetched blocks"),
            *split_buffers(spec, recipe.decode.read, self.block, 2),
            Buffer("q_all", (new_tokens, model.q_heads, model.head_dim), model.q_dtype, "queries of every sequence"),
            Buffer("new_keys", new, new_dtype(model), "new keys of every sequence"),
            Buffer("new_values", new, new_dtype(model), "new values of every sequence"),
            Buffer(
                "packed",
                (rows.sublane_tile * rows.packed_rows, LANES),
                word_dtype(model),
                "a new token in the cache's form",
            ),
            Buffer(
                "unit_out", (*units, rows.sublane_tile_rows, LANES), model.kv_dtype, "rows on their way to the cache"
            ),
            Buffer(
                "q_rows",
                (query_rows, self.heads_per_matmul * head_lanes(model)),
                "float32",
                "queries of one sequence by KV head",
            ),
            *query_row_arguments(spec, (query_rows, LANES)),
            Buffer("row_max", (query_rows, LANES), "float32", "running maximum, the same in every lane"),
            Buffer("row_sum", (query_rows, LANES), "float32", "running sum, the same in every lane"),
            Buffer("acc", (query_rows, head_lanes(model)), "float32", "running output"),
            Buffer("out_rows", (*out, model.q_heads, model.head_dim), model.q_dtype, "outputs on their way out"),
            *lse_rows(spec, (*out, align(model.q_heads, SUBLANES), LANES)),
            *block_checks(spec, self.buffers, self.max_rows, self.write_buffers),
            *self._windows(spec, recipe),
            Buffer("kv_sem", (self.buffers,), "dma", "fetches"),
            *load_sem(spec),
            Buffer("unit_sem", (self.write_buffers,), "dma", "cache writes"),
            Buffer("out_sem", (self.write_buffers,), "dma", "outputs"),
            *lse_sem(spec, self.write_buffers),
        )

    def _windows(self, spec: Spec, recipe: Recipe) -> tuple[Buffer, ...]:
        """The scratch arrays of page tables in HBM; none where they are in SMEM."""
        if recipe.page_table == "smem":
            return ()
        return BlockWindows.of_decode(spec, self.block, self.buffers).buffers(self.buffers)

    def temporaries(self, spec: Spec, recipe: Recipe) -> int:
        """Bytes of the values of one flash step that registers cannot hold: scores and probabilities."""
        return 2 * nbytes((spec.model.kv_heads * head_rows(spec), self.block), "float32")


def recipe(spec: Spec) -> DecodeRecipe:
    """The decisions of the kernel: tiles decide none of them."""
    kv_matmul: KvMatmul = "converted" if spec.model.quantized else "as_stored"
    return DecodeRecipe("blocks", read_of(spec), write_of(spec), decode_mask_of(spec), kv_matmul)


def is_legal(spec: Spec, tiles: DecodeBlocks) -> bool:
    """Whether the kernel works with these tiles at all."""
    whole_pages = tiles.block % spec.serving.page_size == 0
    return (
        whole_pages
        and tiles.block <= power_of_two_from(spec.serving.max_model_len)
        and spec.model.kv_heads % tiles.heads_per_matmul == 0
    )


def choices(spec: Spec, device: Chip, tokens: int) -> Iterator[DecodeBlocks]:
    """From the tiles that keep the chip busy down to the smallest that work."""
    model, serving = spec.model, spec.serving
    token_bytes = nbytes((RowDims.of(model).token_rows, LANES), model.kv_dtype)
    # As long a block as pays, because the chain of MXU, softmax and MXU is paid once a block. But a block is computed whole,
    # so it is no longer than the sequences, and its scores (kv_heads * 8 rows of `block` float32) do not fill the registers.
    shortest = max(power_of_two_from(min(visible_tokens(spec, serving.decode_len))), LANES)
    more_rows = head_rows(spec) // align(model.group, SUBLANES)  # than with one new token
    most_scores = power_of_two_to(SCORE_TOKENS // model.kv_heads // more_rows)
    block = max(min(most_scores, LONGEST_BLOCK, shortest), serving.page_size, LANES)
    max_rows = min(tokens // serving.decode_len, serving.max_num_seqs)
    heads = math.gcd(model.kv_heads, max(device.mxu_size // head_lanes(model), 1))
    while block >= max(serving.page_size, LANES):  # a row of scores is at least one register wide
        most = min(IN_FLIGHT_BYTES // (block * token_bytes) + 2, MAX_BUFFERS)
        for buffers in range(max(most, MIN_BUFFERS), MIN_BUFFERS - 1, -1):
            yield DecodeBlocks(block, heads, buffers, WRITE_BUFFERS, max_rows)
        block //= 2
