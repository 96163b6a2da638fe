"""Bugs of decode kernels for rows of several new tokens, with and without a tree of them."""

from __future__ import annotations

from functools import partial

from mutation import Bug, BugSuite
from small import blocks_plan, drafting, small_plan

SHARED = (
    Bug("each new token sees those after it", "DecodeKernel.visible_tokens", "row < i * GROUP", "row < 0"),
    Bug("the last token not seen", "DecodeKernel.visible_tokens", "token < left", "token < left - 1"),
    Bug(
        "no wait for a cache write before its buffer is used again",
        "DecodeKernel.update_cache.wait_for_buffer",
        "self.wait_for_writes(seq - WRITE_BUFFERS)",
    ),
    Bug(
        "new tokens put into one sublane tile only",
        "DecodeKernel.update_cache",
        "pl.cdiv(end, SUBLANE_TILE)",
        "lax.div(jnp.maximum(first_new, 0), SUBLANE_TILE) + 1",
        hangs=True,
    ),
)
BLOCKS = (
    Bug(
        "new tokens not put into the block before the last",
        "DecodeKernel.wait_and_patch",
        "left < BLOCK + DECODE_LEN",
        "left <= BLOCK",
        hangs=True,
    ),
    Bug("no wait for the last cache writes", "DecodeKernel.drain", "self.wait_for_writes(self.num_seqs - 1 - index)"),
    Bug(
        "the first new token's queries for all",
        "DecodeKernel.load_queries",
        "self.q_all[seq * DECODE_LEN + token]",
        "self.q_all[seq * DECODE_LEN]",
    ),
)
WAVES = (
    Bug(
        "new tokens not put into the tile before the last",
        "DecodeKernel.patch_tile",
        "left < TILE + DECODE_LEN",
        "left <= TILE",
        hangs=True,
    ),
    Bug(
        "new tokens not put into the wave before the last",
        "DecodeKernel.wait_and_patch",
        "self.tile_left[first_tile] < tiles * TILE + DECODE_LEN",
        "self.tile_left[first_tile] <= tiles * TILE",
        hangs=True,
    ),
    Bug("no wait for the last cache writes", "DecodeKernel.drain_write", "self.wait_for_writes(self.num_seqs - 1 - i)"),
    Bug(
        "the new token before put in place of each",
        "DecodeKernel.patch_sublane_tile",
        "array[seq * DECODE_LEN + i]",
        "array[seq * DECODE_LEN + i - 1]",
    ),
)
TREES = (
    Bug(
        "each new token sees what the one before it does",
        "DecodeKernel.visible_tokens",
        "self.tree[seq * DECODE_LEN + i]",
        "self.tree[seq * DECODE_LEN + max(i - 1, 0)]",
    ),
    Bug(
        "the context not seen",
        "DecodeKernel.visible_tokens",
        "2 * self.tree[seq * DECODE_LEN + i] + 1",
        "2 * self.tree[seq * DECODE_LEN + i]",
    ),
    Bug(
        "the first sequence's tree for all",
        "DecodeKernel.visible_tokens",
        "self.tree[seq * DECODE_LEN + i]",
        "self.tree[i]",
    ),
)
plan = partial(small_plan, kind="decode")
SUITES = [
    BugSuite("drafts, blocks", drafting("interleaved", 4), blocks_plan, SHARED + BLOCKS),
    BugSuite(
        "drafts, waves",
        drafting("separate", 4),
        plan,
        SHARED + WAVES,
        ordinary=("each new token sees those after it",),
    ),
    BugSuite(
        "drafts, blocks, a tree",
        drafting("interleaved", 4, tree=True),
        blocks_plan,
        TREES,
        ordinary=("each new token sees what the one before it does",),
    ),
]
