"""Ragged paged attention of gpt-oss-120b, sliding layers: decode batches on v5p.

Do not edit: made from spec 623a068067c941bea572da917de4730a962bd2653c2fc3dc293059a64040709c by
    rpac build gpt-oss-120b.yaml --target v5p
Change the spec or the templates and run it again.

What was specialized:
- 8 query heads over 1 KV heads, head_dim 64, queries bfloat16, KV bfloat16: constants
- these are one device's part of 8: KV heads in 8 parts
- pages of 128 tokens, 128 a sequence, up to 64 sequences
- token buckets that use it: 64, 2048
- causal, cache updated; a window of 128 tokens, nothing fetched before its page; attention sinks, an argument, in the softmax's sum; no soft cap or KV scales in the spec: none is in the code
- only decode batches: the other kernels are not in this program
- decode: blocks of 128 tokens, as long as the expected lengths and the registers for scores allow; 16 buffers, so that DMA latency hides behind 15 blocks in flight
- VMEM: 1,433,600 bytes counted, 16,777,216 allowed, 67,108,864 there
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Q_HEADS = 8
KV_HEADS = 1
GROUP = 8  # query heads that share a KV head
HEAD_DIM = 128  # lanes of a head: of its keys, then of its values
OWN_DIM = 64  # lanes of either
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 128
SCORE_SCALE = 0.18033688011112042  # 0.125 (the softmax scale) * log2(e): probabilities are powers of two
WINDOW = 128  # tokens that a query sees, itself the last of them
LOG2_E = 1.4426950408889634  # sinks are natural logarithms
MASKED = -2e+38  # finite, so that a row with nothing in it yet stays a number

# The cache of one layer is seen as rows of 128 lanes: by token, then KV head, K in the lower lanes and V in the upper.
PAGE_ROWS = 256  # 2 of each token
UNIT = 8  # tokens of the smallest piece that a DMA or a store reaches
UNIT_ROWS = 16


def pack_token(keys, values, packed, token):
    """Lays one token's new keys and values `[KV_HEADS, OWN_DIM]` into rows: of each head its key, then its value."""
    (rows,) = cache_rows_of(keys.astype(jnp.float32), values.astype(jnp.float32))
    rows = jnp.concatenate([rows, jnp.zeros((1, HEAD_DIM))], axis=0)
    packed[token * 1 : (token + 1) * 1] = rows_as_words(rows.astype(jnp.bfloat16))


def rows_as_words(rows):
    return pltpu.bitcast(rows, jnp.uint32)


def words_as_rows(words):
    return pltpu.bitcast(words, jnp.bfloat16)


def by_place(words):
    """Words of 2 rows a token, of as many tokens, as words of 2 tokens a row: transposes them."""
    low, high = words
    return (low & jnp.uint32(0xFFFF)) | (high << 16), (low >> 16) | (high & jnp.uint32(0xFFFF0000))


def token_of_word(tokens):
    """Which of `tokens` consecutive tokens each packed row belongs to."""
    return lax.broadcasted_iota(jnp.int32, (tokens * 1, 128), 0) // 1


def whole_lanes(rows):
    """Rows of OWN_DIM lanes, with zeros up to HEAD_DIM."""
    return jnp.concatenate([rows, jnp.zeros((*rows.shape[:-1], HEAD_DIM - OWN_DIM), rows.dtype)], axis=-1)


def own_lanes(rows):
    """The lanes of values, of rows of HEAD_DIM lanes."""
    return rows[..., OWN_DIM:]


def cache_rows_of(keys, values):
    """The rows of new keys and values `[..., OWN_DIM]` in the cache, `[..., HEAD_DIM]` each: one of both."""
    return (jnp.concatenate([keys, values], axis=-1),)


