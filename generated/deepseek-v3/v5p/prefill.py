"""Ragged paged attention of deepseek-v3: prefill batches on v5p.

Do not edit: made from spec beb302e5bf7ae58bc4f843b176ce5570766fe5e900ecc5ba857bb2b7b12d0229 by
    rpac build deepseek-v3.yaml --target v5p
Change the spec or the templates and run it again.

What was specialized:
- latent attention, absorbed: 128 query heads over one latent vector of 512 and one rotary key of 64 a token, bfloat16: constants
- cache rows of 640 lanes, 5 registers' width: latent vector, rotary key, padding
- pages of 128 tokens, 64 a sequence, up to 64 sequences
- token buckets that use it: 256, 1024
- causal, cache updated
- prefill: blocks of 16 queries with all their heads against 512 fetched tokens (3 buffers); computes 256 query rows at once
- only prefill batches: the other kernels are not in this program
- VMEM: 28,844,032 bytes counted, 41,943,040 allowed, 67,108,864 there
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Q_HEADS = 128  # which share each token's row of the cache
RANK = 512  # lanes of a latent vector, which is the value and part of the key
LANES = 640  # of a row: the latent vector, 64 of the rotary key, 64 of padding
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 64
CHUNK = 256  # new tokens of every sequence
SCORE_SCALE = 0.10411754627697266  # 0.07216878364870323 (the softmax scale) * log2(e): probabilities are powers of two
MASKED = -2e+38  # finite, so that a row with nothing in it yet stays a number

UNIT = 16  # tokens of the smallest piece of the cache that a DMA or a store reaches


def widen(rows, lanes):
    """Rows that hold one value in all 128 lanes, over `lanes` lanes: cheaper than a broadcast from one lane."""
    return jnp.concatenate([rows] * (lanes // 128), axis=1)


def products(rows, matrix, contracted):
    """`rows` times `matrix` along its dimension `contracted`, in float32."""
    dims = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(rows, matrix, dims, preferred_element_type=jnp.float32)


def whole_registers(queries_rope):
    """The rotary queries with zeros up to 128 lanes, which is how they lie in memory anyway."""
    return jnp.pad(queries_rope, ((0, 0), (0, 0), (0, LANES - RANK - queries_rope.shape[2])))


def cache_rows(new_kv, new_rope):
    """The new tokens as rows of the cache, `[tokens, 1, LANES]`: each in registers of its own, to be found by number."""
    padding = jnp.zeros((len(new_kv), LANES - RANK - new_rope.shape[1]), new_kv.dtype)
    return jnp.concatenate([new_kv, new_rope, padding], axis=1)[:, None]


def prefill_kernel(
    # scalars in SMEM
    kv_lens, page_indices, distribution,
    # arrays in HBM; the cache is updated in place
    q_hbm, q_rope_hbm, new_hbm, _cache, out_hbm, cache_hbm,
    # scratch
    kv,
    new_in,
    page_rows,
    merged,
    q_in,
    q_rope_in,
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
    """CHUNK new tokens for each of the sequences [0, distribution[1]): update their pages, then attend, causally.

    A step is one KV block against one query block. The fetch runs 2 steps ahead, across the ends of both.
    """
    first_seq = jnp.int32(0)
    end_seq = distribution[1]

    def q_start(seq):
        return seq * CHUNK

    def q_len(seq):
        return CHUNK

    # ---- update cache: page by page, old tokens kept, new ones packed in; 4 pages ahead, 9 in flight

    def page_span(seq, page):
        """The new tokens of a page, as a range within it."""
        kv_len = kv_lens[seq]
        return jnp.maximum(kv_len - q_len(seq) - page * PAGE_SIZE, 0), jnp.minimum(kv_len - page * PAGE_SIZE, PAGE_SIZE)

    def new_token_copies(seq, page, new_slot):
        # A copy has a fixed size: it is moved back at the end of the array, and lands moved by as much.
        wanted = q_start(seq) + page * PAGE_SIZE - (kv_lens[seq] - q_len(seq))
        source = jnp.clip(wanted, 0, new_hbm.shape[0] - 128)
        take, put = pl.ds(source, 128), pl.ds(PAGE_SIZE + source - wanted, 128)
        return (pltpu.make_async_copy(new_hbm.at[take], new_in.at[new_slot, put], new_sem.at[new_slot]),)

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
            start = pl.multiple_of(piece * 16, 16)
            tokens = pl.ds(start, 16)
            for i in range(16):
                merged[i : i + 1] = new_in[new_slot, PAGE_SIZE + start + i].astype(jnp.float32)
            # As words of two tokens, so that the old ones stay bit for bit whatever they are.
            words = pltpu.bitcast(merged[...].astype(page_rows.dtype), jnp.uint32)
            low = start + 2 * lax.broadcasted_iota(jnp.int32, words.shape, 0)
            low_mask = jnp.where((low >= first) & (low < end), jnp.uint32(0xFFFF), jnp.uint32(0))
            mask = low_mask | jnp.where((low + 1 >= first) & (low + 1 < end), jnp.uint32(0xFFFF0000), jnp.uint32(0))
            old = pltpu.bitcast(page_rows[slot, tokens], jnp.uint32)
            page_rows[slot, tokens] = pltpu.bitcast((words & mask) | (old & ~mask), page_rows.dtype)
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

    # ---- fetch KV: whole pages, into one of 3 buffers of 512 tokens

    def page_copy(seq, block, slot, page):
        physical = page_indices[seq * PAGES_PER_SEQ + block * 4 + page]
        return pltpu.make_async_copy(cache_hbm.at[physical], kv.at[slot, page], kv_sem.at[slot])

    def pages_of(kv_end, block):
        return jnp.minimum(pl.cdiv(kv_end, PAGE_SIZE) - block * 4, 4)

    def start_block(kv_end, seq, block, slot):
        def one(page, _):
            page_copy(seq, block, slot, page).start()
            return 0

        pages = pages_of(kv_end, block)

        @pl.when(pages == 4)
        def _():
            for page in range(4):
                one(page, 0)

        @pl.when(pages < 4)
        def _():
            lax.fori_loop(0, pages, one, 0)

    def wait_block(kv_end, seq, block, slot):
        def one(page, _):
            page_copy(seq, block, slot, page).wait()
            return 0

        pages = pages_of(kv_end, block)

        @pl.when(pages == 4)
        def _():
            pltpu.make_async_copy(kv.at[slot], kv.at[slot], kv_sem.at[slot]).wait()  # for as many bytes, from anywhere

        @pl.when(pages < 4)
        def _():
            lax.fori_loop(0, pages, one, 0)

    def kv_end(seq, q_block):
        """The number of tokens that the last query of a block attends to."""
        return kv_lens[seq] - CHUNK + (q_block + 1) * 16

    def advance(seq, q_block, q_step, block):
        last = (block + 1) * 512 >= kv_end(seq, q_block)
        last_of_seq = last & ((q_block + 1) * 16 >= q_len(seq))
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

    # ---- query blocks: 16 tokens in and out in their natural layout, rows by token, then head

    def block_copies(seq, block, make, act):
        act(make(q_start(seq) + block * 16, 0, 16))

    def query_copies(seq, block, slot, act):
        for hbm, there in ((q_hbm, q_in), (q_rope_hbm, q_rope_in)):

            def make(token, first, size, hbm=hbm, there=there):
                return pltpu.make_async_copy(hbm.at[pl.ds(token, size)], there.at[slot, pl.ds(first, size)], q_sem.at[slot])

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

    def step_place(step):
        """The tokens of a flash step's rows in a query block, and the rows' place in the running state."""
        rows = pl.ds(pl.multiple_of(step * 256, 256), 256)
        return pl.ds(step * 2, 2), rows

    def clear(rows):
        """The running state of some rows, as before their first block."""
        for state, value in ((row_max, MASKED), (row_sum, 0.0), (acc, 0.0)):
            state[rows] = jnp.full((rows.size, state.shape[-1]), value)

    def finish():
        """The output of a query block, and the running state cleared for the next one."""

        def one(step):
            tokens, rows = step_place(step)
            out = (acc[rows] / widen(row_sum[rows], RANK)).astype(out_rows.dtype)
            out_rows[0, tokens] = out.reshape(2, Q_HEADS, RANK)
            clear(rows)

        loop(8, one)

    def clear_tail(slot, valid):
        """Zeroes rows from token `valid` to the end of what is computed: a weight of 0 does not hide a NaN."""
        row = lax.broadcasted_iota(jnp.int32, (UNIT, RANK), 0)

        def clear(unit, _):
            token = unit * UNIT
            tokens = pl.ds(pl.multiple_of(lax.rem(token, PAGE_SIZE), UNIT), UNIT)
            old = kv[slot, token // PAGE_SIZE, tokens, :RANK].astype(jnp.float32)
            kv[slot, token // PAGE_SIZE, tokens, :RANK] = jnp.where(token + row < valid, old, 0.0).astype(kv.dtype)
            return 0

        lax.fori_loop(valid // UNIT, pl.cdiv(valid, 512) * 32, clear, 0)

    # ---- flash steps: 256 query rows against one block

    def score(q_slot, slot, step):
        tokens, _ = step_place(step)
        parts = [array[q_slot, tokens].reshape(256, array.shape[3]) for array in (q_in, q_rope_in)]
        return products(jnp.concatenate(parts, axis=1), kv[slot].reshape(512, LANES), 1) * SCORE_SCALE

    def weigh(scores, slot, step):
        _, rows = step_place(step)
        old_max = row_max[rows]
        new_max = jnp.maximum(old_max, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - widen(new_max, 512))
        rescale = jnp.exp2(old_max - new_max)
        row_max[rows] = new_max
        row_sum[rows] = rescale * row_sum[rows] + jnp.sum(weights, axis=1, keepdims=True)
        part = products(weights.astype(jnp.bfloat16), kv[slot, :, :, :RANK].reshape(512, RANK), 0)
        acc[rows] = widen(rescale, RANK) * acc[rows] + part

    def flash_steps(first, count, score_of, slot):
        """Some steps as one piece of code; scores are made a step ahead, so that the MXU need not wait for a softmax."""
        scores = [score_of(first)]
        for step in range(count):
            if step + 1 < count:
                scores.append(score_of(first + step + 1))
            weigh(scores[step], slot, first + step)

    def attend_block(q_slot, slot, first_query):
        """One KV block, in which the first query is at `first_query` and so sees the tokens up to there."""

        @pl.when(first_query >= 511)
        def _():
            flash_steps(0, 8, lambda step: score(q_slot, slot, step), slot)

        @pl.when(first_query < 511)
        def _():
            def masked_score(step):
                scores = score(q_slot, slot, step)
                row, token = (lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in range(2))
                query = first_query + step * 2 + row // Q_HEADS
                return jnp.where(token <= query, scores, MASKED)

            def turn(index):
                flash_steps(index * 4, 4, masked_score, slot)

            loop(2, turn)

    def attend(start, fetched):
        loop(8, lambda step: clear(step_place(step)[1]))
        start_fetch(0, start, ~fetched)
        ahead = next_fetch(start)
        for step in range(1, 2):
            ahead = fetch_ahead(step, *ahead)

        def body(carry):
            step, at, ahead, sent = carry
            seq, q_block, q_step, block = at
            ahead = fetch_ahead(step + 2, *ahead)
            slot, q_slot = lax.rem(step, 3), lax.rem(q_step, 3)
            end = kv_end(seq, q_block)
            last = (block + 1) * 512 >= end

            @pl.when(block == 0)
            def _():
                query_copies(seq, q_block, q_slot, lambda copy: copy.wait())

            wait_block(end, seq, block, slot)

            @pl.when(last)
            def _():
                clear_tail(slot, end - block * 512)

            attend_block(q_slot, slot, kv_lens[seq] - q_len(seq) + q_block * 16 - block * 512)

            @pl.when(last)
            def _():
                @pl.when(q_step > 0)
                def _():
                    out_copies(*sent, 0, lambda copy: copy.wait())

                finish()
                out_copies(seq, q_block, 0, lambda copy: copy.start())

            sent = tuple(jnp.where(last, new, old) for new, old in zip((seq, q_block), sent))
            return step + 1, advance(*at), ahead, sent

        state = (jnp.int32(0), start, ahead, start[:2])
        *_, sent = lax.while_loop(lambda carry: carry[1][0] < end_seq, body, state)
        out_copies(*sent, 0, lambda copy: copy.wait())

    @pl.when(first_seq < end_seq)
    def _():
        start = (first_seq, jnp.int32(0), jnp.int32(0), jnp.int32(0))
        # The first block comes while the last pages go, if none of these is in it.
        early = first_page(first_seq) >= 4
        update_cache(lambda: start_fetch(0, start, early))
        attend(start, early)


def attend_prefill(queries, queries_rope, new_rows, cache, kv_lens, page_indices, distribution):
    """`(out, cache)` of the prefill sequences; other rows of `out` are not written."""
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        prefill_kernel,
        in_specs=[smem] * 3 + [hbm] * 4,
        out_specs=[hbm] * 2,
        out_shape=[jax.ShapeDtypeStruct(queries.shape, queries.dtype), jax.ShapeDtypeStruct(cache.shape, cache.dtype)],
        input_output_aliases={6: 1},
        scratch_shapes=[
            pltpu.VMEM((3, 4, 128, 640), jnp.bfloat16),  # kv: fetched blocks
            pltpu.VMEM((5, 384, 1, 640), jnp.bfloat16),  # new_in: new tokens, around the page they go to
            pltpu.VMEM((9, 128, 640), jnp.bfloat16),  # page_rows: pages to update
            pltpu.VMEM((16, 640), jnp.float32),  # merged: new tokens, side by side
            pltpu.VMEM((3, 16, 128, 512), jnp.bfloat16),  # q_in: query blocks as they come
            pltpu.VMEM((3, 16, 128, 128), jnp.bfloat16),  # q_rope_in: their rotary parts
            pltpu.VMEM((2048, 128), jnp.float32),  # row_max: running maximum, the same in every lane
            pltpu.VMEM((2048, 128), jnp.float32),  # row_sum: running sum, the same in every lane
            pltpu.VMEM((2048, 512), jnp.float32),  # acc: running output
            pltpu.VMEM((1, 16, 128, 512), jnp.bfloat16),  # out_rows: an output block on its way out
            pltpu.SemaphoreType.DMA((3,)),  # kv_sem: fetches
            pltpu.SemaphoreType.DMA((5,)),  # new_sem: new tokens
            pltpu.SemaphoreType.DMA((9,)),  # old_sem: pages that hold old tokens
            pltpu.SemaphoreType.DMA((9,)),  # write_sem: cache writes
            pltpu.SemaphoreType.DMA((3,)),  # q_sem: query blocks
            pltpu.SemaphoreType.DMA((1,)),  # out_sem: output blocks
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=41943040, disable_bounds_checks=True),
        name="rpa_prefill",
    )(kv_lens, page_indices, distribution, queries, queries_rope, new_rows, cache)


def ragged_paged_attention(
    queries, queries_rope, new_kv, new_rope, kv_cache, kv_lens, page_indices, cu_q_lens, distribution
):
    """Attention of a batch of prefill chunks only; returns `(out, kv_cache)`, the cache in the donated argument's memory.

    Sequence s has rows [s * CHUNK, (s + 1) * CHUNK) of `queries`: `cu_q_lens` has nothing to add.
    """
    queries_rope, new_rows = whole_registers(queries_rope), cache_rows(new_kv, new_rope)
    return attend_prefill(queries, queries_rope, new_rows, kv_cache, kv_lens, page_indices, distribution)
