"""Ragged paged attention of llama3-8b: mixed batches on tpu7x.

Do not edit: made from spec 3a01025e5e4260913d77dc6c14ff4420ca6fada23cde22537a9775b26a4e51e4 by
    rpac build llama3-8b.yaml --target tpu7x
Change the spec or the templates and run it again.

What was specialized:
- 32 query heads over 8 KV heads, head_dim 128, queries bfloat16, KV bfloat16: constants
- pages of 128 tokens, 64 a sequence, up to 64 sequences
- token buckets that use it: 64
- causal, cache updated; no window, soft cap, sinks or KV scales in the spec: none is in the code
- decode: blocks of 1024 tokens, as long as the expected lengths and the registers for scores allow; 4 buffers, so that DMA latency hides behind 3 blocks in flight
- mixed: blocks of 64 queries against 1024 fetched tokens (3 buffers); computes 256 query rows of a head against 512 tokens at once
- VMEM: 37,224,448 bytes counted, 50,331,648 allowed, 67,108,864 there
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
PAGES_PER_SEQ = 64
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


def token_of_word(tokens):
    """Which of `tokens` consecutive tokens each packed row belongs to."""
    return lax.broadcasted_iota(jnp.int32, (tokens * 8, 128), 0) // 8


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
            for piece in range(self.done, min(self.done + pieces, 32)):
                first = piece * 256
                low = rows_as_words(kv[self.slot, pl.ds(first, 256)])
                high = rows_as_words(kv[self.slot, pl.ds(8192 + first, 256)])
                words = pl.ds(piece * 128, 128)
                k_words[self.here, words] = (low & jnp.uint32(0xFFFF)) | (high << 16)
                v_words[self.here, words] = (low >> 16) | (high & jnp.uint32(0xFFFF0000))
            self.done += pieces

        def finish(self):
            self.go_on(32)

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

    # ---- flash step: every KV head's 8 query rows against one block, under one softmax. A product takes
    # 2 heads side by side: together they are as wide as the MXU, and rows are zero in the other heads' lanes.

    def heads(head):
        return slice(head * 8, (head + 1) * 8)

    def group_heads(group):
        return range(group * 2, (group + 1) * 2)

    def group_rows(group):
        return slice(group * 16, (group + 1) * 16)

    def flash_step(valid, here, next_slot):
        """One block, whose words are split already at `here` (0 or 1), while those of the next go to the other place."""
        split = Split(next_slot, 1 - here)
        scores = []
        for group in range(4):
            keys = jnp.concatenate([head_keys(here, head) for head in group_heads(group)], axis=1)
            scores.append(products(q_rows[group_rows(group)].astype(jnp.bfloat16), keys, 1))
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
        for group in range(4):
            values = jnp.concatenate([head_values(here, head) for head in group_heads(group)], axis=1)
            part = products(weights[group_rows(group)], values, 0)
            split.go_on(4)
            for i, head in enumerate(group_heads(group)):
                own = part[heads(i), i * HEAD_DIM : (i + 1) * HEAD_DIM]
                acc[heads(head)] = widen(rescale[heads(head)], HEAD_DIM) * acc[heads(head)] + own
        split.finish()

    def begin(seq):
        queries = q_all[seq].astype(jnp.float32)
        for head in range(KV_HEADS):
            rows = slice(head * 8, head * 8 + GROUP)
            first = head % 2 * HEAD_DIM
            q_rows[rows, first : first + HEAD_DIM] = queries[head * GROUP : (head + 1) * GROUP]
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
            pltpu.VMEM((64, 256), jnp.float32),  # q_rows: queries of one sequence by KV head
            pltpu.VMEM((64, 128), jnp.float32),  # row_max: running maximum, the same in every lane
            pltpu.VMEM((64, 128), jnp.float32),  # row_sum: running sum, the same in every lane
            pltpu.VMEM((64, 128), jnp.float32),  # acc: running output
            pltpu.VMEM((4, 32, 128), jnp.bfloat16),  # out_rows: outputs on their way out
            pltpu.SemaphoreType.DMA((4,)),  # kv_sem: fetches
            pltpu.SemaphoreType.DMA((3,)),  # load_sem: queries, keys, values
            pltpu.SemaphoreType.DMA((4,)),  # unit_sem: cache writes
            pltpu.SemaphoreType.DMA((4,)),  # out_sem: outputs
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=50331648, disable_bounds_checks=True),
        name="rpa_decode",
    )(kv_lens, page_indices, distribution, queries, keys, values, rows)


def mixed_kernel(
    # scalars in SMEM
    kv_lens, page_indices, cu_q_lens, distribution,
    # arrays in HBM; the cache is updated in place, and so is the output, which holds the decode rows
    q_hbm, k_hbm, v_hbm, _cache, _out, out_hbm, cache_hbm,
    # scratch
    kv,
    k_words,
    v_words,
    new_keys,
    new_values,
    page_rows,
    packed,
    q_in,
    q_rows,
    which_query,
    limits,
    next_scores,
    row_max,
    row_sum,
    acc,
    out_rows,
    kv_sem,
    new_sem,
    old_sem,
    write_sem,
    q_sem,
    out_sem,
):  # fmt: skip
    """Any number of new tokens for each of the sequences [distribution[0], distribution[2]): update their pages, then attend.

    A step is one KV block against one query block. The fetch runs 2 steps ahead, across the ends of both.
    """
    first_seq = distribution[0]
    end_seq = distribution[2]

    def q_start(seq):
        return cu_q_lens[seq]

    def q_len(seq):
        return cu_q_lens[seq + 1] - cu_q_lens[seq]

    # ---- update cache: page by page, old tokens kept, new ones packed in; 4 pages ahead, 9 in flight

    def page_span(seq, page):
        """The new tokens of a page, as a range within it."""
        kv_len = kv_lens[seq]
        return jnp.maximum(kv_len - q_len(seq) - page * PAGE_SIZE, 0), jnp.minimum(kv_len - page * PAGE_SIZE, PAGE_SIZE)

    def new_token_copies(seq, page, new_slot):
        # A copy has a fixed size: it is moved back at the end of the array, and lands moved by as much.
        wanted = q_start(seq) + page * PAGE_SIZE - (kv_lens[seq] - q_len(seq))
        source = jnp.clip(wanted, 0, k_hbm.shape[0] - 64)
        take, put = pl.ds(source, 64), pl.ds(PAGE_SIZE + source - wanted, 64)
        return (
            pltpu.make_async_copy(k_hbm.at[take], new_keys.at[new_slot, put], new_sem.at[new_slot]),
            pltpu.make_async_copy(v_hbm.at[take], new_values.at[new_slot, put], new_sem.at[new_slot]),
        )

    def old_page_copy(seq, page, slot):
        physical = page_indices[seq * PAGES_PER_SEQ + page]
        return pltpu.make_async_copy(cache_hbm.at[physical], page_rows.at[slot], old_sem.at[slot])

    def page_write(seq, page, slot):
        physical = page_indices[seq * PAGES_PER_SEQ + page]
        return pltpu.make_async_copy(page_rows.at[slot], cache_hbm.at[physical], write_sem.at[slot])

    def first_page(seq):
        return lax.div(kv_lens[seq] - q_len(seq), PAGE_SIZE)

    def next_page(seq, page):
        last = (page + 1) * PAGE_SIZE >= kv_lens[seq]
        next_seq = jnp.where(last, seq + 1, seq)
        return next_seq, jnp.where(last, first_page(jnp.minimum(next_seq, end_seq - 1)), page + 1)

    def load_page(step, seq, page):
        slot = lax.rem(step, 9)

        @pl.when(seq < end_seq)
        def _():
            @pl.when(step >= 9)
            def _():
                page_write(seq, page, slot).wait()  # the write of 9 steps ago: as many bytes, this semaphore

            for copy in new_token_copies(seq, page, lax.rem(step, 5)):
                copy.start()
            first, end = page_span(seq, page)

            @pl.when((first > 0) | (end < PAGE_SIZE))
            def _():
                old_page_copy(seq, page, slot).start()

        next_seq, next_index = next_page(jnp.minimum(seq, end_seq - 1), page)
        return jnp.where(seq < end_seq, next_seq, seq), jnp.where(seq < end_seq, next_index, page)

    def merge_page(step, seq, page):
        slot, new_slot = lax.rem(step, 9), lax.rem(step, 5)
        first, end = page_span(seq, page)
        for copy in new_token_copies(seq, page, new_slot):
            copy.wait()

        @pl.when((first > 0) | (end < PAGE_SIZE))
        def _():
            old_page_copy(seq, page, slot).wait()

        def merge(piece, _):
            start = piece * 16
            for i in range(16):
                pack_token(new_keys[new_slot, PAGE_SIZE + start + i], new_values[new_slot, PAGE_SIZE + start + i], packed, i)
            rows = pl.ds(pl.multiple_of(piece * 256, 256), 256)
            token = start + token_of_word(16)
            words = jnp.where((token >= first) & (token < end), packed[...], rows_as_words(page_rows[slot, rows]))
            page_rows[slot, rows] = words_as_rows(words)
            return 0

        lax.fori_loop(lax.div(first, 16), pl.cdiv(end, 16), merge, 0)
        page_write(seq, page, slot).start()

    def update_cache(meanwhile):
        """Updates all pages; `meanwhile` is called before it waits for the last of them to be written."""

        def body(carry):
            step, seq, page, *ahead = carry
            ahead = load_page(step + 4, *ahead)
            merge_page(step, seq, page)
            return step + 1, *next_page(seq, page), *ahead

        start = (first_seq, first_page(first_seq))
        ahead = start
        for step in range(4):
            ahead = load_page(jnp.int32(step), *ahead)
        steps, *_ = lax.while_loop(lambda carry: carry[1] < end_seq, body, (jnp.int32(0), *start, *ahead))

        meanwhile()

        def drain(i, _):
            page_write(first_seq, first_page(first_seq), lax.rem(steps - 1 - i, 9)).wait()
            return 0

        lax.fori_loop(0, jnp.minimum(steps, 9), drain, 0)

    # ---- fetch KV: whole pages, into one of 3 buffers of 1024 tokens

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

    def kv_end(seq, q_block):
        """The number of tokens that the last query of a block attends to."""
        new = q_len(seq)
        return kv_lens[seq] - new + jnp.minimum((q_block + 1) * 64, new)

    def advance(seq, q_block, q_step, block):
        last = (block + 1) * 1024 >= kv_end(seq, q_block)
        last_of_seq = last & ((q_block + 1) * 64 >= q_len(seq))
        return (
            jnp.where(last_of_seq, seq + 1, seq),
            jnp.where(last, jnp.where(last_of_seq, 0, q_block + 1), q_block),
            jnp.where(last, q_step + 1, q_step),
            jnp.where(last, 0, block + 1),
        )

    def start_fetch(step, at, wanted=True):
        seq, q_block, q_step, block = at

        @pl.when((seq < end_seq) & wanted)
        def _():
            @pl.when(block == 0)
            def _():
                query_copies(seq, q_block, lax.rem(q_step, 3), lambda copy: copy.start())

            start_block(kv_end(seq, q_block), seq, block, lax.rem(step, 3))

    def next_fetch(at):
        seq, *within = at
        following = advance(jnp.minimum(seq, end_seq - 1), *within)
        return tuple(jnp.where(seq < end_seq, new, old) for new, old in zip(following, at))

    def fetch_ahead(step, *at):
        start_fetch(step, at)
        return next_fetch(at)

    # ---- query blocks: 64 tokens in and out in their natural layout, by KV head inside

    def block_copies(seq, block, make, act):
        """Acts on copies that together hold the block's tokens and no others, in sizes that are powers of two."""
        tokens = jnp.minimum(q_len(seq) - block * 64, 64)
        for size in (64, 32, 16, 8, 4, 2, 1):

            @pl.when((tokens & size) > 0)
            def _(size=size):
                first = tokens & ~(2 * size - 1)
                act(make(q_start(seq) + block * 64 + first, first, size))

    def query_copies(seq, block, slot, act):
        def make(token, first, size):
            return pltpu.make_async_copy(q_hbm.at[pl.ds(token, size)], q_in.at[slot, pl.ds(first, size)], q_sem.at[slot])

        block_copies(seq, block, make, act)

    def out_copies(seq, block, slot, act):
        def make(token, first, size):
            return pltpu.make_async_copy(out_rows.at[slot, pl.ds(first, size)], out_hbm.at[pl.ds(token, size)], out_sem.at[slot])

        block_copies(seq, block, make, act)

    def loop(count, body):
        """Runs `body(index)` for each index below `count`, as one piece of code."""

        def turn(index, _):
            body(index)
            return 0

        lax.fori_loop(0, count, turn, 0)

    def clear(head, rows):
        """The running maximum of some rows of a KV head, as before their first tile."""
        row_max[head, rows] = jnp.full((rows.size, 128), MASKED)

    def clear_all():
        def one(piece):
            rows = pl.ds(lax.rem(piece, 1) * 256, 256)
            clear(lax.div(piece, 1), rows)

        loop(KV_HEADS * 1, one)

    def query_of(row):
        """Which query of the block a row is of: rows go by query, then head."""
        return row // GROUP

    def exchange(parts):
        """Transposes: a register has 4 KV heads of one token, or 4 tokens of one KV head, and `parts` that many registers."""
        sublane = lax.broadcasted_iota(jnp.int32, parts[0].shape, 1)
        for apart in (2, 1):
            low = sublane & (apart * 2) == 0
            for i in range(4):
                if i & apart == 0:
                    a, b = parts[i], parts[i + apart]
                    parts[i] = jnp.where(low, a, pltpu.roll(b, apart * 2, 1))
                    parts[i + apart] = jnp.where(low, pltpu.roll(a, 8 - apart * 2, 1), b)
        return parts

    def begin(slot):
        """Sorts a query block by KV head, `[KV_HEADS, 64 * GROUP, HEAD_DIM]`."""

        def sort(piece):
            tokens = pl.ds(pl.multiple_of(piece * 16, 16), 16)
            rows = pl.ds(pl.multiple_of(piece * 64, 64), 64)
            for first in range(0, KV_HEADS, 4):
                queries = q_in[slot, tokens, first * GROUP : (first + 4) * GROUP]
                words = pltpu.bitcast(queries, jnp.uint32).reshape(4, 4, 8, HEAD_DIM)
                for i, part in enumerate(exchange([words[:, i] for i in range(4)])):
                    q_rows[first + i, rows] = pltpu.bitcast(part, q_rows.dtype).reshape(64, HEAD_DIM)

        loop(4, sort)

    def finish(slot):
        """Puts a block's output back in the order of its tokens, and clears the running maximum for the next one."""

        def unsort(piece):
            tokens = pl.ds(pl.multiple_of(piece * 16, 16), 16)
            rows = pl.ds(pl.multiple_of(piece * 64, 64), 64)

            def out_of(head):
                out = acc[head, rows] / widen(row_sum[head, rows], HEAD_DIM)
                clear(head, rows)
                return out.astype(out_rows.dtype)

            for first in range(0, KV_HEADS, 4):
                heads = slice(first * GROUP, (first + 4) * GROUP)
                outs = [out_of(first + i).reshape(4, 16, HEAD_DIM) for i in range(4)]
                words = jnp.stack(exchange([pltpu.bitcast(out, jnp.uint32) for out in outs]), axis=1)
                words = words.reshape(16, 8, HEAD_DIM)
                out_rows[slot, tokens, heads] = pltpu.bitcast(words, out_rows.dtype)

        loop(4, unsort)

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
        lax.fori_loop(wide, pl.cdiv(valid, 256) * 16, zero(16), 0)

    # ---- read KV: `tokens` tokens of one head, from token `first` of a block on

    def split_tile(slot, tile):
        """Splits a tile's words into K and V. A word of either holds two tokens of a piece of 256: token t of the piece in
        its low half, token t + 128 in its high.
        """
        half = jnp.uint32(0xFFFF)

        def split(turn, _):  # few enough rows at a time to stay in registers
            piece, part = lax.div(turn, 4), lax.rem(turn, 4)
            first = tile * 8192 + piece * 4096 + part * 512
            lower = pl.multiple_of(first, 512)
            upper = pl.multiple_of(first + 2048, 512)
            low = rows_as_words(kv[slot, pl.ds(lower, 512)])
            high = rows_as_words(kv[slot, pl.ds(upper, 512)])
            words = pl.ds(pl.multiple_of(turn * 256, 256), 256)
            k_words[words] = (low & half) | (high << 16)
            v_words[words] = (low >> 16) | (high & ~half)
            return 0

        lax.fori_loop(0, 8, split, 0)

    def head_of(words, first, tokens, head):
        """`[tokens, HEAD_DIM]` of one head out of the tile that was split last, in the order of `piece_tokens`."""
        start = lax.div(lax.rem(first, 512), 2) * 8 + head
        return words_as_rows(words[pl.ds(start, tokens // 2, stride=8), :])

    def head_keys(slot, first, tokens, head):
        return head_of(k_words, first, tokens, head)

    def head_values(slot, first, tokens, head):
        return head_of(v_words, first, tokens, head)

    def piece_tokens(shape, axis):
        """The token of each index along an axis of a piece's: the halves of the words, interleaved."""
        index = lax.broadcasted_iota(jnp.int32, shape, axis)
        return (index >> 1) + (index & 1) * 128

    # ---- flash steps: 256 query rows of one head against one tile, or on the diagonal against one piece of it

    def scores_of(queries, keys, head):
        """`[query rows, tokens]`, as logarithms to base 2."""
        return products(queries, keys, 1) * SCORE_SCALE

    def score(slot, first, tokens, head, rows):
        return scores_of(q_rows[head, rows], head_keys(slot, first, tokens, head), head)

    def state_before(head, rows, begins):
        """The running sum and output of some rows of a KV head; where they begin, what the block before left counts for nothing."""
        return jnp.where(begins, 0.0, row_sum[head, rows]), jnp.where(begins, 0.0, acc[head, rows])

    def weigh(scores, slot, first, head, rows, begins):
        tokens = scores.shape[1]
        old_sum, old_acc = state_before(head, rows, begins)
        old_max = row_max[head, rows]
        new_max = jnp.maximum(old_max, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - widen(new_max, tokens))
        rescale = jnp.exp2(old_max - new_max)
        row_max[head, rows] = new_max
        # The MXU is wider than a head: ones beside the values make the sum of the weights at no cost.
        values = jnp.concatenate([head_values(slot, first, tokens, head), jnp.ones((tokens, 128), jnp.bfloat16)], axis=1)
        part = products(weights.astype(jnp.bfloat16), values, 0)
        row_sum[head, rows] = rescale * old_sum + part[:, HEAD_DIM:]
        acc[head, rows] = widen(rescale, HEAD_DIM) * old_acc + part[:, :HEAD_DIM]

    def flash_turns(turns, heads, ahead, tokens, place, score_of, slot, begins):
        """Takes turns of some heads against the `tokens` tokens from `place(turn)` on, which is a token and the first head.

        A turn is one piece of code, in which scores are made `ahead` steps before they are weighed, the first of the next turn
        at its end: so the MXU and the vector units work at once.
        """
        steps = [(head, pl.ds(row, 256)) for head in range(heads) for row in range(0, 256, 256)]

        def scores_of(turn, step):
            first, head = place(turn)
            return score_of(first, head + steps[step][0], steps[step][1])

        def one_turn(turn, _):
            first, first_head = place(turn)
            on_first_tokens = begins & (first == place(0)[0])
            scores = [next_scores[i, :, :tokens] for i in range(ahead)]
            for i, (head, rows) in enumerate(steps):
                later = i + ahead
                if later < len(steps):
                    scores.append(scores_of(turn, later))
                else:
                    following = jnp.minimum(turn + 1, turns - 1)
                    next_scores[later - len(steps), :, :tokens] = scores_of(following, later - len(steps))
                weigh(scores[i], slot, first, first_head + head, rows, on_first_tokens)
            return 0

        for i in range(ahead):
            next_scores[i, :, :tokens] = scores_of(0, i)
        lax.fori_loop(0, turns, one_turn, 0)

    def plain_tiles(slot, count, begins):
        """Tiles that all queries of the block see whole."""

        def score_of(first, head, rows):
            return score(slot, first, 512, head, rows)

        def place_from(first_tile):
            def place(turn):
                tile, head = first_tile + lax.div(turn, 2), lax.rem(turn, 2) * 4
                return tile * 512, head

            return place

        def one(tile, _):
            split_tile(slot, tile)
            flash_turns(2, 4, 2, 512, place_from(tile), score_of, slot, begins & (tile == 0))
            return 0

        lax.fori_loop(0, count, one, 0)

    def diagonal_tile(slot, tile, valid, begins, first_query):
        """A tile that some query sees in part, as far as there are tokens. `first_query` is seen from the block's start."""
        split_tile(slot, tile)

        first_piece = tile * 2
        pieces = jnp.minimum(2, pl.cdiv(valid, 256) - first_piece)

        # The MXU is wider than a head: beside the keys it multiplies, for each query of a step, how far it may look.
        def make_limits(piece, _):
            shape = (256, 128)
            token = (first_piece + piece) * 256 + piece_tokens(shape, 0)
            for step, row in enumerate(range(0, 256, 256)):
                query = first_query + query_of(row) + lax.broadcasted_iota(jnp.int32, shape, 1)
                limits[piece, step] = jnp.where(token <= query, 0.0, MASKED).astype(limits.dtype)
            return 0

        lax.fori_loop(0, pieces, make_limits, 0)

        def score_of(first, head, rows):
            queries = jnp.concatenate([q_rows[head, rows], which_query[...]], axis=1)
            own_limits = limits[lax.div(first, 256) - first_piece, rows.start // 256]
            keys = jnp.concatenate([head_keys(slot, first, 256, head), own_limits], axis=1)
            return scores_of(queries, keys, head)

        def place(turn):
            piece = first_piece + lax.div(turn, 4)
            return piece * 256, lax.rem(turn, 4) * 2

        flash_turns(pieces * 4, 2, 1, 256, place, score_of, slot, begins)

    def attend(start, fetched):
        row, lane = (lax.broadcasted_iota(jnp.int32, which_query.shape, axis) for axis in range(2))
        which_query[...] = jnp.where(query_of(row) == lane, 1.0, 0.0).astype(which_query.dtype)
        clear_all()
        start_fetch(0, start, ~fetched)
        ahead = next_fetch(start)
        for step in range(1, 2):
            ahead = fetch_ahead(step, *ahead)

        def body(carry):
            step, at, ahead, sent = carry
            seq, q_block, q_step, block = at
            ahead = fetch_ahead(step + 2, *ahead)
            slot = lax.rem(step, 3)
            end = kv_end(seq, q_block)
            valid = jnp.minimum(end - block * 1024, 1024)
            last = (block + 1) * 1024 >= end
            first_query = kv_lens[seq] - q_len(seq) + q_block * 64

            @pl.when(block == 0)
            def _():
                query_copies(seq, q_block, lax.rem(q_step, 3), lambda copy: copy.wait())
                begin(lax.rem(q_step, 3))

            wait_block(end, seq, block, slot)

            @pl.when(last)
            def _():
                clear_tail(slot, valid)

            seen = first_query - block * 1024
            plain = jnp.clip(lax.div(seen + 1, 512), 0, 2)
            plain_tiles(slot, plain, block == 0)

            def diagonal(tile, _):
                diagonal_tile(slot, tile, valid, block + tile == 0, seen)
                return 0

            lax.fori_loop(plain, pl.cdiv(valid, 512), diagonal, 0)

            @pl.when(last)
            def _():
                @pl.when(q_step > 0)
                def _():
                    out_copies(*sent, 0, lambda copy: copy.wait())

                finish(0)
                out_copies(seq, q_block, 0, lambda copy: copy.start())

            sent = tuple(jnp.where(last, new, old) for new, old in zip((seq, q_block), sent))
            return step + 1, advance(*at), ahead, sent

        state = (jnp.int32(0), start, ahead, start[:2])
        _, _, _, sent = lax.while_loop(lambda carry: carry[1][0] < end_seq, body, state)
        out_copies(*sent, 0, lambda copy: copy.wait())

    @pl.when(first_seq < end_seq)
    def _():
        start = (first_seq, jnp.int32(0), jnp.int32(0), jnp.int32(0))
        # The first block comes while the last pages go, if none of these is in it.
        early = first_page(first_seq) >= 8
        update_cache(lambda: start_fetch(0, start, early))
        attend(start, early)


def attend_mixed(queries, keys, values, rows, out, kv_lens, page_indices, cu_q_lens, distribution):
    """`(out, rows)` with the rows of the sequences that are not decode written; other rows of `out` stay."""
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        mixed_kernel,
        in_specs=[smem] * 4 + [hbm] * 5,
        out_specs=[hbm] * 2,
        out_shape=[jax.ShapeDtypeStruct(queries.shape, queries.dtype), jax.ShapeDtypeStruct(rows.shape, rows.dtype)],
        input_output_aliases={7: 1, 8: 0},
        scratch_shapes=[
            pltpu.VMEM((3, 16384, 128), jnp.bfloat16),  # kv: fetched blocks
            pltpu.VMEM((2048, 128), jnp.uint32),  # k_words: keys of one tile, two tokens a word
            pltpu.VMEM((2048, 128), jnp.uint32),  # v_words: values of one tile, two tokens a word
            pltpu.VMEM((5, 320, 8, 128), jnp.bfloat16),  # new_keys: new keys, around the page they go to
            pltpu.VMEM((5, 320, 8, 128), jnp.bfloat16),  # new_values: new values, likewise
            pltpu.VMEM((9, 2048, 128), jnp.bfloat16),  # page_rows: pages to update
            pltpu.VMEM((128, 128), jnp.uint32),  # packed: new tokens in the cache's form
            pltpu.VMEM((3, 64, 32, 128), jnp.bfloat16),  # q_in: query blocks as they come
            pltpu.VMEM((8, 256, 128), jnp.bfloat16),  # q_rows: one by KV head
            pltpu.VMEM((256, 128), jnp.bfloat16),  # which_query: a 1 where a lane is the row's query
            pltpu.VMEM((2, 1, 256, 128), jnp.bfloat16),  # limits: by token and query: 0, or what masks a score
            pltpu.VMEM((2, 256, 512), jnp.float32),  # next_scores: the first scores of the next turn
            pltpu.VMEM((8, 256, 128), jnp.float32),  # row_max: running maximum
            pltpu.VMEM((8, 256, 128), jnp.float32),  # row_sum: running sum, the same in every lane
            pltpu.VMEM((8, 256, 128), jnp.float32),  # acc: running output
            pltpu.VMEM((1, 64, 32, 128), jnp.bfloat16),  # out_rows: an output block on its way out
            pltpu.SemaphoreType.DMA((3,)),  # kv_sem: fetches
            pltpu.SemaphoreType.DMA((5,)),  # new_sem: new keys and values
            pltpu.SemaphoreType.DMA((9,)),  # old_sem: pages that hold old tokens
            pltpu.SemaphoreType.DMA((9,)),  # write_sem: cache writes
            pltpu.SemaphoreType.DMA((3,)),  # q_sem: query blocks
            pltpu.SemaphoreType.DMA((1,)),  # out_sem: output blocks
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=50331648, disable_bounds_checks=True),
        name="rpa_mixed",
    )(kv_lens, page_indices, cu_q_lens, distribution, queries, keys, values, rows, out)


def cache_rows(kv_cache):
    """The cache as rows of 128 lanes, `[pages, PAGE_ROWS, 128]`. The bytes lie the same: the compiler makes it a bitcast."""
    return kv_cache.reshape(kv_cache.shape[0], PAGE_ROWS, 128)


def rows_cache(rows, shape):
    """The inverse of `cache_rows`."""
    return rows.reshape(shape)


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of any batch: decode rows, then the rest; returns `(out, kv_cache)`, the cache in the donated memory."""
    rows = cache_rows(kv_cache)
    out, rows = attend_decode(queries, keys, values, rows, kv_lens, page_indices, distribution)
    out, rows = attend_mixed(queries, keys, values, rows, out, kv_lens, page_indices, cu_q_lens, distribution)
    return out, rows_cache(rows, kv_cache.shape)
