"""Ragged paged attention of gpt-oss-120b, sliding layers: decode batches on v5p.

Do not edit: made from spec 623a068067c941bea572da917de4730a962bd2653c2fc3dc293059a64040709c by
    rpac build SPEC --target v5p
Change the spec or the templates and run it again.

What was specialized:
- 8 query heads over 1 KV heads, head_dim 64, queries bfloat16, KV bfloat16: constants
- these are one device's part of 8: KV heads in 8 parts
- pages of 128 tokens, 128 a sequence, up to 64 sequences
- token buckets that use it: 64, 2048
- causal, cache updated; a window of 128 tokens, nothing fetched before its page; attention sinks, an argument, in the
  softmax's sum; no soft cap, ALiBi or KV scales in the spec: none is in the code
- only decode batches: the other kernels are not in this program
- decode: tiles of 128 tokens, no longer than the expected lengths; waves of 16, so that one fills the other's waits;
  fetched 8 waves ahead, which hides the latency of DMAs
- page tables: in SMEM; the tables of all sequences fit there, where a page id is one load away
- arrays by head: keys, values; XLA keeps arrays so where the heads of a token fill no sublane tiles; then nothing is
  copied around a kernel
- decode, loop: waves of tiles of any sequences; tiles of short sequences hide each other's latency
- decode, reading K and V: all heads at once, in the order of the cache; 32-bit words are split into K and V in
  registers; a mask leaves each query the scores of its own KV head, so that no row has to be moved or stored
- decode, writing new tokens: K and V side by side in a row, packed into words; K and V of a head fill one row of 128
  lanes
- decode, mask: by the length of each sequence; a row has one new token, the last of its sequence
- decode, matmuls with K and V: as they are stored; the MXU takes elements of this dtype beside the rows
- decode, starting fetches: between the tiles of a wave; their scalar instructions take no time where the MXU takes K
  and V meanwhile
- VMEM: 10,608,640 bytes counted, 25,165,824 allowed, 67,108,864 available
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
Q_HEADS = 8
KV_HEADS = 1
GROUP = 8  # query heads that share a KV head
HEAD_DIM = 64
HEAD_LANES = 128  # of a row of the cache: K in the lower ones, V in the upper
MAX_SEQS = 64
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 128
ROW_TOKENS = PAGES_PER_SEQ * PAGE_SIZE  # that a sequence's page table has room for
LEAST_LEN = 1  # tokens of a decode row
CHECKED_PAGES = 8  # page ids that are checked before the first of them is used: as many wait in registers
SCORE_SCALE = 0.18033688011112042  # 0.125 (the softmax scale) * log2(e): probabilities are powers of two
WINDOW = 128  # tokens that a query sees, itself the last of them
LOG2_E = 1.4426950408889634  # from natural logarithms to those of base 2
MASKED = -2e+38  # finite, so that a row that is all masked stays a number
PRECISION = None  # of matmuls: bfloat16 products are exact in float32
VMEM_LIMIT = 25165824  # bytes
PACKING = 2  # elements of the cache in one 32-bit word
PADDING_ROWS = 1  # rows of a token that hold zeros
TOKEN_ROWS = 2  # rows of one token in the cache
WORD_ROWS = 1  # the same rows as 32-bit words
PAGE_ROWS = 256  # rows of one page
SUBLANE_TILE = 8  # tokens of the smallest part of the cache that a DMA or store reaches
SUBLANE_TILE_ROWS = 16  # its rows

TILE = 128  # tokens that are fetched and computed at once, of one sequence
TILES_PER_WAVE = 16  # which fill the waits of each other
LOOKAHEAD = 8  # waves from the fetch of one to its softmax
WAVE_BUFFERS = LOOKAHEAD + 1  # waves that are fetched or computed
TILE_BUFFERS = WAVE_BUFFERS * TILES_PER_WAVE
TILE_PAGES = TILE // PAGE_SIZE
MAX_ROWS = 64  # sequences of the largest batch
PACKED_AT_ONCE = 8  # sequences whose new tokens are packed at once
NO_SEQ = MAX_ROWS  # in place of a sequence where there is no tile
MAX_TOKENS = MAX_ROWS  # new tokens of the largest batch
WRITE_BUFFERS = 64  # sequences whose new tokens are on their way to the cache
TILES_LOADED = 8  # whose loads may be early: those after them wait for the MXU
LAST_ENTRY = MAX_SEQS * PAGES_PER_SEQ - 1  # of the page tables
HEAD_SETS = 1
SET_ROWS = 8  # rows of these queries, whole registers
HEAD_QUERY_ROWS = 8  # of them those of one KV head
ROW_SETS = HEAD_SETS
QUERY_ROWS = ROW_SETS * SET_ROWS
SCORE_SETS = 1  # whose rows of scores are kept
SCORE_ROWS = SCORE_SETS * SET_ROWS  # of them, for each row of K
NO_TOKEN = 1073741824  # a number that no token of a sequence has
VALUES_SHIFT = 0  # bits of K in a pair of K and V
ROW_DTYPE = jnp.int16  # of as many bits as an element of the cache
PAIR_DTYPE = jnp.int32  # of K and V; with one KV head, of all rows of a token
TOKEN_COLUMNS = 1  # rows of K of one token, all heads
HEAD_COLUMNS = 1  # of them those of one head
COLUMNS = TILE * TOKEN_COLUMNS  # rows of K, and of V, of all heads of a tile
CLEARED_TILES = 16  # sublane tiles that are cleared at once
SORTED_TOKENS = 16  # whose heads are sorted at once
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


def pad_lanes(rows):
    """Rows of HEAD_DIM lanes, with zeros up to HEAD_LANES."""
    return jnp.concatenate([rows, jnp.zeros((*rows.shape[:-1], HEAD_LANES - HEAD_DIM), rows.dtype)], axis=-1)


def unpad_lanes(rows):
    """The lanes of V, of rows of HEAD_LANES lanes."""
    return rows[..., HEAD_DIM:]


def kv_rows(keys, values):
    """The rows of new keys and values `[..., HEAD_DIM]` in the cache, `[..., HEAD_LANES]`: one of both."""
    return (jnp.concatenate([keys, values], axis=-1),)


def float_rows(keys, values):
    """The same in float32."""
    return kv_rows(keys.astype(jnp.float32), values.astype(jnp.float32))


def matmul(rows, matrix, contracted):
    """`rows` times `matrix` along its dimension `contracted`, in float32."""
    dims = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(rows, matrix, dims, precision=PRECISION, preferred_element_type=jnp.float32)


def lane_partial_sum(p):
    """The sums of probabilities, a part of each in every lane."""
    return sum(p[:, lane : lane + LANES] for lane in range(0, p.shape[1], LANES))


def lane_partial_max(scores):
    """The largest of scores, a part of each in every lane."""
    return functools.reduce(jnp.maximum, [scores[:, lane : lane + LANES] for lane in range(0, scores.shape[1], LANES)])


def max_lanes(parts):
    """Such maxima whole, the same in every lane."""
    return jnp.broadcast_to(jnp.max(parts, axis=1, keepdims=True), parts.shape)


def reduce_lanes(parts):
    """Such sums whole, the same in every lane: a block of queries needs it once."""
    return jnp.broadcast_to(jnp.sum(parts, axis=1, keepdims=True), parts.shape)


def rows_as_words(rows):
    """Rows of the cache as 32-bit words, each of PACKING rows."""
    return pltpu.bitcast(rows, jnp.uint32)


def words_as_rows(words):
    """The inverse of `rows_as_words`."""
    return pltpu.bitcast(words, jnp.bfloat16)


def token_of_word(tokens):
    """Which of `tokens` consecutive tokens each row of words belongs to."""
    return lax.broadcasted_iota(jnp.int32, (tokens * WORD_ROWS, LANES), 0) // WORD_ROWS


def rows_of_tile(index):
    """The rows of a sublane tile, the `index`-th from where rows are counted."""
    return pl.ds(pl.multiple_of(index * SUBLANE_TILE_ROWS, SUBLANE_TILE_ROWS), SUBLANE_TILE_ROWS)


def cache_rows(kv_cache):
    """The cache as rows of LANES lanes, `[pages, PAGE_ROWS, LANES]`: by token, then KV head, with K in the lower lanes and V in the upper.

    The bytes lie the same: the compiler makes it a bitcast.
    """
    return kv_cache.reshape(kv_cache.shape[0], PAGE_ROWS, LANES)


def rows_cache(rows, shape):
    """The inverse of `cache_rows`."""
    return rows.reshape(shape)


def pack_token(keys, values, packed, token):
    """Lays one token's new keys and values `[KV_HEADS, HEAD_DIM]` into rows: of each head its key, then its value."""
    (rows,) = float_rows(keys, values)
    rows = jnp.concatenate([rows, jnp.zeros((PADDING_ROWS, HEAD_LANES))], axis=0)
    packed[token * WORD_ROWS : (token + 1) * WORD_ROWS] = rows_as_words(rows.astype(jnp.bfloat16))


