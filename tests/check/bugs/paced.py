"""Bugs of prefill kernels whose softmax is paced by scores."""

from __future__ import annotations

from functools import partial

from mutation import Bug, BugSuite
from small import PACED, plan_of

PACED_SOFTMAX = (
    Bug(
        "scores of the next step added",
        "PrefillKernel.flash_iteration",
        "self.at_tokens(i, chunk)",
        "self.at_tokens(i + 1, chunk)",
    ),
    Bug("the maximum not kept", "PrefillKernel.flash_iteration", "self.row_max[self.at(head, rows)] = new_max"),
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
    Bug("a token too many seen", "visible", "token <= query", "token <= query + 1"),
    Bug(
        "one diagonal block a tile only",
        "PartialTile.run",
        "pl.cdiv(self.valid, DIAGONAL_BLOCK) - self.first_block",
        "1",
    ),
    Bug(
        "the sum before left out",
        "PrefillKernel.flash_iteration",
        "alpha * old_sum + lane_partial_sum(p)",
        "lane_partial_sum(p)",
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
    Bug(
        "what lies behind the last token not cleared",
        "PrefillKernel.step",
        "pl.when(last)(functools.partial(self.clear_tail, buffer, valid))",
    ),
)

SUITES = [BugSuite("prefill, paced", PACED, partial(plan_of, kind="prefill"), PACED_SOFTMAX)]
