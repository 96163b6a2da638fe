"""Ragged paged attention of deepseek-v3: decode batches on v5p.

Do not edit: made from spec beb302e5bf7ae58bc4f843b176ce5570766fe5e900ecc5ba857bb2b7b12d0229 by
    rpac build SPEC --target v5p
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
- page tables: in SMEM; the tables of all sequences fit there, where a page id is one load away
- decode, loop: waves of tiles of any sequences; tiles of short sequences hide each other's latency
- decode, reading K and V: one row of a token for all query heads; the latent vector is part of every key and is every
  value
- decode, writing new tokens: latent vector and rotary key in one row; that is how latent attention stores a token
- decode, mask: by the length of each sequence; a row has one new token, the last of its sequence
- decode, matmuls with K and V: as they are stored; the MXU takes elements of this dtype beside the rows
- decode, starting fetches: before an iteration's matmuls; then no fetch waits for a matmul
- VMEM: 40,861,696 bytes counted, 50,331,648 allowed, 67,108,864 available
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
ROW_TOKENS = PAGES_PER_SEQ * PAGE_SIZE  # that a sequence's page table has room for
LEAST_LEN = 1  # tokens of a decode row
CHECKED_PAGES = 8  # page ids that are checked before the first of them is used: as many wait in registers
SCORE_SCALE = 0.10411754627697266  # 0.07216878364870323 (the softmax scale) * log2(e): probabilities are powers of two
MASKED = -2e+38  # finite, so that a row that is all masked stays a number
PRECISION = None  # of matmuls: bfloat16 products are exact in float32
VMEM_LIMIT = 50331648  # bytes
RANK = 512  # lanes of a latent vector, which is the value and part of the key
ROPE_DIM = 64  # lanes of a rotary key
ROW_LANES = 640  # of a token's row in the cache: the latent vector, 64 of the rotary key, 64 of padding
SUBLANE_TILE = 8  # tokens of a tile of the cache in HBM, and in VMEM: a copy from one to the other moves no rows
PAGE_TILES = 16

TILE = 1024  # tokens that are fetched and computed at once, of one sequence
TILES_PER_WAVE = 2  # which fill the waits of each other
LOOKAHEAD = 5  # waves from the fetch of one to its softmax
WAVE_BUFFERS = LOOKAHEAD + 1  # waves that are fetched or computed
TILE_BUFFERS = WAVE_BUFFERS * TILES_PER_WAVE
TILE_PAGES = TILE // PAGE_SIZE
MAX_ROWS = 64  # sequences of the largest batch
NO_SEQ = MAX_ROWS  # in place of a sequence where there is no tile
WRITE_BUFFERS = 8  # sequences whose new tokens are on their way to the cache
QUERY_ROWS = Q_HEADS
SCORE_ROWS = QUERY_ROWS
LOADS = 6  # queries, their rotary parts, both of later sequences, new latent vectors, new rotary keys
FIRST_ROWS = 4  # sequences whose queries are loaded before the first iteration
LATER_ROWS = 60  # those whose queries are loaded meanwhile
LATER_WAVE = FIRST_ROWS // TILES_PER_WAVE  # the first whose iteration may need them
TURNED_ROWS = 4  # whose rotary queries are transposed at once
NEW_ROWS = 64  # new tokens that are loaded: whole tiles


def for_each(first, end, body):
    """Runs `body(index)` for each index in [first, end), as one piece of code."""

    def run(index, _):
        body(index)
        return 0

    lax.fori_loop(first, end, run, 0)


def for_each_digit(count, most, body):
    """Runs `body(size)` for each binary digit of `count`, which is at most `most`: that is code for a few sizes, and no loop."""
    for digit in range(most.bit_length()):
        pl.when(count & (1 << digit) != 0)(functools.partial(body, 1 << digit))


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


def cache_rows(kv_cache):
    """The cache by tiles of rows, `[pages, PAGE_TILES, SUBLANE_TILE, ROW_LANES]`, so that it has the same tiles in VMEM.

    A page is then one run of bytes on both sides of a copy. The bytes lie the same: the compiler makes it a bitcast.
    """
    return kv_cache.reshape(kv_cache.shape[0], PAGE_TILES, SUBLANE_TILE, ROW_LANES)


def rows_cache(rows, shape):
    """The inverse of `cache_rows`."""
    return rows.reshape(shape)


def is_page(physical, cache):
    """Whether a page id is one of the cache's: below zero it is a large number, too."""
    return physical.astype(jnp.uint32) < jnp.uint32(cache.shape[0])


