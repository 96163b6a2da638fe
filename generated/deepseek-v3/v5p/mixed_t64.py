"""Ragged paged attention of deepseek-v3: mixed batches on v5p.

Do not edit: made from spec beb302e5bf7ae58bc4f843b176ce5570766fe5e900ecc5ba857bb2b7b12d0229 by
    rpac build SPEC --target v5p
Change the spec or the templates and run it again.

What was specialized:
- latent attention, absorbed: 128 query heads over one latent vector of 512 and one rotary key of 64 a token, bfloat16:
  constants
- cache rows of 640 lanes, 5 registers' width: latent vector, rotary key, padding
- pages of 128 tokens, 64 a sequence, up to 64 sequences
- token buckets that use it: 64
- causal, cache updated
- decode: tiles of 1024 tokens, no longer than the expected lengths; waves of 2, so that one fills the other's waits;
  fetched 5 waves ahead, which hides the latency of DMAs
- mixed: blocks of 16 queries with all their heads against 512 fetched tokens (3 buffers); computes 256 query rows at
  once
- page tables: in SMEM; the tables of all sequences fit there, where a page id is one load away
- decode, loop: waves of tiles of any sequences; tiles of short sequences hide each other's latency
- decode, reading K and V: one row of a token for all query heads; the latent vector is part of every key and is every
  value
- decode, writing new tokens: latent vector and rotary key in one row; that is how latent attention stores a token
- decode, mask: by the length of each sequence; a row has one new token, the last of its sequence
- decode, matmuls with K and V: as they are stored; the MXU takes elements of this dtype beside the rows
- decode, starting fetches: before an iteration's matmuls; then no fetch waits for a matmul
- mixed, loop: blocks of queries with all their heads; all heads read the same row of a token
- mixed, reading K and V: one row of a token for all query heads; the latent vector is part of every key and is every
  value
- mixed, writing new tokens: latent vector and rotary key in one row; that is how latent attention stores a token
- mixed, mask: by comparing positions; this works with any mask and needs no MXU lanes
- mixed, scores: a row for each query; this needs neither MXU lanes to spare nor whole registers of rows
- mixed, softmax: not paced; this needs no buffers but those of the lookahead, and steps of any length
- mixed, lookahead: none; a step has the rows of all heads, which keep the MXU busy
- mixed, sorting queries: not at all; all query heads read the same row of a token
- mixed, between blocks: each block makes its own first scores; other tiles, or the splitting of words, may come between
- mixed, sums of probabilities: on the vector unit; this needs no MXU lanes
- mixed, values: whole registers of lanes; the MXU takes them as they lie in the cache
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
MAX_NEW = ROW_TOKENS  # new tokens that a sequence may have
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

DECODE_TILE = 1024  # tokens that are fetched and computed at once, of one sequence
DECODE_TILES_PER_WAVE = 2  # which fill the waits of each other
DECODE_LOOKAHEAD = 5  # waves from the fetch of one to its softmax
DECODE_WAVE_BUFFERS = DECODE_LOOKAHEAD + 1  # waves that are fetched or computed
DECODE_TILE_BUFFERS = DECODE_WAVE_BUFFERS * DECODE_TILES_PER_WAVE
DECODE_TILE_PAGES = DECODE_TILE // PAGE_SIZE
DECODE_MAX_ROWS = 64  # sequences of the largest batch
DECODE_NO_SEQ = DECODE_MAX_ROWS  # in place of a sequence where there is no tile
DECODE_WRITE_BUFFERS = 8  # sequences whose new tokens are on their way to the cache
DECODE_QUERY_ROWS = Q_HEADS
DECODE_SCORE_ROWS = DECODE_QUERY_ROWS
DECODE_LOADS = 6  # queries, their rotary parts, both of later sequences, new latent vectors, new rotary keys
DECODE_FIRST_ROWS = 4  # sequences whose queries are loaded before the first iteration
DECODE_LATER_ROWS = 60  # those whose queries are loaded meanwhile
DECODE_LATER_WAVE = DECODE_FIRST_ROWS // DECODE_TILES_PER_WAVE  # the first whose iteration may need them
DECODE_TURNED_ROWS = 4  # whose rotary queries are transposed at once
DECODE_NEW_ROWS = 64  # new tokens that are loaded: whole tiles
MIXED_DECODE_ROWS = 64  # sequences of the largest batch for the decode kernel
MIXED_Q_BLOCK = 16  # query tokens of a query block
MIXED_Q_ROWS = MIXED_Q_BLOCK * Q_HEADS
MIXED_KV_BLOCK = 512  # tokens that are fetched and computed at once
MIXED_KV_BUFFERS = 3  # KV blocks, and query blocks, in VMEM
MIXED_FETCH_LOOKAHEAD = MIXED_KV_BUFFERS - 1  # steps that the fetch runs ahead
MIXED_COPY_SIZES = (16, 8, 4, 2, 1)  # tokens: of these is every copy of a query block
MIXED_STEP_ROWS = 256  # query rows of a flash step
MIXED_STEP_TOKENS = MIXED_STEP_ROWS // Q_HEADS
MIXED_ROW_STEPS = MIXED_Q_ROWS // MIXED_STEP_ROWS  # flash steps of a query block
MIXED_DIAGONAL_STEPS = 4  # of them, one piece of code on the diagonal
MIXED_DIAGONAL_ITERATIONS = MIXED_ROW_STEPS // MIXED_DIAGONAL_STEPS
MIXED_PAGE_BUFFERS = 9  # pages under update
MIXED_NEW_BUFFERS = 5  # pages whose new tokens are fetched or in use
MIXED_UPDATE_LOOKAHEAD = 4  # pages that their fetch runs ahead
MIXED_NEW_TOKENS = 64  # tokens of such a fetch
MIXED_MERGE_TOKENS = 16  # new tokens that are put into a page at once
MIXED_MERGE_TILES = MIXED_MERGE_TOKENS // SUBLANE_TILE


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


def start_copy(copy):
    copy.start()


def wait_copy(copy):
    copy.wait()


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


def pad_rope(queries_rope):
    """The rotary queries with zeros up to whole registers, which is how they lie in memory anyway."""
    return jnp.pad(queries_rope, ((0, 0), (0, 0), (0, ROW_LANES - RANK - queries_rope.shape[2])))


def rows_of_new_tokens(new_kv, new_rope):
    """The new tokens as rows of the cache, `[tokens, 1, ROW_LANES]`: each in registers of its own, to be found by number."""
    padding = jnp.zeros((len(new_kv), ROW_LANES - RANK - new_rope.shape[1]), new_kv.dtype)
    return jnp.concatenate([new_kv, new_rope, padding], axis=1)[:, None]


class PagedKernel:
    """What kernels share that fetch blocks of `block_pages` whole pages, and compute `computed_tokens` tokens at once."""

    def start_block(self, kv_end, seq, entry, block, buffer):
        """Starts to fetch a block into a buffer, as far as there are tokens below `kv_end`, without pages of bad ids.

        `entry` is the first of its sequence in the page tables that is used.
        """
        first = entry + block * self.block_pages
        self.fetched[buffer] = 0
        self.start_pages(kv_end, block, functools.partial(self.start_page, seq, first, buffer))
        is_short = self.fetched[buffer] < self.pages_of(kv_end, block)
        self.bad_row[seq] = jnp.where(is_short, 1, self.bad_row[seq])

    def start_page(self, seq, first, buffer, page):
        """Starts to fetch a page of a block; `first` is the place of the block's first page in the page table."""
        physical = self.page_indices[first + page]
        found = (self.bad_row[seq] == 0) & is_page(physical, self.cache_hbm)
        pl.when(found)(self.page_copy(physical, buffer, page).start)
        self.fetched[buffer] += found.astype(jnp.int32)

    def wait_block(self, kv_end, block, buffer):
        """Waits for the copies that `start_block` started."""
        self.wait_pages(buffer, self.fetched[buffer])

    def page_copy(self, physical, buffer, page):
        place = self.kv.at[buffer, page]
        return pltpu.make_async_copy(self.cache_hbm.at[physical], place, self.kv_sem.at[buffer])

    def pages_of(self, kv_end, block):
        """How many pages of a block hold tokens below `kv_end`."""
        return jnp.minimum(pl.cdiv(kv_end, PAGE_SIZE) - block * self.block_pages, self.block_pages)

    def start_pages(self, kv_end, block, start_page):
        """Starts the fetch of each page of a block that holds tokens below `kv_end`."""
        pages = self.pages_of(kv_end, block)

        @pl.when(pages == self.block_pages)
        def start_full_block():
            for page in range(self.block_pages):
                start_page(page)

        pl.when(pages < self.block_pages)(functools.partial(for_each, 0, pages, start_page))

    def wait_pages(self, buffer, pages):
        """Waits for some pages of a block."""

        @pl.when(pages == self.block_pages)
        def wait_for_full_block():
            whole = self.kv.at[buffer]
            pltpu.make_async_copy(whole, whole, self.kv_sem.at[buffer]).wait()  # as many bytes, wherever they come from

        pl.when(pages < self.block_pages)(functools.partial(for_each, 0, pages, functools.partial(self.wait_page, buffer)))

    def wait_page(self, buffer, page):
        self.page_copy(0, buffer, page).wait()  # as many bytes, wherever they come from

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

    The work is cut into tiles of DECODE_TILE tokens of one sequence. A wave is DECODE_TILES_PER_WAVE tiles, of whatever sequences.
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
    kv: Ref  # bfloat16[DECODE_TILE_BUFFERS, DECODE_TILE_PAGES, PAGE_TILES, SUBLANE_TILE, ROW_LANES]: fetched tiles
    q_in: Ref  # bfloat16[DECODE_MAX_ROWS + 1, Q_HEADS, RANK]: queries of every sequence, and of no sequence
    q_rope_t: Ref  # bfloat16[DECODE_MAX_ROWS, ROPE_DIM, Q_HEADS]: their rotary parts, transposed
    q_rope_in: Ref  # bfloat16[DECODE_MAX_ROWS + 1, Q_HEADS, ROPE_DIM]: their rotary parts
    new_latents: Ref  # bfloat16[DECODE_NEW_ROWS, RANK]: new latent vectors of every sequence
    new_ropes: Ref  # bfloat16[DECODE_NEW_ROWS, ROPE_DIM]: their rotary keys
    new_rows: Ref  # float32[DECODE_NEW_ROWS, ROW_LANES]: both, as rows of the cache
    new_out: Ref  # bfloat16[DECODE_WRITE_BUFFERS, SUBLANE_TILE, ROW_LANES]: new tokens on their way to the cache
    scores: Ref  # float32[DECODE_TILES_PER_WAVE, Q_HEADS, DECODE_TILE]: scores of a wave, for the next iteration
    row_max: Ref  # float32[Q_HEADS, LANES]: running maximum, the same in every lane
    row_sum: Ref  # float32[Q_HEADS, LANES]: running sum, the same in every lane
    acc: Ref  # float32[Q_HEADS, RANK]: running output
    out_all: Ref  # bfloat16[DECODE_MAX_ROWS + 1, Q_HEADS, RANK]: outputs of every sequence, and of no sequence
    tile_seq: Ref  # int32[DECODE_TILE_BUFFERS]: the sequence of each tile in flight
    tile_first: Ref  # int32[DECODE_TILE_BUFFERS]: its first token
    tile_left: Ref  # int32[DECODE_TILE_BUFFERS]: tokens of its sequence from there on
    last_slot: Ref  # int32[DECODE_MAX_ROWS + 1]: the last tile of each sequence so far
    bad_row: Ref  # int32[DECODE_MAX_ROWS + 1]: whether each sequence is bad, so far
    good_rows: Ref  # int32[1]: how many sequences are not bad, of those that have come to their end
    kv_sem: Ref  # DMA[DECODE_WAVE_BUFFERS]: fetches
    load_sem: Ref  # DMA[DECODE_LOADS]: queries, their rotary parts, new tokens
    write_sem: Ref  # DMA[DECODE_WRITE_BUFFERS]: cache writes
    out_sem: Ref  # DMA[1]: outputs

    computed_tokens = DECODE_TILE

    def run(self):
        self.num_seqs = jnp.clip(self.distribution[0], 0, DECODE_MAX_ROWS)
        pl.when(self.num_seqs > 0)(self.attend)

    def attend(self):
        """Attends to all tokens of all sequences."""
        self.good_rows[0] = 0
        loads = self.load_copies()
        for load in loads:
            load.start()
        # The first iteration finds a wave before the first, with no tile in it: nobody reads what that leaves.
        for_each(0, DECODE_TILES_PER_WAVE, self.clear_slot)
        ahead = (jnp.int32(0), jnp.int32(0))
        ahead = lax.fori_loop(1, DECODE_LOOKAHEAD, self.fetch_first_wave, ahead)
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
        return lax.rem(wave, DECODE_WAVE_BUFFERS)

    def load_copies(self):
        """The copies of what the first iterations need: the queries of DECODE_FIRST_ROWS sequences, and all new tokens."""
        new = (self.new_latents_hbm, self.new_latents), (self.new_ropes_hbm, self.new_ropes)
        return [
            *self.query_copies(0, DECODE_FIRST_ROWS, 0),
            *(copy_of_rows(*pair, self.load_sem.at[4 + i]) for i, pair in enumerate(new)),
        ]

    def later_copies(self):
        """Those of the other sequences' queries, which arrive during the first iterations."""
        firsts = range(DECODE_FIRST_ROWS, DECODE_MAX_ROWS, DECODE_LATER_ROWS)  # one, or none
        return [copy for first in firsts for copy in self.query_copies(first, DECODE_LATER_ROWS, 2)]

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
        self.clear_slot(DECODE_LOOKAHEAD * DECODE_TILES_PER_WAVE)  # the first iteration looks there for outputs, and finds none
        for_each(0, DECODE_FIRST_ROWS // DECODE_TURNED_ROWS, self.transpose_rope)
        self.new_rows[...] = jnp.zeros(self.new_rows.shape)
        self.new_rows[:, :RANK] = self.new_latents[...].astype(jnp.float32)
        self.new_rows[:, RANK : RANK + ROPE_DIM] = self.new_ropes[...].astype(jnp.float32)

    def transpose_rope(self, step):
        """Transposes the rotary parts of DECODE_TURNED_ROWS sequences: they come with a head in each lane."""
        for i in range(DECODE_TURNED_ROWS):
            seq = step * DECODE_TURNED_ROWS + i
            self.q_rope_in[seq] = self.q_rope_t[seq].T

    def wait_for_later_copies(self):
        for copy in self.later_copies():
            copy.wait()
        for_each(DECODE_FIRST_ROWS // DECODE_TURNED_ROWS, DECODE_MAX_ROWS // DECODE_TURNED_ROWS, self.transpose_rope)

    def stream(self, wave):
        """Waits for the later copies before the first wave that needs them, and sends outputs that are complete."""
        pl.when(wave == DECODE_LATER_WAVE)(self.wait_for_later_copies)
        self.send_outputs(wave, self.tile_seq[self.slot(wave, 0)])

    def send_outputs(self, wave, end):
        """Starts to write the outputs of those sequences before `end` that have tiles in the wave before `wave`."""
        first = self.tile_seq[self.slot(wave + DECODE_LOOKAHEAD, 0)]  # that wave's buffer, which is fetched into next
        for i in range(DECODE_TILES_PER_WAVE):
            pl.when(first + i < end)(functools.partial(self.send_output, first + i))

    def send_output(self, seq):
        self.spoil_bad_row(seq)
        pltpu.make_async_copy(self.out_all.at[seq], self.out_hbm.at[seq], self.out_sem.at[0]).start()

    def write_results(self, wave):
        """Sends the last outputs and waits for all; `wave` is the one after the last."""
        pl.when(wave <= DECODE_LATER_WAVE)(self.wait_for_later_copies)
        self.send_outputs(wave, self.num_seqs)
        self.wait_for_all_writes()
        for_each_digit(
            self.num_seqs, DECODE_MAX_ROWS, lambda size: wait_for_bytes(self.out_all.at[pl.ds(0, size)], self.out_sem.at[0])
        )

    def iterate(self, carry):
        """Computes a wave's values and the next wave's scores; fetches a wave DECODE_LOOKAHEAD waves later."""
        wave, _, *ahead = carry
        self.wait_and_patch(self.slot(wave + 1, 0), DECODE_TILES_PER_WAVE, lax.rem(wave + 1, DECODE_WAVE_BUFFERS))
        self.stream(wave)
        ahead = self.compute_wave(wave, ahead)
        more = self.tile_seq[self.slot(wave + 1, 0)] < DECODE_NO_SEQ
        return wave + 1, more, *ahead

    # ---- the tiles in flight: each one's sequence, its first token, and the tokens that the sequence has from there on

    def slot(self, wave, i):
        """The buffer of tile `i` of a wave."""
        return lax.rem(wave, DECODE_WAVE_BUFFERS) * DECODE_TILES_PER_WAVE + i

    def clear_slot(self, slot):
        self.tile_seq[slot] = DECODE_NO_SEQ
        self.tile_first[slot] = 0
        self.tile_left[slot] = 0

    # ---- fetch K and V: whole pages

    def fetch_wave(self, wave, *ahead):
        """Starts the fetch of a wave whose first tile is at `ahead`: a sequence, and a token of it; returns the next wave's."""
        for i in range(DECODE_TILES_PER_WAVE):
            ahead = self.fetch_tile(wave, i, *ahead)
        return ahead

    def fetch_tile(self, wave, i, seq, first):
        """The same for one tile."""
        live, some_seq = seq < self.num_seqs, jnp.minimum(seq, self.num_seqs - 1)
        left = jnp.where(live, self.row_len(some_seq) - first, 0)
        self.tile_seq[self.slot(wave, i)] = jnp.where(live, seq, DECODE_NO_SEQ)
        self.last_slot[jnp.where(live, seq, DECODE_NO_SEQ)] = self.slot(wave, i)
        self.tile_first[self.slot(wave, i)] = first
        first_entry = some_seq * PAGES_PER_SEQ + quotient(first, PAGE_SIZE)
        left = self.fetch_pages(wave, i, first_entry, left)
        self.tile_left[self.slot(wave, i)] = left
        seq, first = self.next_tile(seq, first, left)
        return seq, first

    def next_tile(self, seq, first, left):
        """Where the tile after one at token `first` of `seq` is, which has `left` tokens from there on."""
        last = left <= DECODE_TILE
        seq = jnp.where(last, seq + 1, seq)
        return seq, jnp.where(last, 0, first + DECODE_TILE)

    def fetch_pages(self, wave, i, entry, left):
        """Starts the fetch of a tile's pages, of which `entry` says where the first one's id is: up to the first bad id.

        Returns how many tokens its sequence has left, none of them behind a bad id.
        """
        fetched = left
        for first in range(0, DECODE_TILE_PAGES, CHECKED_PAGES):
            pages = range(first, min(first + CHECKED_PAGES, DECODE_TILE_PAGES))
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
        tokens = jnp.clip(self.tile_left[slot], 0, DECODE_TILE)
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
        return jnp.where(self.tile_left[slot] > DECODE_TILE, seq, jnp.minimum(seq + 1, self.num_seqs))

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

        @pl.when(jnp.minimum(*lefts) < DECODE_TILE)
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
            pl.when(is_wanted & (seq >= DECODE_WRITE_BUFFERS))(functools.partial(self.wait_for_writes, seq - DECODE_WRITE_BUFFERS))
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
        return remainder(seq, DECODE_WRITE_BUFFERS), remainder(seq, DECODE_WRITE_BUFFERS)

    def wait_for_writes(self, seq):
        """Waits until the new token of a sequence is in the cache."""
        write = self.cache_write(seq, 0)  # as many bytes, whichever page they go to
        pl.when(self.bad_row[seq] == 0)(write.wait)

    def wait_for_all_writes(self):
        """Waits for the writes of the last sequences."""
        for_each(0, jnp.minimum(self.num_seqs, DECODE_WRITE_BUFFERS), self.drain_write)

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
        ahead = self.fetch_wave(wave + DECODE_LOOKAHEAD, *ahead)
        softmaxes = [self.softmax(wave, i) for i in range(DECODE_TILES_PER_WAVE)]
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
        p = jnp.exp2(scores - broadcast_lanes(tile_max, DECODE_TILE))
        tile_sum = jnp.broadcast_to(jnp.sum(p, axis=1, keepdims=True), self.row_sum.shape)
        return p, tile_max, tile_sum

    def visible_tokens(self, wave, i):
        """Which scores of a tile count: those of the tokens before the end of its sequence."""
        left = self.tile_left[self.slot(wave, i)]
        token = self.token_of_column(DECODE_SCORE_ROWS)
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
        """The scores of a tile, float32[Q_HEADS, DECODE_TILE]."""
        seq = self.tile_seq[self.slot(wave, i)]
        queries = jnp.concatenate([self.q_in[seq], self.q_rope_in[seq]], axis=1)
        return matmul_keys(queries, self.kv[self.slot(wave, i), ..., : RANK + ROPE_DIM].reshape(DECODE_TILE, RANK + ROPE_DIM))

    def accumulate_pv(self, wave, i, p):
        """The weighted values of a tile, float32[Q_HEADS, RANK]."""
        return matmul_values(p, self.kv[self.slot(wave, i), ..., :RANK].reshape(DECODE_TILE, RANK))

    def token_of_column(self, rows):
        """The token of each score of some query rows, int32[rows, DECODE_TILE]."""
        return lax.broadcasted_iota(jnp.int32, (rows, DECODE_TILE), 1)

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
            pltpu.VMEM((DECODE_TILE_BUFFERS, DECODE_TILE_PAGES, PAGE_TILES, SUBLANE_TILE, ROW_LANES), jnp.bfloat16),  # kv
            pltpu.VMEM((DECODE_MAX_ROWS + 1, Q_HEADS, RANK), jnp.bfloat16),  # q_in
            pltpu.VMEM((DECODE_MAX_ROWS, ROPE_DIM, Q_HEADS), jnp.bfloat16),  # q_rope_t
            pltpu.VMEM((DECODE_MAX_ROWS + 1, Q_HEADS, ROPE_DIM), jnp.bfloat16),  # q_rope_in
            pltpu.VMEM((DECODE_NEW_ROWS, RANK), jnp.bfloat16),  # new_latents
            pltpu.VMEM((DECODE_NEW_ROWS, ROPE_DIM), jnp.bfloat16),  # new_ropes
            pltpu.VMEM((DECODE_NEW_ROWS, ROW_LANES), jnp.float32),  # new_rows
            pltpu.VMEM((DECODE_WRITE_BUFFERS, SUBLANE_TILE, ROW_LANES), jnp.bfloat16),  # new_out
            pltpu.VMEM((DECODE_TILES_PER_WAVE, Q_HEADS, DECODE_TILE), jnp.float32),  # scores
            pltpu.VMEM((Q_HEADS, LANES), jnp.float32),  # row_max
            pltpu.VMEM((Q_HEADS, LANES), jnp.float32),  # row_sum
            pltpu.VMEM((Q_HEADS, RANK), jnp.float32),  # acc
            pltpu.VMEM((DECODE_MAX_ROWS + 1, Q_HEADS, RANK), jnp.bfloat16),  # out_all
            pltpu.SMEM((DECODE_TILE_BUFFERS,), jnp.int32),  # tile_seq
            pltpu.SMEM((DECODE_TILE_BUFFERS,), jnp.int32),  # tile_first
            pltpu.SMEM((DECODE_TILE_BUFFERS,), jnp.int32),  # tile_left
            pltpu.SMEM((DECODE_MAX_ROWS + 1,), jnp.int32),  # last_slot
            pltpu.SMEM((DECODE_MAX_ROWS + 1,), jnp.int32),  # bad_row
            pltpu.SMEM((1,), jnp.int32),  # good_rows
            pltpu.SemaphoreType.DMA((DECODE_WAVE_BUFFERS,)),  # kv_sem
            pltpu.SemaphoreType.DMA((DECODE_LOADS,)),  # load_sem
            pltpu.SemaphoreType.DMA((DECODE_WRITE_BUFFERS,)),  # write_sem
            pltpu.SemaphoreType.DMA((1,)),  # out_sem
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True),
        name="rpa_decode",
    )(*scalars, *arrays)


