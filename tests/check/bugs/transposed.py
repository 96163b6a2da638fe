"""Bugs of prefill kernels that transpose their scores: query rows lie along lanes."""

from __future__ import annotations

from functools import partial

from mutation import Bug, BugSuite
from small import LONG_WINDOW, TRANSPOSED, featured, transposed_plan

SCORES = (
    Bug(
        "scores of the next step added",
        "PrefillKernel.flash_iteration",
        "self.at_tokens(i, chunk)",
        "self.at_tokens(i + 1, chunk)",
    ),
    Bug(
        "the next scores made of this iteration",
        "PrefillKernel.flash_iteration",
        "iteration if later > i else jnp.minimum(iteration + 1, tiles.last)",
        "iteration",
    ),
    Bug("scores of the first chunk for all", "PrefillKernel.make_scores", "first + chunk.start", "first"),
    Bug(
        "values of the first tokens for all",
        "PrefillKernel.flash_iteration",
        "self.head_values(tiles.buffer, first, tiles.tokens, head)",
        "self.head_values(tiles.buffer, 0, tiles.tokens, head)",
    ),
    Bug(
        "values of the first heads for all",
        "PrefillKernel.flash_iteration",
        "self.head_values(tiles.buffer, first, tiles.tokens, head)",
        "self.head_values(tiles.buffer, first, tiles.tokens, head - first_head)",
    ),
    Bug(
        "an iteration too few on the diagonal",
        "PartialTile.run",
        "blocks * DIAGONAL_ITERATIONS",
        "blocks * DIAGONAL_ITERATIONS - 1",
    ),
    Bug(
        "scores of this block taken for those of the next",
        "FullTiles.start",
        "jnp.where(self.scores_next_block, self.iterations, self.iterations - 1)",
        "self.iterations - 1",
    ),
    Bug(
        "no wait for the next block",
        "FullTiles.wait_for_next",
        "pl.when(self.scores_next_block & (iteration == self.iterations - 1))(self.wait_for_block)",
    ),
)
SOFTMAX = (
    Bug("the maximum of the next step", "PrefillKernel.flash_iteration", "self.tile_max(i)", "self.tile_max(i + 1)"),
    Bug(
        "a maximum of each sublane",
        "PrefillKernel.keep_max",
        "max_in_all_rows(jnp.max(jnp.stack(largest), axis=0))",
        "jnp.max(jnp.stack(largest), axis=0)",
    ),
    Bug(
        "the maximum of the last chunk only",
        "PrefillKernel.keep_max",
        "jnp.max(jnp.stack(largest), axis=0)",
        "largest[-1]",
    ),
    Bug("the maximum not kept", "PrefillKernel.flash_iteration", "self.row_max[self.at(head, rows)] = new_max"),
    Bug(
        "the sum before left out",
        "PrefillKernel.flash_iteration",
        "alpha * old_sum + pv[VALUE_ROWS : VALUE_ROWS + SUBLANES]",
        "pv[VALUE_ROWS : VALUE_ROWS + SUBLANES]",
    ),
    Bug(
        "the output before not rescaled",
        "PrefillKernel.flash_iteration",
        "alpha * by_register(old_acc)",
        "by_register(old_acc)",
    ),
    Bug(
        "a row of values taken for the sum",
        "PrefillKernel.flash_iteration",
        "pv[VALUE_ROWS : VALUE_ROWS + SUBLANES]",
        "pv[VALUE_ROWS - SUBLANES : VALUE_ROWS]",
    ),
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
    Bug(
        "the maximum of the first rows only cleared",
        "PrefillKernel.clear_step",
        "lax.rem(step, ROW_STEPS) * STEP_ROWS",
        "0",
    ),
    Bug("the output of the first rows for all", "PrefillKernel.unsort_tokens", "step * UNSORT_ROWS", "0"),
    Bug(
        "the output not transposed back",
        "PrefillKernel.take_output",
        "out = out.astype(self.out_rows.dtype).T",
        "out = out.astype(self.out_rows.dtype)[:, :128]",
    ),
)
MASKS = (
    Bug("the mask of the other step", "PartialTile.scores", "rows.start // STEP_ROWS", "1 - rows.start // STEP_ROWS"),
    Bug("a token too many seen", "visible", "token <= query", "token <= query + 1"),
    Bug("a token too few seen", "visible", "token <= query", "token < query"),
    Bug(
        "rows taken for those of the next query", "PrefillKernel.attend", "self.query_of(row)", "self.query_of(row) + 1"
    ),
    Bug(
        "what lies behind the last token not cleared",
        "PrefillKernel.step",
        "pl.when(last)(functools.partial(self.clear_tail, buffer, valid))",
    ),
)
FEATURES = (
    Bug("a window one too long", "visible", "token > query - WINDOW", "token >= query - WINDOW"),
    Bug(
        "rows of the first step for all",
        "PrefillKernel.query_positions",
        "rows.start + lax.broadcasted_iota(jnp.int32, (tokens, rows.size), 1)",
        "lax.broadcasted_iota(jnp.int32, (tokens, rows.size), 1)",
    ),
    Bug("sinks of the first KV head for all", "PrefillKernel.load_sinks", "head * GROUP + i", "i"),
    Bug(
        "the sink of a group's first head for all of it",
        "PrefillKernel.load_sinks",
        "head_of_group == i",
        "head_of_group == 0",
    ),
    Bug(
        "sinks left out of the sum",
        "PrefillKernel.state_before",
        "jnp.where(begins, SINK_SUM, self.row_sum[self.at(head, rows)])",
        "jnp.where(begins, 0.0, self.row_sum[self.at(head, rows)])",
    ),
    Bug(
        "the log-sum-exp of a group's first head for all of it",
        "PrefillKernel.store_log_sums_of",
        "pl.ds(i, Q_BLOCK, stride=GROUP)",
        "pl.ds(0, Q_BLOCK, stride=GROUP)",
    ),
)
NOT_CAUSAL = (
    Bug(
        "a token behind the last one seen",
        "PartialTile.scores",
        "token < self.valid - first",
        "token <= self.valid - first",
    ),
)

prefill = partial(transposed_plan, kind="prefill")
SUITES = [
    BugSuite(
        "prefill, transposed",
        TRANSPOSED["separate"],
        prefill,
        SCORES + SOFTMAX + MASKS,
        ordinary=("scores of the next step added",),
    ),
    BugSuite("prefill, transposed, features", featured(TRANSPOSED["separate"], LONG_WINDOW), prefill, FEATURES),
    BugSuite(
        "prefill, transposed, not causal", featured(TRANSPOSED["separate"], {"causal": False}), prefill, NOT_CAUSAL
    ),
]
