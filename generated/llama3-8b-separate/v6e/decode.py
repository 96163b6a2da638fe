"""Ragged paged attention of llama3-8b-separate: decode batches on v6e.

Do not edit: made from spec d69f518148a4ef2ff712641d26f9755ca8f201ed793daed084ece9bba323a095 by
    rpac build llama3-8b-separate.yaml --target v6e
Change the spec or the templates and run it again.

What was specialized:
- 32 query heads over 8 KV heads, head_dim 128, queries bfloat16, KV bfloat16: constants
- pages of 128 tokens, 64 a sequence, up to 64 sequences
- token buckets that use it: 64, 256, 1024, 2048
- causal, cache updated; no window, soft cap, sinks or KV scales in the spec: none is in the code
- K and V apart in the cache, pages of [2, KV heads, tokens, head_dim] (kv_layout separate)
- only decode batches: the other kernels are not in this program
- decode: tiles of 256 tokens, no longer than the expected lengths, 2 of them a turn, so that one fills the other's waits; fetched 6 turns ahead, so that DMA latency hides
- tuned: 0.982 of the rule's time, predicted with libtpu 0.0.42.1, seed 0
- VMEM: 16,777,216 bytes counted, 25,165,824 allowed, 134,217,728 there
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

    The work is cut into tiles of 256 tokens of one sequence, and goes by groups of 2 tiles, whatever sequences
    they are of. A turn of the loop scores the tiles of one group beside weighing those of the group before, so that the
    MXU need not wait for a softmax. No turn asks where a sequence ends: every tile leaves its sequence's output so far,
    and the last one stays.
    """
    num_seqs = distribution[0]

    # ---- the tiles in flight: whose each is, where it begins, and how many tokens the sequence has from there on

    def slot_of(group, i):
        return lax.rem(group, 7) * 2 + i

    def no_tile(index, _):
        tile_seq[index] = 64
        tile_first[index] = 0
        tile_left[index] = 0
        return 0

    # ---- fetch KV: whole pages, 6 groups ahead

    def page_copy(physical, group, i, page):
        slot, sem = slot_of(group, i), kv_sem.at[lax.rem(group, 7)]
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
        first_slot, sem = slot_of(group, 0), kv_sem.at[lax.rem(group, 7)]

        def wait_for(place):
            pltpu.make_async_copy(place, place, sem).wait()  # for as many bytes, from anywhere

        @pl.when(left >= 512)
        def _():
            wait_for(kv.at[pl.ds(first_slot, 2)])

        @pl.when(left < 512)
        def _():
            for i in range(2):
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
        @pl.when(tile_left[slot_of(group, 0)] <= 512)
        def _():
            for i in range(2):
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
        lax.fori_loop(0, 14, no_tile, 0)
        ahead = (jnp.int32(0), jnp.int32(0))
        for group in range(1, 6):
            ahead = fetch(group, *ahead)
        for load in loads:
            load.wait()

        def turn(carry):
            group, _, *ahead = carry
            arrive(group + 1)
            ahead = fetch(group + 6, *ahead)
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
            pltpu.VMEM((14, 2, 2, 8, 128, 128), jnp.bfloat16),  # kv: fetched tiles
            pltpu.VMEM((65, 32, 128), jnp.bfloat16),  # q_in: queries of every sequence, and of none
            pltpu.VMEM((64, 8, 128), jnp.bfloat16),  # new_keys: new keys of every sequence
            pltpu.VMEM((64, 8, 128), jnp.bfloat16),  # new_values: new values of every sequence
            pltpu.VMEM((8, 2, 8, 16, 128), jnp.bfloat16),  # unit_out: new tokens on their way to the cache
            pltpu.VMEM((2, 32, 256), jnp.float32),  # scores: scores of a group, from turn to turn
            pltpu.VMEM((32, 128), jnp.float32),  # row_max: running maximum, the same in every lane
            pltpu.VMEM((32, 128), jnp.float32),  # row_sum: running sum, the same in every lane
            pltpu.VMEM((32, 128), jnp.float32),  # acc: running output
            pltpu.VMEM((65, 32, 128), jnp.bfloat16),  # out_all: outputs of every sequence, and of none
            pltpu.SMEM((14,), jnp.int32),  # tile_seq: the sequence of each tile in flight
            pltpu.SMEM((14,), jnp.int32),  # tile_first: its first token
            pltpu.SMEM((14,), jnp.int32),  # tile_left: tokens of its sequence from there on
            pltpu.SemaphoreType.DMA((7,)),  # kv_sem: fetches
            pltpu.SemaphoreType.DMA((3,)),  # load_sem: queries, keys, values
            pltpu.SemaphoreType.DMA((8,)),  # unit_sem: cache writes
            pltpu.SemaphoreType.DMA((1,)),  # out_sem: outputs
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=25165824, disable_bounds_checks=True),
        name="rpa_decode",
    )(kv_lens, page_indices, distribution, queries, keys, values, cache)


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of a batch of decode rows only; returns `(out, kv_cache)`, the cache in the donated argument's memory.

    Row s of `queries` is sequence s: with one new token each, `cu_q_lens` has nothing to add.
    """
    return attend_decode(queries, keys, values, kv_cache, kv_lens, page_indices, distribution)
