"""Ragged paged attention of deepseek-v3: decode batches on v6e.

Do not edit: made from spec beb302e5bf7ae58bc4f843b176ce5570766fe5e900ecc5ba857bb2b7b12d0229 by
    rpac build SPEC --target v6e
Change the spec or the templates and run it again.

What was specialized:
- latent attention, absorbed: 128 query heads over one latent vector of 512 and one rotary key of 64 a token, bfloat16:
  constants
- cache rows of 640 lanes, 5 registers' width: latent vector, rotary key, padding
- pages of 128 tokens, 64 a sequence, up to 64 sequences
- token buckets that use it: 64, 256, 1024
- causal, cache updated
- only decode batches: the other kernels are not in this program
- decode: tiles of 1024 tokens, no longer than the expected lengths; waves of 2, so that one fills the other's waits;
  fetched 5 waves ahead, which hides the latency of DMAs
- decode, loop: waves of tiles of any sequences; tiles of short sequences hide each other's latency
- decode, reading K and V: one row of a token for all query heads; the latent vector is part of every key and is every
  value
- decode, writing new tokens: latent vector and rotary key in one row; that is how latent attention stores a token
- decode, mask: by the length of each sequence; a row has one new token, the last of its sequence
- decode, matmuls with K and V: as they are stored; the MXU takes elements of this dtype beside the rows
- decode, starting fetches: before an iteration's matmuls; then no fetch waits for a matmul
- VMEM: 39,813,120 bytes counted, 50,331,648 allowed, 134,217,728 available
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Ref, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
Q_HEADS = 128
HEAD_LANES = 512  # of a row of the cache
MAX_SEQS = 64
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 64
SCORE_SCALE = 0.10411754627697266  # 0.07216878364870323 (the softmax scale) * log2(e): probabilities are powers of two
MASKED = -2e+38  # finite, so that a row that is all masked stays a number
PRECISION = None  # of matmuls: bfloat16 products are exact in float32
VMEM_LIMIT = 50331648  # bytes
RANK = 512  # lanes of a latent vector, which is the value and part of the key
ROW_LANES = 640  # of a token's row in the cache: the latent vector, 64 of the rotary key, 64 of padding
SUBLANE_TILE = 16  # tokens of the smallest part of the cache that a DMA or store reaches

TILE = 1024  # tokens that are fetched and computed at once, of one sequence
TILES_PER_WAVE = 2  # which fill the waits of each other
LOOKAHEAD = 5  # waves from the fetch of one to its softmax
WAVE_TOKENS = TILES_PER_WAVE * TILE
WAVE_BUFFERS = LOOKAHEAD + 1  # waves that are fetched or computed
TILE_BUFFERS = WAVE_BUFFERS * TILES_PER_WAVE
TILE_PAGES = TILE // PAGE_SIZE
MAX_ROWS = 64  # sequences of the largest batch
NO_SEQ = MAX_ROWS  # in place of a sequence where there is no tile
MAX_TOKENS = MAX_ROWS  # new tokens of the largest batch
WRITE_BUFFERS = 8  # sequences whose new tokens are on their way to the cache
QUERY_ROWS = Q_HEADS
LOADS = 3  # queries, their rotary parts, new tokens


def for_each(first, end, body):
    """Runs `body(index)` for each index in [first, end), as one piece of code."""

    def run(index, _):
        body(index)
        return 0

    lax.fori_loop(first, end, run, 0)


def quotient(value, divisor):
    """`value // divisor` of what is not negative, by a power of two: one shift, where a division of signed numbers is ten."""
    return value >> (divisor.bit_length() - 1)


def remainder(value, divisor):
    """`value % divisor`, as `quotient`."""
    return value & (divisor - 1)


def broadcast_lanes(rows, lanes):
    """Rows that hold one value in all LANES lanes, over `lanes` lanes: cheaper than a broadcast from one lane."""
    return jnp.concatenate([rows] * (lanes // LANES), axis=1)


def matmul(rows, matrix, contracted):
    """`rows` times `matrix` along its dimension `contracted`, in float32."""
    dims = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(rows, matrix, dims, precision=PRECISION, preferred_element_type=jnp.float32)


def pad_rope(queries_rope):
    """The rotary queries with zeros up to whole registers, which is how they lie in memory anyway."""
    return jnp.pad(queries_rope, ((0, 0), (0, 0), (0, ROW_LANES - RANK - queries_rope.shape[2])))


def rows_of_new_tokens(new_kv, new_rope):
    """The new tokens as rows of the cache, `[tokens, 1, ROW_LANES]`: each in registers of its own, to be found by number."""
    padding = jnp.zeros((len(new_kv), ROW_LANES - RANK - new_rope.shape[1]), new_kv.dtype)
    return jnp.concatenate([new_kv, new_rope, padding], axis=1)[:, None]


class PagedKernel:
    """What kernels share that fetch blocks of `block_pages` whole pages, and compute `computed_tokens` tokens at once."""

    def clear_tail(self, buffer, valid):
        """Zeroes the tokens from `valid` to the end of those that are computed: a probability of 0 does not hide a NaN."""
        token = lax.broadcasted_iota(jnp.int32, (SUBLANE_TILE, RANK), 0)
        clear_tile = functools.partial(self.clear_tile, buffer, valid, token)
        for_each(valid // SUBLANE_TILE, pl.cdiv(valid, self.computed_tokens) * (self.computed_tokens // SUBLANE_TILE), clear_tile)

    def clear_tile(self, buffer, valid, token, tile):
        first = tile * SUBLANE_TILE
        tokens = pl.ds(pl.multiple_of(lax.rem(first, PAGE_SIZE), SUBLANE_TILE), SUBLANE_TILE)
        old = self.kv[buffer, first // PAGE_SIZE, tokens, :RANK].astype(jnp.float32)
        self.kv[buffer, first // PAGE_SIZE, tokens, :RANK] = jnp.where(first + token < valid, old, 0.0).astype(self.kv.dtype)


@dataclasses.dataclass
class DecodeKernel(PagedKernel):
    """One new token for each of the sequences [0, distribution[0]): update its page, attend to all of its tokens.

    The work is cut into tiles of TILE tokens of one sequence. A wave is TILES_PER_WAVE tiles, of whatever sequences.
    An iteration computes the scores of one wave beside the softmax and the values of the wave before, so that the MXU
    need not wait for a softmax. No iteration asks where a sequence ends: every tile leaves its sequence's output so far,
    and the last one stays.
    """

    # Scalars in SMEM.
    kv_lens: Ref  # int32[MAX_SEQS]
    page_indices: Ref  # int32[MAX_SEQS * PAGES_PER_SEQ]
    distribution: Ref  # int32[3]
    # Arrays in HBM.
    q_hbm: Ref  # bfloat16[tokens, Q_HEADS, RANK]
    q_rope_hbm: Ref  # bfloat16[tokens, Q_HEADS, ROW_LANES - RANK]
    new_hbm: Ref  # bfloat16[tokens, 1, ROW_LANES]
    cache_in: Ref  # bfloat16[pages, PAGE_SIZE, ROW_LANES]: the memory of cache_hbm
    out_hbm: Ref  # bfloat16[tokens, Q_HEADS, RANK]
    cache_hbm: Ref  # bfloat16[pages, PAGE_SIZE, ROW_LANES]
    # Scratch arrays in VMEM, and semaphores.
    kv: Ref  # bfloat16[TILE_BUFFERS, TILE_PAGES, PAGE_SIZE, ROW_LANES]: fetched tiles
    q_in: Ref  # bfloat16[MAX_ROWS + 1, Q_HEADS, RANK]: queries of every sequence, and of no sequence
    q_rope_in: Ref  # bfloat16[MAX_ROWS + 1, Q_HEADS, ROW_LANES - RANK]: their rotary parts
    new_in: Ref  # bfloat16[MAX_ROWS, 1, ROW_LANES]: new tokens of every sequence
    new_out: Ref  # bfloat16[WRITE_BUFFERS, SUBLANE_TILE, ROW_LANES]: new tokens on their way to the cache
    scores: Ref  # float32[TILES_PER_WAVE, Q_HEADS, TILE]: scores of a wave, for the next iteration
    row_max: Ref  # float32[Q_HEADS, LANES]: running maximum, the same in every lane
    row_sum: Ref  # float32[Q_HEADS, LANES]: running sum, the same in every lane
    acc: Ref  # float32[Q_HEADS, RANK]: running output
    out_all: Ref  # bfloat16[MAX_ROWS + 1, Q_HEADS, RANK]: outputs of every sequence, and of no sequence
    tile_seq: Ref  # int32[TILE_BUFFERS]: the sequence of each tile in flight
    tile_first: Ref  # int32[TILE_BUFFERS]: its first token
    tile_left: Ref  # int32[TILE_BUFFERS]: tokens of its sequence from there on
    kv_sem: Ref  # DMA[WAVE_BUFFERS]: fetches
    load_sem: Ref  # DMA[LOADS]: queries, their rotary parts, new tokens
    write_sem: Ref  # DMA[WRITE_BUFFERS]: cache writes
    out_sem: Ref  # DMA[1]: outputs

    computed_tokens = TILE

    def run(self):
        self.num_seqs = self.distribution[0]
        pl.when(self.num_seqs > 0)(self.attend)

    def attend(self):
        """Attends to all tokens of all sequences."""
        loads = self.load_copies()
        for load in loads:
            load.start()
        # The first iteration finds a wave before the first, with no tile in it: nobody reads what that leaves.
        for_each(0, TILE_BUFFERS, self.clear_slot)
        ahead = (jnp.int32(0), jnp.int32(0))
        for wave in range(1, LOOKAHEAD):
            ahead = self.fetch_wave(wave, *ahead)
        for load in loads:
            load.wait()
        lax.while_loop(more_waves, self.iterate, (jnp.int32(0), jnp.bool_(True), *ahead))
        results = [
            copy_of_tokens(self.out_all, self.out_hbm, self.out_sem.at[0]),
        ]
        for result in results:
            result.start()
        for_each(0, jnp.minimum(self.num_seqs, WRITE_BUFFERS), self.drain_write)
        for result in results:
            result.wait()

    def load_copies(self):
        """The copies of what the kernel loads at its start, of all sequences."""
        arrays = [
            (copy_of_tokens, self.q_hbm, self.q_in),
            (copy_of_tokens, self.q_rope_hbm, self.q_rope_in),
            (copy_of_tokens, self.new_hbm, self.new_in),
        ]
        return [copy(source, target, self.load_sem.at[i]) for i, (copy, source, target) in enumerate(arrays)]

    def iterate(self, carry):
        """Computes a wave's values and the next wave's scores; fetches a wave LOOKAHEAD waves later."""
        wave, _, *ahead = carry
        self.wait_and_patch(wave + 1)
        state = self.row_max[...], self.row_sum[...], self.acc[...]
        state, ahead = self.compute_tiles(wave, state, ahead)
        self.row_max[...], self.row_sum[...], self.acc[...] = state
        more = self.tile_left[self.slot(wave + 1, 0)] > 0
        return wave + 1, more, *ahead

    # ---- the tiles in flight: each one's sequence, its first token, and the tokens that the sequence has from there on

    def slot(self, wave, i):
        """The buffer of tile `i` of a wave."""
        return lax.rem(wave, WAVE_BUFFERS) * TILES_PER_WAVE + i

    def clear_slot(self, slot):
        self.tile_seq[slot] = NO_SEQ
        self.tile_first[slot] = 0
        self.tile_left[slot] = 0

    # ---- fetch K and V: whole pages

    def fetch_wave(self, wave, *ahead):
        """Starts the fetch of a wave whose first tile is at `ahead`: a sequence, and a token of it; returns the next wave's."""
        for i in range(TILES_PER_WAVE):
            ahead = self.fetch_tile(wave, i, *ahead)
        return ahead

    def fetch_tile(self, wave, i, seq, first):
        """The same for one tile."""
        live, some_seq = seq < self.num_seqs, jnp.minimum(seq, self.num_seqs - 1)
        left = jnp.where(live, self.kv_lens[some_seq] - first, 0)
        self.tile_seq[self.slot(wave, i)] = jnp.where(live, seq, NO_SEQ)
        self.tile_first[self.slot(wave, i)] = first
        self.tile_left[self.slot(wave, i)] = left
        first_entry = some_seq * PAGES_PER_SEQ + quotient(first, PAGE_SIZE)
        for page in range(TILE_PAGES):
            # Not under the condition: a load that waits for it costs more.
            physical = self.page_indices[first_entry + page]
            pl.when(page * PAGE_SIZE < left)(functools.partial(self.fetch_page, physical, wave, i, page))
        seq, first = self.next_tile(seq, first, left)
        return seq, first

    def next_tile(self, seq, first, left):
        """Where the tile after one at token `first` of `seq` is, which has `left` tokens from there on."""
        last = left <= TILE
        seq = jnp.where(last, seq + 1, seq)
        return seq, jnp.where(last, 0, first + TILE)

    def fetch_page(self, physical, wave, i, page):
        slot, sem = self.slot(wave, i), self.kv_sem.at[lax.rem(wave, WAVE_BUFFERS)]
        pltpu.make_async_copy(self.cache_hbm.at[physical], self.kv.at[slot, page], sem).start()

    def wait_for_wave(self, wave):
        left = self.tile_left[self.slot(wave, 0)]
        first_slot, sem = self.slot(wave, 0), self.kv_sem.at[lax.rem(wave, WAVE_BUFFERS)]

        @pl.when(left >= WAVE_TOKENS)
        def wait_for_full_wave():
            wait_for_bytes(self.kv.at[pl.ds(first_slot, TILES_PER_WAVE)], sem)

        @pl.when(left < WAVE_TOKENS)
        def wait_for_pages():
            tokens = (jnp.clip(self.tile_left[self.slot(wave, i)], 0, TILE) for i in range(TILES_PER_WAVE))
            pages = sum(quotient(some + (PAGE_SIZE - 1), PAGE_SIZE) for some in tokens)
            # By the binary digits of their count: that is code for a few waits, and no loop.
            for digit in range((TILES_PER_WAVE * TILE_PAGES).bit_length()):
                as_large = self.some_pages(first_slot, 1 << digit)
                pl.when(pages & (1 << digit) != 0)(functools.partial(wait_for_bytes, as_large, sem))

    def some_pages(self, slot, count):
        """The buffers of a power of two of pages: some of a tile, or those of several tiles."""
        if count < TILE_PAGES:
            return self.kv.at[slot, pl.ds(0, count)]
        return self.kv.at[pl.ds(slot, count // TILE_PAGES)]

    def wait_and_patch(self, wave):
        """Waits for a wave; stores the new token and clears what lies behind it where a sequence ends."""
        self.wait_for_wave(wave)

        # Not before all tiles have arrived: the bytes that a wait counts may be another tile's.
        @pl.when(self.tile_left[self.slot(wave, 0)] <= WAVE_TOKENS)
        def patch_tiles():
            for i in range(TILES_PER_WAVE):
                self.patch_tile(wave, i)

    def patch_tile(self, wave, i):
        seq = self.tile_seq[self.slot(wave, i)]
        left = self.tile_left[self.slot(wave, i)]

        @pl.when((left > 0) & (left <= TILE))
        def patch_last_tile():
            self.update_cache(seq, self.slot(wave, i), left)
            self.clear_tail(self.slot(wave, i), left)

    # ---- queries and outputs: a row of `q_in` and `out_all` is a sequence

    def store_output(self, wave, i, row_max, row_sum, acc):
        """The output of a tile's sequence, as it is after this tile."""
        out = acc / broadcast_lanes(row_sum, RANK)
        self.out_all[self.tile_seq[self.slot(wave, i)]] = out.astype(self.out_all.dtype)

    # ---- update cache: tokens share a sublane tile, so the new one is written with those around it

    def update_cache(self, seq, slot, left):
        """Puts the new token into the tile in which its sequence ends after `left` tokens; starts its way to the cache."""
        token = left - 1
        buffer = remainder(seq, WRITE_BUFFERS)

        @pl.when(seq >= WRITE_BUFFERS)
        def wait_for_buffer():
            self.wait_for_writes(seq - WRITE_BUFFERS)

        page, place = quotient(token, PAGE_SIZE), remainder(token, SUBLANE_TILE)
        tokens = sublane_tile(token)
        rows = self.patched((slot, page, tokens), seq, place)
        self.kv[slot, page, tokens] = rows
        self.new_out[buffer] = rows
        entry = seq * PAGES_PER_SEQ + quotient(self.kv_lens[seq] - 1, PAGE_SIZE)
        self.cache_write(seq, self.page_indices[entry]).start()

    def cache_write(self, seq, page):
        """The copy of the sublane tile with a sequence's new token to a page of the cache."""
        buffer = remainder(seq, WRITE_BUFFERS)
        position = self.kv_lens[seq] - 1
        target = self.cache_hbm.at[page, sublane_tile(position)]
        return pltpu.make_async_copy(self.new_out.at[buffer], target, self.write_sem.at[buffer])

    def wait_for_writes(self, seq):
        self.cache_write(seq, 0).wait()  # as many bytes, whichever page they go to

    def patched(self, at, seq, place):
        """Rows of a tile in which a sequence's new token takes its place.

        They are patched as words of two tokens, so that the old ones stay bit for bit whatever they are.
        """
        own_half = jnp.where(place % 2 == 0, jnp.uint32(0xFFFF), jnp.uint32(0xFFFF0000))
        word = lax.broadcasted_iota(jnp.int32, (SUBLANE_TILE // 2, ROW_LANES), 0)
        mask = jnp.where(word == place // 2, own_half, jnp.uint32(0))
        bits = pltpu.bitcast(self.new_in[seq].astype(jnp.float32), jnp.uint32)  # a bfloat16 is the high half of a float32
        both_halves = bits | (bits >> 16)
        old = pltpu.bitcast(self.kv[at], jnp.uint32)
        return pltpu.bitcast((old & ~mask) | (both_halves & mask), self.kv.dtype)

    def drain_write(self, i):
        """Waits for the writes of one of the last sequences."""
        self.wait_for_writes(self.num_seqs - 1 - i)

    # ---- one tile: softmax, and the running softmax of its sequence

    def compute_tiles(self, wave, state, ahead):
        """The values of a wave's tiles, merged one by one, beside the scores of the next wave's; fetches before."""
        ahead = self.fetch_wave(wave + LOOKAHEAD, *ahead)
        softmaxes = [self.softmax(wave, i) for i in range(TILES_PER_WAVE)]
        for i, (p, tile_max, tile_sum) in enumerate(softmaxes):
            self.keep_scores(wave + 1, i)
            state = self.merge(wave, i, state, tile_max, tile_sum, self.accumulate_pv(wave, i, p))
        return state, ahead

    def keep_scores(self, wave, i):
        """Makes the scores of a tile, for the next iteration."""
        self.scores[i] = self.compute_scores(wave, i)

    def softmax(self, wave, i):
        """Probabilities relative to the tile's own maximum, with that and their sum, the same in every lane."""
        scores = self.scores[i]
        scores = jnp.where(self.visible_tokens(wave, i), scores * SCORE_SCALE, MASKED)
        tile_max = jnp.broadcast_to(jnp.max(scores, axis=1, keepdims=True), self.row_max.shape)
        p = jnp.exp2(scores - broadcast_lanes(tile_max, TILE))
        tile_sum = jnp.broadcast_to(jnp.sum(p, axis=1, keepdims=True), self.row_sum.shape)
        return p, tile_max, tile_sum

    def visible_tokens(self, wave, i):
        """Which scores of a tile count: those of the tokens before the end of its sequence."""
        left = self.tile_left[self.slot(wave, i)]
        token = self.token_of_column(QUERY_ROWS)
        return token < left

    def merge(self, wave, i, state, tile_max, tile_sum, values):
        """Adds a tile to the running softmax of its sequence and leaves the output that it would be the last of."""
        old_max, old_sum, old_acc = state
        begins = self.tile_first[self.slot(wave, i)] == 0
        old_max = jnp.where(begins, MASKED, old_max)
        new_max = jnp.maximum(old_max, tile_max)
        alpha, beta = jnp.exp2(old_max - new_max), jnp.exp2(tile_max - new_max)
        new_sum = jnp.where(begins, 0.0, old_sum) * alpha + tile_sum * beta
        new_acc = jnp.where(begins, 0.0, old_acc) * broadcast_lanes(alpha, RANK)
        new_acc = new_acc + values * broadcast_lanes(beta, RANK)
        self.store_output(wave, i, new_max, new_sum, new_acc)
        return new_max, new_sum, new_acc

    # ---- scores and values: all query heads share a token's row of the cache

    def compute_scores(self, wave, i):
        """The scores of a tile, float32[Q_HEADS, TILE]."""
        seq = self.tile_seq[self.slot(wave, i)]
        queries = jnp.concatenate([self.q_in[seq], self.q_rope_in[seq]], axis=1)
        return matmul_keys(queries, self.kv[self.slot(wave, i)].reshape(TILE, ROW_LANES))

    def accumulate_pv(self, wave, i, p):
        """The weighted values of a tile, float32[Q_HEADS, RANK]."""
        return matmul_values(p, self.kv[self.slot(wave, i), :, :, :RANK].reshape(TILE, RANK))

    def token_of_column(self, rows):
        """The token of each score of some query rows, int32[rows, TILE]."""
        return lax.broadcasted_iota(jnp.int32, (rows, TILE), 1)


def more_waves(carry):
    """Whether there are tiles in the wave of the next iteration."""
    return carry[1]


def copy_of_tokens(source, target, sem):
    """A copy of the rows of all new tokens."""
    return pltpu.make_async_copy(source.at[pl.ds(0, MAX_TOKENS)], target.at[pl.ds(0, MAX_TOKENS)], sem)


def wait_for_bytes(array, sem):
    """Waits until as many bytes have arrived as an array has, whichever copies brought them."""
    pltpu.make_async_copy(array, array, sem).wait()


def sublane_tile(token):
    """The tokens of the sublane tile around a token of a sequence, within its page."""
    first = remainder(token, PAGE_SIZE) - remainder(token, SUBLANE_TILE)
    return pl.ds(pl.multiple_of(first, SUBLANE_TILE), SUBLANE_TILE)


def matmul_keys(queries, keys):
    """The scores `[rows, tokens]` of queries with keys `[tokens, HEAD_LANES]`."""
    return matmul(queries.astype(jnp.bfloat16), keys, 1)


def matmul_values(p, values):
    """Values `[tokens, lanes]`, weighted by rows of probabilities."""
    return matmul(p.astype(jnp.bfloat16), values, 0)


def decode_kernel(*refs):
    DecodeKernel(*refs).run()


def attend_decode(queries, queries_rope, new_rows, cache, kv_lens, page_indices, distribution):
    """`(out, cache)` of the decode sequences; other rows of `out` are undefined."""
    scalars = (kv_lens, page_indices, distribution)
    arrays = (queries, queries_rope, new_rows, cache)
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        decode_kernel,
        in_specs=[smem] * len(scalars) + [hbm] * len(arrays),
        out_specs=[hbm] * 2,
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        ],
        input_output_aliases={6: 1},  # results in the memory of operands
        scratch_shapes=[
            pltpu.VMEM((TILE_BUFFERS, TILE_PAGES, PAGE_SIZE, ROW_LANES), jnp.bfloat16),  # kv
            pltpu.VMEM((MAX_ROWS + 1, Q_HEADS, RANK), jnp.bfloat16),  # q_in
            pltpu.VMEM((MAX_ROWS + 1, Q_HEADS, ROW_LANES - RANK), jnp.bfloat16),  # q_rope_in
            pltpu.VMEM((MAX_ROWS, 1, ROW_LANES), jnp.bfloat16),  # new_in
            pltpu.VMEM((WRITE_BUFFERS, SUBLANE_TILE, ROW_LANES), jnp.bfloat16),  # new_out
            pltpu.VMEM((TILES_PER_WAVE, Q_HEADS, TILE), jnp.float32),  # scores
            pltpu.VMEM((Q_HEADS, LANES), jnp.float32),  # row_max
            pltpu.VMEM((Q_HEADS, LANES), jnp.float32),  # row_sum
            pltpu.VMEM((Q_HEADS, RANK), jnp.float32),  # acc
            pltpu.VMEM((MAX_ROWS + 1, Q_HEADS, RANK), jnp.bfloat16),  # out_all
            pltpu.SMEM((TILE_BUFFERS,), jnp.int32),  # tile_seq
            pltpu.SMEM((TILE_BUFFERS,), jnp.int32),  # tile_first
            pltpu.SMEM((TILE_BUFFERS,), jnp.int32),  # tile_left
            pltpu.SemaphoreType.DMA((WAVE_BUFFERS,)),  # kv_sem
            pltpu.SemaphoreType.DMA((LOADS,)),  # load_sem
            pltpu.SemaphoreType.DMA((WRITE_BUFFERS,)),  # write_sem
            pltpu.SemaphoreType.DMA((1,)),  # out_sem
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True),
        name="rpa_decode",
    )(*scalars, *arrays)


def ragged_paged_attention(queries, queries_rope, new_kv, new_rope, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of a batch of decode rows only; returns `(out, kv_cache)`, the cache in the donated argument's memory.

    Sequence s has row s of `queries`: `cu_q_lens` is not used.
    """
    queries_rope, new_rows = pad_rope(queries_rope), rows_of_new_tokens(new_kv, new_rope)
    out, cache = attend_decode(queries, queries_rope, new_rows, kv_cache, kv_lens, page_indices, distribution)
    return out, cache
