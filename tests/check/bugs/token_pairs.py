"""Bugs of decode kernels in which two tokens share each row of a matmul."""

from __future__ import annotations

from mutation import Bug, BugSuite
from small import pairing, pairs_plan

PAIRS = (
    Bug("second halves of tiles not swapped", "DecodeKernel.compute_tiles", "self.swap_second_half(wave + 1, i)"),
    Bug(
        "the second half of the wave before swapped",
        "DecodeKernel.compute_tiles",
        "self.swap_second_half(wave + 1, i)",
        "self.swap_second_half(wave, i)",
    ),
    Bug(
        "the second half kept for another head",
        "DecodeKernel.swap_second_half",
        "self.kv_swapped[i, head]",
        "self.kv_swapped[i, KV_HEADS - 1 - head]",
    ),
    Bug(
        "K read for V",
        "DecodeKernel.head_values",
        "select_lanes(self.kv_swapped[i, head], first)",
        "select_lanes(first, self.kv_swapped[i, head])",
    ),
    Bug(
        "queries of the second half not moved to its lanes",
        "DecodeKernel.rows_of_queries",
        "pltpu.roll(queries, HEAD_DIM, 1)",
        "queries",
    ),
    Bug(
        "what lies behind the last token not cleared",
        "DecodeKernel.patch_last_tiles.clear_tails",
        "self.clear_tail(slot, left)",
    ),
)
SUITES = [BugSuite("decode, token pairs", pairing(), pairs_plan, PAIRS, ordinary=("K read for V",))]