@dataclasses.dataclass
class MixedKernel(PagedKernel):
    """Any number of new tokens for each of the sequences [distribution[0], distribution[2]).

    First the new tokens get into the pages of the cache. Then a step is one KV block against one query block, of all query
    heads; the fetch runs MIXED_FETCH_LOOKAHEAD steps ahead, across the ends of both.
    """

    # Scalars in SMEM.
    kv_lens: Ref  # int32[MAX_SEQS]
    page_indices: Ref  # int32[MAX_SEQS * PAGES_PER_SEQ]
    cu_q_lens: Ref  # int32[MAX_SEQS + 1]
    distribution: Ref  # int32[3]
    # Arrays in HBM.
    q_hbm: Ref  # bfloat16[tokens, Q_HEADS, RANK]
    q_rope_hbm: Ref  # bfloat16[tokens, Q_HEADS, ROW_LANES - RANK]
    new_hbm: Ref  # bfloat16[tokens, 1, ROW_LANES]
    cache_in: Ref  # bfloat16[pages, PAGE_TILES, SUBLANE_TILE, ROW_LANES]: the memory of cache_hbm
    out_in: Ref  # bfloat16[tokens, Q_HEADS, RANK]: the memory of out_hbm
    out_hbm: Ref  # bfloat16[tokens, Q_HEADS, RANK]
    cache_hbm: Ref  # bfloat16[pages, PAGE_TILES, SUBLANE_TILE, ROW_LANES]
    # Scratch arrays in VMEM, and semaphores.
    kv: Ref  # bfloat16[MIXED_KV_BUFFERS, MIXED_KV_BLOCK // PAGE_SIZE, PAGE_TILES, SUBLANE_TILE, ROW_LANES]: fetched blocks
    new_in: Ref  # bfloat16[MIXED_NEW_BUFFERS, 2 * PAGE_SIZE + MIXED_NEW_TOKENS, 1, ROW_LANES]: new tokens, around the page they go to
    page_rows: Ref  # bfloat16[MIXED_PAGE_BUFFERS, PAGE_TILES, SUBLANE_TILE, ROW_LANES]: pages to update
    merged: Ref  # float32[MIXED_MERGE_TOKENS, ROW_LANES]: new tokens, side by side
    q_in: Ref  # bfloat16[MIXED_KV_BUFFERS, MIXED_Q_BLOCK, Q_HEADS, RANK]: query blocks as they come
    q_rope_in: Ref  # bfloat16[MIXED_KV_BUFFERS, MIXED_Q_BLOCK, Q_HEADS, ROW_LANES - RANK]: their rotary parts
    row_max: Ref  # float32[MIXED_Q_ROWS, LANES]: running maximum, the same in every lane
    row_sum: Ref  # float32[MIXED_Q_ROWS, LANES]: running sum, the same in every lane
    acc: Ref  # float32[MIXED_Q_ROWS, RANK]: running output
    out_rows: Ref  # bfloat16[1, MIXED_Q_BLOCK, Q_HEADS, RANK]: an output block on its way out
    fetched: Ref  # int32[MIXED_KV_BUFFERS]: pages that are fetched into each buffer
    bad_row: Ref  # int32[MAX_SEQS]: whether each sequence is bad
    q_starts: Ref  # int32[MAX_SEQS]: the row of each sequence's first new token
    q_lens: Ref  # int32[MAX_SEQS]: the number of its new tokens
    row_lens: Ref  # int32[MAX_SEQS]: the number of its tokens
    updated: Ref  # int32[MIXED_PAGE_BUFFERS]: whether each page under update is written
    kv_sem: Ref  # DMA[MIXED_KV_BUFFERS]: fetches
    new_sem: Ref  # DMA[MIXED_NEW_BUFFERS]: new tokens
    old_sem: Ref  # DMA[MIXED_PAGE_BUFFERS]: pages that hold old tokens
    write_sem: Ref  # DMA[MIXED_PAGE_BUFFERS]: cache writes
    q_sem: Ref  # DMA[MIXED_KV_BUFFERS]: query blocks
    out_sem: Ref  # DMA[1]: output blocks

    block_pages = MIXED_KV_BLOCK // PAGE_SIZE
    computed_tokens = MIXED_KV_BLOCK

    def run(self):
        self.first_seq, self.end_seq = self.sequences()
        pl.when(self.first_seq < self.end_seq)(self.attend)

    def attend(self):
        """Updates the pages, goes through the query blocks of all sequences, and for each through the KV blocks that it sees."""
        start = (self.first_seq, jnp.int32(0), jnp.int32(0), jnp.int32(0))
        lax.fori_loop(self.first_seq, self.end_seq, self.check_row, self.first_seq)
        # The first block comes while the last pages go, if none of these is in it.
        early = self.first_page(self.first_seq) >= self.block_pages
        self.update_pages(functools.partial(self.start_fetch, 0, start, early))
        for_each(0, MIXED_ROW_STEPS, self.clear_state)
        self.start_fetch(0, start, ~early)
        fetched = self.next_fetch(start)
        for step in range(1, MIXED_FETCH_LOOKAHEAD):
            fetched = self.fetch_ahead(step, *fetched)
        state = (jnp.int32(0), start, fetched, start[:2])
        *_, sent = lax.while_loop(self.has_work, self.step, state)
        self.for_copies(*sent, self.out_copy, wait_copy)

    def has_work(self, carry):
        """Whether there is a step to take."""
        return carry[1][0] < self.end_seq

    def step(self, carry):
        """Takes one step; `at` is its sequence, its query block (of the sequence, and of all) and its KV block."""
        step, at, fetched, sent = carry
        seq, q_block, q_step, block = at
        fetched = self.fetch_ahead(step + MIXED_FETCH_LOOKAHEAD, *fetched)
        buffer, q_buffer = lax.rem(step, MIXED_KV_BUFFERS), lax.rem(q_step, MIXED_KV_BUFFERS)
        end = self.kv_end(seq, q_block)
        last = (block + 1) * MIXED_KV_BLOCK >= end
        pl.when(block == 0)(functools.partial(self.for_query_copies, seq, q_block, q_buffer, wait_copy))
        self.wait_block(end, block, buffer)

        @pl.when(last)
        def clear_last_block():
            self.clear_tail(buffer, end - block * MIXED_KV_BLOCK)

        first_query = self.row_len(seq) - self.q_len(seq) + q_block * MIXED_Q_BLOCK - block * MIXED_KV_BLOCK
        self.attend_block(q_buffer, buffer, first_query)
        pl.when(last)(functools.partial(self.store_query_block, seq, q_block, q_step, sent))
        sent = tuple(jnp.where(last, new, old) for new, old in zip((seq, q_block), sent))
        return step + 1, self.advance(*at), fetched, sent

    # ---- Sequences: any number of new tokens each.

    def sequences(self):
        """The first sequence of the kernel, and the end of them."""
        return self.checked_sequences()

    def q_start(self, seq):
        """The row of a sequence's first new token."""
        return self.q_starts[seq]

    def q_len(self, seq):
        """The number of its new tokens."""
        return self.q_lens[seq]

    def queries_end(self, seq, q_block):
        """The number of tokens of a sequence up to the last query of a block."""
        new = self.q_len(seq)
        return self.row_len(seq) - new + jnp.minimum((q_block + 1) * MIXED_Q_BLOCK, new)

    def for_copies(self, seq, q_block, make_copy, act):
        """Acts on copies `make_copy(row of queries, token of the block, tokens)` that together hold a query block.

        They hold no other tokens: their sizes are powers of two.
        """
        tokens = jnp.minimum(self.q_len(seq) - q_block * MIXED_Q_BLOCK, MIXED_Q_BLOCK)
        for size in MIXED_COPY_SIZES:

            @pl.when((tokens & size) > 0)
            def act_on_part(size=size):
                first = tokens & ~(2 * size - 1)
                act(make_copy(self.q_start(seq) + q_block * MIXED_Q_BLOCK + first, first, size))

    # ---- Update of the cache: page by page, old tokens are kept and new ones put in.

    def update_pages(self, meanwhile):
        """Updates the pages of all sequences; `meanwhile` is called before the last of them are waited for."""
        start = (self.first_seq, self.first_page(self.first_seq))
        fetched = start
        for step in range(MIXED_UPDATE_LOOKAHEAD):
            fetched = self.load_page(jnp.int32(step), *fetched)
        steps, *_ = lax.while_loop(self.has_page, self.update_page, (jnp.int32(0), *start, *fetched))
        meanwhile()
        for_each(0, jnp.minimum(steps, MIXED_PAGE_BUFFERS), functools.partial(self.wait_last_write, steps))

    def has_page(self, carry):
        """Whether there is a page to update."""
        return carry[1] < self.end_seq

    def update_page(self, carry):
        """Updates one page, and loads what a later one needs."""
        step, seq, page, *fetched = carry
        fetched = self.load_page(step + MIXED_UPDATE_LOOKAHEAD, *fetched)
        pl.when(self.updated[lax.rem(step, MIXED_PAGE_BUFFERS)] > 0)(functools.partial(self.merge_page, step, seq, page))
        return step + 1, *self.next_page(seq, page), *fetched

    def wait_last_write(self, steps, index):
        """Waits for one of the last writes: all have as many bytes."""
        page, buffer = self.first_page(self.first_seq), lax.rem(steps - 1 - index, MIXED_PAGE_BUFFERS)
        write = self.page_write(self.first_seq, page, buffer)
        pl.when(self.updated[buffer] > 0)(write.wait)

    def first_page(self, seq):
        """The first page of a sequence that gets new tokens."""
        return lax.div(self.row_len(seq) - self.q_len(seq), PAGE_SIZE)

    def next_page(self, seq, page):
        """The page after a page, maybe of the next sequence."""
        last = (page + 1) * PAGE_SIZE >= self.row_len(seq)
        next_seq = jnp.where(last, seq + 1, seq)
        return next_seq, jnp.where(last, self.first_page(jnp.minimum(next_seq, self.end_seq - 1)), page + 1)

    def new_span(self, seq, page):
        """The new tokens of a page, as a range within it."""
        kv_len = self.row_len(seq)
        first = jnp.maximum(kv_len - self.q_len(seq) - page * PAGE_SIZE, 0)
        return first, jnp.minimum(kv_len - page * PAGE_SIZE, PAGE_SIZE)

    def load_page(self, step, seq, page):
        """Starts the copies of a page's new tokens, and of its old ones if it has any; returns the page after it."""
        buffer = lax.rem(step, MIXED_PAGE_BUFFERS)
        pl.when(seq < self.end_seq)(functools.partial(self.start_page_copies, step, seq, page, buffer))
        return self.page_after(seq, page)

    def page_after(self, seq, page):
        """The page after a page, if there is one."""
        next_seq, next_index = self.next_page(jnp.minimum(seq, self.end_seq - 1), page)
        return jnp.where(seq < self.end_seq, next_seq, seq), jnp.where(seq < self.end_seq, next_index, page)

    def start_page_copies(self, step, seq, page, buffer):
        """Starts them once the buffer is free."""

        @pl.when((step >= MIXED_PAGE_BUFFERS) & (self.updated[buffer] > 0))
        def wait_for_buffer():
            self.page_write(seq, page, buffer).wait()  # the write of MIXED_PAGE_BUFFERS steps ago: as many bytes, this semaphore

        pl.when(self.check_page(seq, page, buffer))(functools.partial(self.load_tokens, step, seq, page, buffer))

    def load_tokens(self, step, seq, page, buffer):
        """Starts the copies of a page's new tokens, and of its old ones if it has any."""
        for copy in self.new_token_copies(seq, page, lax.rem(step, MIXED_NEW_BUFFERS)):
            copy.start()
        first, end = self.new_span(seq, page)

        @pl.when((first > 0) | (end < PAGE_SIZE))
        def start_old_tokens():
            self.old_page_copy(seq, page, buffer).start()

    def old_page_copy(self, seq, page, buffer):
        physical = self.page_indices[seq * PAGES_PER_SEQ + page]
        return pltpu.make_async_copy(self.cache_hbm.at[physical], self.page_rows.at[buffer], self.old_sem.at[buffer])

    def page_write(self, seq, page, buffer):
        physical = self.page_indices[seq * PAGES_PER_SEQ + page]
        return pltpu.make_async_copy(self.page_rows.at[buffer], self.cache_hbm.at[physical], self.write_sem.at[buffer])

    def merge_page(self, step, seq, page):
        """Puts the new tokens into a page, and starts to write it."""
        buffer, new_buffer = lax.rem(step, MIXED_PAGE_BUFFERS), lax.rem(step, MIXED_NEW_BUFFERS)
        first, end = self.new_span(seq, page)
        for copy in self.new_token_copies(seq, page, new_buffer):
            copy.wait()

        @pl.when((first > 0) | (end < PAGE_SIZE))
        def wait_for_old_tokens():
            self.old_page_copy(seq, page, buffer).wait()

        merge = functools.partial(self.merge_tokens, buffer, new_buffer, first, end)
        for_each(lax.div(first, MIXED_MERGE_TOKENS), pl.cdiv(end, MIXED_MERGE_TOKENS), merge)
        self.page_write(seq, page, buffer).start()

    def new_token_copies(self, seq, page, buffer):
        """The copy of a page's new tokens."""
        # A copy has a fixed size: it is moved back at the end of the array, and lands moved by as much.
        wanted = self.q_start(seq) + page * PAGE_SIZE - (self.row_len(seq) - self.q_len(seq))
        source = jnp.clip(wanted, 0, self.new_hbm.shape[0] - MIXED_NEW_TOKENS)
        take, put = pl.ds(source, MIXED_NEW_TOKENS), pl.ds(PAGE_SIZE + source - wanted, MIXED_NEW_TOKENS)
        return (pltpu.make_async_copy(self.new_hbm.at[take], self.new_in.at[buffer, put], self.new_sem.at[buffer]),)

    def merge_tokens(self, buffer, new_buffer, first, end, index):
        """Puts new tokens into MIXED_MERGE_TOKENS tokens of a page, where they lie in `[first, end)`.

        They are put in as words of two tokens, so that the old ones stay bit for bit whatever they are.
        """
        start = pl.multiple_of(index * MIXED_MERGE_TOKENS, MIXED_MERGE_TOKENS)
        tiles = pl.ds(index * MIXED_MERGE_TILES, MIXED_MERGE_TILES)
        for i in range(MIXED_MERGE_TOKENS):
            self.merged[i : i + 1] = self.new_in[new_buffer, PAGE_SIZE + start + i].astype(jnp.float32)
        words = pltpu.bitcast(self.merged[...].astype(self.page_rows.dtype), jnp.uint32)
        low = start + 2 * lax.broadcasted_iota(jnp.int32, words.shape, 0)
        low_mask = jnp.where((low >= first) & (low < end), jnp.uint32(0xFFFF), jnp.uint32(0))
        mask = low_mask | jnp.where((low + 1 >= first) & (low + 1 < end), jnp.uint32(0xFFFF0000), jnp.uint32(0))
        old = pltpu.bitcast(self.page_rows[buffer, tiles].reshape(self.merged.shape), jnp.uint32)
        merged = pltpu.bitcast((words & mask) | (old & ~mask), self.page_rows.dtype)
        self.page_rows[buffer, tiles] = merged.reshape(MIXED_MERGE_TILES, SUBLANE_TILE, ROW_LANES)

    # ---- Fetches.

    def kv_end(self, seq, q_block):
        """The number of tokens that a query block attends to, from the first one on that is fetched."""
        return self.queries_end(seq, q_block)

    def advance(self, seq, q_block, q_step, block):
        """The step after a step."""
        last = (block + 1) * MIXED_KV_BLOCK >= self.kv_end(seq, q_block)
        last_of_seq = last & ((q_block + 1) * MIXED_Q_BLOCK >= self.q_len(seq))
        return (
            jnp.where(last_of_seq, seq + 1, seq),
            jnp.where(last, jnp.where(last_of_seq, 0, q_block + 1), q_block),
            jnp.where(last, q_step + 1, q_step),
            jnp.where(last, 0, block + 1),
        )

    def fetch_ahead(self, step, *at):
        """Starts the fetch of a step; returns the step after it."""
        self.start_fetch(step, at)
        return self.next_fetch(at)

    def start_fetch(self, step, at, wanted=True):
        """Starts the fetch of a step's KV block, and of its query block if it is the first one against that."""
        pl.when((at[0] < self.end_seq) & wanted)(functools.partial(self.start_copies, step, *at))

    def start_copies(self, step, seq, q_block, q_step, block):
        @pl.when(block == 0)
        def start_query_copies():
            self.for_query_copies(seq, q_block, lax.rem(q_step, MIXED_KV_BUFFERS), start_copy)

        end = self.kv_end(seq, q_block)
        self.start_block(end, seq, seq * PAGES_PER_SEQ, block, lax.rem(step, MIXED_KV_BUFFERS))

    def next_fetch(self, at):
        """The step after a step, if there is one."""
        seq, *within = at
        following = self.advance(jnp.minimum(seq, self.end_seq - 1), *within)
        return tuple(jnp.where(seq < self.end_seq, new, old) for new, old in zip(following, at))

    # ---- Bounds checks: `bad_row` says of which sequences a number cannot be.

    def num_tokens(self):
        """The number of rows of queries."""
        return self.q_hbm.shape[0]

    def checked_sequences(self):
        """The first sequence that is no decode row, and the end of them."""
        first = jnp.clip(self.distribution[0], 0, MIXED_DECODE_ROWS)
        return first, jnp.clip(self.distribution[2], first, MAX_SEQS)

    def check_row(self, seq, start):
        """Finds a sequence's new tokens, from `start` on, where those of the one before end; returns their end."""
        end = jnp.clip(self.cu_q_lens[seq + 1], start, self.num_tokens())
        new = jnp.minimum(end - start, MAX_NEW)
        least = new
        is_row = (self.kv_lens[seq] >= least) & (self.kv_lens[seq] <= ROW_TOKENS)
        self.q_starts[seq], self.q_lens[seq] = start, new
        self.row_lens[seq] = jnp.where(is_row, self.kv_lens[seq], least)
        self.bad_row[seq] = jnp.where(is_row, 0, 1)
        return end

    def row_len(self, seq):
        """The number of a sequence's tokens; where that cannot be, the least that it has."""
        return self.row_lens[seq]

    def check_page(self, seq, page, buffer):
        """Whether a page is to be updated: there are new tokens for it, its sequence is not bad, and nor is its id."""
        physical = self.page_indices[seq * PAGES_PER_SEQ + page]
        first, end = self.new_span(seq, page)
        has_id = is_page(physical, self.cache_hbm)
        self.bad_row[seq] = jnp.where(has_id, self.bad_row[seq], 1)
        self.updated[buffer] = jnp.where(has_id & (first < end) & (self.bad_row[seq] == 0), 1, 0)
        return self.updated[buffer] > 0

    def spoil_output(self, i):
        """Makes a part of an output block NaN."""
        self.out_rows[0, i] = jnp.full(self.out_rows.shape[2:], jnp.nan, self.out_rows.dtype)

    # ---- Query blocks, in and out in their natural layout: rows by token, then head.

    def for_query_copies(self, seq, q_block, buffer, act):
        """Acts on the copies of a query block and of its rotary parts."""
        for hbm, vmem in ((self.q_hbm, self.q_in), (self.q_rope_hbm, self.q_rope_in)):
            self.for_copies(seq, q_block, functools.partial(self.query_copy, hbm, vmem, buffer), act)

    def query_copy(self, hbm, vmem, buffer, row, first, size):
        place = vmem.at[buffer, pl.ds(first, size)]
        return pltpu.make_async_copy(hbm.at[pl.ds(row, size)], place, self.q_sem.at[buffer])

    def out_copy(self, row, first, size):
        source = self.out_rows.at[0, pl.ds(first, size)]
        return pltpu.make_async_copy(source, self.out_hbm.at[pl.ds(row, size)], self.out_sem.at[0])

    def store_query_block(self, seq, q_block, q_step, sent):
        """Starts to write the output of a query block, once that of the block before, `sent`, has been written."""

        @pl.when(q_step > 0)
        def wait_for_output():
            self.for_copies(*sent, self.out_copy, wait_copy)

        for_each(0, MIXED_ROW_STEPS, self.store_output)
        pl.when(self.bad_row[seq] > 0)(functools.partial(for_each, 0, self.out_rows.shape[1], self.spoil_output))
        self.for_copies(seq, q_block, self.out_copy, start_copy)

    def store_output(self, step):
        """Stores the output of a flash step's rows, and clears their running state for the next query block."""
        tokens, rows = self.rows_of_step(step)
        out = (self.acc[rows] / broadcast_lanes(self.row_sum[rows], RANK)).astype(self.out_rows.dtype)
        self.out_rows[0, tokens] = out.reshape(MIXED_STEP_TOKENS, Q_HEADS, RANK)
        self.clear_rows(rows)

    def clear_state(self, step):
        self.clear_rows(self.rows_of_step(step)[1])

    def clear_rows(self, rows):
        """Makes the running state of some rows what it is before their first block."""
        for state, value in ((self.row_max, MASKED), (self.row_sum, 0.0), (self.acc, 0.0)):
            state[rows] = jnp.full((rows.size, state.shape[-1]), value)

    def rows_of_step(self, step):
        """The tokens of a flash step in a query block, and their rows in the running state."""
        rows = pl.ds(pl.multiple_of(step * MIXED_STEP_ROWS, MIXED_STEP_ROWS), MIXED_STEP_ROWS)
        return pl.ds(step * MIXED_STEP_TOKENS, MIXED_STEP_TOKENS), rows

    # ---- Flash steps: MIXED_STEP_ROWS query rows against one block.

    def attend_block(self, q_buffer, buffer, first_query):
        """One KV block, in which the first query is at `first_query` and so sees the tokens up to there."""

        @pl.when(first_query >= MIXED_KV_BLOCK - 1)
        def attend_full_block():
            self.flash_steps(functools.partial(self.score, q_buffer, buffer), buffer, 0, MIXED_ROW_STEPS)

        @pl.when(first_query < MIXED_KV_BLOCK - 1)
        def attend_diagonal_block():
            score = functools.partial(self.masked_score, q_buffer, buffer, first_query)
            for_each(0, MIXED_DIAGONAL_ITERATIONS, functools.partial(self.diagonal_steps, score, buffer))

    def diagonal_steps(self, score, buffer, iteration):
        self.flash_steps(score, buffer, iteration * MIXED_DIAGONAL_STEPS, MIXED_DIAGONAL_STEPS)

    def flash_steps(self, score, buffer, first, count):
        """Some steps as one piece of code; scores are made a step ahead, so that the MXU need not wait for a softmax."""
        scores = [score(first)]
        for step in range(count):
            if step + 1 < count:
                scores.append(score(first + step + 1))
            self.accumulate_pv(scores[step], buffer, first + step)

    def score(self, q_buffer, buffer, step):
        """The scores of a step, float32[MIXED_STEP_ROWS, MIXED_KV_BLOCK]."""
        tokens, _ = self.rows_of_step(step)
        parts = [array[q_buffer, tokens].reshape(MIXED_STEP_ROWS, array.shape[-1]) for array in (self.q_in, self.q_rope_in)]
        queries = jnp.concatenate(parts, axis=1)
        return matmul(queries, self.kv[buffer].reshape(MIXED_KV_BLOCK, ROW_LANES), 1) * SCORE_SCALE

    def masked_score(self, q_buffer, buffer, first_query, step):
        """The same where not all queries see all tokens."""
        scores = self.score(q_buffer, buffer, step)
        row, token = (lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in range(2))
        query = first_query + step * MIXED_STEP_TOKENS + row // Q_HEADS
        return jnp.where(token <= query, scores, MASKED)

    def accumulate_pv(self, scores, buffer, step):
        """The softmax of a step's scores, and the values that it weighs."""
        _, rows = self.rows_of_step(step)
        old_max = self.row_max[rows]
        new_max = jnp.maximum(old_max, jnp.max(scores, axis=1, keepdims=True))
        p = jnp.exp2(scores - broadcast_lanes(new_max, MIXED_KV_BLOCK))
        alpha = jnp.exp2(old_max - new_max)
        self.row_max[rows] = new_max
        self.row_sum[rows] = alpha * self.row_sum[rows] + jnp.sum(p, axis=1, keepdims=True)
        p = p.astype(jnp.bfloat16)
        values = matmul(p, self.kv[buffer, ..., :RANK].reshape(MIXED_KV_BLOCK, RANK), 0)
        self.acc[rows] = broadcast_lanes(alpha, RANK) * self.acc[rows] + values


