"""Ragged paged attention of gemma3-27b, local layers: decode batches on tpu7x.

Do not edit: made from spec b1cc74a09f6d0dc624e567640a0d3d747f73f0c0cd802cd95889ebb4d796f8e9 by
    rpac build SPEC --target tpu7x
Change the spec or the templates and run it again.

What was specialized:
- 4 query heads over 2 KV heads, head_dim 128, queries bfloat16, KV bfloat16: constants
- these are one device's part of 8: KV heads in 8 parts
- pages of 128 tokens, 128 a sequence, up to 64 sequences
- token buckets that use it: 64, 2048
- causal, cache updated; a window of 1024 tokens, nothing fetched before its page; no soft cap, sinks, ALiBi or KV
  scales in the spec: none is in the code
- separate K and V in the cache, pages of [2, KV heads, tokens, head_dim] (kv_layout separate)
- only decode batches: the other kernels are not in this program
- decode: tiles of 1024 tokens, no longer than the expected lengths; waves of 8, so that one fills the other's waits;
  fetched 3 waves ahead, which hides the latency of DMAs
- page tables: in SMEM; the tables of all sequences fit there, where a page id is one load away
- decode, loop: waves of tiles of any sequences; tiles of short sequences hide each other's latency
- decode, reading K and V: as they lie in the cache, one array for K and one for V of each head; kv_layout separate
  needs no shuffle before the MXU
- decode, writing new tokens: halves of the words of a sublane tile; 16-bit elements of two tokens share a word
- decode, mask: by the length of each sequence; a row has one new token, the last of its sequence
- decode, matmuls with K and V: as they are stored; the MXU takes elements of this dtype beside the rows
- decode, starting fetches: between the tiles of a wave; their scalar instructions take no time where the MXU takes K
  and V meanwhile
- VMEM: 35,731,456 bytes counted, 50,331,648 allowed, 67,108,864 available
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Ref, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
Q_HEADS = 4
KV_HEADS = 2
HEAD_DIM = 128
HEAD_LANES = 128  # of a row of the cache
MAX_SEQS = 64
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 128
ROW_TOKENS = PAGES_PER_SEQ * PAGE_SIZE  # that a sequence's page table has room for
LEAST_LEN = 1  # tokens of a decode row
CHECKED_PAGES = 8  # page ids that are checked before the first of them is used: as many wait in registers
SCORE_SCALE = 0.11130633889143211  # 0.07715167498104596 (the softmax scale) * log2(e): probabilities are powers of two
WINDOW = 1024  # tokens that a query sees, itself the last of them
MASKED = -2e+38  # finite, so that a row that is all masked stays a number
PRECISION = None  # of matmuls: bfloat16 products are exact in float32
VMEM_LIMIT = 50331648  # bytes
PACKING = 2  # elements of the cache in one 32-bit word
KV_PLANES = 2  # K and V
K_PLANE = 0  # where K is among them
V_PLANE = 1  # where V is
SUBLANE_TILE = 16  # tokens of the smallest part of the cache that a DMA or store reaches

TILE = 1024  # tokens that are fetched and computed at once, of one sequence
TILES_PER_WAVE = 8  # which fill the waits of each other
LOOKAHEAD = 3  # waves from the fetch of one to its softmax
WAVE_BUFFERS = LOOKAHEAD + 1  # waves that are fetched or computed
TILE_BUFFERS = WAVE_BUFFERS * TILES_PER_WAVE
TILE_PAGES = TILE // PAGE_SIZE
MAX_ROWS = 64  # sequences of the largest batch
PACKED_AT_ONCE = 8  # sequences whose new tokens are packed at once
NO_SEQ = MAX_ROWS  # in place of a sequence where there is no tile
MAX_TOKENS = MAX_ROWS  # new tokens of the largest batch
WRITE_BUFFERS = 64  # sequences whose new tokens are on their way to the cache
TILES_LOADED = 1  # whose loads may be early: those after them wait for the MXU
LAST_ENTRY = MAX_SEQS * PAGES_PER_SEQ - 1  # of the page tables
QUERIES = Q_HEADS  # of a sequence
HEADS_PER_SET = 4  # KV heads whose queries are the rows of one matmul: they fill a register
HEAD_SETS = 1
SET_QUERIES = 8
SET_ROWS = 8  # rows of these queries, whole registers
P_ROWS = SET_ROWS  # rows of a set's probabilities in one matmul
HEAD_QUERY_ROWS = 2  # of them those of one KV head
ROW_SETS = HEAD_SETS
QUERY_ROWS = ROW_SETS * SET_ROWS
SCORE_SETS = 1  # whose rows of scores are kept
SCORE_ROWS = SCORE_SETS * SET_ROWS  # of them, for each row of K
FIRST_TILES = 2  # of the first wave, scored while the others are on their way
FIRST_STEPS = TILES_PER_WAVE // FIRST_TILES
LOADS = 3  # queries, keys, values


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


def is_page(physical, cache):
    """Whether a page id is one of the cache's: below zero it is a large number, too."""
    return physical.astype(jnp.uint32) < jnp.uint32(cache.shape[0])


