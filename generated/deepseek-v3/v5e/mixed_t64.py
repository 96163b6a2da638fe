"""Ragged paged attention of deepseek-v3: mixed batches on v5e.

Do not edit: made from spec beb302e5bf7ae58bc4f843b176ce5570766fe5e900ecc5ba857bb2b7b12d0229 by
    rpac build deepseek-v3.yaml --target v5e
Change the spec or the templates and run it again.

What was specialized:
- latent attention, absorbed: 128 query heads over one latent vector of 512 and one rotary key of 64 a token, bfloat16: constants
- cache rows of 640 lanes, 5 registers' width: latent vector, rotary key, padding
- pages of 128 tokens, 64 a sequence, up to 64 sequences
- token buckets that use it: 64
- causal, cache updated
- decode: tiles of 1024 tokens, no longer than the expected lengths, 2 of them a turn, so that one fills the other's waits; fetched 5 turns ahead, so that DMA latency hides
- mixed: blocks of 16 queries with all their heads against 512 fetched tokens (3 buffers); computes 256 query rows at once
- VMEM: 39,813,120 bytes counted, 50,331,648 allowed, 134,217,728 there
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


def decode_kernel(
    # scalars in SMEM
    kv_lens, page_indices, distribution,
    # arrays in HBM; the cache is updated in place
    q_hbm, q_rope_hbm, new_hbm, _cache, out_hbm, cache_hbm,
    # scratch
    kv,
    q_in,
    q_rope_in,
    new_in,
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

    The work is cut into tiles of 1024 tokens of one sequence, and goes by groups of 2 tiles, whatever sequences
    they are of. A turn of the loop scores the tiles of one group beside weighing those of the group before, so that the
    MXU need not wait for a softmax. No turn asks where a sequence ends: every tile leaves its sequence's output so far,
    and the last one stays.
    """
    num_seqs = distribution[0]

    # ---- the tiles in flight: whose each is, where it begins, and how many tokens the sequence has from there on

    def slot_of(group, i):
        return lax.rem(group, 6) * 2 + i

    def no_tile(index, _):
        tile_seq[index] = 64
        tile_first[index] = 0
        tile_left[index] = 0
        return 0

    # ---- fetch KV: whole pages, 5 groups ahead

    def page_copy(physical, group, i, page):
        slot, sem = slot_of(group, i), kv_sem.at[lax.rem(group, 6)]
        return pltpu.make_async_copy(cache_hbm.at[physical], kv.at[slot, page], sem)

    def fetch(group, seq, first):
        """Starts the fetch of a group whose first tile is at token `first` of `seq`; returns where the next one begins."""
        for i in range(2):
            live, some_seq = seq < num_seqs, jnp.minimum(seq, num_seqs - 1)
            left = jnp.where(live, kv_lens[some_seq] - first, 0)
            tile_seq[slot_of(group, i)] = jnp.where(live, seq, 64)
            tile_first[slot_of(group, i)] = first
            tile_left[slot_of(group, i)] = left
            pages = some_seq * PAGES_PER_SEQ + first // PAGE_SIZE
            for page in range(8):
                physical = page_indices[pages + page]  # not under the condition: a load that waits for it costs more

                @pl.when(page * PAGE_SIZE < left)
                def _():
                    page_copy(physical, group, i, page).start()

            last = left <= 1024
            seq = jnp.where(last, seq + 1, seq)
            first = jnp.where(last, 0, first + 1024)
        return seq, first

    def wait(group):
        left = tile_left[slot_of(group, 0)]
        first_slot, sem = slot_of(group, 0), kv_sem.at[lax.rem(group, 6)]

        def wait_for(place):
            pltpu.make_async_copy(place, place, sem).wait()  # for as many bytes, from anywhere

        @pl.when(left >= 2048)
        def _():
            wait_for(kv.at[pl.ds(first_slot, 2)])

        @pl.when(left < 2048)
        def _():
            for i in range(2):
                wait_tile(tile_left[slot_of(group, i)], first_slot + i, wait_for)

    def wait_tile(left, slot, wait_for):
        def one_page(_, carry):
            wait_for(kv.at[slot, 0])
            return carry

        @pl.when(left >= 1024)
        def _():
            wait_for(kv.at[slot])

        @pl.when(left < 1024)
        def _():
            lax.fori_loop(0, pl.cdiv(left, PAGE_SIZE), one_page, 0)

    def arrive(group):
        """Waits for a group; where a sequence ends, puts the new token in and clears what lies behind."""
        wait(group)

        # Not before all of them are there: the bytes that a wait counts may be another tile's.
        @pl.when(tile_left[slot_of(group, 0)] <= 2048)
        def _():
            for i in range(2):
                seq, left = tile_seq[slot_of(group, i)], tile_left[slot_of(group, i)]

                @pl.when((left > 0) & (left <= 1024))
                def _():
                    update_cache(seq, slot_of(group, i), left - 1)
                    clear_tail(slot_of(group, i), left)

    # ---- update cache: 16 tokens share a register, so the new one goes out with those around it

    def unit_copy(seq):
        slot = lax.rem(seq, 8)
        position = kv_lens[seq] - 1
        page = page_indices[seq * PAGES_PER_SEQ + position // PAGE_SIZE]
        tokens = pl.ds(pl.multiple_of(lax.rem(position, PAGE_SIZE) // UNIT * UNIT, UNIT), UNIT)
        return pltpu.make_async_copy(unit_out.at[slot], cache_hbm.at[page, tokens], unit_sem.at[slot])

    def update_cache(seq, slot, token):
        write = lax.rem(seq, 8)

        @pl.when(seq >= 8)
        def _():
            unit_copy(seq - 8).wait()

        page, in_unit = token // PAGE_SIZE, lax.rem(token, UNIT)
        tokens = pl.ds(pl.multiple_of(lax.rem(token, PAGE_SIZE) // UNIT * UNIT, UNIT), UNIT)
        # As words of two tokens, so that the old ones stay bit for bit whatever they are.
        own_half = jnp.where(in_unit % 2 == 0, jnp.uint32(0xFFFF), jnp.uint32(0xFFFF0000))
        mask = jnp.where(lax.broadcasted_iota(jnp.int32, (UNIT // 2, LANES), 0) == in_unit // 2, own_half, jnp.uint32(0))
        bits = pltpu.bitcast(new_in[seq].astype(jnp.float32), jnp.uint32)  # a bfloat16 is the high half of a float32
        both_halves = bits | (bits >> 16)
        old = pltpu.bitcast(kv[slot, page, tokens], jnp.uint32)
        rows = pltpu.bitcast((old & ~mask) | (both_halves & mask), kv.dtype)
        kv[slot, page, tokens] = rows
        unit_out[write] = rows
        unit_copy(seq).start()

    def clear_tail(slot, valid):
        """Zeroes rows from token `valid` to the end of what is computed: a weight of 0 does not hide a NaN."""
        row = lax.broadcasted_iota(jnp.int32, (UNIT, RANK), 0)

        def clear(unit, _):
            token = unit * UNIT
            tokens = pl.ds(pl.multiple_of(lax.rem(token, PAGE_SIZE), UNIT), UNIT)
            old = kv[slot, token // PAGE_SIZE, tokens, :RANK].astype(jnp.float32)
            kv[slot, token // PAGE_SIZE, tokens, :RANK] = jnp.where(token + row < valid, old, 0.0).astype(kv.dtype)
            return 0

        lax.fori_loop(valid // UNIT, pl.cdiv(valid, 1024) * 64, clear, 0)

    # ---- one tile: scores of all query heads, their softmax, the weighted values

    def tile_keys(group, i):
        return kv[slot_of(group, i)].reshape(1024, LANES)

    def tile_values(group, i):
        return kv[slot_of(group, i), :, :, :RANK].reshape(1024, RANK)

    def tile_tokens(shape):
        """The token of each column of a score."""
        return lax.broadcasted_iota(jnp.int32, shape, 1)

    def score(group, i):
        seq = tile_seq[slot_of(group, i)]
        queries = jnp.concatenate([q_in[seq], q_rope_in[seq]], axis=1)
        return products(queries, tile_keys(group, i), 1)

    def softmax(scores, left):
        """Weights relative to the tile's own maximum, with that and their sum, the same in every lane."""
        scores = jnp.where(tile_tokens(scores.shape) < left, scores * SCORE_SCALE, MASKED)
        top = jnp.broadcast_to(jnp.max(scores, axis=1, keepdims=True), row_max.shape)
        weights = jnp.exp2(scores - widen(top, 1024))
        total = jnp.broadcast_to(jnp.sum(weights, axis=1, keepdims=True), row_sum.shape)
        return weights.astype(jnp.bfloat16), top, total

    def weigh(group, i, weights):
        return products(weights, tile_values(group, i), 0)

    def merge(group, i, state, top, total, part):
        """Adds a tile to the running softmax of its sequence and leaves the output that it would be the last of."""
        old_max, old_sum, old_acc = state
        begins = tile_first[slot_of(group, i)] == 0
        old_max = jnp.where(begins, MASKED, old_max)
        new_max = jnp.maximum(old_max, top)
        kept, added = jnp.exp2(old_max - new_max), jnp.exp2(top - new_max)
        new_sum = jnp.where(begins, 0.0, old_sum) * kept + total * added
        new_acc = jnp.where(begins, 0.0, old_acc) * widen(kept, RANK) + part * widen(added, RANK)
        out_all[tile_seq[slot_of(group, i)]] = (new_acc / widen(new_sum, RANK)).astype(out_all.dtype)
        return new_max, new_sum, new_acc

    @pl.when(num_seqs > 0)
    def _():
        loads = [
            pltpu.make_async_copy(source.at[pl.ds(0, 64)], target.at[pl.ds(0, 64)], load_sem.at[i])
            for i, (source, target) in enumerate([(q_hbm, q_in), (q_rope_hbm, q_rope_in), (new_hbm, new_in)])
        ]
        for load in loads:
            load.start()
        # The first turn finds a group before the first, with no tile in it: what that leaves, nobody reads.
        lax.fori_loop(0, 12, no_tile, 0)
        ahead = (jnp.int32(0), jnp.int32(0))
        for group in range(1, 5):
            ahead = fetch(group, *ahead)
        for load in loads:
            load.wait()

        def turn(carry):
            group, _, *ahead = carry
            arrive(group + 1)
            ahead = fetch(group + 5, *ahead)
            state = row_max[...], row_sum[...], acc[...]
            weighted = [softmax(scores[i], tile_left[slot_of(group, i)]) for i in range(2)]
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


def attend_decode(queries, queries_rope, new_rows, cache, kv_lens, page_indices, distribution):
    """`(out, cache)` of the decode sequences; what other rows of `out` hold means nothing."""
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        decode_kernel,
        in_specs=[smem] * 3 + [hbm] * 4,
        out_specs=[hbm] * 2,
        out_shape=[jax.ShapeDtypeStruct(queries.shape, queries.dtype), jax.ShapeDtypeStruct(cache.shape, cache.dtype)],
        input_output_aliases={6: 1},
        scratch_shapes=[
            pltpu.VMEM((12, 8, 128, 640), jnp.bfloat16),  # kv: fetched tiles
            pltpu.VMEM((65, 128, 512), jnp.bfloat16),  # q_in: queries of every sequence, and of none
            pltpu.VMEM((65, 128, 128), jnp.bfloat16),  # q_rope_in: their rotary parts
            pltpu.VMEM((64, 1, 640), jnp.bfloat16),  # new_in: new tokens of every sequence
            pltpu.VMEM((8, 16, 640), jnp.bfloat16),  # unit_out: new tokens on their way to the cache
            pltpu.VMEM((2, 128, 1024), jnp.float32),  # scores: scores of a group, from turn to turn
            pltpu.VMEM((128, 128), jnp.float32),  # row_max: running maximum, the same in every lane
            pltpu.VMEM((128, 128), jnp.float32),  # row_sum: running sum, the same in every lane
            pltpu.VMEM((128, 512), jnp.float32),  # acc: running output
            pltpu.VMEM((65, 128, 512), jnp.bfloat16),  # out_all: outputs of every sequence, and of none
            pltpu.SMEM((12,), jnp.int32),  # tile_seq: the sequence of each tile in flight
            pltpu.SMEM((12,), jnp.int32),  # tile_first: its first token
            pltpu.SMEM((12,), jnp.int32),  # tile_left: tokens of its sequence from there on
            pltpu.SemaphoreType.DMA((6,)),  # kv_sem: fetches
            pltpu.SemaphoreType.DMA((3,)),  # load_sem: queries, their rotary parts, new tokens
            pltpu.SemaphoreType.DMA((8,)),  # unit_sem: cache writes
            pltpu.SemaphoreType.DMA((1,)),  # out_sem: outputs
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=50331648, disable_bounds_checks=True),
        name="rpa_decode",
    )(kv_lens, page_indices, distribution, queries, queries_rope, new_rows, cache)


def mixed_kernel(
    # scalars in SMEM
    kv_lens, page_indices, cu_q_lens, distribution,
    # arrays in HBM; the cache is updated in place, and so is the output, which holds the decode rows
    q_hbm, q_rope_hbm, new_hbm, _cache, _out, out_hbm, cache_hbm,
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
        source = jnp.clip(wanted, 0, new_hbm.shape[0] - 64)
        take, put = pl.ds(source, 64), pl.ds(PAGE_SIZE + source - wanted, 64)
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
        new = q_len(seq)
        return kv_lens[seq] - new + jnp.minimum((q_block + 1) * 16, new)

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
        """Acts on copies that together hold the block's tokens and no others, in sizes that are powers of two."""
        tokens = jnp.minimum(q_len(seq) - block * 16, 16)
        for size in (16, 8, 4, 2, 1):

            @pl.when((tokens & size) > 0)
            def _(size=size):
                first = tokens & ~(2 * size - 1)
                act(make(q_start(seq) + block * 16 + first, first, size))

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


def attend_mixed(queries, queries_rope, new_rows, cache, out, kv_lens, page_indices, cu_q_lens, distribution):
    """`(out, cache)` with the rows of the sequences that are not decode written; other rows of `out` stay."""
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        mixed_kernel,
        in_specs=[smem] * 4 + [hbm] * 5,
        out_specs=[hbm] * 2,
        out_shape=[jax.ShapeDtypeStruct(queries.shape, queries.dtype), jax.ShapeDtypeStruct(cache.shape, cache.dtype)],
        input_output_aliases={7: 1, 8: 0},
        scratch_shapes=[
            pltpu.VMEM((3, 4, 128, 640), jnp.bfloat16),  # kv: fetched blocks
            pltpu.VMEM((5, 320, 1, 640), jnp.bfloat16),  # new_in: new tokens, around the page they go to
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
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=50331648, disable_bounds_checks=True),
        name="rpa_mixed",
    )(kv_lens, page_indices, cu_q_lens, distribution, queries, queries_rope, new_rows, cache, out)


def ragged_paged_attention(
    queries, queries_rope, new_kv, new_rope, kv_cache, kv_lens, page_indices, cu_q_lens, distribution
):
    """Attention of any batch: decode rows, then the rest; returns `(out, kv_cache)`, the cache in the donated memory."""
    queries_rope, new_rows = whole_registers(queries_rope), cache_rows(new_kv, new_rope)
    out, cache = attend_decode(queries, queries_rope, new_rows, kv_cache, kv_lens, page_indices, distribution)
    return attend_mixed(
        queries, queries_rope, new_rows, cache, out, kv_lens, page_indices, cu_q_lens, distribution
    )
