"""Ragged paged attention of llama3-8b-separate: mixed batches on v6e.

Do not edit: made from spec d69f518148a4ef2ff712641d26f9755ca8f201ed793daed084ece9bba323a095 by
    rpac build llama3-8b-separate.yaml --target v6e
Change the spec or the templates and run it again.

What was specialized:
- 32 query heads over 8 KV heads, head_dim 128, queries bfloat16, KV bfloat16: constants
- pages of 128 tokens, 64 a sequence, up to 64 sequences
- token buckets that use it: 64
- causal, cache updated; no window, soft cap, sinks or KV scales in the spec: none is in the code
- K and V apart in the cache, pages of [2, KV heads, tokens, head_dim] (kv_layout separate)
- decode: tiles of 256 tokens, no longer than the expected lengths, 4 of them a turn, so that one fills the other's waits; fetched 4 turns ahead, so that DMA latency hides
- mixed: blocks of 32 queries against 1024 fetched tokens (3 buffers); computes 128 query rows of a head against 512 tokens at once
- tuned: 0.993 of the rule's time, predicted with libtpu 0.0.42.1, seed 0, search cut short
- VMEM: 29,097,984 bytes counted, 41,943,040 allowed, 134,217,728 there
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

UNIT = 16  # tokens of the smallest piece of the cache that a DMA or a store reaches


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
    q_in,
    new_keys,
    new_values,
    unit_out,
    scores,
    row_max,
    row_sum,
    acc,
    out_all,
    tile_seq,
    tile_first,
    tile_left,
    kv_sem,
    load_sem,
    unit_sem,
    out_sem,
):  # fmt: skip
    """One new token for each of the sequences [0, distribution[0]): update its page, attend to all of its tokens.

    The work is cut into tiles of 256 tokens of one sequence, and goes by groups of 4 tiles, whatever sequences
    they are of. A turn of the loop scores the tiles of one group beside weighing those of the group before, so that the
    MXU need not wait for a softmax. No turn asks where a sequence ends: every tile leaves its sequence's output so far,
    and the last one stays.
    """
    num_seqs = distribution[0]

    # ---- the tiles in flight: whose each is, where it begins, and how many tokens the sequence has from there on

    def slot_of(group, i):
        return lax.rem(group, 5) * 4 + i

    def no_tile(index, _):
        tile_seq[index] = 64
        tile_first[index] = 0
        tile_left[index] = 0
        return 0

    # ---- fetch KV: whole pages, 4 groups ahead

    def page_copy(physical, group, i, page):
        slot, sem = slot_of(group, i), kv_sem.at[lax.rem(group, 5)]
        return pltpu.make_async_copy(cache_hbm.at[physical], kv.at[slot, page], sem)

    def fetch(group, seq, first):
        """Starts the fetch of a group whose first tile is at token `first` of `seq`; returns where the next one begins."""
        for i in range(4):
            live, some_seq = seq < num_seqs, jnp.minimum(seq, num_seqs - 1)
            left = jnp.where(live, kv_lens[some_seq] - first, 0)
            tile_seq[slot_of(group, i)] = jnp.where(live, seq, 64)
            tile_first[slot_of(group, i)] = first
            tile_left[slot_of(group, i)] = left
            pages = some_seq * PAGES_PER_SEQ + first // PAGE_SIZE
            for page in range(2):
                physical = page_indices[pages + page]  # not under the condition: a load that waits for it costs more

                @pl.when(page * PAGE_SIZE < left)
                def _():
                    page_copy(physical, group, i, page).start()

            last = left <= 256
            seq = jnp.where(last, seq + 1, seq)
            first = jnp.where(last, 0, first + 256)
        return seq, first

    def wait(group):
        left = tile_left[slot_of(group, 0)]
        first_slot, sem = slot_of(group, 0), kv_sem.at[lax.rem(group, 5)]

        def wait_for(place):
            pltpu.make_async_copy(place, place, sem).wait()  # for as many bytes, from anywhere

        @pl.when(left >= 1024)
        def _():
            wait_for(kv.at[pl.ds(first_slot, 4)])

        @pl.when(left < 1024)
        def _():
            for i in range(4):
                wait_tile(tile_left[slot_of(group, i)], first_slot + i, wait_for)

    def wait_tile(left, slot, wait_for):
        def one_page(_, carry):
            wait_for(kv.at[slot, 0])
            return carry

        @pl.when(left >= 256)
        def _():
            wait_for(kv.at[slot])

        @pl.when(left < 256)
        def _():
            lax.fori_loop(0, pl.cdiv(left, PAGE_SIZE), one_page, 0)

    def arrive(group):
        """Waits for a group; where a sequence ends, puts the new token in and clears what lies behind."""
        wait(group)

        # Not before all of them are there: the bytes that a wait counts may be another tile's.
        @pl.when(tile_left[slot_of(group, 0)] <= 1024)
        def _():
            for i in range(4):
                seq, left = tile_seq[slot_of(group, i)], tile_left[slot_of(group, i)]

                @pl.when((left > 0) & (left <= 256))
                def _():
                    update_cache(seq, slot_of(group, i), left - 1)
                    clear_tail(slot_of(group, i), left)

    # ---- update cache: 16 tokens share a register, so the new one goes out with those around it

    def unit_copy(seq):
        slot = lax.rem(seq, 8)
        position = kv_lens[seq] - 1
        page = page_indices[seq * PAGES_PER_SEQ + position // PAGE_SIZE]
        tokens = pl.ds(pl.multiple_of(lax.rem(position, PAGE_SIZE) // UNIT * UNIT, UNIT), UNIT)
        return pltpu.make_async_copy(unit_out.at[slot], cache_hbm.at[page, :, :, tokens], unit_sem.at[slot])

    def update_cache(seq, slot, token):
        write = lax.rem(seq, 8)

        @pl.when(seq >= 8)
        def _():
            unit_copy(seq - 8).wait()

        page, in_unit = token // PAGE_SIZE, lax.rem(token, UNIT)
        tokens = pl.ds(pl.multiple_of(lax.rem(token, PAGE_SIZE) // UNIT * UNIT, UNIT), UNIT)
        # As words of two tokens, so that the old ones stay bit for bit whatever they are.
        own_half = jnp.where(in_unit % 2 == 0, jnp.uint32(0xFFFF), jnp.uint32(0xFFFF0000))
        mask = jnp.where(lax.broadcasted_iota(jnp.int32, (UNIT // 2, HEAD_DIM), 0) == in_unit // 2, own_half, jnp.uint32(0))
        for kind, new in enumerate((new_keys, new_values)):
            bits = pltpu.bitcast(new[seq].astype(jnp.float32), jnp.uint32)  # a bfloat16 is the high half of a float32
            both_halves = bits | (bits >> 16)
            for head in range(KV_HEADS):
                old = pltpu.bitcast(kv[slot, page, kind, head, tokens], jnp.uint32)
                rows = pltpu.bitcast((old & ~mask) | (both_halves[head : head + 1] & mask), kv.dtype)
                kv[slot, page, kind, head, tokens] = rows
                unit_out[write, kind, head] = rows
        unit_copy(seq).start()

    def clear_tail(slot, valid):
        """Zeroes V from token `valid` to the end of those that are computed: a weight of 0 does not hide a NaN."""
        row = lax.broadcasted_iota(jnp.int32, (UNIT, HEAD_DIM), 0)

        def clear(unit, _):
            token = unit * UNIT
            tokens = pl.ds(pl.multiple_of(lax.rem(token, PAGE_SIZE), UNIT), UNIT)
            for head in range(KV_HEADS):
                old = kv[slot, token // PAGE_SIZE, 1, head, tokens].astype(jnp.float32)
                kv[slot, token // PAGE_SIZE, 1, head, tokens] = jnp.where(token + row < valid, old, 0.0).astype(kv.dtype)
            return 0

        lax.fori_loop(valid // UNIT, pl.cdiv(valid, 256) * 16, clear, 0)

    # ---- read KV: one head of a tile at a time

    def tile_keys(group, i, head):
        return kv[slot_of(group, i), :, 0, head].reshape(256, HEAD_DIM)

    def tile_values(group, i, head):
        return kv[slot_of(group, i), :, 1, head].reshape(256, HEAD_DIM)

    def tile_tokens(shape):
        """The token of each column of a score."""
        return lax.broadcasted_iota(jnp.int32, shape, 1)

    # ---- one tile: scores of every query head, their softmax, the weighted values. Rows of a product are the queries of
    # 2 KV heads, as many as fill a register; of a product with one head's keys, that head's rows count.

    def heads_of(part):
        return range(part * 2, min((part + 1) * 2, KV_HEADS))

    def own_rows(results):
        """Out of each KV head's result the rows of its own queries."""
        row = lax.broadcasted_iota(jnp.int32, results[0].shape, 0)
        rows = results[0]
        for i, result in enumerate(results[1:], 1):
            rows = jnp.where(row >= i * GROUP, result, rows)
        return rows

    def score(group, i):
        queries = q_in[tile_seq[slot_of(group, i)]].astype(jnp.float32)
        scores = []
        for part in range(4):
            rows = queries[part * 8 : (part + 1) * 8]
            rows = rows.astype(jnp.bfloat16)
            scores.append(own_rows([products(rows, tile_keys(group, i, head), 1) for head in heads_of(part)]))
        return jnp.concatenate(scores, axis=0)

    def softmax(scores, left):
        """Weights relative to the tile's own maximum, with that and their sum, the same in every lane."""
        scores = jnp.where(tile_tokens(scores.shape) < left, scores * SCORE_SCALE, MASKED)
        top = jnp.broadcast_to(jnp.max(scores, axis=1, keepdims=True), row_max.shape)
        weights = jnp.exp2(scores - widen(top, 256))
        total = jnp.broadcast_to(jnp.sum(weights, axis=1, keepdims=True), row_sum.shape)
        return weights.astype(jnp.bfloat16), top, total

    def weigh(group, i, weights):
        parts = []
        for part in range(4):
            rows = weights[part * 8 : (part + 1) * 8]
            parts.append(own_rows([products(rows, tile_values(group, i, head), 0) for head in heads_of(part)]))
        return jnp.concatenate(parts, axis=0)

    def merge(group, i, state, top, total, part):
        """Adds a tile to the running softmax of its sequence and leaves the output that it would be the last of."""
        old_max, old_sum, old_acc = state
        begins = tile_first[slot_of(group, i)] == 0
        old_max = jnp.where(begins, MASKED, old_max)
        new_max = jnp.maximum(old_max, top)
        kept, added = jnp.exp2(old_max - new_max), jnp.exp2(top - new_max)
        new_sum = jnp.where(begins, 0.0, old_sum) * kept + total * added
        new_acc = jnp.where(begins, 0.0, old_acc) * widen(kept, HEAD_DIM) + part * widen(added, HEAD_DIM)
        out_all[tile_seq[slot_of(group, i)]] = (new_acc / widen(new_sum, HEAD_DIM)).astype(out_all.dtype)
        return new_max, new_sum, new_acc

    @pl.when(num_seqs > 0)
    def _():
        loads = [
            pltpu.make_async_copy(source.at[pl.ds(0, 64)], target.at[pl.ds(0, 64)], load_sem.at[i])
            for i, (source, target) in enumerate([(q_hbm, q_in), (k_hbm, new_keys), (v_hbm, new_values)])
        ]
        for load in loads:
            load.start()
        # The first turn finds a group before the first, with no tile in it: what that leaves, nobody reads.
        lax.fori_loop(0, 20, no_tile, 0)
        ahead = (jnp.int32(0), jnp.int32(0))
        for group in range(1, 4):
            ahead = fetch(group, *ahead)
        for load in loads:
            load.wait()

        def turn(carry):
            group, _, *ahead = carry
            arrive(group + 1)
            ahead = fetch(group + 4, *ahead)
            state = row_max[...], row_sum[...], acc[...]
            weighted = [softmax(scores[i], tile_left[slot_of(group, i)]) for i in range(4)]
            for i, (weights, top, total) in enumerate(weighted):
                scores[i] = score(group + 1, i)
                state = merge(group, i, state, top, total, weigh(group, i, weights))
            row_max[...], row_sum[...], acc[...] = state
            more = tile_left[slot_of(group + 1, 0)] > 0
            return group + 1, more, *ahead

        lax.while_loop(lambda carry: carry[1], turn, (jnp.int32(0), jnp.bool_(True), *ahead))
        out_copy = pltpu.make_async_copy(out_all.at[pl.ds(0, 64)], out_hbm.at[pl.ds(0, 64)], out_sem.at[0])
        out_copy.start()

        def drain(i, _):
            unit_copy(num_seqs - 1 - i).wait()
            return 0

        lax.fori_loop(0, jnp.minimum(num_seqs, 8), drain, 0)
        out_copy.wait()