class PagedKernel:
    """What kernels share that fetch blocks of `block_pages` whole pages, and compute `computed_tokens` tokens at once."""

    cleared_planes = (V_PLANE,)

    def clear_tail(self, buffer, valid):
        """Zeroes the tokens from `valid` to the end of those that are computed: a probability of 0 does not hide a NaN in V.

        In K too where `cleared_planes` says so: a masked score does not hide one either.
        """
        clear_in_tile = functools.partial(self.clear_elements, buffer, valid, quotient(valid, SUBLANE_TILE))
        pl.when(remainder(valid, SUBLANE_TILE) > 0)(clear_in_tile)
        # One sublane tile at a time to where several at a time can go on.
        several = min(self.computed_tokens, PAGE_SIZE, LANES) // SUBLANE_TILE
        first = quotient(valid + (SUBLANE_TILE - 1), SUBLANE_TILE)
        wide = quotient(first + (several - 1), several)
        for_each(first, wide * several, functools.partial(self.clear_tiles, buffer, 1))
        end = quotient(valid + (self.computed_tokens - 1), self.computed_tokens) * (self.computed_tokens // SUBLANE_TILE)
        for_each(wide, quotient(end, several), functools.partial(self.clear_tiles, buffer, several))

    def clear_elements(self, buffer, valid, tile):
        first = tile * SUBLANE_TILE
        token = lax.broadcasted_iota(jnp.int32, (SUBLANE_TILE, HEAD_LANES), 0)
        tokens = pl.ds(pl.multiple_of(remainder(first, PAGE_SIZE), SUBLANE_TILE), SUBLANE_TILE)
        for head in range(KV_HEADS):
            for plane in self.cleared_planes:
                old = self.kv[buffer, quotient(first, PAGE_SIZE), plane, head, tokens].astype(jnp.float32)
                kept = jnp.where(first + token < valid, old, 0.0).astype(self.kv.dtype)
                self.kv[buffer, quotient(first, PAGE_SIZE), plane, head, tokens] = kept

    def clear_tiles(self, buffer, tiles, index):
        first, count = index * (tiles * SUBLANE_TILE), tiles * SUBLANE_TILE
        tokens = pl.ds(pl.multiple_of(remainder(first, PAGE_SIZE), count), count)
        for head in range(KV_HEADS):
            for plane in self.cleared_planes:
                zeros = jnp.zeros((count, HEAD_LANES), self.kv.dtype)
                self.kv[buffer, quotient(first, PAGE_SIZE), plane, head, tokens] = zeros


@dataclasses.dataclass
class DecodeKernel(PagedKernel):
    """One new token for each of the sequences [0, distribution[0]): update its page, attend to all tokens that it sees.

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
    q_hbm: Ref  # bfloat16[tokens, Q_HEADS, HEAD_DIM]
    k_hbm: Ref  # bfloat16[tokens, KV_HEADS, HEAD_DIM]
    v_hbm: Ref  # bfloat16[tokens, KV_HEADS, HEAD_DIM]
    cache_in: Ref  # bfloat16[pages, KV_PLANES, KV_HEADS, PAGE_SIZE, HEAD_LANES]: the memory of cache_hbm
    out_hbm: Ref  # bfloat16[tokens, Q_HEADS, HEAD_DIM]
    cache_hbm: Ref  # bfloat16[pages, KV_PLANES, KV_HEADS, PAGE_SIZE, HEAD_LANES]
    # Scratch arrays in VMEM, and semaphores.
    kv: Ref  # bfloat16[TILE_BUFFERS, TILE_PAGES, KV_PLANES, KV_HEADS, PAGE_SIZE, HEAD_LANES]: fetched tiles
    q_in: Ref  # bfloat16[MAX_ROWS + 1, Q_HEADS, HEAD_DIM]: queries of every sequence, and of no sequence
    new_keys: Ref  # bfloat16[MAX_TOKENS, KV_HEADS, HEAD_DIM]: new keys of every sequence
    new_values: Ref  # bfloat16[MAX_TOKENS, KV_HEADS, HEAD_DIM]: new values of every sequence
    new_out: Ref  # bfloat16[WRITE_BUFFERS, KV_PLANES, KV_HEADS, SUBLANE_TILE, HEAD_LANES]: new tokens on their way to the cache
    packed: Ref  # uint32[MAX_ROWS, KV_PLANES, KV_HEADS, HEAD_LANES]: rows of new tokens, in every place of a word
    scores: Ref  # float32[TILES_PER_WAVE, SCORE_ROWS, TILE]: scores of a wave, for the next iteration
    row_max: Ref  # float32[QUERY_ROWS, LANES]: running maximum, the same in every lane
    row_sum: Ref  # float32[QUERY_ROWS, LANES]: running sum, the same in every lane
    acc: Ref  # float32[QUERY_ROWS, HEAD_LANES]: running output
    out_all: Ref  # bfloat16[MAX_ROWS + 1, Q_HEADS, HEAD_DIM]: outputs of every sequence, and of no sequence
    tile_seq: Ref  # int32[TILE_BUFFERS]: the sequence of each tile in flight
    tile_first: Ref  # int32[TILE_BUFFERS]: its first token
    tile_left: Ref  # int32[TILE_BUFFERS]: tokens of its sequence from there on
    last_slot: Ref  # int32[MAX_ROWS + 1]: the last tile of each sequence so far
    bad_row: Ref  # int32[MAX_ROWS + 1]: whether each sequence is bad, so far
    good_rows: Ref  # int32[1]: how many sequences are not bad, of those that have come to their end
    kv_sem: Ref  # DMA[WAVE_BUFFERS + FIRST_STEPS]: fetches
    load_sem: Ref  # DMA[LOADS]: queries, keys, values
    write_sem: Ref  # DMA[1]: cache writes
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
        ahead = (jnp.int32(0), self.first_token(0))
        ahead = lax.fori_loop(1, LOOKAHEAD + 1, self.fetch_first_wave, ahead)
        for load in loads:
            load.wait()
        for_each(0, pl.cdiv(self.num_seqs, PACKED_AT_ONCE), self.make_new_rows)
        for_each(0, FIRST_STEPS, self.score_first_tiles)
        wave, *_ = lax.while_loop(more_waves, self.iterate, (jnp.int32(1), jnp.bool_(True), *ahead))
        self.write_results(wave)

    def fetch_first_wave(self, wave, ahead):
        """Starts the fetch of a wave before the loop, as `fetch_wave`."""
        ahead = self.fetch_wave(wave, *ahead)
        return ahead

    def fetch_sem(self, wave, i):
        """The semaphore of the pages of a tile: one for each wave, and one for each step of the first."""
        return jnp.where(wave == 1, WAVE_BUFFERS + i // FIRST_TILES, lax.rem(wave, WAVE_BUFFERS))

    def score_first_tiles(self, step):
        """Makes the scores of some tiles of the first wave, while the others are still on their way."""
        first = step * FIRST_TILES
        self.wait_and_patch(self.slot(1, first), FIRST_TILES, WAVE_BUFFERS + step)
        for i in range(FIRST_TILES):
            self.keep_scores(1, first + i)

    def load_copies(self):
        """The copies of what the kernel loads at its start, of all sequences."""
        arrays = [
            (copy_of_tokens, self.q_hbm, self.q_in),
            (copy_of_tokens, self.k_hbm, self.new_keys),
            (copy_of_tokens, self.v_hbm, self.new_values),
        ]
        return [copy(source, target, self.load_sem.at[i]) for i, (copy, source, target) in enumerate(arrays)]

    def write_results(self, wave):
        """Writes the outputs of all sequences; `wave` is the one after the last."""
        pl.when(self.good_rows[0] < self.num_seqs)(functools.partial(for_each, 0, self.num_seqs, self.spoil_bad_row))
        results = [
            copy_of_tokens(self.out_all, self.out_hbm, self.out_sem.at[0]),
        ]
        for result in results:
            result.start()
        self.wait_for_all_writes()
        for result in results:
            result.wait()

    def iterate(self, carry):
        """Computes a wave's values and the next wave's scores; fetches a wave LOOKAHEAD waves later."""
        wave, _, *ahead = carry
        self.wait_and_patch(self.slot(wave + 1, 0), TILES_PER_WAVE, lax.rem(wave + 1, WAVE_BUFFERS))
        ahead = self.compute_wave(wave, ahead)
        more = self.tile_seq[self.slot(wave + 1, 0)] < NO_SEQ
        return wave + 1, more, *ahead

    # ---- the tiles in flight: each one's sequence, its first token, and the tokens that the sequence has from there on

    def slot(self, wave, i):
        """The buffer of tile `i` of a wave."""
        return lax.rem(wave, WAVE_BUFFERS) * TILES_PER_WAVE + i

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
        self.tile_first[self.slot(wave, i)] = first - self.first_token(some_seq)
        first_entry = some_seq * PAGES_PER_SEQ + quotient(first, PAGE_SIZE)
        left = self.fetch_pages(wave, i, first_entry, left)
        self.tile_left[self.slot(wave, i)] = left
        seq, first = self.next_tile(seq, first, left)
        return seq, first

    def next_tile(self, seq, first, left):
        """Where the tile after one at token `first` of `seq` is, which has `left` tokens from there on."""
        last = left <= TILE
        seq = jnp.where(last, seq + 1, seq)
        return seq, jnp.where(last, self.first_token(jnp.minimum(seq, self.num_seqs - 1)), first + TILE)

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
        return self.page_indices[jnp.minimum(entry + page, LAST_ENTRY)]

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
        return (left > 0) & (self.tile_first[slot] + left == self.seen_len(seq))

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

    def load_queries(self, wave, i):
        """The queries of a tile's sequence, float32[Q_HEADS, HEAD_LANES]."""
        return self.q_in[self.tile_seq[self.slot(wave, i)]].astype(jnp.float32)

    def store_output(self, wave, i, row_max, row_sum, acc):
        """The output of a tile's sequence, as it is after this tile."""
        out = without_padding(acc / broadcast_lanes(row_sum, HEAD_LANES))
        self.out_all[self.tile_seq[self.slot(wave, i)]] = out.astype(self.out_all.dtype)

    # ---- update cache: tokens share a sublane tile, so the new one is written with those around it

    def update_cache(self, seqs, buffers, lefts):
        """Puts new tokens into the buffers in which their sequences end after `lefts` tokens; starts their way to the cache.

        All are put in before any is on its way: so the latencies of several hide each other, and one may be there twice.
        """
        copies = [functools.partial(self.start_write, *ends) for ends in zip(seqs, buffers, lefts, strict=True)]
        wanted = [*(seq != seqs[-1] for seq in seqs[:-1]), True]
        for seq, buffer, left in zip(seqs, buffers, lefts, strict=True):
            self.put_new_token(seq, buffer, left)
        for start, is_written in zip(copies, [one & good for one, good in zip(wanted, self.good, strict=True)], strict=True):
            pl.when(is_written)(start)

    def start_write(self, seq, buffer, left):
        """Starts the way of a sequence's new token to the cache."""
        entry = seq * PAGES_PER_SEQ + quotient(self.kv_lens[seq] - 1, PAGE_SIZE)
        self.cache_write(seq, self.page_indices[entry]).start()

    # Each sequence has a buffer of its own, so that no write is waited for before the last.

    def write_place(self, seq):
        """The buffer of a sequence's new token on its way to the cache, and the number of its semaphore."""
        return seq, 0

    def wait_for_all_writes(self):
        """Waits until all new tokens are in the cache."""
        rows = self.good_rows[0]
        pl.when(rows > 0)(functools.partial(wait_for_bytes, self.new_out.at[pl.ds(0, rows)], self.write_sem.at[0]))

    def put_new_token(self, seq, slot, left):
        """Puts the new token into the tile in which its sequence ends after `left` tokens, and into its copy."""
        token = left - 1
        page, place = quotient(token, PAGE_SIZE), remainder(token, SUBLANE_TILE)
        tokens = sublane_tile(token)
        mask = self.new_token_mask(place)
        buffer, _ = self.write_place(seq)
        for plane, new in enumerate([self.packed[seq, i] for i in range(KV_PLANES)]):
            for head in range(KV_HEADS):
                rows = self.patched((slot, page, plane, head, tokens), head, new, mask)
                self.kv[slot, page, plane, head, tokens] = rows
                self.new_out[buffer, plane, head] = rows

    def cache_write(self, seq, page):
        """The copy of the sublane tile with a sequence's new token to a page of the cache."""
        buffer, sem = self.write_place(seq)
        position = self.kv_lens[seq] - 1
        target = self.cache_hbm.at[page, :, :, sublane_tile(position)]
        return pltpu.make_async_copy(self.new_out.at[buffer], target, self.write_sem.at[sem])

    # As words of two tokens, so that the old ones stay bit for bit whatever they are.

    def new_token_mask(self, place):
        """The bits of a token in the words of its sublane tile."""
        own_half = jnp.where(remainder(place, PACKING) == 0, jnp.uint32(0xFFFF), jnp.uint32(0xFFFF0000))
        word = lax.broadcasted_iota(jnp.int32, (SUBLANE_TILE // 2, HEAD_LANES), 0)
        return jnp.where(word == quotient(place, PACKING), own_half, jnp.uint32(0))

    def new_rows(self, seq):
        """The new token's rows of K, then of V, with its bits in both halves of a word."""
        for rows in self.new_kv_rows(seq):
            yield self.in_every_place(rows)

    def new_kv_rows(self, seq):
        for new in (self.new_keys, self.new_values):
            yield new[seq].astype(jnp.float32)

    def patched(self, at, head, new, mask):
        """Rows of a tile in which the new token of a KV head takes its place."""
        old = pltpu.bitcast(self.kv[at], jnp.uint32)
        return pltpu.bitcast((old & ~mask) | (new[head : head + 1] & mask), self.kv.dtype)

    def in_every_place(self, rows):
        """The bits of new rows, in every place of a word."""
        bits = pltpu.bitcast(rows, jnp.uint32)  # a bfloat16 is the high half of a float32
        return bits | (bits >> 16)

    # ---- one tile: softmax, and the running softmax of its sequence

    def compute_tiles(self, wave, state, ahead):
        """The values of a wave's tiles, merged one by one, beside the scores of the next wave's; fetches in between."""
        softmaxes = [self.softmax(wave, i) for i in range(TILES_PER_WAVE)]
        for i, (p, tile_max, tile_sum) in enumerate(softmaxes):
            self.keep_scores(wave + 1, i)
            state = self.merge(wave, i, state, tile_max, tile_sum, self.accumulate_pv(wave, i, p))
            if i >= TILES_LOADED:
                self.wait_for_scores(wave, i - TILES_LOADED)
            ahead = self.fetch_tile(wave + LOOKAHEAD, i, *ahead)
        return state, ahead

    def wait_for_scores(self, wave, i):
        """Keeps what follows behind half of a tile's scores.

        The compiler cannot tell which tile a fetch overwrites, so that it keeps fetches behind all loads of K and V before
        them, and loads behind fetches. It would load tiles long before the MXU can take them, and spill them. A store to
        where `kv` is free again keeps its place among these loads and fetches, and it waits for what it stores.
        """
        made = self.scores[i, QUERY_ROWS - SUBLANES :, pl.ds(TILE // 2 // LANES * LANES, LANES)]
        page = self.kv.at[self.slot(wave, i), 0, K_PLANE, 0]
        page[pl.ds(0, SUBLANES * PACKING), pl.ds(0, LANES)] = pltpu.bitcast(made, self.kv.dtype)

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
        return (token >= left - WINDOW) & (token < left)

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
        new_acc = jnp.where(begins, 0.0, old_acc) * broadcast_lanes(alpha, HEAD_LANES)
        new_acc = new_acc + values * broadcast_lanes(beta, HEAD_LANES)
        self.store_output(wave, i, new_max, new_sum, new_acc)
        return new_max, new_sum, new_acc

    # ---- all heads of a tile

    def compute_scores(self, wave, i):
        """The scores of a tile, float32[QUERY_ROWS, TILE]."""
        queries = self.load_queries(wave, i)
        scores = [self.set_scores(rows, wave, i, index) for index, rows in enumerate(self.query_sets(queries))]
        return jnp.concatenate(scores, axis=0)

    def accumulate_pv(self, wave, i, p):
        """The weighted values of a tile, float32[QUERY_ROWS, HEAD_LANES]."""
        values = []
        for index in range(HEAD_SETS):
            values.append(self.set_pv(p[index * P_ROWS : (index + 1) * P_ROWS], wave, i, index))
        return jnp.concatenate(values, axis=0)

    def token_of_column(self, rows):
        """The token of each score of some query rows, int32[rows, TILE]."""
        return lax.broadcasted_iota(jnp.int32, (rows, TILE), 1)

    def query_sets(self, queries):
        """The queries of each set of heads; the last set has rows of no query too."""
        queries = jnp.concatenate([queries, jnp.zeros((HEAD_SETS * SET_ROWS - queries.shape[0], HEAD_LANES))], axis=0)
        for index in range(HEAD_SETS):
            yield queries[index * SET_ROWS : (index + 1) * SET_ROWS]

    # ---- a set of KV heads, as many as fill a register: the rows of a matmul are the queries of all, and of the result with
    # each head's keys or values the rows of its own queries count

    def set_scores(self, queries, wave, i, index):
        rows = self.rows_of_queries(queries)
        return select_own_rows([self.head_scores(rows, wave, i, head) for head in heads_of_set(index)])

    def set_pv(self, p, wave, i, index):
        return select_own_rows([self.head_pv(p, wave, i, head) for head in heads_of_set(index)])

    # ---- one head of a tile

    def head_keys(self, wave, i, head):
        return self.kv[self.slot(wave, i), :, K_PLANE, head].reshape(TILE, HEAD_LANES)

    def head_values(self, wave, i, head):
        return self.kv[self.slot(wave, i), :, V_PLANE, head].reshape(TILE, HEAD_LANES)

    def rows_of_queries(self, queries):
        """The rows of a matmul with a head's keys."""
        return queries

    def head_scores(self, rows, wave, i, head):
        """The scores of some queries with a head's keys."""
        return matmul_keys(rows, self.head_keys(wave, i, head))

    def head_pv(self, rows, wave, i, head):
        """A head's values, weighted by some rows of probabilities."""
        return matmul_values(rows, self.head_values(wave, i, head))

    def first_token(self, seq):
        """Where the page begins in which the window of a sequence's first query does: nothing before it is fetched."""
        return lax.div(jnp.maximum(self.row_len(seq) - WINDOW, 0), PAGE_SIZE) * PAGE_SIZE

    # ---- bounds checks: `bad_row` says of which sequences a number cannot be

    def is_row(self, seq):
        """Whether the number of a sequence's tokens can be one: from LEAST_LEN to ROW_TOKENS."""
        return (self.kv_lens[seq] - LEAST_LEN).astype(jnp.uint32) <= jnp.uint32(ROW_TOKENS - LEAST_LEN)

    def row_len(self, seq):
        """The number of a sequence's tokens; 0 where that cannot be."""
        return jnp.where(self.is_row(seq), self.kv_lens[seq], 0)

    def seen_len(self, seq):
        """The number of a sequence's tokens from its `first_token` on."""
        return self.row_len(seq) - self.first_token(seq)

    def entry(self, seq):
        """Where the page of a sequence's `first_token` is in the page table."""
        return seq * PAGES_PER_SEQ + lax.div(self.first_token(seq), PAGE_SIZE)

    def make_new_rows(self, index):
        """Makes the rows of the new tokens of some sequences, so that their latencies hide each other, and the first wave's them."""
        for seq in [index * PACKED_AT_ONCE + i for i in range(PACKED_AT_ONCE)]:
            for plane, rows in enumerate(self.new_rows(seq)):
                self.packed[seq, plane] = rows


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


def without_padding(rows):
    """The rows of a sequence that are a query's."""
    counts = [min(SET_QUERIES, QUERIES - index * SET_QUERIES) for index in range(HEAD_SETS)]
    return jnp.concatenate([rows[i * SET_ROWS : i * SET_ROWS + count] for i, count in enumerate(counts)], axis=0)


def heads_of_set(index):
    """The KV heads whose queries share a register."""
    return range(index * HEADS_PER_SET, min((index + 1) * HEADS_PER_SET, KV_HEADS))


def select_own_rows(results):
    """Out of each KV head's result the rows of its own queries."""
    row = lax.broadcasted_iota(jnp.int32, results[0].shape, 0)
    rows = results[0]
    for i, result in enumerate(results[1:], 1):
        rows = jnp.where(row >= i * HEAD_QUERY_ROWS, result, rows)
    return rows


def matmul_keys(queries, keys):
    """The scores `[rows, tokens]` of queries with keys `[tokens, HEAD_LANES]`."""
    return matmul(queries.astype(jnp.bfloat16), keys, 1)


def matmul_values(p, values):
    """Values `[tokens, lanes]`, weighted by rows of probabilities."""
    return matmul(p.astype(jnp.bfloat16), values, 0)


def decode_kernel(*refs):
    DecodeKernel(*refs).run()


def attend_decode(queries, keys, values, cache, kv_lens, page_indices, distribution):
    """`(out, cache)` of the decode sequences; other rows of `out` are undefined."""
    scalars = (kv_lens, page_indices, distribution)
    arrays = (queries, keys, values, cache)
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
            pltpu.VMEM((TILE_BUFFERS, TILE_PAGES, KV_PLANES, KV_HEADS, PAGE_SIZE, HEAD_LANES), jnp.bfloat16),  # kv
            pltpu.VMEM((MAX_ROWS + 1, Q_HEADS, HEAD_DIM), jnp.bfloat16),  # q_in
            pltpu.VMEM((MAX_TOKENS, KV_HEADS, HEAD_DIM), jnp.bfloat16),  # new_keys
            pltpu.VMEM((MAX_TOKENS, KV_HEADS, HEAD_DIM), jnp.bfloat16),  # new_values
            pltpu.VMEM((WRITE_BUFFERS, KV_PLANES, KV_HEADS, SUBLANE_TILE, HEAD_LANES), jnp.bfloat16),  # new_out
            pltpu.VMEM((MAX_ROWS, KV_PLANES, KV_HEADS, HEAD_LANES), jnp.uint32),  # packed
            pltpu.VMEM((TILES_PER_WAVE, SCORE_ROWS, TILE), jnp.float32),  # scores
            pltpu.VMEM((QUERY_ROWS, LANES), jnp.float32),  # row_max
            pltpu.VMEM((QUERY_ROWS, LANES), jnp.float32),  # row_sum
            pltpu.VMEM((QUERY_ROWS, HEAD_LANES), jnp.float32),  # acc
            pltpu.VMEM((MAX_ROWS + 1, Q_HEADS, HEAD_DIM), jnp.bfloat16),  # out_all
            pltpu.SMEM((TILE_BUFFERS,), jnp.int32),  # tile_seq
            pltpu.SMEM((TILE_BUFFERS,), jnp.int32),  # tile_first
            pltpu.SMEM((TILE_BUFFERS,), jnp.int32),  # tile_left
            pltpu.SMEM((MAX_ROWS + 1,), jnp.int32),  # last_slot
            pltpu.SMEM((MAX_ROWS + 1,), jnp.int32),  # bad_row
            pltpu.SMEM((1,), jnp.int32),  # good_rows
            pltpu.SemaphoreType.DMA((WAVE_BUFFERS + FIRST_STEPS,)),  # kv_sem
            pltpu.SemaphoreType.DMA((LOADS,)),  # load_sem
            pltpu.SemaphoreType.DMA((1,)),  # write_sem
            pltpu.SemaphoreType.DMA((1,)),  # out_sem
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True),
        name="rpa_decode",
    )(*scalars, *arrays)


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of a batch of decode rows only; returns `(out, kv_cache)`, the cache in the donated argument's memory.

    Sequence s has row s of `queries`: `cu_q_lens` is not used.
    """
    out, cache = attend_decode(queries, keys, values, kv_cache, kv_lens, page_indices, distribution)
    return out, cache
