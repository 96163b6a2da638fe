"""Ragged paged attention of mistral-7b: decode batches on v5p.

Do not edit: made from spec 7f5bc4968c91a8440db970b6df67d4ec707ff9d7b77799f16f3340227e130ff4 by
    rpac build mistral-7b.yaml --target v5p
Change the spec or the templates and run it again.

What was specialized:
- 32 query heads over 8 KV heads, head_dim 128, queries bfloat16, KV bfloat16: constants
- pages of 128 tokens, 32 a sequence, up to 64 sequences
- token buckets that use it: 64, 256, 1024, 2048
- causal, cache updated; no window, soft cap, sinks or KV scales in the spec: none is in the code
- only decode batches: the other kernels are not in this program
- decode: blocks of 1024 tokens, as long as the expected lengths and the registers for scores allow; 4 buffers, so that DMA latency hides behind 3 blocks in flight
- VMEM: 26,660,864 bytes counted, 41,943,040 allowed, 67,108,864 there
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

KV_HEADS = 8
GROUP = 4  # query heads that share a KV head
HEAD_DIM = 128
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 32
SCORE_SCALE = 0.12751743082459868  # 0.08838834764831845 (the softmax scale) * log2(e): probabilities are powers of two
MASKED = -2e+38  # finite, so that a row with nothing in it yet stays a number

# The cache of one layer is seen as rows of 128 lanes: by token, then KV head, then K and V.
PAGE_ROWS = 2048  # 16 of each token
UNIT = 1  # tokens of the smallest piece that a DMA or a store reaches
UNIT_ROWS = 16


def pack_token(keys, values, packed, token):
    """Lays one token's new keys and values `[KV_HEADS, HEAD_DIM]` into 32-bit words: K in the low half, V in the high."""
    keys = pltpu.bitcast(keys.astype(jnp.float32), jnp.uint32)  # a bfloat16 is the high half of a float32
    values = pltpu.bitcast(values.astype(jnp.float32), jnp.uint32)
    words = (keys >> 16) | values
    packed[token * 8 : (token + 1) * 8] = words


def rows_as_words(rows):
    return pltpu.bitcast(rows, jnp.uint32)


def words_as_rows(words):
    return pltpu.bitcast(words, jnp.bfloat16)


