"""Bugs of how kernels by blocks of queries order query rows by head, mask them in the matmul and keep their state."""

from __future__ import annotations

from functools import partial

from mutation import Bug, BugSuite
from small import ITERATED, iterated_plan

MASKS = (
    Bug("a token too many seen", "visible", "token <= query", "token <= query + 1"),
    Bug("a token too few seen", "visible", "token <= query", "token < query"),
    Bug("the mask of the other step", "PartialTile.scores", "rows.start // STEP_ROWS", "1 - rows.start // STEP_ROWS"),
    Bug(
        "the mask of the first rows for all",
        "PartialTile.make_mask_bias",
        "self.first_query + kernel.query_of(row)",
        "self.first_query",
    ),
    Bug(
        "the mask of the first diagonal block made for both",
        "PartialTile.make_mask_bias",
        "self.first_block + block",
        "self.first_block",
    ),
    Bug(
        "the mask of the first diagonal block read for both",
        "PartialTile.scores",
        "lax.div(first, DIAGONAL_BLOCK) - self.first_block",
        "0",
    ),
    Bug(
        "rows taken for those of the next query", "PrefillKernel.attend", "self.query_of(row)", "self.query_of(row) + 1"
    ),
    Bug("rows taken as sorted by head", "PrefillKernel.attend", "self.query_of(row)", "lax.rem(row, 16)"),
    Bug(
        "what lies behind the last token not cleared",
        "PrefillKernel.step",
        "pl.when(last)(functools.partial(self.clear_tail, buffer, valid))",
    ),
    Bug(
        "keys behind the last token not cleared",
        "PrefillKernel",
        "cleared_planes = CLEARED_PLANES",
        "cleared_planes = (V_PLANE,)",
    ),
    Bug(
        "values behind the last token not cleared",
        "PrefillKernel",
        "cleared_planes = CLEARED_PLANES",
        "cleared_planes = (K_PLANE,)",
    ),
)
# Of heads within registers.
TRANSPOSES = (
    Bug(
        "halves of a register taken for each other",
        "transpose_heads",
        "sublane & (apart * HEAD_SUBLANES) == 0",
        "sublane & (apart * HEAD_SUBLANES) != 0",
    ),
    Bug(
        "heads moved a sublane too far",
        "transpose_heads",
        "pltpu.roll(b, apart * HEAD_SUBLANES, 1)",
        "pltpu.roll(b, apart * HEAD_SUBLANES + 1, 1)",
    ),
    Bug("heads moved the wrong way", "transpose_heads", "SUBLANES - apart * HEAD_SUBLANES", "apart * HEAD_SUBLANES"),
    Bug("the transpose without its second pass", "transpose_heads", "TRANSPOSE_DISTANCES", "TRANSPOSE_DISTANCES[:1]"),
)
SORTING = (
    Bug("queries of a step sorted in reverse order", "PrefillKernel.sort_tokens", "first + i", "first + 3 - i"),
    Bug("outputs of a step taken in reverse order", "PrefillKernel.unsort_tokens", "first + i", "first + 3 - i"),
    Bug("queries of the first step sorted for all", "PrefillKernel.sort_tokens", "step * SORT_TOKENS", "0"),
    Bug("queries of all steps sorted over the first", "PrefillKernel.sort_tokens", "step * SORT_ROWS", "0"),
    Bug("the output of the first rows for all", "PrefillKernel.unsort_tokens", "step * UNSORT_ROWS", "0"),
)
STATE = (
    Bug(
        "the sum kept from the query block before",
        "PrefillKernel.state_before",
        "jnp.where(begins, 0.0, self.row_sum[self.at(head, rows)])",
        "self.row_sum[self.at(head, rows)]",
    ),
    Bug(
        "the output kept from the query block before",
        "PrefillKernel.state_before",
        "jnp.where(begins, 0.0, self.acc[self.at(head, rows)])",
        "self.acc[self.at(head, rows)]",
    ),
    Bug(
        "the state cleared at every tile of the first block",
        "PrefillKernel.flash_iteration",
        "tiles.begins & (first == tiles.tile_of(0)[0])",
        "tiles.begins",
    ),
    Bug("the state cleared at each block", "PrefillKernel.attend_block", "block == 0", "block >= 0"),
    Bug(
        "the state cleared at each partial tile of the first block",
        "PrefillKernel.attend_partial_tile",
        "block + tile",
        "block",
    ),
    Bug("the maximum not cleared at first", "PrefillKernel.attend", "self.clear_all()"),
    Bug(
        "the maximum of the first rows only cleared",
        "PrefillKernel.clear_step",
        "lax.rem(step, ROW_STEPS) * STEP_ROWS",
        "0",
    ),
    Bug("the maximum of the first heads only cleared", "PrefillKernel.clear_all", "KV_HEADS * ROW_STEPS", "KV_HEADS"),
)
# Shown only by scores of one query block that are far above those of the next: no batch of the check has such.
STALE_MAXIMUM = Bug(
    "the maximum kept from the query block before", "PrefillKernel.take_output", "self.clear_max(head, rows)"
)

SHARED = (MASKS[0], TRANSPOSES[0])
prefill = partial(iterated_plan, kind="prefill")
SUITES = [
    BugSuite(
        "query rows, prefill, separate",
        ITERATED["separate"],
        prefill,
        MASKS + TRANSPOSES + SORTING + STATE,
        ordinary=("the sum kept from the query block before",),
    ),
    BugSuite(
        "query rows, prefill, interleaved",
        ITERATED["interleaved"],
        prefill,
        SHARED,
        ordinary=("a token too many seen", "halves of a register taken for each other"),
    ),
    *(
        BugSuite(f"query rows, mixed, {layout}", spec, partial(iterated_plan, kind="mixed"), SHARED)
        for layout, spec in ITERATED.items()
    ),
]