def attend_decode(queries, keys, values, cache, kv_lens, page_indices, distribution):
    """`(out, cache)` of the decode sequences; what other rows of `out` hold means nothing."""
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        decode_kernel,
        in_specs=[smem] * 3 + [hbm] * 4,
        out_specs=[hbm] * 2,
        out_shape=[jax.ShapeDtypeStruct(queries.shape, queries.dtype), jax.ShapeDtypeStruct(cache.shape, cache.dtype)],
        input_output_aliases={6: 1},
        scratch_shapes=[
            pltpu.VMEM((20, 2, 2, 8, 128, 128), jnp.bfloat16),  # kv: fetched tiles
            pltpu.VMEM((65, 32, 128), jnp.bfloat16),  # q_in: queries of every sequence, and of none
            pltpu.VMEM((64, 8, 128), jnp.bfloat16),  # new_keys: new keys of every sequence
            pltpu.VMEM((64, 8, 128), jnp.bfloat16),  # new_values: new values of every sequence
            pltpu.VMEM((8, 2, 8, 16, 128), jnp.bfloat16),  # unit_out: new tokens on their way to the cache
            pltpu.VMEM((4, 32, 256), jnp.float32),  # scores: scores of a group, from turn to turn
            pltpu.VMEM((32, 128), jnp.float32),  # row_max: running maximum, the same in every lane
            pltpu.VMEM((32, 128), jnp.float32),  # row_sum: running sum, the same in every lane
            pltpu.VMEM((32, 128), jnp.float32),  # acc: running output
            pltpu.VMEM((65, 32, 128), jnp.bfloat16),  # out_all: outputs of every sequence, and of none
            pltpu.SMEM((20,), jnp.int32),  # tile_seq: the sequence of each tile in flight
            pltpu.SMEM((20,), jnp.int32),  # tile_first: its first token
            pltpu.SMEM((20,), jnp.int32),  # tile_left: tokens of its sequence from there on
            pltpu.SemaphoreType.DMA((5,)),  # kv_sem: fetches
            pltpu.SemaphoreType.DMA((3,)),  # load_sem: queries, keys, values
            pltpu.SemaphoreType.DMA((8,)),  # unit_sem: cache writes
            pltpu.SemaphoreType.DMA((1,)),  # out_sem: outputs
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=41943040, disable_bounds_checks=True),
        name="rpa_decode",
    )(kv_lens, page_indices, distribution, queries, keys, values, cache)