def widen(rows, lanes):
    """Rows that hold one value in all 128 lanes, over `lanes` lanes: cheaper than a broadcast from one lane."""
    return jnp.concatenate([rows] * (lanes // 128), axis=1)


def products(rows, matrix, contracted):
    """`rows` times `matrix` along its dimension `contracted`, in float32."""
    dims = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(rows, matrix, dims, preferred_element_type=jnp.float32)


def decode_kernel(
    # scalars in SMEM
    kv_lens, page_indices, distribution, sinks,
    # arrays in HBM; the cache is updated in place
    q_hbm, k_hbm, v_hbm, _cache, out_hbm, cache_hbm,
    # scratch
    kv,
    row_words,
    q_all,
    new_keys,
    new_values,
    packed,
    unit_out,
    q_rows,
    sink_rows,
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

    A step is one KV block of one sequence. The fetch runs 15 steps ahead, across the ends of sequences.
    While one block is computed, the words of the next are split into heads: the one keeps the MXU busy, the other the stores.
    """
    num_seqs = distribution[0]

    # ---- window: a sequence begins at the page where its window does; nothing before it is fetched

    def first_token(seq):
        return lax.div(jnp.maximum(kv_lens[seq] - WINDOW, 0), PAGE_SIZE) * PAGE_SIZE

    def seen_len(seq):
        """Tokens from there on."""
        return kv_lens[seq] - first_token(seq)

    def entry(seq):
        return seq * PAGES_PER_SEQ + lax.div(first_token(seq), PAGE_SIZE)

    # ---- fetch KV: whole pages, into one of 16 buffers of 128 tokens

    # `entry` is where in the page table the window's first page is, and `kv_end` counts the tokens from there on.
    def page_copy(entry, block, slot, page):
        physical = page_indices[entry + block * 1 + page]
        rows = pl.ds(page * PAGE_ROWS, PAGE_ROWS)
        return pltpu.make_async_copy(cache_hbm.at[physical], kv.at[slot, rows], kv_sem.at[slot])

    def pages_of(kv_end, block):
        return jnp.minimum(pl.cdiv(kv_end, PAGE_SIZE) - block * 1, 1)

    def start_block(kv_end, entry, block, slot):
        def one(page, _):
            page_copy(entry, block, slot, page).start()
            return 0

        pages = pages_of(kv_end, block)

        @pl.when(pages == 1)
        def _():
            for page in range(1):
                one(page, 0)

        @pl.when(pages < 1)
        def _():
            lax.fori_loop(0, pages, one, 0)

    def wait_block(kv_end, entry, block, slot):
        def one(page, _):
            page_copy(entry, block, slot, page).wait()
            return 0

        pages = pages_of(kv_end, block)

        @pl.when(pages == 1)
        def _():
            pltpu.make_async_copy(kv.at[slot], kv.at[slot], kv_sem.at[slot]).wait()  # for as many bytes, from anywhere

        @pl.when(pages < 1)
        def _():
            lax.fori_loop(0, pages, one, 0)

    def advance(seq, block):
        last = (block + 1) * 128 >= seen_len(seq)
        return jnp.where(last, seq + 1, seq), jnp.where(last, 0, block + 1)

    def fetch_ahead(step, seq, block):
        @pl.when(seq < num_seqs)
        def _():
            start_block(seen_len(seq), entry(seq), block, lax.rem(step, 16))

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

        token = seen_len(seq) - 1 - block * 128
        rows = pl.ds(pl.multiple_of(token // UNIT * UNIT_ROWS, UNIT_ROWS), UNIT_ROWS)
        for i in range(UNIT):
            pack_token(new_keys[seq], new_values[seq], packed, i)
        words = jnp.where(token_of_word(UNIT) == lax.rem(token, UNIT), packed[...], rows_as_words(kv[slot, rows]))
        kv[slot, rows] = words_as_rows(words)
        unit_out[lax.rem(seq, 4)] = words_as_rows(words)
        unit_copy(seq).start()

    def clear_tail(slot, valid):
        """Zeroes the tokens from `valid` to the end of those that are computed: a weight of 0 does not hide a NaN in V."""
        rows = pl.ds(pl.multiple_of(valid // UNIT * UNIT_ROWS, UNIT_ROWS), UNIT_ROWS)

        @pl.when(lax.rem(valid, UNIT) > 0)
        def _():
            words = rows_as_words(kv[slot, rows])
            kv[slot, rows] = words_as_rows(jnp.where(token_of_word(UNIT) < lax.rem(valid, UNIT), words, jnp.zeros_like(words)))

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
        lax.fori_loop(wide, pl.cdiv(valid, 128) * 1, zero(16), 0)

    # ---- read KV: one head of a block at a time

    class Split:
        """The split of a block's words by the place of rows in them at `here` (0 or 1), in pieces to be done beside other work.

        A word then holds token t in its lowest part, t + 64 in the next, and so on.
        """

        def __init__(self, slot, here):
            self.slot, self.here, self.done = slot, here, 0

        def go_on(self, pieces):
            for piece in range(self.done, min(self.done + pieces, 1)):
                firsts = [part * 128 + piece * 128 for part in range(2)]
                words = [rows_as_words(kv[self.slot, pl.ds(first, 128)]) for first in firsts]
                for place, part in enumerate(by_place(words)):
                    row_words[self.here, place, pl.ds(piece * 64, 64)] = part
            self.done += pieces

        def finish(self):
            self.go_on(1)

    def row_of(here, row):
        """`[128, HEAD_DIM]` of one row of each token, in the order of `block_tokens`."""
        words = row_words[here, row % 2, pl.ds(row // 2, 64, stride=1), :]
        return words_as_rows(words)

    def head_keys(here, head):
        return row_of(here, head)

    def head_values(here, head):
        return row_of(here, head)

    def block_tokens(shape):
        """The token of each column of a score: the parts of the words, interleaved."""
        column = lax.broadcasted_iota(jnp.int32, shape, 1)
        return (column >> 1) + (column & 1) * 64

    # ---- flash step: every KV head's 8 query rows against one block, under one softmax

    def heads(head):
        return slice(head * 8, (head + 1) * 8)

    def flash_step(first, valid, here, next_slot):
        """One block, whose words are split already at `here` (0 or 1), while those of the next go to the other place."""
        split = Split(next_slot, 1 - here)
        scores = []
        for head in range(KV_HEADS):
            scores.append(products(q_rows[heads(head)].astype(jnp.bfloat16), head_keys(here, head), 1))
            split.go_on(1)
        scores = jnp.concatenate(scores, axis=0) * SCORE_SCALE
        token = block_tokens(scores.shape)
        scores = jnp.where((token >= first) & (token < valid), scores, MASKED)
        old_max = row_max[...]
        new_max = jnp.maximum(old_max, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - widen(new_max, 128))
        rescale = jnp.exp2(old_max - new_max)
        row_max[...] = new_max
        row_sum[...] = rescale * row_sum[...] + jnp.sum(weights, axis=1, keepdims=True)
        weights = weights.astype(jnp.bfloat16)
        for head in range(KV_HEADS):
            part = products(weights[heads(head)], head_values(here, head), 0)
            split.go_on(1)
            acc[heads(head)] = widen(rescale[heads(head)], HEAD_DIM) * acc[heads(head)] + part
        split.finish()

    def begin(seq):
        queries = whole_lanes(q_all[seq].astype(jnp.float32))
        for head in range(KV_HEADS):
            rows = slice(head * 8, head * 8 + GROUP)
            q_rows[rows] = queries[head * GROUP : (head + 1) * GROUP]
        row_max[...] = sink_rows[...]
        row_sum[...] = jnp.ones_like(row_sum)
        acc[...] = jnp.zeros_like(acc)

    def load_sinks():
        """Spreads the sinks over their query rows. Each is in the sum from the start, where the maximum is its own."""
        sink_rows[...] = jnp.full_like(sink_rows, MASKED)
        for head in range(Q_HEADS):
            row = head
            sink_rows[row : row + 1] = jnp.full((1, 128), sinks[head]) * LOG2_E

    # ---- send output

    def out_copy(seq):
        slot = lax.rem(seq, 4)
        return pltpu.make_async_copy(out_rows.at[slot], out_hbm.at[seq], out_sem.at[slot])

    def finish(seq):
        @pl.when(seq >= 4)
        def _():
            out_copy(seq - 4).wait()

        out = own_lanes(acc[...] / widen(row_sum[...], HEAD_DIM)).astype(out_rows.dtype)
        for head in range(KV_HEADS):
            rows = out[head * 8 : head * 8 + GROUP]
            out_rows[lax.rem(seq, 4), head * GROUP : (head + 1) * GROUP] = rows
        out_copy(seq).start()

    @pl.when(num_seqs > 0)
    def _():
        start = (jnp.int32(0), jnp.int32(0))
        ahead = start
        for step in range(15):
            ahead = fetch_ahead(step, *ahead)
        loads = [
            pltpu.make_async_copy(source.at[pl.ds(0, 64)], target, load_sem.at[i])
            for i, (source, target) in enumerate([(q_hbm, q_all), (k_hbm, new_keys), (v_hbm, new_values)])
        ]
        for load in loads:
            load.start()
        q_rows[...] = jnp.zeros_like(q_rows)
        load_sinks()
        for load in loads:
            load.wait()

        def arrive(step, seq, block):
            """Waits for a block; at the end of its sequence, puts the new token in and clears what lies behind."""
            slot = lax.rem(step, 16)
            kv_len = seen_len(seq)
            wait_block(kv_len, entry(seq), block, slot)

            @pl.when((block + 1) * 128 >= kv_len)
            def _():
                update_cache(seq, block, slot)
                clear_tail(slot, kv_len - block * 128)

        arrive(0, *start)
        Split(0, 0).finish()

        def body(carry):
            step, seq, block, *ahead = carry
            ahead = fetch_ahead(step + 15, *ahead)
            kv_len = seen_len(seq)
            valid = jnp.minimum(kv_len - block * 128, 128)
            first = kv_len - WINDOW - block * 128
            following = advance(seq, block)

            @pl.when(following[0] < num_seqs)
            def _():
                arrive(step + 1, *following)

            @pl.when(block == 0)
            def _():
                begin(seq)

            next_slot = lax.rem(step + 1, 16)
            pl.when(lax.rem(step, 2) == 0)(lambda: flash_step(first, valid, 0, next_slot))
            pl.when(lax.rem(step, 2) == 1)(lambda: flash_step(first, valid, 1, next_slot))

            @pl.when((block + 1) * 128 >= kv_len)
            def _():
                finish(seq)

            return step + 1, *following, *ahead

        lax.while_loop(lambda carry: carry[1] < num_seqs, body, (jnp.int32(0), *start, *ahead))

        def drain(i, _):
            unit_copy(num_seqs - 1 - i).wait()
            out_copy(num_seqs - 1 - i).wait()
            return 0

        lax.fori_loop(0, jnp.minimum(num_seqs, 4), drain, 0)


def attend_decode(queries, keys, values, rows, kv_lens, page_indices, distribution, sinks):
    """`(out, rows)` of the decode sequences; other rows of `out` are not written."""
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        decode_kernel,
        in_specs=[smem] * 4 + [hbm] * 4,
        out_specs=[hbm] * 2,
        out_shape=[jax.ShapeDtypeStruct(queries.shape, queries.dtype), jax.ShapeDtypeStruct(rows.shape, rows.dtype)],
        input_output_aliases={7: 1},
        scratch_shapes=[
            pltpu.VMEM((16, 256, 128), jnp.bfloat16),  # kv: fetched blocks
            pltpu.VMEM((2, 2, 64, 128), jnp.uint32),  # row_words: a tile by row of a token, 2 tokens a word
            pltpu.VMEM((64, 8, 64), jnp.bfloat16),  # q_all: queries of every sequence
            pltpu.VMEM((64, 1, 64), jnp.bfloat16),  # new_keys: new keys of every sequence
            pltpu.VMEM((64, 1, 64), jnp.bfloat16),  # new_values: new values of every sequence
            pltpu.VMEM((8, 128), jnp.uint32),  # packed: a new token in the cache's form
            pltpu.VMEM((4, 16, 128), jnp.bfloat16),  # unit_out: rows on their way to the cache
            pltpu.VMEM((8, 128), jnp.float32),  # q_rows: queries of one sequence by KV head
            pltpu.VMEM((8, 128), jnp.float32),  # sink_rows: sinks, the same in every lane
            pltpu.VMEM((8, 128), jnp.float32),  # row_max: running maximum, the same in every lane
            pltpu.VMEM((8, 128), jnp.float32),  # row_sum: running sum, the same in every lane
            pltpu.VMEM((8, 128), jnp.float32),  # acc: running output
            pltpu.VMEM((4, 8, 64), jnp.bfloat16),  # out_rows: outputs on their way out
            pltpu.SemaphoreType.DMA((16,)),  # kv_sem: fetches
            pltpu.SemaphoreType.DMA((3,)),  # load_sem: queries, keys, values
            pltpu.SemaphoreType.DMA((4,)),  # unit_sem: cache writes
            pltpu.SemaphoreType.DMA((4,)),  # out_sem: outputs
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=16777216, disable_bounds_checks=True),
        name="rpa_decode",
    )(kv_lens, page_indices, distribution, sinks, queries, keys, values, rows)


def cache_rows(kv_cache):
    """The cache as rows of 128 lanes, `[pages, PAGE_ROWS, 128]`. The bytes lie the same: the compiler makes it a bitcast."""
    return kv_cache.reshape(kv_cache.shape[0], PAGE_ROWS, 128)


def rows_cache(rows, shape):
    """The inverse of `cache_rows`."""
    return rows.reshape(shape)


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, sinks):
    """Attention of a batch of decode rows only; returns `(out, kv_cache)`, the cache in the donated argument's memory.

    Row s of `queries` is sequence s: with one new token each, `cu_q_lens` has nothing to add.
    """
    out, rows = attend_decode(queries, keys, values, cache_rows(kv_cache), kv_lens, page_indices, distribution, sinks)
    return out, rows_cache(rows, kv_cache.shape)