def mixed_kernel(*refs):
    MixedKernel(*refs).run()


def attend_mixed(queries, padded_rope, new_rows, cache, out, kv_lens, page_indices, cu_q_lens, distribution):
    """`(out, cache)` of the sequences that are not decode; other rows of `out` stay as they are."""
    scalars = (kv_lens, page_indices, cu_q_lens, distribution)
    arrays = (queries, padded_rope, new_rows, cache, out)
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        mixed_kernel,
        in_specs=[smem] * len(scalars) + [hbm] * len(arrays),
        out_specs=[hbm] * 2,
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        ],
        input_output_aliases={7: 1, 8: 0},  # results in the memory of operands
        scratch_shapes=[
            pltpu.VMEM((MIXED_KV_BUFFERS, MIXED_KV_BLOCK // PAGE_SIZE, PAGE_TILES, SUBLANE_TILE, ROW_LANES), jnp.bfloat16),  # kv
            pltpu.VMEM((MIXED_NEW_BUFFERS, 2 * PAGE_SIZE + MIXED_NEW_TOKENS, 1, ROW_LANES), jnp.bfloat16),  # new_in
            pltpu.VMEM((MIXED_PAGE_BUFFERS, PAGE_TILES, SUBLANE_TILE, ROW_LANES), jnp.bfloat16),  # page_rows
            pltpu.VMEM((MIXED_MERGE_TOKENS, ROW_LANES), jnp.float32),  # merged
            pltpu.VMEM((MIXED_KV_BUFFERS, MIXED_Q_BLOCK, Q_HEADS, RANK), jnp.bfloat16),  # q_in
            pltpu.VMEM((MIXED_KV_BUFFERS, MIXED_Q_BLOCK, Q_HEADS, ROW_LANES - RANK), jnp.bfloat16),  # q_rope_in
            pltpu.VMEM((MIXED_Q_ROWS, LANES), jnp.float32),  # row_max
            pltpu.VMEM((MIXED_Q_ROWS, LANES), jnp.float32),  # row_sum
            pltpu.VMEM((MIXED_Q_ROWS, RANK), jnp.float32),  # acc
            pltpu.VMEM((1, MIXED_Q_BLOCK, Q_HEADS, RANK), jnp.bfloat16),  # out_rows
            pltpu.SMEM((MIXED_KV_BUFFERS,), jnp.int32),  # fetched
            pltpu.SMEM((MAX_SEQS,), jnp.int32),  # bad_row
            pltpu.SMEM((MAX_SEQS,), jnp.int32),  # q_starts
            pltpu.SMEM((MAX_SEQS,), jnp.int32),  # q_lens
            pltpu.SMEM((MAX_SEQS,), jnp.int32),  # row_lens
            pltpu.SMEM((MIXED_PAGE_BUFFERS,), jnp.int32),  # updated
            pltpu.SemaphoreType.DMA((MIXED_KV_BUFFERS,)),  # kv_sem
            pltpu.SemaphoreType.DMA((MIXED_NEW_BUFFERS,)),  # new_sem
            pltpu.SemaphoreType.DMA((MIXED_PAGE_BUFFERS,)),  # old_sem
            pltpu.SemaphoreType.DMA((MIXED_PAGE_BUFFERS,)),  # write_sem
            pltpu.SemaphoreType.DMA((MIXED_KV_BUFFERS,)),  # q_sem
            pltpu.SemaphoreType.DMA((1,)),  # out_sem
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True),
        name="rpa_mixed",
    )(*scalars, *arrays)


def ragged_paged_attention(queries, queries_rope, new_kv, new_rope, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of any batch, decode rows first; returns `(out, kv_cache)`, the cache in the donated argument's memory.
    """
    padded_rope, new_rows = pad_rope(queries_rope), rows_of_new_tokens(new_kv, new_rope)
    out, cache = attend_decode(queries, queries_rope, new_kv, new_rope, cache_rows(kv_cache), kv_lens, page_indices, distribution)
    out, cache = attend_mixed(queries, padded_rope, new_rows, cache, out, kv_lens, page_indices, cu_q_lens, distribution)
    return out, rows_cache(cache, kv_cache.shape)