def mixed_kernel(
    # scalars in SMEM
    kv_lens, page_indices, cu_q_lens, distribution,
    # arrays in HBM; the cache is updated in place, and so is the output, which holds the decode rows
    q_hbm, k_hbm, v_hbm, _cache, _out, out_hbm, cache_hbm,
    # scratch
    kv,
    new_keys,
    new_values,
    page_rows,
    q_in,
    q_rows,
    which_query,
    limits,
    next_scores,
    step_max,
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
            start = pl.multiple_of(piece * 16, 16)
            tokens = pl.ds(start, 16)
            # As words of two tokens, so that the old ones stay bit for bit whatever they are.
            low = start + 2 * lax.broadcasted_iota(jnp.int32, (8, HEAD_DIM), 0)
            low_mask = jnp.where((low >= first) & (low < end), jnp.uint32(0xFFFF), jnp.uint32(0))
            mask = low_mask | jnp.where((low + 1 >= first) & (low + 1 < end), jnp.uint32(0xFFFF0000), jnp.uint32(0))

            new_tokens = pl.ds(PAGE_SIZE + start, 16)
            new = [array[new_slot, new_tokens].astype(jnp.float32) for array in (new_keys, new_values)]
            for kind, rows in enumerate(new):
                by_head = jnp.swapaxes(rows, 0, 1)
                for head in range(KV_HEADS):
                    old = page_rows[slot, kind, head, tokens]
                    words, old = pltpu.bitcast(by_head[head].astype(old.dtype), jnp.uint32), pltpu.bitcast(old, jnp.uint32)
                    page_rows[slot, kind, head, tokens] = pltpu.bitcast((words & mask) | (old & ~mask), page_rows.dtype)
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
        return pltpu.make_async_copy(cache_hbm.at[physical], kv.at[slot, page], kv_sem.at[slot])

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
        return kv_lens[seq] - new + jnp.minimum((q_block + 1) * 32, new)

    def advance(seq, q_block, q_step, block):
        last = (block + 1) * 1024 >= kv_end(seq, q_block)
        last_of_seq = last & ((q_block + 1) * 32 >= q_len(seq))
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

    # ---- query blocks: 32 tokens in and out in their natural layout, by KV head inside

    def block_copies(seq, block, make, act):
        """Acts on copies that together hold the block's tokens and no others, in sizes that are powers of two."""
        tokens = jnp.minimum(q_len(seq) - block * 32, 32)
        for size in (32, 16, 8, 4, 2, 1):

            @pl.when((tokens & size) > 0)
            def _(size=size):
                first = tokens & ~(2 * size - 1)
                act(make(q_start(seq) + block * 32 + first, first, size))

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
        row_max[head, :, rows] = jnp.full((8, rows.size), MASKED)

    def clear_all():
        def one(piece):
            rows = pl.ds(lax.rem(piece, 1) * 128, 128)
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
        """Sorts a query block by KV head, `[KV_HEADS, 32 * GROUP, HEAD_DIM]`."""

        def sort(piece):
            tokens = pl.ds(pl.multiple_of(piece * 16, 16), 16)
            rows = pl.ds(pl.multiple_of(piece * 64, 64), 64)
            for first in range(0, KV_HEADS, 4):
                queries = q_in[slot, tokens, first * GROUP : (first + 4) * GROUP]
                words = pltpu.bitcast(queries, jnp.uint32).reshape(4, 4, 8, HEAD_DIM)
                for i, part in enumerate(exchange([words[:, i] for i in range(4)])):
                    q_rows[first + i, rows] = pltpu.bitcast(part, q_rows.dtype).reshape(64, HEAD_DIM)

        loop(2, sort)

    def finish(slot):
        """Puts a block's output back in the order of its tokens, and clears the running maximum for the next one."""

        def unsort(piece):
            tokens = pl.ds(pl.multiple_of(piece * 32, 32), 32)
            rows = pl.ds(pl.multiple_of(piece * 128, 128), 128)

            def out_of(head):
                scale = 1.0 / row_sum[head, :, rows]
                out = in_rows(by_register(acc[head, :, rows]) * scale)
                clear(head, rows)
                return out.astype(out_rows.dtype).T

            for first in range(0, KV_HEADS, 4):
                heads = slice(first * GROUP, (first + 4) * GROUP)
                outs = [out_of(first + i).reshape(8, 16, HEAD_DIM) for i in range(4)]
                words = jnp.stack(exchange([pltpu.bitcast(out, jnp.uint32) for out in outs]), axis=1)
                words = words.reshape(32, 8, HEAD_DIM)
                out_rows[slot, tokens, heads] = pltpu.bitcast(words, out_rows.dtype)

        loop(1, unsort)

    def clear_tail(slot, valid):
        """Zeroes K and V from token `valid` to the end of those that are computed: neither a masked score nor a weight of 0 hides a NaN."""
        row = lax.broadcasted_iota(jnp.int32, (UNIT, HEAD_DIM), 0)

        def clear(unit, _):
            token = unit * UNIT
            tokens = pl.ds(pl.multiple_of(lax.rem(token, PAGE_SIZE), UNIT), UNIT)
            for head in range(KV_HEADS):
                for kind in range(2):
                    old = kv[slot, token // PAGE_SIZE, kind, head, tokens].astype(jnp.float32)
                    kv[slot, token // PAGE_SIZE, kind, head, tokens] = jnp.where(token + row < valid, old, 0.0).astype(kv.dtype)
            return 0

        lax.fori_loop(valid // UNIT, pl.cdiv(valid, 256) * 16, clear, 0)

    # ---- read KV: `tokens` tokens of one head, from token `first` of a block on, both whole pages

    def head_of(slot, kind, first, tokens, head):
        pages = pl.ds(lax.div(first, PAGE_SIZE), tokens // PAGE_SIZE)
        return kv[slot, pages, kind, head].reshape(tokens, HEAD_DIM)

    def head_keys(slot, first, tokens, head):
        return head_of(slot, 0, first, tokens, head)

    def head_values(slot, first, tokens, head):
        return head_of(slot, 1, first, tokens, head)

    def piece_tokens(shape, axis):
        """The token of each index along an axis of a piece's."""
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    # ---- flash steps: 128 query rows of one head against one tile, or on the diagonal against one piece of it

    def scores_of(queries, keys, head):
        """`[tokens, query rows]`, as logarithms to base 2."""
        return products(keys, queries, 1) * SCORE_SCALE

    def score(slot, first, tokens, head, rows):
        return scores_of(q_rows[head, rows], head_keys(slot, first, tokens, head), head)

    def state_before(head, rows, begins):
        """The running sum and output of some rows of a KV head; where they begin, what the block before left counts for nothing."""
        return jnp.where(begins, 0.0, row_sum[head, :, rows]), jnp.where(begins, 0.0, acc[head, :, rows])

    # Scores are turned, with tokens along sublanes and query rows along lanes: so weights are the matrix that the MXU keeps,
    # values what it multiplies, and its width is full of queries, not half empty for a head is narrower.

    def by_register(rows):
        """`[rows / 8, 8, lanes]`: what is the same in all 8 sublanes is spread over registers at no cost."""
        return rows.reshape(rows.shape[0] // 8, 8, rows.shape[1])

    def in_rows(registers):
        return registers.reshape(registers.shape[0] * 8, registers.shape[2])

    def in_all_rows(parts):
        """The largest of 8 rows, in each of them."""
        return jnp.broadcast_to(jnp.max(parts, axis=0, keepdims=True), parts.shape)

    def after(value, most):
        """`value`, once scores are there of which `most` is the largest: none is below -inf, which the compiler does not know."""
        return jnp.where(most < -jnp.inf, most, value)

    def largest(scores):
        """Of each query row's scores, by sublane."""
        return jnp.max(by_register(scores), axis=0)

    def weights_of(scores, top):
        return in_rows(jnp.exp2(by_register(scores) - top))

    def values_and_ones(slot, first, tokens, head):
        """`[HEAD_DIM + 16, tokens]`: rows of ones below the values make the sums of the weights."""
        values = head_values(slot, first, tokens, head).T
        return jnp.concatenate([values, jnp.ones((16, tokens), values.dtype)])

    def flash_turns(turns, heads, ahead, tied_to, tokens, place, score_of, slot, begins, onward=None):
        """Takes turns of some heads against the `tokens` tokens from `place(turn)` on, which is a token and the first head.

        A turn is one piece of code, in which scores are made `ahead` steps before they are weighed, 256 tokens at a time, the first
        of the next turn at its end. The compiler would make weights as soon as it can, far ahead of the MXU, and spill them:
        so each part of them waits for scores that the MXU makes meanwhile, the last but `tied_to`.
        `onward`: whether a block before has made the first scores, whether turn `turns` is the next block's first, and what waits
        for that block.
        """
        steps = [(head, pl.ds(row, 128)) for head in range(heads) for row in range(0, 128, 128)]
        parts = [pl.ds(first, 256) for first in range(0, tokens, 256)]

        def make(turn, step, part):
            first, head = place(turn)
            scores = score_of(first + part.start, head + steps[step][0], steps[step][1])
            next_scores[step % 8, part] = scores
            return largest(scores)

        def keep_most(step, made):
            step_max[step % 8] = in_all_rows(jnp.max(jnp.stack(made), axis=0))

        def one_turn(turn, _):
            if onward:
                pl.when(goes_on & (turn == turns - 1))(wait_for_next)
            first, first_head = place(turn)
            on_first_tokens = begins & (first == place(0)[0])
            made = []
            for i, (head, rows) in enumerate(steps):
                head = first_head + head
                if rows.start == 0:
                    values = values_and_ones(slot, first, tokens, head)
                later = (i + ahead) % len(steps)
                turn_of_later = turn if later > i else jnp.minimum(turn + 1, last_turn)
                old_max = row_max[head, :, rows]
                new_max = jnp.maximum(old_max, step_max[i % 8])
                rescale = jnp.exp2(old_max - new_max)
                weights = []
                for part in parts:
                    made.append(make(turn_of_later, later, part))
                    base = after(new_max, made[-tied_to]) if len(made) >= tied_to else new_max
                    weights.append(weights_of(next_scores[i % 8, part], base))
                keep_most(later, made[-len(parts) :])
                weights = jnp.concatenate(weights, axis=0)
                row_max[head, :, rows] = new_max
                old_sum, old_acc = state_before(head, rows, on_first_tokens)
                output = products(values, weights.astype(jnp.bfloat16), 0)
                row_sum[head, :, rows] = rescale * old_sum + output[HEAD_DIM : HEAD_DIM + 8]
                acc[head, :, rows] = in_rows(rescale * by_register(old_acc) + by_register(output[:HEAD_DIM]))
            return 0

        def make_first():
            for i in range(ahead):
                keep_most(i, [make(0, i, part) for part in parts])

        if onward:
            carried, goes_on, wait_for_next = onward
            last_turn = jnp.where(goes_on, turns, turns - 1)
            pl.when(~carried)(make_first)
        else:
            last_turn = turns - 1
            make_first()
        lax.fori_loop(0, turns, one_turn, 0)

    def plain_tiles(slot, count, begins, onward):
        """Tiles that all queries of the block see whole."""

        def score_of(first, head, rows):
            beyond = first >= 1024  # in the next block
            at = jnp.where(beyond, lax.rem(slot + 1, 3), slot)
            first = jnp.where(beyond, first - 1024, first)
            return score(at, first, 256, head, rows)

        def place_from(first_tile):
            def place(turn):
                tile, head = first_tile + lax.div(turn, 1), lax.rem(turn, 1) * 8
                return tile * 512, head

            return place

        @pl.when(count > 0)
        def _():
            turns = count * 1
            flash_turns(turns, 8, 3, 5, 512, place_from(0), score_of, slot, begins, onward)

    def diagonal_tile(slot, tile, valid, begins, first_query):
        """A tile that some query sees in part, as far as there are tokens. `first_query` is seen from the block's start."""

        first_piece = tile * 2
        pieces = jnp.minimum(2, pl.cdiv(valid, 256) - first_piece)

        # The MXU is wider than a head: beside the keys it multiplies, for each query of a step, how far it may look.
        def make_limits(piece, _):
            shape = (256, 128)
            token = (first_piece + piece) * 256 + piece_tokens(shape, 0)
            for step, row in enumerate(range(0, 128, 128)):
                query = first_query + query_of(row) + lax.broadcasted_iota(jnp.int32, shape, 1)
                limits[piece, step] = jnp.where(token <= query, 0.0, MASKED).astype(limits.dtype)
            return 0

        lax.fori_loop(0, pieces, make_limits, 0)

        def score_of(first, head, rows):
            queries = jnp.concatenate([q_rows[head, rows], which_query[...]], axis=1)
            own_limits = limits[lax.div(first, 256) - first_piece, rows.start // 128]
            keys = jnp.concatenate([head_keys(slot, first, 256, head), own_limits], axis=1)
            return scores_of(queries, keys, head)

        def place(turn):
            piece = first_piece + lax.div(turn, 1)
            return piece * 256, lax.rem(turn, 1) * 8

        flash_turns(pieces * 1, 8, 6, 6, 256, place, score_of, slot, begins)

    def attend(start, fetched):
        row, lane = (lax.broadcasted_iota(jnp.int32, which_query.shape, axis) for axis in range(2))
        which_query[...] = jnp.where(query_of(row) == lane, 1.0, 0.0).astype(which_query.dtype)
        clear_all()
        start_fetch(0, start, ~fetched)
        ahead = next_fetch(start)
        for step in range(1, 2):
            ahead = fetch_ahead(step, *ahead)

        def body(carry):
            step, at, ahead, sent, carried = carry
            seq, q_block, q_step, block = at
            ahead = fetch_ahead(step + 2, *ahead)
            slot = lax.rem(step, 3)
            end = kv_end(seq, q_block)
            valid = jnp.minimum(end - block * 1024, 1024)
            last = (block + 1) * 1024 >= end
            first_query = kv_lens[seq] - q_len(seq) + q_block * 32

            @pl.when(block == 0)
            def _():
                query_copies(seq, q_block, lax.rem(q_step, 3), lambda copy: copy.wait())
                begin(lax.rem(q_step, 3))

            @pl.when(~carried)
            def _():
                wait_block(end, seq, block, slot)

            @pl.when(last)
            def _():
                clear_tail(slot, valid)

            seen = first_query - block * 1024
            plain = jnp.clip(lax.div(seen + 1, 512), 0, 2)
            goes_on = ~last & (plain == 2)
            wait_for_next = lambda: wait_block(end, seq, block + 1, lax.rem(step + 1, 3))
            plain_tiles(slot, plain, block == 0, (carried, goes_on, wait_for_next))

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
            return step + 1, advance(*at), ahead, sent, goes_on

        state = (jnp.int32(0), start, ahead, start[:2], jnp.bool_(False))
        _, _, _, sent, _ = lax.while_loop(lambda carry: carry[1][0] < end_seq, body, state)
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
            pltpu.VMEM((3, 8, 2, 8, 128, 128), jnp.bfloat16),  # kv: fetched blocks
            pltpu.VMEM((5, 320, 8, 128), jnp.bfloat16),  # new_keys: new keys, around the page they go to
            pltpu.VMEM((5, 320, 8, 128), jnp.bfloat16),  # new_values: new values, likewise
            pltpu.VMEM((9, 2, 8, 128, 128), jnp.bfloat16),  # page_rows: pages to update
            pltpu.VMEM((3, 32, 32, 128), jnp.bfloat16),  # q_in: query blocks as they come
            pltpu.VMEM((8, 128, 128), jnp.bfloat16),  # q_rows: one by KV head
            pltpu.VMEM((128, 128), jnp.bfloat16),  # which_query: a 1 where a lane is the row's query
            pltpu.VMEM((2, 1, 256, 128), jnp.bfloat16),  # limits: by token and query: 0, or what masks a score
            pltpu.VMEM((8, 512, 128), jnp.float32),  # next_scores: scores of the next steps
            pltpu.VMEM((8, 8, 128), jnp.float32),  # step_max: their largest
            pltpu.VMEM((8, 8, 128), jnp.float32),  # row_max: running maximum
            pltpu.VMEM((8, 8, 128), jnp.float32),  # row_sum: running sum, the same in every sublane
            pltpu.VMEM((8, 128, 128), jnp.float32),  # acc: running output
            pltpu.VMEM((1, 32, 32, 128), jnp.bfloat16),  # out_rows: an output block on its way out
            pltpu.SemaphoreType.DMA((3,)),  # kv_sem: fetches
            pltpu.SemaphoreType.DMA((5,)),  # new_sem: new keys and values
            pltpu.SemaphoreType.DMA((9,)),  # old_sem: pages that hold old tokens
            pltpu.SemaphoreType.DMA((9,)),  # write_sem: cache writes
            pltpu.SemaphoreType.DMA((3,)),  # q_sem: query blocks
            pltpu.SemaphoreType.DMA((1,)),  # out_sem: output blocks
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=41943040, disable_bounds_checks=True),
        name="rpa_mixed",
    )(kv_lens, page_indices, cu_q_lens, distribution, queries, keys, values, rows, out)


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of any batch: decode rows, then the rest; returns `(out, kv_cache)`, the cache in the donated memory."""
    out, cache = attend_decode(queries, keys, values, kv_cache, kv_lens, page_indices, distribution)
    return attend_mixed(queries, keys, values, cache, out, kv_lens, page_indices, cu_q_lens, distribution)
