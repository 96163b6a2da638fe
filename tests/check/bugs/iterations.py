"""Bugs of kernels by blocks of queries whose tiles take several iterations: their order, and scores made ahead."""

from __future__ import annotations

from functools import partial

from mutation import Bug, BugSuite, in_mixed
from small import ITERATED, iterated_plan

SCORES = (
    Bug(
        "the next scores stored in reverse order",
        "PrefillKernel.flash_iteration",
        "self.next_scores[later - len(steps), :, : tiles.tokens]",
        "self.next_scores[len(steps) - 1 - i, :, : tiles.tokens]",
    ),
    Bug(
        "scores of the first iteration for all",
        "PrefillKernel.step_scores",
        "tiles.tile_of(iteration)",
        "tiles.tile_of(0)",
    ),
    Bug(
        "the scores of the first step for all, at first",
        "PrefillKernel.make_first_scores",
        "self.step_scores(tiles, 0, i)",
        "self.step_scores(tiles, 0, 0)",
    ),
    Bug(
        "no first scores",
        "PrefillKernel.make_first_scores",
        "self.next_scores[i, :, : tiles.tokens] = self.step_scores(tiles, 0, i)",
    ),
)
# Pipelined across blocks, with separate K and V.
PIPELINED = (
    Bug(
        "the next scores made of this iteration",
        "PrefillKernel.flash_iteration",
        "jnp.minimum(iteration + 1, tiles.last)",
        "iteration",
    ),
    Bug(
        "the last scores made of the iteration before",
        "PrefillKernel.flash_iteration",
        "jnp.minimum(iteration + 1, tiles.last)",
        "jnp.minimum(iteration + 1, tiles.last - 1)",
    ),
    Bug(
        "scores of this block taken for those of the next",
        "FullTiles.start",
        "jnp.where(self.scores_next_block, self.iterations, self.iterations - 1)",
        "self.iterations - 1",
    ),
    Bug(
        "scores of the next block made of this one's start",
        "FullTiles.scores",
        "jnp.where(beyond, lax.rem(self.buffer + 1, KV_BUFFERS), self.buffer)",
        "self.buffer",
    ),
    Bug(
        "no wait for the next block",
        "FullTiles.wait_for_next",
        "pl.when(self.scores_next_block & (iteration == self.iterations - 1))(self.wait_for_block)",
    ),
    Bug(
        "the next block waited for an iteration late",
        "FullTiles.wait_for_next",
        "self.iterations - 1",
        "self.iterations",
    ),
    Bug(
        "full tiles counted from the second on",
        "PrefillKernel.attend_block",
        "FullTiles(self, buffer, block == 0, 0, full, scored, scores_next_block, wait_for_next)",
        "FullTiles(self, buffer, block == 0, 1, full, scored, scores_next_block, wait_for_next)",
    ),
    Bug(
        "all iterations of the first tile",
        "FullTiles.tile_of",
        "self.first_tile + lax.div(iteration, ITERATIONS)",
        "self.first_tile",
    ),
    Bug("an iteration too few", "FullTiles.take_tiles", "self.count * ITERATIONS", "self.count * ITERATIONS - 1"),
)
ORDER = (
    Bug("scores added to the first heads", "PrefillKernel.flash_iteration", "first_head + head", "head"),
    Bug(
        "iterations whose heads overlap",
        "FullTiles.tile_of",
        "lax.rem(iteration, ITERATIONS) * STEP_HEADS",
        "lax.rem(iteration, ITERATIONS)",
    ),
    Bug(
        "iterations on the diagonal whose heads overlap",
        "PartialTile.tile_of",
        "lax.rem(iteration, DIAGONAL_ITERATIONS) * DIAGONAL_HEADS",
        "lax.rem(iteration, DIAGONAL_ITERATIONS)",
    ),
    Bug(
        "an iteration too few on the diagonal",
        "PartialTile.run",
        "blocks * DIAGONAL_ITERATIONS",
        "blocks * DIAGONAL_ITERATIONS - 1",
    ),
    Bug(
        "a full tile too many",
        "PrefillKernel.attend_block",
        "lax.div(first_query + 1, TILE)",
        "lax.div(first_query + 1, TILE) + 1",
    ),
    Bug(
        "tiles taken for full that the second query sees whole",
        "PrefillKernel.attend_block",
        "first_query + 1",
        "first_query + 2",
    ),
    Bug(
        "full tiles beyond the block",
        "PrefillKernel.attend_block",
        "jnp.clip(lax.div(first_query + 1, TILE), 0, TILES)",
        "jnp.clip(lax.div(first_query + 1, TILE), 0, TILES + 1)",
    ),
    Bug(
        "full tiles attended to twice",
        "PrefillKernel.attend_block",
        "for_each(full, pl.cdiv(valid, TILE), functools.partial(self.attend_partial_tile, buffer, block, valid, first_query))",
        "for_each(0, pl.cdiv(valid, TILE), functools.partial(self.attend_partial_tile, buffer, block, valid, first_query))",
    ),
    Bug("the last tile left out", "PrefillKernel.attend_block", "pl.cdiv(valid, TILE)", "valid // TILE"),
    Bug("diagonal blocks of another tile", "PartialTile.run", "self.tile * DIAGONAL_BLOCKS", "self.tile"),
    Bug(
        "a partial diagonal block left out",
        "PartialTile.run",
        "pl.cdiv(self.valid, DIAGONAL_BLOCK)",
        "self.valid // DIAGONAL_BLOCK",
    ),
    Bug(
        "only the first diagonal block of a tile attended to",
        "PartialTile.run",
        "jnp.minimum(DIAGONAL_BLOCKS, pl.cdiv(self.valid, DIAGONAL_BLOCK) - self.first_block)",
        "jnp.minimum(1, pl.cdiv(self.valid, DIAGONAL_BLOCK) - self.first_block)",
    ),
    Bug(
        "the first diagonal block attended to again",
        "PartialTile.tile_of",
        "self.first_block + lax.div(iteration, DIAGONAL_ITERATIONS)",
        "self.first_block",
    ),
)
# Interleaved K and V, which a kernel splits a tile before it reads them.
WORDS = (
    Bug(
        "the next scores made of this iteration",
        "PrefillKernel.flash_iteration",
        "jnp.minimum(iteration + 1, tiles.iterations - 1)",
        "iteration",
    ),
    Bug(
        "words of the first tile for all full ones",
        "FullTiles.take_tile",
        "self.kernel.deinterleave_tile(self.buffer, tile)",
        "self.kernel.deinterleave_tile(self.buffer, 0)",
    ),
    Bug(
        "words not deinterleaved on the diagonal",
        "PartialTile.run",
        "self.kernel.deinterleave_tile(self.buffer, self.tile)",
    ),
    Bug(
        "words of the first diagonal block deinterleaved for all",
        "PrefillKernel.deinterleave_rows",
        "tile * TILE_ROWS + block * DIAGONAL_ROWS",
        "tile * TILE_ROWS",
    ),
    Bug(
        "words of the first diagonal block read for all",
        "PrefillKernel.head_rows_of",
        "lax.div(lax.rem(first, TILE), PACKING)",
        "0",
    ),
    Bug(
        "tokens of a diagonal block in the wrong order",
        "PrefillKernel.tokens_in_order",
        "(index & 1) * TOKENS_APART",
        "(index & 1) * (TOKENS_APART - 1)",
    ),
)

prefill, mixed = partial(iterated_plan, kind="prefill"), partial(iterated_plan, kind="mixed")
SUITES = [
    BugSuite(
        "iterations, prefill, separate",
        ITERATED["separate"],
        prefill,
        SCORES + PIPELINED + ORDER,
        ordinary=("the first diagonal block attended to again",),
    ),
    BugSuite(
        "iterations, prefill, interleaved",
        ITERATED["interleaved"],
        prefill,
        WORDS,
        ordinary=("the next scores made of this iteration",),
    ),
    BugSuite("iterations, mixed", ITERATED["interleaved"], mixed, (in_mixed(WORDS[0]),)),
]
