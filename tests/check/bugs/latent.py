"""Bugs of kernels of latent attention."""

from __future__ import annotations

from functools import partial

from mutation import Bug, BugSuite
from small import latent, plan_of, staged

# More sequences than a kernel has buffers for new tokens on their way.
SPEC = latent(page_size=64, max_num_seqs=12, max_num_tokens=64, token_buckets=(16, 64))
DECODE = (
    Bug(
        "other lanes of the latent vector taken for the values",
        "DecodeKernel.accumulate_pv",
        "self.kv[self.slot(wave, i), ..., :RANK]",
        "self.kv[self.slot(wave, i), ..., 64 : 64 + RANK]",
    ),
    Bug(
        "scores without the rotary part",
        "DecodeKernel.compute_scores",
        "[self.q_in[seq], self.q_rope_in[seq]]",
        "[self.q_in[seq], 0 * self.q_rope_in[seq]]",
    ),
    Bug(
        "what lies behind the last token not cleared",
        "DecodeKernel.patch_last_tiles.clear_tails",
        "self.clear_tail(slot, left)",
    ),
    Bug("the new token not attended to", "DecodeKernel.put_new_token", "self.kv[*at] = rows"),
    Bug(
        "no wait for a cache write before its buffer is used again",
        "DecodeKernel.update_cache",
        "pl.when(is_wanted & (seq >= WRITE_BUFFERS))(functools.partial(self.wait_for_writes, seq - WRITE_BUFFERS))",
    ),
)
STAGED = (
    Bug(
        "keys of the wrong tile",
        "DecodeKernel.transpose_keys",
        "self.latents_t[i % 2, chunk]",
        "self.latents_t[(i + 1) % 2, chunk]",
    ),
    Bug(
        "the output before a tile not rescaled",
        "DecodeKernel.merge",
        "broadcast_lanes(self.alpha[i % 2], RANK)",
        "1.0",
    ),
    Bug(
        "the mask of other tokens",
        "DecodeKernel.keep_scores",
        "self.visible_tokens(wave, i)[:, columns]",
        "self.visible_tokens(wave, i)[:, :MXU_TOKENS]",
    ),
    Bug(
        "outputs sent before they are complete",
        "DecodeKernel.stream",
        "self.tile_seq[self.slot(wave, 0)]",
        "self.tile_seq[self.slot(wave, 0)] + 1",
    ),
    Bug(
        "no wait for the queries that come later",
        "DecodeKernel.stream",
        "pl.when(wave == LATER_WAVE)(self.wait_for_later_copies)",
    ),
)
PREFILL = (
    Bug("the next token seen", "PrefillKernel.masked_score", "token <= query", "token <= query + 1"),
    Bug(
        "rows taken for those of the wrong query",
        "PrefillKernel.masked_score",
        "row // Q_HEADS",
        "row // (Q_HEADS * 2)",
    ),
    Bug(
        "a block on the diagonal not masked",
        "PrefillKernel.attend_block",
        "first_query >= KV_BLOCK - 1",
        "first_query >= KV_BLOCK - 2",
    ),
    Bug(
        "the output not rescaled",
        "PrefillKernel.accumulate_pv",
        "broadcast_lanes(alpha, RANK) * self.acc[rows]",
        "self.acc[rows]",
    ),
    Bug(
        "new tokens a row late",
        "PrefillKernel.merge_tokens",
        "self.new_in[new_buffer, PAGE_SIZE + start + i]",
        "self.new_in[new_buffer, PAGE_SIZE + start + i - 1]",
    ),
    Bug(
        "what lies behind the last token not cleared",
        "PrefillKernel.step.clear_last_block",
        "self.clear_tail(buffer, end - block * KV_BLOCK)",
    ),
    Bug(
        "the running softmax not cleared for the next query block",
        "PrefillKernel.store_output",
        "self.clear_rows(rows)",
    ),
)
SUITES = [
    BugSuite(
        "latent decode", SPEC, partial(plan_of, kind="decode"), DECODE, ordinary=("scores without the rotary part",)
    ),
    BugSuite(
        "latent stages",
        staged(),
        partial(plan_of, kind="decode"),
        STAGED,
        ordinary=("keys of the wrong tile",),
    ),
    BugSuite("latent prefill", SPEC, partial(plan_of, kind="prefill"), PREFILL, ordinary=("the next token seen",)),
]