def widen(rows, lanes):
    """Rows that hold one value in all 128 lanes, over `lanes` lanes: cheaper than a broadcast from one lane."""
    return jnp.concatenate([rows] * (lanes // 128), axis=1)


def products(rows, matrix, contracted):
    """`rows` times `matrix` along its dimension `contracted`, in float32."""
    dims = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(rows, matrix, dims, preferred_element_type=jnp.float32)


def decode_kernel(
    # scalars in SMEM
    kv_lens, page_indices, distribution,
    # arrays in HBM; the cache is updated in place
    q_hbm, k_hbm, v_hbm, _cache, out_hbm, cache_hbm,
    # scratch
    kv,
    k_words,
    v_words,
    q_all,
    new_keys,
    new_values,
    packed,
    unit_out,
    q_rows,
    row_max,
    row_sum,
    acc,
    out_rows,
    kv_sem,
    load_sem,
    unit_sem,
    out_sem,
):  # fmt: skip
    """One new token for each of the sequences [0, distribution[0]): update its page, attend to all of its tokens.

    A step is one KV block of one sequence. The fetch runs 3 steps ahead, across the ends of sequences.
    While one block is computed, the words of the next are split into K and V: the one keeps the MXU busy, the other the stores.
    """
    num_seqs = distribution[0]

    # ---- fetch KV: whole pages, into one of 4 buffers of 1024 tokens

    def page_copy(seq, block, slot, page):
        physical = page_indices[seq * PAGES_PER_SEQ + block * 8 + page]
        rows = pl.ds(page * PAGE_ROWS, PAGE_ROWS)
        return pltpu.make_async_copy(cache_hbm.at[physical], kv.at[slot, rows], kv_sem.at[slot])

    def pages_of(kv_end, block):
        return jnp.minimum(pl.cdiv(kv_end, PAGE_SIZE) - block * 8, 8)

    def start_block(kv_end, seq, block, slot):
        def one(page, _):
            page_copy(seq, block, slot, page).start()
            return 0

        pages = pages_of(kv_end, block)

        @pl.when(pages == 8)
        def _():
            for page in range(8):
                one(page, 0)

        @pl.when(pages < 8)
        def _():
            lax.fori_loop(0, pages, one, 0)

    def wait_block(kv_end, seq, block, slot):
        def one(page, _):
            page_copy(seq, block, slot, page).wait()
            return 0

        pages = pages_of(kv_end, block)

        @pl.when(pages == 8)
        def _():
            pltpu.make_async_copy(kv.at[slot], kv.at[slot], kv_sem.at[slot]).wait()  # for as many bytes, from anywhere

        @pl.when(pages < 8)
        def _():
            lax.fori_loop(0, pages, one, 0)

    def advance(seq, block):
        last = (block + 1) * 1024 >= kv_lens[seq]
        return jnp.where(last, seq + 1, seq), jnp.where(last, 0, block + 1)

    def fetch_ahead(step, seq, block):
        @pl.when(seq < num_seqs)
        def _():
            start_block(kv_lens[seq], seq, block, lax.rem(step, 4))

        next_seq, next_block = advance(jnp.minimum(seq, num_seqs - 1), block)
        return jnp.where(seq < num_seqs, next_seq, seq), jnp.where(seq < num_seqs, next_block, block)

    # ---- update cache: the new token's row goes into the fetched block, and from a copy of it back to its page

    def unit_copy(seq):
        slot = lax.rem(seq, 4)
        position = kv_lens[seq] - 1
        page = page_indices[seq * PAGES_PER_SEQ + position // PAGE_SIZE]
        row = pl.multiple_of(lax.rem(position, PAGE_SIZE) // UNIT * UNIT_ROWS, UNIT_ROWS)
        return pltpu.make_async_copy(unit_out.at[slot], cache_hbm.at[page, pl.ds(row, UNIT_ROWS)], unit_sem.at[slot])

    def update_cache(seq, block, slot):
        @pl.when(seq >= 4)
        def _():
            unit_copy(seq - 4).wait()

        token = kv_lens[seq] - 1 - block * 1024
        rows = pl.ds(pl.multiple_of(token // UNIT * UNIT_ROWS, UNIT_ROWS), UNIT_ROWS)
        pack_token(new_keys[seq], new_values[seq], packed, 0)
        words = packed[...]
        kv[slot, rows] = words_as_rows(words)
        unit_out[lax.rem(seq, 4)] = words_as_rows(words)
        unit_copy(seq).start()

    def clear_tail(slot, valid):
        """Zeroes the tokens from `valid` to the end of those that are computed: a weight of 0 does not hide a NaN in V."""

        def zero(units):
            def one(index, _):
                rows = units * UNIT_ROWS
                kv[slot, pl.ds(pl.multiple_of(index * rows, rows), rows)] = jnp.zeros((rows, 128), kv.dtype)
                return 0

            return one

        # One unit at a time to where 16 at a time can go on.
        first = pl.cdiv(valid, UNIT)
        wide = pl.cdiv(first, 16)
        lax.fori_loop(first, wide * 16, zero(1), 0)
        lax.fori_loop(wide, pl.cdiv(valid, 1024) * 64, zero(16), 0)

    # ---- read KV: one head of a block at a time

    class Split:
        """The split of a block's words into K and V at `here` (0 or 1), in pieces to be done beside other work.

        A word of either holds token t in its low half, t + 512 in its high.
        """

        def __init__(self, slot, here):
            self.slot, self.here, self.done = slot, here, 0

        def go_on(self, pieces):
            for piece in range(self.done, min(self.done + pieces, 64)):
                first = piece * 128
                low = rows_as_words(kv[self.slot, pl.ds(first, 128)])
                high = rows_as_words(kv[self.slot, pl.ds(8192 + first, 128)])
                words = pl.ds(piece * 64, 64)
                k_words[self.here, words] = (low & jnp.uint32(0xFFFF)) | (high << 16)
                v_words[self.here, words] = (low >> 16) | (high & jnp.uint32(0xFFFF0000))
            self.done += pieces

        def finish(self):
            self.go_on(64)

    def head_of(words, here, head):
        """`[1024, HEAD_DIM]` of one head, in the order of `block_tokens`."""
        return words_as_rows(words[here, pl.ds(head, 512, stride=8), :])

    def head_keys(here, head):
        return head_of(k_words, here, head)

    def head_values(here, head):
        return head_of(v_words, here, head)

    def block_tokens(shape):
        """The token of each column of a score: the halves of the words, interleaved."""
        column = lax.broadcasted_iota(jnp.int32, shape, 1)
        return (column >> 1) + (column & 1) * 512

    # ---- flash step: every KV head's 8 query rows against one block, under one softmax

    def heads(head):
        return slice(head * 8, (head + 1) * 8)

    def flash_step(valid, here, next_slot):
        """One block, whose words are split already at `here` (0 or 1), while those of the next go to the other place."""
        split = Split(next_slot, 1 - here)
        scores = []
        for head in range(KV_HEADS):
            scores.append(products(q_rows[heads(head)].astype(jnp.bfloat16), head_keys(here, head), 1))
            split.go_on(4)
        scores = jnp.concatenate(scores, axis=0) * SCORE_SCALE
        scores = jnp.where(block_tokens(scores.shape) < valid, scores, MASKED)
        old_max = row_max[...]
        new_max = jnp.maximum(old_max, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - widen(new_max, 1024))
        rescale = jnp.exp2(old_max - new_max)
        row_max[...] = new_max
        row_sum[...] = rescale * row_sum[...] + jnp.sum(weights, axis=1, keepdims=True)
        weights = weights.astype(jnp.bfloat16)
        for head in range(KV_HEADS):
            part = products(weights[heads(head)], head_values(here, head), 0)
            split.go_on(4)
            acc[heads(head)] = widen(rescale[heads(head)], HEAD_DIM) * acc[heads(head)] + part
        split.finish()

    def begin(seq):
        queries = q_all[seq].astype(jnp.float32)
        for head in range(KV_HEADS):
            rows = slice(head * 8, head * 8 + GROUP)
            q_rows[rows] = queries[head * GROUP : (head + 1) * GROUP]
        row_max[...] = jnp.full_like(row_max, MASKED)
        row_sum[...] = jnp.zeros_like(row_sum)
        acc[...] = jnp.zeros_like(acc)

    # ---- send output

    def out_copy(seq):
        slot = lax.rem(seq, 4)
        return pltpu.make_async_copy(out_rows.at[slot], out_hbm.at[seq], out_sem.at[slot])

    def finish(seq):
        @pl.when(seq >= 4)
        def _():
            out_copy(seq - 4).wait()

        out = (acc[...] / widen(row_sum[...], HEAD_DIM)).astype(out_rows.dtype)
        for head in range(KV_HEADS):
            rows = out[head * 8 : head * 8 + GROUP]
            out_rows[lax.rem(seq, 4), head * GROUP : (head + 1) * GROUP] = rows
        out_copy(seq).start()

    @pl.when(num_seqs > 0)
    def _():
        start = (jnp.int32(0), jnp.int32(0))
        ahead = start
        for step in range(3):
            ahead = fetch_ahead(step, *ahead)
        loads = [
            pltpu.make_async_copy(source.at[pl.ds(0, 64)], target, load_sem.at[i])
            for i, (source, target) in enumerate([(q_hbm, q_all), (k_hbm, new_keys), (v_hbm, new_values)])
        ]
        for load in loads:
            load.start()
        q_rows[...] = jnp.zeros_like(q_rows)
        for load in loads:
            load.wait()

        def arrive(step, seq, block):
            """Waits for a block; at the end of its sequence, puts the new token in and clears what lies behind."""
            slot = lax.rem(step, 4)
            kv_len = kv_lens[seq]
            wait_block(kv_len, seq, block, slot)

            @pl.when((block + 1) * 1024 >= kv_len)
            def _():
                update_cache(seq, block, slot)
                clear_tail(slot, kv_len - block * 1024)

        arrive(0, *start)
        Split(0, 0).finish()

        def body(carry):
            step, seq, block, *ahead = carry
            ahead = fetch_ahead(step + 3, *ahead)
            kv_len = kv_lens[seq]
            valid = jnp.minimum(kv_len - block * 1024, 1024)
            following = advance(seq, block)

            @pl.when(following[0] < num_seqs)
            def _():
                arrive(step + 1, *following)

            @pl.when(block == 0)
            def _():
                begin(seq)

            next_slot = lax.rem(step + 1, 4)
            pl.when(lax.rem(step, 2) == 0)(lambda: flash_step(valid, 0, next_slot))
            pl.when(lax.rem(step, 2) == 1)(lambda: flash_step(valid, 1, next_slot))

            @pl.when((block + 1) * 1024 >= kv_len)
            def _():
                finish(seq)

            return step + 1, *following, *ahead

        lax.while_loop(lambda carry: carry[1] < num_seqs, body, (jnp.int32(0), *start, *ahead))

        def drain(i, _):
            unit_copy(num_seqs - 1 - i).wait()
            out_copy(num_seqs - 1 - i).wait()
            return 0

        lax.fori_loop(0, jnp.minimum(num_seqs, 4), drain, 0)


def attend_decode(queries, keys, values, rows, kv_lens, page_indices, distribution):
    """`(out, rows)` of the decode sequences; other rows of `out` are not written."""
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        decode_kernel,
        in_specs=[smem] * 3 + [hbm] * 4,
        out_specs=[hbm] * 2,
        out_shape=[jax.ShapeDtypeStruct(queries.shape, queries.dtype), jax.ShapeDtypeStruct(rows.shape, rows.dtype)],
        input_output_aliases={6: 1},
        scratch_shapes=[
            pltpu.VMEM((4, 16384, 128), jnp.bfloat16),  # kv: fetched blocks
            pltpu.VMEM((2, 4096, 128), jnp.uint32),  # k_words: keys of one tile, two tokens a word
            pltpu.VMEM((2, 4096, 128), jnp.uint32),  # v_words: values of one tile, two tokens a word
            pltpu.VMEM((64, 32, 128), jnp.bfloat16),  # q_all: queries of every sequence
            pltpu.VMEM((64, 8, 128), jnp.bfloat16),  # new_keys: new keys of every sequence
            pltpu.VMEM((64, 8, 128), jnp.bfloat16),  # new_values: new values of every sequence
            pltpu.VMEM((8, 128), jnp.uint32),  # packed: a new token in the cache's form
            pltpu.VMEM((4, 16, 128), jnp.bfloat16),  # unit_out: rows on their way to the cache
            pltpu.VMEM((64, 128), jnp.float32),  # q_rows: queries of one sequence by KV head
            pltpu.VMEM((64, 128), jnp.float32),  # row_max: running maximum, the same in every lane
            pltpu.VMEM((64, 128), jnp.float32),  # row_sum: running sum, the same in every lane
            pltpu.VMEM((64, 128), jnp.float32),  # acc: running output
            pltpu.VMEM((4, 32, 128), jnp.bfloat16),  # out_rows: outputs on their way out
            pltpu.SemaphoreType.DMA((4,)),  # kv_sem: fetches
            pltpu.SemaphoreType.DMA((3,)),  # load_sem: queries, keys, values
            pltpu.SemaphoreType.DMA((4,)),  # unit_sem: cache writes
            pltpu.SemaphoreType.DMA((4,)),  # out_sem: outputs
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=41943040, disable_bounds_checks=True),
        name="rpa_decode",
    )(kv_lens, page_indices, distribution, queries, keys, values, rows)


def cache_rows(kv_cache):
    """The cache as rows of 128 lanes, `[pages, PAGE_ROWS, 128]`. The bytes lie the same: the compiler makes it a bitcast."""
    return kv_cache.reshape(kv_cache.shape[0], PAGE_ROWS, 128)


def rows_cache(rows, shape):
    """The inverse of `cache_rows`."""
    return rows.reshape(shape)


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of a batch of decode rows only; returns `(out, kv_cache)`, the cache in the donated argument's memory.

    Row s of `queries` is sequence s: with one new token each, `cu_q_lens` has nothing to add.
    """
    out, rows = attend_decode(queries, keys, values, cache_rows(kv_cache), kv_lens, page_indices, distribution)
    return out, rows_cache(rows, kv_cache.shape)