def is_page(physical, cache):
    """Whether a page id is one of the cache's: below zero it is a large number, too."""
    return physical.astype(jnp.uint32) < jnp.uint32(cache.shape[0])


def swap_heads(rows):
    """`[tokens, heads, HEAD_DIM]` with tokens and heads swapped, or back. XLA keeps it by head, so nothing moves here."""
    return jnp.swapaxes(rows, 0, 1)


class PagedKernel:
    """What kernels share that fetch blocks of `block_pages` whole pages, and compute `computed_tokens` tokens at once."""

    def clear_tail(self, buffer, valid):
        """Zeroes the tokens from `valid` to the end of those that are computed: a probability of 0 does not hide a NaN in V."""
        rows = rows_of_tile(quotient(valid, SUBLANE_TILE))
        clear_in_tile = functools.partial(self.clear_in_tile, buffer, rows, valid)
        pl.when(remainder(valid, SUBLANE_TILE) > 0)(clear_in_tile)
        # One sublane tile at a time to where several at a time can go on.
        first = quotient(valid + (SUBLANE_TILE - 1), SUBLANE_TILE)
        wide = quotient(first + (self.cleared_tiles - 1), self.cleared_tiles)
        for_each(first, wide * self.cleared_tiles, functools.partial(self.clear_tiles, buffer, 1))
        steps = quotient(valid + (self.computed_tokens - 1), self.computed_tokens)
        wide_end = steps * (self.computed_tokens // (SUBLANE_TILE * self.cleared_tiles))
        for_each(wide, wide_end, functools.partial(self.clear_tiles, buffer, self.cleared_tiles))

    def clear_in_tile(self, buffer, rows, valid):
        words = rows_as_words(self.kv[buffer, rows])
        kept = token_of_word(SUBLANE_TILE) < remainder(valid, SUBLANE_TILE)
        self.kv[buffer, rows] = words_as_rows(jnp.where(kept, words, jnp.zeros_like(words)))

    def clear_tiles(self, buffer, tiles, index):
        rows = tiles * SUBLANE_TILE_ROWS
        self.kv[buffer, pl.ds(pl.multiple_of(index * rows, rows), rows)] = jnp.zeros((rows, LANES), self.kv.dtype)


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
    sinks: Ref  # float32[Q_HEADS]
    # Arrays in HBM.
    q_hbm: Ref  # bfloat16[tokens, Q_HEADS, HEAD_DIM]
    k_hbm: Ref  # bfloat16[KV_HEADS, tokens, HEAD_DIM]
    v_hbm: Ref  # bfloat16[KV_HEADS, tokens, HEAD_DIM]
    cache_in: Ref  # bfloat16[pages, PAGE_ROWS, LANES]: the memory of cache_hbm
    out_hbm: Ref  # bfloat16[tokens, Q_HEADS, HEAD_DIM]
    cache_hbm: Ref  # bfloat16[pages, PAGE_ROWS, LANES]
    # Scratch arrays in VMEM, and semaphores.
    kv: Ref  # bfloat16[TILE_BUFFERS, TILE * TOKEN_ROWS, LANES]: fetched tiles
    k_by_head: Ref  # bfloat16[KV_HEADS, MAX_TOKENS, HEAD_DIM]: new keys as they come
    v_by_head: Ref  # bfloat16[KV_HEADS, MAX_TOKENS, HEAD_DIM]: new values as they come
    q_in: Ref  # bfloat16[MAX_ROWS + 1, Q_HEADS, HEAD_DIM]: queries of every sequence, and of no sequence
    new_keys: Ref  # bfloat16[MAX_TOKENS, KV_HEADS, HEAD_DIM]: new keys of every sequence
    new_values: Ref  # bfloat16[MAX_TOKENS, KV_HEADS, HEAD_DIM]: new values of every sequence
    new_out: Ref  # bfloat16[WRITE_BUFFERS, SUBLANE_TILE_ROWS, LANES]: new tokens on their way to the cache
    packed: Ref  # uint32[MAX_ROWS, SUBLANE_TILE * WORD_ROWS, LANES]: new tokens in the cache's form
    tile_max: Ref  # float32[TILES_PER_WAVE, QUERY_ROWS, LANES]: the largest score of each tile, the same in every lane
    column_token: Ref  # int32[SCORE_ROWS, COLUMNS]: the token of each score of an own KV head
    scores: Ref  # float32[TILES_PER_WAVE, SCORE_ROWS, COLUMNS]: scores of a wave, for the next iteration
    sink_rows: Ref  # float32[QUERY_ROWS, LANES]: sinks, the same in every lane
    row_max: Ref  # float32[QUERY_ROWS, LANES]: running maximum, the same in every lane
    row_sum: Ref  # float32[QUERY_ROWS, LANES]: running sum, the same in every lane
    acc: Ref  # float32[QUERY_ROWS, LANES]: running output
    out_all: Ref  # bfloat16[MAX_ROWS + 1, Q_HEADS, HEAD_DIM]: outputs of every sequence, and of no sequence
    tile_seq: Ref  # int32[TILE_BUFFERS]: the sequence of each tile in flight
    tile_first: Ref  # int32[TILE_BUFFERS]: its first token
    tile_left: Ref  # int32[TILE_BUFFERS]: tokens of its sequence from there on
    last_slot: Ref  # int32[MAX_ROWS + 1]: the last tile of each sequence so far
    bad_row: Ref  # int32[MAX_ROWS + 1]: whether each sequence is bad, so far
    good_rows: Ref  # int32[1]: how many sequences are not bad, of those that have come to their end
    kv_sem: Ref  # DMA[WAVE_BUFFERS]: fetches
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
        # The first iteration finds a wave before the first, with no tile in it: nobody reads what that leaves.
        for_each(0, TILES_PER_WAVE, self.clear_slot)
        self.load_sinks()
        self.load_column_tokens()
        ahead = (jnp.int32(0), self.first_token(0))
        ahead = lax.fori_loop(1, LOOKAHEAD, self.fetch_first_wave, ahead)
        for load in loads:
            load.wait()
        for_each(0, self.sorting_steps(), self.sort_new_tokens)
        for_each(0, pl.cdiv(self.num_seqs, PACKED_AT_ONCE), self.pack_new_tokens)
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
        """The copies of what the kernel loads at its start, of all sequences."""
        arrays = [
            (copy_of_tokens, self.q_hbm, self.q_in),
            (copy_by_head, self.k_hbm, self.k_by_head),
            (copy_by_head, self.v_hbm, self.v_by_head),
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
        target = self.kv.at[self.slot(wave, i), pl.ds(page * PAGE_ROWS, PAGE_ROWS)]
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
        return pad_lanes(self.q_in[self.tile_seq[self.slot(wave, i)]].astype(jnp.float32))

    def store_output(self, wave, i, row_max, row_sum, acc):
        """The output of a tile's sequence, as it is after this tile."""
        out = acc / broadcast_lanes(row_sum, LANES)
        self.out_all[self.tile_seq[self.slot(wave, i)]] = unpad_lanes(out).astype(self.out_all.dtype)

    def rows_of_head(self, head):
        """The rows of a query head among the queries of a sequence."""
        return [head // GROUP * HEAD_QUERY_ROWS + head % GROUP]

    # The new token goes into the fetched tokens, and from a copy of its sublane tile back to its page.

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

    def put_new_token(self, seq, buffer, left):
        """Puts the new token into the buffer in which its sequence ends after `left` tokens, and into its copy."""
        token = left - 1
        rows = rows_of_tile(quotient(token, SUBLANE_TILE))
        is_new = token_of_word(SUBLANE_TILE) == remainder(token, SUBLANE_TILE)
        words = jnp.where(is_new, self.new_words(seq), rows_as_words(self.kv[buffer, rows]))
        self.kv[buffer, rows] = words_as_rows(words)
        write_buffer, _ = self.write_place(seq)
        self.new_out[write_buffer] = words_as_rows(words)

    def cache_write(self, seq, page):
        """The copy of the sublane tile with a sequence's new token to a page of the cache."""
        buffer, sem = self.write_place(seq)
        position = self.kv_lens[seq] - 1
        target = self.cache_hbm.at[page, rows_of_tile(quotient(remainder(position, PAGE_SIZE), SUBLANE_TILE))]
        return pltpu.make_async_copy(self.new_out.at[buffer], target, self.write_sem.at[sem])

    def new_words(self, seq):
        """The words of a sequence's new token, in the place of each token of a sublane tile."""
        return self.packed[seq]

    # ---- one tile: softmax, and the running softmax of its sequence

    def compute_tiles(self, wave, state, ahead):
        """The values of a wave's tiles, merged one by one, beside the scores of the next wave's; fetches in between.

        The probabilities of a tile wait for scores of the next wave. Otherwise the compiler would make those of all tiles at
        the start, and the MXU would wait for them.
        """
        softmax = self.softmax(wave, 0, self.largest_of_tile(0))
        for i in range(TILES_PER_WAVE):
            made = self.keep_scores(wave + 1, i)
            p, tile_max, tile_sum = softmax
            if i + 1 < TILES_PER_WAVE:
                softmax = self.softmax(wave, i + 1, paced_by(self.largest_of_tile(i + 1), made))
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
        made = self.scores[i, SCORE_ROWS - SUBLANES :, pl.ds(COLUMNS // 2 // LANES * LANES, LANES)]
        self.kv[self.slot(wave, i), pl.ds(0, SUBLANES * PACKING), pl.ds(0, LANES)] = pltpu.bitcast(made, self.kv.dtype)

    def keep_scores(self, wave, i):
        """Makes the scores of a tile, masked, and their maximum, for the next iteration; returns some of the scores.

        That is done here, beside the MXU, because the next iteration begins with probabilities.
        """
        made = self.compute_scores(wave, i)
        scores = self.whole_scores(self.score_rows(made))
        scores = jnp.where(self.visible_tokens(wave, i), scores * SCORE_SCALE, MASKED)
        self.scores[i] = scores
        largest = self.spread_maxima(lane_partial_max(scores))
        self.tile_max[i] = largest if is_last_of_wave(i) else max_lanes(largest)
        return made[:SUBLANES, :LANES]

    def largest_of_tile(self, i):
        """The largest score of a tile, the same in every lane.

        Of the last tile of a wave this is found here, in the next iteration: nothing would hide its latency before.
        """
        return max_lanes(self.tile_max[i]) if is_last_of_wave(i) else self.tile_max[i]

    def softmax(self, wave, i, tile_max):
        """Probabilities relative to the tile's own maximum, with that and their sum, the same in every lane."""
        p = jnp.exp2(self.scores[i] - broadcast_lanes(self.score_rows(tile_max), COLUMNS))
        tile_sum = reduce_lanes(self.spread_weights(lane_partial_sum(p)))
        return self.spread_weights(p), tile_max, tile_sum

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
        old_max = jnp.where(begins, self.sink_rows[...], old_max)
        new_max = jnp.maximum(old_max, tile_max)
        alpha, beta = jnp.exp2(old_max - new_max), jnp.exp2(tile_max - new_max)
        new_sum = jnp.where(begins, 1.0, old_sum) * alpha + tile_sum * beta
        new_acc = jnp.where(begins, 0.0, old_acc) * broadcast_lanes(alpha, LANES)
        new_acc = new_acc + values * broadcast_lanes(beta, LANES)
        self.store_output(wave, i, new_max, new_sum, new_acc)
        return new_max, new_sum, new_acc

    # ---- all heads of a tile at once: rows of K and V in the order of the cache, by token and then by KV head

    cleared_tiles = CLEARED_TILES

    def compute_scores(self, wave, i):
        """The scores of a tile, float32[QUERY_ROWS, COLUMNS]: of all queries with K of all heads."""
        queries = jnp.concatenate(list(self.query_sets(self.load_queries(wave, i))), axis=0)
        return matmul_keys(self.split_queries(queries), self.tile_keys(wave, i))

    def accumulate_pv(self, wave, i, p):
        """The weighted values of a tile, float32[QUERY_ROWS, LANES]."""
        return matmul_values(p, self.tile_values(wave, i))

    def token_of_column(self, rows):
        """The token of each score, int32[rows, COLUMNS]; of another KV head's than the query's none that a sequence has."""
        return self.column_token[...]

    # ---- scores of all queries with each row of K: a mask leaves those of its own KV head

    def score_rows(self, rows):
        """The rows of which scores are kept, out of those of all queries."""
        return rows

    def spread_maxima(self, rows):
        """The inverse, of maxima."""
        return rows

    def spread_weights(self, rows):
        """The inverse, of probabilities or their sums."""
        return rows

    def is_own(self, row, head):
        """Whether a row of scores is of a query of a KV head."""
        return head == lax.div(row, HEAD_QUERY_ROWS)

    def whole_scores(self, scores):
        """Scores with whole rows of K."""
        return scores

    def split_queries(self, queries):
        """The rows of a matmul with K of all heads."""
        return queries

    # A word holds K in the lower bits of an integer of PAIR_DTYPE, and V above. Or it holds a row of both, and padding above: the
    # MXU takes such a row as either, beside queries that have zeros where V is.

    def tile_keys(self, wave, i):
        """K of all heads of a tile, `[COLUMNS, LANES]`."""
        return lower_rows(self.kv[self.slot(wave, i)])

    def tile_values(self, wave, i):
        """V of all heads of a tile, `[COLUMNS, LANES]`."""
        return lower_rows(rows_as_words(self.kv[self.slot(wave, i)]) >> VALUES_SHIFT)

    def query_sets(self, queries):
        """The queries of each set of heads."""
        for index in range(HEAD_SETS):
            yield queries[index * SET_ROWS : (index + 1) * SET_ROWS]

    def first_token(self, seq):
        """Where the page begins in which the window of a sequence's first query does: nothing before it is fetched."""
        return lax.div(jnp.maximum(self.row_len(seq) - WINDOW, 0), PAGE_SIZE) * PAGE_SIZE

    def load_sinks(self):
        """Spreads the sinks over their query rows. Each is in the sum from the start, where the maximum is its own."""
        self.sink_rows[...] = jnp.full_like(self.sink_rows, MASKED)
        for head in range(Q_HEADS):
            for row in self.rows_of_head(head):
                self.sink_rows[row : row + 1] = jnp.full((1, LANES), self.sinks[head]) * LOG2_E

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

    def load_column_tokens(self):
        """Says for each score which token it is of; NO_TOKEN where the query has another KV head than K."""
        row = lax.broadcasted_iota(jnp.int32, self.column_token.shape, 0)
        column = lax.broadcasted_iota(jnp.int32, self.column_token.shape, 1)
        token, head = lax.div(column, TOKEN_COLUMNS), lax.div(lax.rem(column, TOKEN_COLUMNS), HEAD_COLUMNS)
        self.column_token[...] = jnp.where(self.is_own(row, head), token, NO_TOKEN)

    # ---- new tokens that come by head: they are sorted by token while the first waves are on their way

    def sorting_steps(self):
        return pl.cdiv(self.num_seqs, SORTED_TOKENS)

    def sort_new_tokens(self, step):
        """Sorts SORTED_TOKENS new tokens."""
        arrays = [
            (self.k_by_head, self.new_keys),
            (self.v_by_head, self.new_values),
        ]
        for by_head, by_token in arrays:
            rows = by_head[:, sorted_tokens(step)].astype(jnp.float32)
            by_token[sorted_tokens(step)] = jnp.swapaxes(rows, 0, 1).astype(by_token.dtype)

    def pack_new_tokens(self, index):
        """Packs the new tokens of some sequences, so that their latencies hide each other, and the first wave's hides them."""
        for seq in [index * PACKED_AT_ONCE + i for i in range(PACKED_AT_ONCE)]:
            for place in range(SUBLANE_TILE):
                pack_token(self.new_keys[seq], self.new_values[seq], self.packed.at[seq], place)


def paced_by(value, scores):
    """`value`, once some of the scores are made: none is below -inf, which the compiler does not know."""
    waits = jnp.concatenate([scores] * (value.shape[0] // SUBLANES), axis=0)
    return jnp.where(waits < -jnp.inf, waits, value)


def more_waves(carry):
    """Whether there are tiles in the wave of the next iteration."""
    return carry[1]


def is_last_of_wave(i):
    """Whether a tile of a wave is known to be its last. Before the loop that is known of none."""
    return isinstance(i, int) and i == TILES_PER_WAVE - 1


def copy_of_tokens(source, target, sem):
    """A copy of the rows of all new tokens."""
    return pltpu.make_async_copy(source.at[pl.ds(0, MAX_TOKENS)], target.at[pl.ds(0, MAX_TOKENS)], sem)


def copy_by_head(source, target, sem):
    """A copy of all new tokens of arrays by head."""
    return pltpu.make_async_copy(source.at[:, pl.ds(0, MAX_TOKENS)], target.at[:, pl.ds(0, MAX_TOKENS)], sem)


def sorted_tokens(step):
    """The tokens that a step of sorting takes."""
    return pl.ds(pl.multiple_of(step * SORTED_TOKENS, SORTED_TOKENS), SORTED_TOKENS)


def wait_for_bytes(array, sem):
    """Waits until as many bytes have arrived as an array has, whichever copies brought them."""
    pltpu.make_async_copy(array, array, sem).wait()


def lower_rows(pairs):
    """The rows in the lower bits of integers of PAIR_DTYPE. One operation of the vector unit takes two registers."""
    return pltpu.bitcast(pltpu.bitcast(pairs, PAIR_DTYPE).astype(ROW_DTYPE), jnp.bfloat16)


def matmul_keys(queries, keys):
    """The scores `[rows, tokens]` of queries with keys `[tokens, HEAD_LANES]`."""
    return matmul(queries.astype(jnp.bfloat16), keys, 1)


def matmul_values(p, values):
    """Values `[tokens, lanes]`, weighted by rows of probabilities."""
    return matmul(p.astype(jnp.bfloat16), values, 0)


def decode_kernel(*refs):
    DecodeKernel(*refs).run()


def attend_decode(queries, keys, values, cache, kv_lens, page_indices, distribution, sinks):
    """`(out, cache)` of the decode sequences; other rows of `out` are undefined."""
    scalars = (kv_lens, page_indices, distribution, sinks)
    arrays = (queries, swap_heads(keys), swap_heads(values), cache)
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
            pltpu.VMEM((TILE_BUFFERS, TILE * TOKEN_ROWS, LANES), jnp.bfloat16),  # kv
            pltpu.VMEM((KV_HEADS, MAX_TOKENS, HEAD_DIM), jnp.bfloat16),  # k_by_head
            pltpu.VMEM((KV_HEADS, MAX_TOKENS, HEAD_DIM), jnp.bfloat16),  # v_by_head
            pltpu.VMEM((MAX_ROWS + 1, Q_HEADS, HEAD_DIM), jnp.bfloat16),  # q_in
            pltpu.VMEM((MAX_TOKENS, KV_HEADS, HEAD_DIM), jnp.bfloat16),  # new_keys
            pltpu.VMEM((MAX_TOKENS, KV_HEADS, HEAD_DIM), jnp.bfloat16),  # new_values
            pltpu.VMEM((WRITE_BUFFERS, SUBLANE_TILE_ROWS, LANES), jnp.bfloat16),  # new_out
            pltpu.VMEM((MAX_ROWS, SUBLANE_TILE * WORD_ROWS, LANES), jnp.uint32),  # packed
            pltpu.VMEM((TILES_PER_WAVE, QUERY_ROWS, LANES), jnp.float32),  # tile_max
            pltpu.VMEM((SCORE_ROWS, COLUMNS), jnp.int32),  # column_token
            pltpu.VMEM((TILES_PER_WAVE, SCORE_ROWS, COLUMNS), jnp.float32),  # scores
            pltpu.VMEM((QUERY_ROWS, LANES), jnp.float32),  # sink_rows
            pltpu.VMEM((QUERY_ROWS, LANES), jnp.float32),  # row_max
            pltpu.VMEM((QUERY_ROWS, LANES), jnp.float32),  # row_sum
            pltpu.VMEM((QUERY_ROWS, LANES), jnp.float32),  # acc
            pltpu.VMEM((MAX_ROWS + 1, Q_HEADS, HEAD_DIM), jnp.bfloat16),  # out_all
            pltpu.SMEM((TILE_BUFFERS,), jnp.int32),  # tile_seq
            pltpu.SMEM((TILE_BUFFERS,), jnp.int32),  # tile_first
            pltpu.SMEM((TILE_BUFFERS,), jnp.int32),  # tile_left
            pltpu.SMEM((MAX_ROWS + 1,), jnp.int32),  # last_slot
            pltpu.SMEM((MAX_ROWS + 1,), jnp.int32),  # bad_row
            pltpu.SMEM((1,), jnp.int32),  # good_rows
            pltpu.SemaphoreType.DMA((WAVE_BUFFERS,)),  # kv_sem
            pltpu.SemaphoreType.DMA((LOADS,)),  # load_sem
            pltpu.SemaphoreType.DMA((1,)),  # write_sem
            pltpu.SemaphoreType.DMA((1,)),  # out_sem
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True),
        name="rpa_decode",
    )(*scalars, *arrays)


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, sinks):
    """Attention of a batch of decode rows only; returns `(out, kv_cache)`, the cache in the donated argument's memory.

    Sequence s has row s of `queries`: `cu_q_lens` is not used.
    """
    out, cache = attend_decode(queries, keys, values, cache_rows(kv_cache), kv_lens, page_indices, distribution, sinks)
    return out, rows_cache(cache, kv_cache.shape)