class PagedKernel:
    """What kernels share that fetch blocks of `block_pages` whole pages, and compute `computed_tokens` tokens at once."""

    def clear_tail(self, buffer, valid):
        """Zeroes the tokens from `valid` to the end of those that are computed: a probability of 0 does not hide a NaN."""
        token = lax.broadcasted_iota(jnp.int32, (SUBLANE_TILE, RANK), 0)
        clear_tile = functools.partial(self.clear_tile, buffer, valid, token)
        for_each(valid // SUBLANE_TILE, pl.cdiv(valid, self.computed_tokens) * (self.computed_tokens // SUBLANE_TILE), clear_tile)

    def clear_tile(self, buffer, valid, token, tile):
        first = tile * SUBLANE_TILE
        at = buffer, first // PAGE_SIZE, lax.rem(tile, PAGE_TILES)
        old = self.kv[*at, :, :RANK].astype(jnp.float32)
        self.kv[*at, :, :RANK] = jnp.where(first + token < valid, old, 0.0).astype(self.kv.dtype)


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
    q_rope_hbm: Ref  # bfloat16[tokens, ROPE_DIM, Q_HEADS]
    new_latents_hbm: Ref  # bfloat16[tokens, RANK]
    new_ropes_hbm: Ref  # bfloat16[tokens, ROPE_DIM]
    cache_in: Ref  # bfloat16[pages, PAGE_TILES, SUBLANE_TILE, ROW_LANES]: the memory of cache_hbm
    out_hbm: Ref  # bfloat16[tokens, Q_HEADS, RANK]
    cache_hbm: Ref  # bfloat16[pages, PAGE_TILES, SUBLANE_TILE, ROW_LANES]
    # Scratch arrays in VMEM, and semaphores.
    kv: Ref  # bfloat16[TILE_BUFFERS, TILE_PAGES, PAGE_TILES, SUBLANE_TILE, ROW_LANES]: fetched tiles
    q_in: Ref  # bfloat16[MAX_ROWS + 1, Q_HEADS, RANK]: queries of every sequence, and of no sequence
    q_rope_t: Ref  # bfloat16[MAX_ROWS, ROPE_DIM, Q_HEADS]: their rotary parts, transposed
    q_rope_in: Ref  # bfloat16[MAX_ROWS + 1, Q_HEADS, ROPE_DIM]: their rotary parts
    new_latents: Ref  # bfloat16[NEW_ROWS, RANK]: new latent vectors of every sequence
    new_ropes: Ref  # bfloat16[NEW_ROWS, ROPE_DIM]: their rotary keys
    new_rows: Ref  # float32[NEW_ROWS, ROW_LANES]: both, as rows of the cache
    new_out: Ref  # bfloat16[WRITE_BUFFERS, SUBLANE_TILE, ROW_LANES]: new tokens on their way to the cache
    scores: Ref  # float32[TILES_PER_WAVE, Q_HEADS, TILE]: scores of a wave, for the next iteration
    row_max: Ref  # float32[Q_HEADS, LANES]: running maximum, the same in every lane
    row_sum: Ref  # float32[Q_HEADS, LANES]: running sum, the same in every lane
    acc: Ref  # float32[Q_HEADS, RANK]: running output
    out_all: Ref  # bfloat16[MAX_ROWS + 1, Q_HEADS, RANK]: outputs of every sequence, and of no sequence
    tile_seq: Ref  # int32[TILE_BUFFERS]: the sequence of each tile in flight
    tile_first: Ref  # int32[TILE_BUFFERS]: its first token
    tile_left: Ref  # int32[TILE_BUFFERS]: tokens of its sequence from there on
    last_slot: Ref  # int32[MAX_ROWS + 1]: the last tile of each sequence so far
    bad_row: Ref  # int32[MAX_ROWS + 1]: whether each sequence is bad, so far
    good_rows: Ref  # int32[1]: how many sequences are not bad, of those that have come to their end
    kv_sem: Ref  # DMA[WAVE_BUFFERS]: fetches
    load_sem: Ref  # DMA[LOADS]: queries, their rotary parts, new tokens
    write_sem: Ref  # DMA[WRITE_BUFFERS]: cache writes
    out_sem: Ref  # DMA[1]: outputs

    computed_tokens = TILE

    def run(self):
        self.num_seqs = jnp.clip(self.distribution[0], 0, MAX_ROWS)
        pl.when(self.num_seqs > 0)(self.attend)

    def attend(self):
        """Attends to all tokens of all sequences."""
        self.good_rows[0] = 0
        loads = self.load_copies()
        for load in loads:
            load.start()
        # The first iteration finds a wave before the first, with no tile in it: nobody reads what that leaves.
        for_each(0, TILES_PER_WAVE, self.clear_slot)
        ahead = (jnp.int32(0), jnp.int32(0))
        ahead = lax.fori_loop(1, LOOKAHEAD, self.fetch_first_wave, ahead)
        for load in loads:
            load.wait()
        self.use_loads()
        wave, *_ = lax.while_loop(more_waves, self.iterate, (jnp.int32(0), jnp.bool_(True), *ahead))
        self.write_results(wave)

    def fetch_first_wave(self, wave, ahead):
        """Starts the fetch of a wave before the loop, as `fetch_wave`."""
        ahead = self.fetch_wave(wave, *ahead)
        return ahead

    def fetch_sem(self, wave, i):
        """The semaphore of the pages of a tile."""
        return lax.rem(wave, WAVE_BUFFERS)

    def load_copies(self):
        """The copies of what the first iterations need: the queries of FIRST_ROWS sequences, and all new tokens."""
        new = (self.new_latents_hbm, self.new_latents), (self.new_ropes_hbm, self.new_ropes)
        return [
            *self.query_copies(0, FIRST_ROWS, 0),
            *(copy_of_rows(*pair, self.load_sem.at[4 + i]) for i, pair in enumerate(new)),
        ]

    def later_copies(self):
        """Those of the other sequences' queries, which arrive during the first iterations."""
        firsts = range(FIRST_ROWS, MAX_ROWS, LATER_ROWS)  # one, or none
        return [copy for first in firsts for copy in self.query_copies(first, LATER_ROWS, 2)]

    def query_copies(self, first, count, sem):
        rows = pl.ds(first, count)
        pairs = (self.q_hbm, self.q_in), (self.q_rope_hbm, self.q_rope_t)
        return [
            pltpu.make_async_copy(source.at[rows], target.at[rows], self.load_sem.at[sem + i])
            for i, (source, target) in enumerate(pairs)
        ]

    def use_loads(self):
        """Starts the later copies, and spreads the new tokens over rows of 32 bits, of which one can be loaded by its number."""
        for copy in self.later_copies():
            copy.start()
        self.clear_slot(LOOKAHEAD * TILES_PER_WAVE)  # the first iteration looks there for outputs, and finds none
        for_each(0, FIRST_ROWS // TURNED_ROWS, self.transpose_rope)
        self.new_rows[...] = jnp.zeros(self.new_rows.shape)
        self.new_rows[:, :RANK] = self.new_latents[...].astype(jnp.float32)
        self.new_rows[:, RANK : RANK + ROPE_DIM] = self.new_ropes[...].astype(jnp.float32)

    def transpose_rope(self, step):
        """Transposes the rotary parts of TURNED_ROWS sequences: they come with a head in each lane."""
        for i in range(TURNED_ROWS):
            seq = step * TURNED_ROWS + i
            self.q_rope_in[seq] = self.q_rope_t[seq].T

    def wait_for_later_copies(self):
        for copy in self.later_copies():
            copy.wait()
        for_each(FIRST_ROWS // TURNED_ROWS, MAX_ROWS // TURNED_ROWS, self.transpose_rope)

    def stream(self, wave):
        """Waits for the later copies before the first wave that needs them, and sends outputs that are complete."""
        pl.when(wave == LATER_WAVE)(self.wait_for_later_copies)
        self.send_outputs(wave, self.tile_seq[self.slot(wave, 0)])

    def send_outputs(self, wave, end):
        """Starts to write the outputs of those sequences before `end` that have tiles in the wave before `wave`."""
        first = self.tile_seq[self.slot(wave + LOOKAHEAD, 0)]  # that wave's buffer, which is fetched into next
        for i in range(TILES_PER_WAVE):
            pl.when(first + i < end)(functools.partial(self.send_output, first + i))

    def send_output(self, seq):
        self.spoil_bad_row(seq)
        pltpu.make_async_copy(self.out_all.at[seq], self.out_hbm.at[seq], self.out_sem.at[0]).start()

    def write_results(self, wave):
        """Sends the last outputs and waits for all; `wave` is the one after the last."""
        pl.when(wave <= LATER_WAVE)(self.wait_for_later_copies)
        self.send_outputs(wave, self.num_seqs)
        self.wait_for_all_writes()
        for_each_digit(
            self.num_seqs, MAX_ROWS, lambda size: wait_for_bytes(self.out_all.at[pl.ds(0, size)], self.out_sem.at[0])
        )

    def iterate(self, carry):
        """Computes a wave's values and the next wave's scores; fetches a wave LOOKAHEAD waves later."""
        wave, _, *ahead = carry
        self.wait_and_patch(self.slot(wave + 1, 0), TILES_PER_WAVE, lax.rem(wave + 1, WAVE_BUFFERS))
        self.stream(wave)
        ahead = self.compute_wave(wave, ahead)
        more = self.tile_seq[self.slot(wave + 1, 0)] < NO_SEQ
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
        left = jnp.where(live, self.row_len(some_seq) - first, 0)
        self.tile_seq[self.slot(wave, i)] = jnp.where(live, seq, NO_SEQ)
        self.last_slot[jnp.where(live, seq, NO_SEQ)] = self.slot(wave, i)
        self.tile_first[self.slot(wave, i)] = first
        first_entry = some_seq * PAGES_PER_SEQ + quotient(first, PAGE_SIZE)
        left = self.fetch_pages(wave, i, first_entry, left)
        self.tile_left[self.slot(wave, i)] = left
        seq, first = self.next_tile(seq, first, left)
        return seq, first

    def next_tile(self, seq, first, left):
        """Where the tile after one at token `first` of `seq` is, which has `left` tokens from there on."""
        last = left <= TILE
        seq = jnp.where(last, seq + 1, seq)
        return seq, jnp.where(last, 0, first + TILE)

    def fetch_pages(self, wave, i, entry, left):
        """Starts the fetch of a tile's pages, of which `entry` says where the first one's id is: up to the first bad id.

        Returns how many tokens its sequence has left, none of them behind a bad id.
        """
        fetched = left
        for first in range(0, TILE_PAGES, CHECKED_PAGES):
            pages = range(first, min(first + CHECKED_PAGES, TILE_PAGES))
            # Not under a condition: a load that waits for it costs more.
            ids = [self.page_id(entry, page) for page in pages]
            end = ROW_TOKENS
            for page, physical in reversed(list(zip(pages, ids))):
                end = jnp.where(is_page(physical, self.cache_hbm), end, page * PAGE_SIZE)
            fetched = jnp.minimum(fetched, end)
            for page, physical in zip(pages, ids):
                pl.when(page * PAGE_SIZE < fetched)(functools.partial(self.fetch_page, physical, wave, i, page))
        return fetched

    def pages_of_tile(self, slot):
        """How many pages of a tile are fetched."""
        tokens = jnp.clip(self.tile_left[slot], 0, TILE)
        return quotient(tokens + (PAGE_SIZE - 1), PAGE_SIZE)

    def page_id(self, entry, page):
        """The id of a page of a tile; `entry` is where that of the tile's first page is."""
        return self.page_indices[entry + page]

    def fetch_page(self, physical, wave, i, page):
        target = self.kv.at[self.slot(wave, i), page]
        pltpu.make_async_copy(self.cache_hbm.at[physical], target, self.kv_sem.at[self.fetch_sem(wave, i)]).start()

    def wait_for_tiles(self, first, count, sem):
        """Waits for all pages of some tiles at once, by their bytes."""
        pages = sum(self.pages_of_tile(first + i) for i in range(count))
        # Not for none, because nothing may ever have come by that semaphore.
        pl.when(pages > 0)(functools.partial(wait_for_bytes, self.cache_hbm.at[pl.ds(0, pages)], self.kv_sem.at[sem]))

    def first_open(self, slot):
        """The first sequence that goes on after a tile."""
        seq = self.tile_seq[slot]
        return jnp.where(self.tile_left[slot] > TILE, seq, jnp.minimum(seq + 1, self.num_seqs))

    def is_good(self, seq, slot):
        """Whether a sequence is good, as far as a tile of it tells: fewer tokens are left there if it is not."""
        left = self.tile_left[slot]
        return (left > 0) & (self.tile_first[slot] + left == self.kv_lens[seq])

    def spoil_bad_row(self, seq):
        pl.when(self.bad_row[seq] > 0)(functools.partial(self.spoil_row, seq))

    def spoil_row(self, seq):
        """Makes a sequence's results NaN."""
        for array in (self.out_all,):
            for row in self.rows_of_seq(seq):
                array[row] = jnp.full(array.shape[1:], jnp.nan, array.dtype)
    def wait_and_patch(self, first_tile, tiles, sem):
        """Waits for some tiles in a row; stores the new token and clears what lies behind it where a sequence ends."""
        self.wait_for_tiles(first_tile, tiles, sem)
        # Not before all tiles have arrived: the bytes that a wait counts may be another tile's.
        first, end = self.tile_seq[first_tile], self.first_open(first_tile + tiles - 1)
        for_each(0, quotient(end - first + 1, 2), functools.partial(self.patch_last_tiles, first, end))

    def patch_last_tiles(self, first, end, pair):
        """Patches the last tiles of two sequences, whose latencies hide each other; the last of an odd number is both of them."""
        seqs = first + 2 * pair, jnp.minimum(first + 2 * pair + 1, end - 1)
        slots = [self.last_slot[seq] for seq in seqs]
        lefts = [self.tile_left[slot] for slot in slots]
        self.good = [self.is_good(seq, slot) for seq, slot in zip(seqs, slots, strict=True)]
        lefts = [jnp.maximum(left, 1) for left in lefts]  # a bad sequence may have none
        self.update_cache(seqs, slots, lefts)

        @pl.when(jnp.minimum(*lefts) < TILE)
        def clear_tails():
            for slot, left in zip(slots, lefts, strict=True):
                self.clear_tail(slot, left)

        # Not before the writes are on their way: loads of scalars wait for stores.
        for seq, good in zip(seqs, self.good, strict=True):
            self.bad_row[seq] = jnp.where(good, 0, 1)
        counted = self.good[0], self.good[1] & (seqs[0] != seqs[1])
        self.good_rows[0] += sum(one.astype(jnp.int32) for one in counted)
    # ---- queries and outputs: a row of `q_in` and `out_all` is a sequence

    def rows_of_seq(self, seq):
        """The rows of a sequence in these."""
        return [seq]

    def store_output(self, wave, i, row_max, row_sum, acc):
        """The output of a tile's sequence, as it is after this tile."""
        out = acc / broadcast_lanes(row_sum, RANK)
        self.out_all[self.tile_seq[self.slot(wave, i)]] = out.astype(self.out_all.dtype)

    # ---- update cache: tokens share a sublane tile, so the new one is written with those around it

    def update_cache(self, seqs, buffers, lefts):
        """Puts new tokens into the buffers in which their sequences end after `lefts` tokens; starts their way to the cache.

        All are put in before any is on its way: so the latencies of several hide each other, and one may be there twice.
        """
        copies = [functools.partial(self.start_write, *ends) for ends in zip(seqs, buffers, lefts, strict=True)]
        wanted = [*(seq != seqs[-1] for seq in seqs[:-1]), True]
        for seq, is_wanted in zip(seqs, wanted, strict=True):
            pl.when(is_wanted & (seq >= WRITE_BUFFERS))(functools.partial(self.wait_for_writes, seq - WRITE_BUFFERS))
        for seq, buffer, left in zip(seqs, buffers, lefts, strict=True):
            self.put_new_token(seq, buffer, left)
        for start, is_written in zip(copies, [one & good for one, good in zip(wanted, self.good, strict=True)], strict=True):
            pl.when(is_written)(start)

    def start_write(self, seq, buffer, left):
        """Starts the way of a sequence's new token to the cache."""
        entry = seq * PAGES_PER_SEQ + quotient(self.kv_lens[seq] - 1, PAGE_SIZE)
        self.cache_write(seq, self.page_indices[entry]).start()

    def write_place(self, seq):
        """The buffer of a sequence's new token on its way to the cache, and the number of its semaphore."""
        return remainder(seq, WRITE_BUFFERS), remainder(seq, WRITE_BUFFERS)

    def wait_for_writes(self, seq):
        """Waits until the new token of a sequence is in the cache."""
        write = self.cache_write(seq, 0)  # as many bytes, whichever page they go to
        pl.when(self.bad_row[seq] == 0)(write.wait)

    def wait_for_all_writes(self):
        """Waits for the writes of the last sequences."""
        for_each(0, jnp.minimum(self.num_seqs, WRITE_BUFFERS), self.drain_write)

    def drain_write(self, i):
        self.wait_for_writes(self.num_seqs - 1 - i)

    def put_new_token(self, seq, slot, left):
        """Puts the new token into the tile in which its sequence ends after `left` tokens, and into its copy."""
        token = left - 1
        at = slot, quotient(token, PAGE_SIZE), tile_of_page(token)
        rows = self.patched(at, seq, remainder(token, SUBLANE_TILE))
        self.kv[*at] = rows
        buffer, _ = self.write_place(seq)
        self.new_out[buffer] = rows

    def cache_write(self, seq, page):
        """The copy of the sublane tile with a sequence's new token to a page of the cache."""
        buffer, sem = self.write_place(seq)
        position = self.kv_lens[seq] - 1
        target = self.cache_hbm.at[page, tile_of_page(position)]
        return pltpu.make_async_copy(self.new_out.at[buffer], target, self.write_sem.at[sem])

    def patched(self, at, seq, place):
        """Rows of a tile in which a sequence's new token takes its place.

        They are patched as words of two tokens, so that the old ones stay bit for bit whatever they are.
        """
        own_half = jnp.where(place % 2 == 0, jnp.uint32(0xFFFF), jnp.uint32(0xFFFF0000))
        word = lax.broadcasted_iota(jnp.int32, (SUBLANE_TILE // 2, ROW_LANES), 0)
        mask = jnp.where(word == place // 2, own_half, jnp.uint32(0))
        bits = pltpu.bitcast(self.new_rows[pl.ds(seq, 1)], jnp.uint32)  # a bfloat16 is the high half of a float32
        both_halves = bits | (bits >> 16)
        old = pltpu.bitcast(self.kv[*at], jnp.uint32)
        return pltpu.bitcast((old & ~mask) | (both_halves & mask), self.kv.dtype)

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
        token = self.token_of_column(SCORE_ROWS)
        return token < left

    def compute_wave(self, wave, ahead):
        """Computes a wave's tiles; the running softmax is loaded before and stored after them."""
        state = self.row_max[...], self.row_sum[...], self.acc[...]
        state, ahead = self.compute_tiles(wave, state, ahead)
        self.row_max[...], self.row_sum[...], self.acc[...] = state
        return ahead

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
        return matmul_keys(queries, self.kv[self.slot(wave, i), ..., : RANK + ROPE_DIM].reshape(TILE, RANK + ROPE_DIM))

    def accumulate_pv(self, wave, i, p):
        """The weighted values of a tile, float32[Q_HEADS, RANK]."""
        return matmul_values(p, self.kv[self.slot(wave, i), ..., :RANK].reshape(TILE, RANK))

    def token_of_column(self, rows):
        """The token of each score of some query rows, int32[rows, TILE]."""
        return lax.broadcasted_iota(jnp.int32, (rows, TILE), 1)

    # ---- bounds checks: `bad_row` says of which sequences a number cannot be

    def is_row(self, seq):
        """Whether the number of a sequence's tokens can be one: from LEAST_LEN to ROW_TOKENS."""
        return (self.kv_lens[seq] - LEAST_LEN).astype(jnp.uint32) <= jnp.uint32(ROW_TOKENS - LEAST_LEN)

    def row_len(self, seq):
        """The number of a sequence's tokens; 0 where that cannot be."""
        return jnp.where(self.is_row(seq), self.kv_lens[seq], 0)


def more_waves(carry):
    """Whether there are tiles in the wave of the next iteration."""
    return carry[1]


def copy_of_rows(source, target, sem):
    """A copy of the rows of a matrix, as far as there are so many."""
    rows = pl.ds(0, min(source.shape[0], target.shape[0]))
    return pltpu.make_async_copy(source.at[rows], target.at[rows], sem)


def wait_for_bytes(array, sem):
    """Waits until as many bytes have arrived as an array has, whichever copies brought them."""
    pltpu.make_async_copy(array, array, sem).wait()


def tile_of_page(token):
    """The sublane tile of a page that a token of a sequence lies in."""
    return quotient(remainder(token, PAGE_SIZE), SUBLANE_TILE)


def matmul_keys(queries, keys):
    """The scores `[rows, tokens]` of queries with keys `[tokens, HEAD_LANES]`."""
    return matmul(queries.astype(jnp.bfloat16), keys, 1)


def matmul_values(p, values):
    """Values `[tokens, lanes]`, weighted by rows of probabilities."""
    return matmul(p.astype(jnp.bfloat16), values, 0)


def decode_kernel(*refs):
    DecodeKernel(*refs).run()


def attend_decode(queries, queries_rope, new_kv, new_rope, cache, kv_lens, page_indices, distribution):
    """`(out, cache)` of the decode sequences; other rows of `out` are undefined."""
    scalars = (kv_lens, page_indices, distribution)
    arrays = (queries, queries_rope.swapaxes(1, 2), new_kv, new_rope, cache)
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        decode_kernel,
        in_specs=[smem] * len(scalars) + [hbm] * len(arrays),
        out_specs=[hbm] * 2,
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        ],
        input_output_aliases={7: 1},  # results in the memory of operands
        scratch_shapes=[
            pltpu.VMEM((TILE_BUFFERS, TILE_PAGES, PAGE_TILES, SUBLANE_TILE, ROW_LANES), jnp.bfloat16),  # kv
            pltpu.VMEM((MAX_ROWS + 1, Q_HEADS, RANK), jnp.bfloat16),  # q_in
            pltpu.VMEM((MAX_ROWS, ROPE_DIM, Q_HEADS), jnp.bfloat16),  # q_rope_t
            pltpu.VMEM((MAX_ROWS + 1, Q_HEADS, ROPE_DIM), jnp.bfloat16),  # q_rope_in
            pltpu.VMEM((NEW_ROWS, RANK), jnp.bfloat16),  # new_latents
            pltpu.VMEM((NEW_ROWS, ROPE_DIM), jnp.bfloat16),  # new_ropes
            pltpu.VMEM((NEW_ROWS, ROW_LANES), jnp.float32),  # new_rows
            pltpu.VMEM((WRITE_BUFFERS, SUBLANE_TILE, ROW_LANES), jnp.bfloat16),  # new_out
            pltpu.VMEM((TILES_PER_WAVE, Q_HEADS, TILE), jnp.float32),  # scores
            pltpu.VMEM((Q_HEADS, LANES), jnp.float32),  # row_max
            pltpu.VMEM((Q_HEADS, LANES), jnp.float32),  # row_sum
            pltpu.VMEM((Q_HEADS, RANK), jnp.float32),  # acc
            pltpu.VMEM((MAX_ROWS + 1, Q_HEADS, RANK), jnp.bfloat16),  # out_all
            pltpu.SMEM((TILE_BUFFERS,), jnp.int32),  # tile_seq
            pltpu.SMEM((TILE_BUFFERS,), jnp.int32),  # tile_first
            pltpu.SMEM((TILE_BUFFERS,), jnp.int32),  # tile_left
            pltpu.SMEM((MAX_ROWS + 1,), jnp.int32),  # last_slot
            pltpu.SMEM((MAX_ROWS + 1,), jnp.int32),  # bad_row
            pltpu.SMEM((1,), jnp.int32),  # good_rows
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
    out, cache = attend_decode(queries, queries_rope, new_kv, new_rope, cache_rows(kv_cache), kv_lens, page_indices, distribution)
    return out, rows_cache(cache, kv_cache.shape)
