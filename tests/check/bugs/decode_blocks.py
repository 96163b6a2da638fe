"""Bugs of decode kernels by blocks: interleaved K and V, which a kernel splits a block before it reads them."""

from __future__ import annotations

from mutation import Bug, BugSuite
from small import INTERLEAVED, blocks_plan

READING = (
    Bug(
        "the next page fetched in place of each",
        "PagedKernel.start_page",
        "self.page_indices[first + page]",
        "self.page_indices[first + page + 1]",
    ),
    Bug(
        "the block waited for and patched in the next buffer",
        "DecodeKernel.wait_and_patch",
        "lax.rem(iteration, KV_BUFFERS)",
        "lax.rem(iteration + 1, KV_BUFFERS)",
        hangs=True,
    ),
    Bug("K read for V", "DecodeKernel.head_values", "self.v_words", "self.k_words"),
    Bug(
        "this block split in place of the next",
        "DecodeKernel.compute_block",
        "lax.rem(iteration + 1, KV_BUFFERS)",
        "lax.rem(iteration, KV_BUFFERS)",
    ),
    Bug(
        "the next block split over this one",
        "DecodeKernel.flash_step",
        "Deinterleave(self, next_buffer, 1 - half)",
        "Deinterleave(self, next_buffer, half)",
    ),
    Bug("the first block not split", "DecodeKernel.attend", "Deinterleave(self, 0, 0).finish()"),
    Bug("queries of the wrong heads", "DecodeKernel.load_queries", "queries[heads]", "queries[head : head + GROUP]"),
    Bug(
        "the last block left out",
        "DecodeKernel.next_block",
        "(block + 1) * BLOCK >= self.row_len(seq)",
        "(block + 2) * BLOCK > self.row_len(seq)",
        hangs=True,
    ),
)
SOFTMAX = (
    Bug("the sum not rescaled", "DecodeKernel.softmax", "alpha * self.row_sum[...]", "self.row_sum[...]"),
    Bug(
        "the output not rescaled",
        "DecodeKernel.accumulate_pv",
        "broadcast_lanes(alpha[rows], HEAD_LANES) * self.acc[rows]",
        "self.acc[rows]",
    ),
    Bug("a token too many seen", "DecodeKernel.visible_tokens", "token < end", "token < end + 1"),
    Bug("the last token not seen", "DecodeKernel.visible_tokens", "token < end", "token < end - 1"),
    Bug(
        "what lies behind the last token not cleared",
        "DecodeKernel.wait_and_patch.patch_last_block",
        "self.clear_tail(buffer, kv_len - block * BLOCK)",
    ),
)
WAITS = (
    Bug("no wait for a block", "DecodeKernel.wait_and_patch", "self.wait_block(kv_len, block, buffer)"),
    Bug(
        "no wait for a full block",
        "PagedKernel.wait_pages.wait_for_full_block",
        "pltpu.make_async_copy(whole, whole, self.kv_sem.at[buffer]).wait()",
    ),
    Bug(
        "the next block neither waited for nor patched",
        "DecodeKernel.iterate",
        "self.wait_and_patch(iteration + 1, *following)",
        hangs=True,
    ),
    Bug("no wait for queries, keys and values", "DecodeKernel.attend", "load.wait()"),
    Bug(
        "no wait for a cache write before its buffer is used again",
        "DecodeKernel.update_cache",
        "pl.when(is_wanted & (seq >= WRITE_BUFFERS))(functools.partial(self.wait_for_writes, seq - WRITE_BUFFERS))",
    ),
    Bug("no wait for the last cache writes", "DecodeKernel.drain", "self.wait_for_writes(self.num_seqs - 1 - index)"),
    Bug(
        "no wait for an output before its buffer is used again",
        "DecodeKernel.store_output.wait_for_buffer",
        "self.out_copy(seq - WRITE_BUFFERS).wait()",
    ),
    Bug("no wait for the last outputs", "DecodeKernel.drain", "self.out_copy(self.num_seqs - 1 - index).wait()"),
)
UPDATES = (
    Bug(
        "the new token written to the next page",
        "DecodeKernel.start_write",
        "quotient(self.kv_lens[seq] - 1, PAGE_SIZE)",
        "quotient(self.kv_lens[seq], PAGE_SIZE)",
    ),
    Bug(
        "the new token written where the one before it is",
        "DecodeKernel.cache_write",
        "self.kv_lens[seq] - 1",
        "jnp.maximum(self.kv_lens[seq] - 2, 0)",
    ),
    Bug(
        "the new token not attended to",
        "DecodeKernel.put_new_token",
        "self.kv[buffer, rows] = words_as_rows(words)",
    ),
    Bug(
        "the new token not written",
        "DecodeKernel.start_write",
        "self.cache_write(seq, self.page_indices[entry]).start()",
        hangs=True,
    ),
)

SUITES = [
    BugSuite(
        "decode, blocks",
        INTERLEAVED,
        blocks_plan,
        READING + SOFTMAX + WAITS + UPDATES,
        ordinary=(
            "the next block split over this one",
            "the output not rescaled",
            "what lies behind the last token not cleared",
            "no wait for a cache write before its buffer is used again",
        ),
    ),
]
