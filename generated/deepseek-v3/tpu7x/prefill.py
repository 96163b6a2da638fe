"""Ragged paged attention of deepseek-v3: prefill batches on tpu7x.

Do not edit: made from spec beb302e5bf7ae58bc4f843b176ce5570766fe5e900ecc5ba857bb2b7b12d0229 by
    rpac build SPEC --target tpu7x
Change the spec or the templates and run it again.

What was specialized:
- latent attention, absorbed: 128 query heads over one latent vector of 512 and one rotary key of 64 a token, bfloat16:
  constants
- cache rows of 640 lanes, 5 registers' width: latent vector, rotary key, padding
- pages of 128 tokens, 64 a sequence, up to 64 sequences
- token buckets that use it: 256, 1024
- causal, cache updated
- only prefill batches: the other kernels are not in this program
- prefill: blocks of 16 queries with all their heads against 512 fetched tokens (3 buffers); computes 256 query rows at
  once
- page tables: in SMEM; the tables of all sequences fit there, where a page id is one load away
- prefill, loop: blocks of queries with all their heads; all heads read the same row of a token
- prefill, reading K and V: one row of a token for all query heads; the latent vector is part of every key and is every
  value
- prefill, writing new tokens: latent vector and rotary key in one row; that is how latent attention stores a token
- prefill, mask: by comparing positions; this works with any mask and needs no MXU lanes
- prefill, scores: a row for each query; this needs neither MXU lanes to spare nor whole registers of rows
- prefill, softmax: not paced; this needs no buffers but those of the lookahead, and steps of any length
- prefill, lookahead: none; a step has the rows of all heads, which keep the MXU busy
- prefill, sorting queries: not at all; all query heads read the same row of a token
- prefill, between blocks: each block makes its own first scores; other tiles, or the splitting of words, may come
  between
- prefill, sums of probabilities: on the vector unit; this needs no MXU lanes
- prefill, values: whole registers of lanes; the MXU takes them as they lie in the cache
- VMEM: 28,844,032 bytes counted, 41,943,040 allowed, 67,108,864 available
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
MAX_SEQS = 64
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 64
ROW_TOKENS = PAGES_PER_SEQ * PAGE_SIZE  # that a sequence's page table has room for
CHUNK_LEAST = 256  # tokens of a sequence
CHUNK = 256  # new tokens of every sequence
SCORE_SCALE = 0.10411754627697266  # 0.07216878364870323 (the softmax scale) * log2(e): probabilities are powers of two
MASKED = -2e+38  # finite, so that a row that is all masked stays a number
PRECISION = None  # of matmuls: bfloat16 products are exact in float32
VMEM_LIMIT = 41943040  # bytes
RANK = 512  # lanes of a latent vector, which is the value and part of the key
ROW_LANES = 640  # of a token's row in the cache: the latent vector, 64 of the rotary key, 64 of padding
SUBLANE_TILE = 8  # tokens of a tile of the cache in HBM, and in VMEM: a copy from one to the other moves no rows
PAGE_TILES = 16

Q_BLOCK = 16  # query tokens of a query block
Q_ROWS = Q_BLOCK * Q_HEADS
KV_BLOCK = 512  # tokens that are fetched and computed at once
KV_BUFFERS = 3  # KV blocks, and query blocks, in VMEM
FETCH_LOOKAHEAD = KV_BUFFERS - 1  # steps that the fetch runs ahead
STEP_ROWS = 256  # query rows of a flash step
STEP_TOKENS = STEP_ROWS // Q_HEADS
ROW_STEPS = Q_ROWS // STEP_ROWS  # flash steps of a query block
DIAGONAL_STEPS = 4  # of them, one piece of code on the diagonal
DIAGONAL_ITERATIONS = ROW_STEPS // DIAGONAL_STEPS
PAGE_BUFFERS = 9  # pages under update
NEW_BUFFERS = 5  # pages whose new tokens are fetched or in use
UPDATE_LOOKAHEAD = 4  # pages that their fetch runs ahead
NEW_TOKENS = 128  # tokens of such a fetch
MERGE_TOKENS = 16  # new tokens that are put into a page at once
MERGE_TILES = MERGE_TOKENS // SUBLANE_TILE


def for_each(first, end, body):
    """Runs `body(index)` for each index in [first, end), as one piece of code."""

    def run(index, _):
        body(index)
        return 0

    lax.fori_loop(first, end, run, 0)


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
class PrefillKernel(PagedKernel):
    """CHUNK new tokens for each of the sequences [0, distribution[1]).

    First the new tokens get into the pages of the cache. Then a step is one KV block against one query block, of all query
    heads; the fetch runs FETCH_LOOKAHEAD steps ahead, across the ends of both.
    """

    # Scalars in SMEM.
    kv_lens: Ref  # int32[MAX_SEQS]
    page_indices: Ref  # int32[MAX_SEQS * PAGES_PER_SEQ]
    distribution: Ref  # int32[3]
    # Arrays in HBM.
    q_hbm: Ref  # bfloat16[tokens, Q_HEADS, RANK]
    q_rope_hbm: Ref  # bfloat16[tokens, Q_HEADS, ROW_LANES - RANK]
    new_hbm: Ref  # bfloat16[tokens, 1, ROW_LANES]
    cache_in: Ref  # bfloat16[pages, PAGE_TILES, SUBLANE_TILE, ROW_LANES]: the memory of cache_hbm
    out_hbm: Ref  # bfloat16[tokens, Q_HEADS, RANK]
    cache_hbm: Ref  # bfloat16[pages, PAGE_TILES, SUBLANE_TILE, ROW_LANES]
    # Scratch arrays in VMEM, and semaphores.
    kv: Ref  # bfloat16[KV_BUFFERS, KV_BLOCK // PAGE_SIZE, PAGE_TILES, SUBLANE_TILE, ROW_LANES]: fetched blocks
    new_in: Ref  # bfloat16[NEW_BUFFERS, 2 * PAGE_SIZE + NEW_TOKENS, 1, ROW_LANES]: new tokens, around the page they go to
    page_rows: Ref  # bfloat16[PAGE_BUFFERS, PAGE_TILES, SUBLANE_TILE, ROW_LANES]: pages to update
    merged: Ref  # float32[MERGE_TOKENS, ROW_LANES]: new tokens, side by side
    q_in: Ref  # bfloat16[KV_BUFFERS, Q_BLOCK, Q_HEADS, RANK]: query blocks as they come
    q_rope_in: Ref  # bfloat16[KV_BUFFERS, Q_BLOCK, Q_HEADS, ROW_LANES - RANK]: their rotary parts
    row_max: Ref  # float32[Q_ROWS, LANES]: running maximum, the same in every lane
    row_sum: Ref  # float32[Q_ROWS, LANES]: running sum, the same in every lane
    acc: Ref  # float32[Q_ROWS, RANK]: running output
    out_rows: Ref  # bfloat16[1, Q_BLOCK, Q_HEADS, RANK]: an output block on its way out
    fetched: Ref  # int32[KV_BUFFERS]: pages that are fetched into each buffer
    bad_row: Ref  # int32[MAX_SEQS]: whether each sequence is bad
    updated: Ref  # int32[PAGE_BUFFERS]: whether each page under update is written
    kv_sem: Ref  # DMA[KV_BUFFERS]: fetches
    new_sem: Ref  # DMA[NEW_BUFFERS]: new tokens
    old_sem: Ref  # DMA[PAGE_BUFFERS]: pages that hold old tokens
    write_sem: Ref  # DMA[PAGE_BUFFERS]: cache writes
    q_sem: Ref  # DMA[KV_BUFFERS]: query blocks
    out_sem: Ref  # DMA[1]: output blocks

    block_pages = KV_BLOCK // PAGE_SIZE
    computed_tokens = KV_BLOCK

    def run(self):
        self.first_seq, self.end_seq = self.sequences()
        pl.when(self.first_seq < self.end_seq)(self.attend)

    def attend(self):
        """Updates the pages, goes through the query blocks of all sequences, and for each through the KV blocks that it sees."""
        start = (self.first_seq, jnp.int32(0), jnp.int32(0), jnp.int32(0))
        for_each(0, self.end_seq, self.check_row)
        # The first block comes while the last pages go, if none of these is in it.
        early = self.first_page(self.first_seq) >= self.block_pages
        self.update_pages(functools.partial(self.start_fetch, 0, start, early))
        for_each(0, ROW_STEPS, self.clear_state)
        self.start_fetch(0, start, ~early)
        fetched = self.next_fetch(start)
        for step in range(1, FETCH_LOOKAHEAD):
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
        fetched = self.fetch_ahead(step + FETCH_LOOKAHEAD, *fetched)
        buffer, q_buffer = lax.rem(step, KV_BUFFERS), lax.rem(q_step, KV_BUFFERS)
        end = self.kv_end(seq, q_block)
        last = (block + 1) * KV_BLOCK >= end
        pl.when(block == 0)(functools.partial(self.for_query_copies, seq, q_block, q_buffer, wait_copy))
        self.wait_block(end, block, buffer)

        @pl.when(last)
        def clear_last_block():
            self.clear_tail(buffer, end - block * KV_BLOCK)

        first_query = self.row_len(seq) - self.q_len(seq) + q_block * Q_BLOCK - block * KV_BLOCK
        self.attend_block(q_buffer, buffer, first_query)
        pl.when(last)(functools.partial(self.store_query_block, seq, q_block, q_step, sent))
        sent = tuple(jnp.where(last, new, old) for new, old in zip((seq, q_block), sent))
        return step + 1, self.advance(*at), fetched, sent

    # ---- Sequences: CHUNK new tokens each.

    def sequences(self):
        """The first sequence of the kernel, and the end of them."""
        return jnp.int32(0), jnp.clip(self.distribution[1], 0, min(MAX_SEQS, self.num_tokens() // CHUNK))

    def q_start(self, seq):
        """The row of a sequence's first new token."""
        return seq * CHUNK

    def q_len(self, seq):
        """The number of its new tokens."""
        return CHUNK

    def queries_end(self, seq, q_block):
        """The number of tokens of a sequence up to the last query of a block."""
        return self.row_len(seq) - CHUNK + (q_block + 1) * Q_BLOCK

    def for_copies(self, seq, q_block, make_copy, act):
        """Acts on the copy `make_copy(row of queries, token of the block, tokens)` that holds a query block."""
        act(make_copy(pl.multiple_of(self.q_start(seq) + q_block * Q_BLOCK, Q_BLOCK), 0, Q_BLOCK))

    # ---- Update of the cache: page by page, old tokens are kept and new ones put in.

    def update_pages(self, meanwhile):
        """Updates the pages of all sequences; `meanwhile` is called before the last of them are waited for."""
        start = (self.first_seq, self.first_page(self.first_seq))
        fetched = start
        for step in range(UPDATE_LOOKAHEAD):
            fetched = self.load_page(jnp.int32(step), *fetched)
        steps, *_ = lax.while_loop(self.has_page, self.update_page, (jnp.int32(0), *start, *fetched))
        meanwhile()
        for_each(0, jnp.minimum(steps, PAGE_BUFFERS), functools.partial(self.wait_last_write, steps))

    def has_page(self, carry):
        """Whether there is a page to update."""
        return carry[1] < self.end_seq

    def update_page(self, carry):
        """Updates one page, and loads what a later one needs."""
        step, seq, page, *fetched = carry
        fetched = self.load_page(step + UPDATE_LOOKAHEAD, *fetched)
        pl.when(self.updated[lax.rem(step, PAGE_BUFFERS)] > 0)(functools.partial(self.merge_page, step, seq, page))
        return step + 1, *self.next_page(seq, page), *fetched

    def wait_last_write(self, steps, index):
        """Waits for one of the last writes: all have as many bytes."""
        page, buffer = self.first_page(self.first_seq), lax.rem(steps - 1 - index, PAGE_BUFFERS)
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
        buffer = lax.rem(step, PAGE_BUFFERS)
        pl.when(seq < self.end_seq)(functools.partial(self.start_page_copies, step, seq, page, buffer))
        return self.page_after(seq, page)

    def page_after(self, seq, page):
        """The page after a page, if there is one."""
        next_seq, next_index = self.next_page(jnp.minimum(seq, self.end_seq - 1), page)
        return jnp.where(seq < self.end_seq, next_seq, seq), jnp.where(seq < self.end_seq, next_index, page)

    def start_page_copies(self, step, seq, page, buffer):
        """Starts them once the buffer is free."""

        @pl.when((step >= PAGE_BUFFERS) & (self.updated[buffer] > 0))
        def wait_for_buffer():
            self.page_write(seq, page, buffer).wait()  # the write of PAGE_BUFFERS steps ago: as many bytes, this semaphore

        pl.when(self.check_page(seq, page, buffer))(functools.partial(self.load_tokens, step, seq, page, buffer))

    def load_tokens(self, step, seq, page, buffer):
        """Starts the copies of a page's new tokens, and of its old ones if it has any."""
        for copy in self.new_token_copies(seq, page, lax.rem(step, NEW_BUFFERS)):
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
        buffer, new_buffer = lax.rem(step, PAGE_BUFFERS), lax.rem(step, NEW_BUFFERS)
        first, end = self.new_span(seq, page)
        for copy in self.new_token_copies(seq, page, new_buffer):
            copy.wait()

        @pl.when((first > 0) | (end < PAGE_SIZE))
        def wait_for_old_tokens():
            self.old_page_copy(seq, page, buffer).wait()

        merge = functools.partial(self.merge_tokens, buffer, new_buffer, first, end)
        for_each(lax.div(first, MERGE_TOKENS), pl.cdiv(end, MERGE_TOKENS), merge)
        self.page_write(seq, page, buffer).start()

    def new_token_copies(self, seq, page, buffer):
        """The copy of a page's new tokens."""
        # A copy has a fixed size: it is moved back at the end of the array, and lands moved by as much.
        wanted = self.q_start(seq) + page * PAGE_SIZE - (self.row_len(seq) - self.q_len(seq))
        source = jnp.clip(wanted, 0, self.new_hbm.shape[0] - NEW_TOKENS)
        take, put = pl.ds(source, NEW_TOKENS), pl.ds(PAGE_SIZE + source - wanted, NEW_TOKENS)
        return (pltpu.make_async_copy(self.new_hbm.at[take], self.new_in.at[buffer, put], self.new_sem.at[buffer]),)

    def merge_tokens(self, buffer, new_buffer, first, end, index):
        """Puts new tokens into MERGE_TOKENS tokens of a page, where they lie in `[first, end)`.

        They are put in as words of two tokens, so that the old ones stay bit for bit whatever they are.
        """
        start = pl.multiple_of(index * MERGE_TOKENS, MERGE_TOKENS)
        tiles = pl.ds(index * MERGE_TILES, MERGE_TILES)
        for i in range(MERGE_TOKENS):
            self.merged[i : i + 1] = self.new_in[new_buffer, PAGE_SIZE + start + i].astype(jnp.float32)
        words = pltpu.bitcast(self.merged[...].astype(self.page_rows.dtype), jnp.uint32)
        low = start + 2 * lax.broadcasted_iota(jnp.int32, words.shape, 0)
        low_mask = jnp.where((low >= first) & (low < end), jnp.uint32(0xFFFF), jnp.uint32(0))
        mask = low_mask | jnp.where((low + 1 >= first) & (low + 1 < end), jnp.uint32(0xFFFF0000), jnp.uint32(0))
        old = pltpu.bitcast(self.page_rows[buffer, tiles].reshape(self.merged.shape), jnp.uint32)
        merged = pltpu.bitcast((words & mask) | (old & ~mask), self.page_rows.dtype)
        self.page_rows[buffer, tiles] = merged.reshape(MERGE_TILES, SUBLANE_TILE, ROW_LANES)

    # ---- Fetches.

    def kv_end(self, seq, q_block):
        """The number of tokens that a query block attends to, from the first one on that is fetched."""
        return self.queries_end(seq, q_block)

    def advance(self, seq, q_block, q_step, block):
        """The step after a step."""
        last = (block + 1) * KV_BLOCK >= self.kv_end(seq, q_block)
        last_of_seq = last & ((q_block + 1) * Q_BLOCK >= self.q_len(seq))
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
            self.for_query_copies(seq, q_block, lax.rem(q_step, KV_BUFFERS), start_copy)

        end = self.kv_end(seq, q_block)
        self.start_block(end, seq, seq * PAGES_PER_SEQ, block, lax.rem(step, KV_BUFFERS))

    def next_fetch(self, at):
        """The step after a step, if there is one."""
        seq, *within = at
        following = self.advance(jnp.minimum(seq, self.end_seq - 1), *within)
        return tuple(jnp.where(seq < self.end_seq, new, old) for new, old in zip(following, at))

    # ---- Bounds checks: `bad_row` says of which sequences a number cannot be.

    def num_tokens(self):
        """The number of rows of queries."""
        return self.q_hbm.shape[0]

    def check_row(self, seq):
        self.bad_row[seq] = jnp.where(self.is_row(seq), 0, 1)

    def is_row(self, seq):
        """Whether the number of a sequence's tokens can be one: from CHUNK_LEAST to ROW_TOKENS."""
        return (self.kv_lens[seq] - CHUNK_LEAST).astype(jnp.uint32) <= jnp.uint32(ROW_TOKENS - CHUNK_LEAST)

    def row_len(self, seq):
        """The number of a sequence's tokens; where that cannot be, CHUNK_LEAST."""
        return jnp.where(self.is_row(seq), self.kv_lens[seq], CHUNK_LEAST)

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

        for_each(0, ROW_STEPS, self.store_output)
        pl.when(self.bad_row[seq] > 0)(functools.partial(for_each, 0, self.out_rows.shape[1], self.spoil_output))
        self.for_copies(seq, q_block, self.out_copy, start_copy)

    def store_output(self, step):
        """Stores the output of a flash step's rows, and clears their running state for the next query block."""
        tokens, rows = self.rows_of_step(step)
        out = (self.acc[rows] / broadcast_lanes(self.row_sum[rows], RANK)).astype(self.out_rows.dtype)
        self.out_rows[0, tokens] = out.reshape(STEP_TOKENS, Q_HEADS, RANK)
        self.clear_rows(rows)

    def clear_state(self, step):
        self.clear_rows(self.rows_of_step(step)[1])

    def clear_rows(self, rows):
        """Makes the running state of some rows what it is before their first block."""
        for state, value in ((self.row_max, MASKED), (self.row_sum, 0.0), (self.acc, 0.0)):
            state[rows] = jnp.full((rows.size, state.shape[-1]), value)

    def rows_of_step(self, step):
        """The tokens of a flash step in a query block, and their rows in the running state."""
        rows = pl.ds(pl.multiple_of(step * STEP_ROWS, STEP_ROWS), STEP_ROWS)
        return pl.ds(step * STEP_TOKENS, STEP_TOKENS), rows

    # ---- Flash steps: STEP_ROWS query rows against one block.

    def attend_block(self, q_buffer, buffer, first_query):
        """One KV block, in which the first query is at `first_query` and so sees the tokens up to there."""

        @pl.when(first_query >= KV_BLOCK - 1)
        def attend_full_block():
            self.flash_steps(functools.partial(self.score, q_buffer, buffer), buffer, 0, ROW_STEPS)

        @pl.when(first_query < KV_BLOCK - 1)
        def attend_diagonal_block():
            score = functools.partial(self.masked_score, q_buffer, buffer, first_query)
            for_each(0, DIAGONAL_ITERATIONS, functools.partial(self.diagonal_steps, score, buffer))

    def diagonal_steps(self, score, buffer, iteration):
        self.flash_steps(score, buffer, iteration * DIAGONAL_STEPS, DIAGONAL_STEPS)

    def flash_steps(self, score, buffer, first, count):
        """Some steps as one piece of code; scores are made a step ahead, so that the MXU need not wait for a softmax."""
        scores = [score(first)]
        for step in range(count):
            if step + 1 < count:
                scores.append(score(first + step + 1))
            self.accumulate_pv(scores[step], buffer, first + step)

    def score(self, q_buffer, buffer, step):
        """The scores of a step, float32[STEP_ROWS, KV_BLOCK]."""
        tokens, _ = self.rows_of_step(step)
        parts = [array[q_buffer, tokens].reshape(STEP_ROWS, array.shape[-1]) for array in (self.q_in, self.q_rope_in)]
        queries = jnp.concatenate(parts, axis=1)
        return matmul(queries, self.kv[buffer].reshape(KV_BLOCK, ROW_LANES), 1) * SCORE_SCALE

    def masked_score(self, q_buffer, buffer, first_query, step):
        """The same where not all queries see all tokens."""
        scores = self.score(q_buffer, buffer, step)
        row, token = (lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in range(2))
        query = first_query + step * STEP_TOKENS + row // Q_HEADS
        return jnp.where(token <= query, scores, MASKED)

    def accumulate_pv(self, scores, buffer, step):
        """The softmax of a step's scores, and the values that it weighs."""
        _, rows = self.rows_of_step(step)
        old_max = self.row_max[rows]
        new_max = jnp.maximum(old_max, jnp.max(scores, axis=1, keepdims=True))
        p = jnp.exp2(scores - broadcast_lanes(new_max, KV_BLOCK))
        alpha = jnp.exp2(old_max - new_max)
        self.row_max[rows] = new_max
        self.row_sum[rows] = alpha * self.row_sum[rows] + jnp.sum(p, axis=1, keepdims=True)
        p = p.astype(jnp.bfloat16)
        values = matmul(p, self.kv[buffer, ..., :RANK].reshape(KV_BLOCK, RANK), 0)
        self.acc[rows] = broadcast_lanes(alpha, RANK) * self.acc[rows] + values


def prefill_kernel(*refs):
    PrefillKernel(*refs).run()


def attend_prefill(queries, padded_rope, new_rows, cache, kv_lens, page_indices, distribution):
    """`(out, cache)` of the prefill sequences; other rows of `out` are undefined."""
    scalars = (kv_lens, page_indices, distribution)
    arrays = (queries, padded_rope, new_rows, cache)
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        prefill_kernel,
        in_specs=[smem] * len(scalars) + [hbm] * len(arrays),
        out_specs=[hbm] * 2,
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, queries.dtype),
            jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        ],
        input_output_aliases={6: 1},  # results in the memory of operands
        scratch_shapes=[
            pltpu.VMEM((KV_BUFFERS, KV_BLOCK // PAGE_SIZE, PAGE_TILES, SUBLANE_TILE, ROW_LANES), jnp.bfloat16),  # kv
            pltpu.VMEM((NEW_BUFFERS, 2 * PAGE_SIZE + NEW_TOKENS, 1, ROW_LANES), jnp.bfloat16),  # new_in
            pltpu.VMEM((PAGE_BUFFERS, PAGE_TILES, SUBLANE_TILE, ROW_LANES), jnp.bfloat16),  # page_rows
            pltpu.VMEM((MERGE_TOKENS, ROW_LANES), jnp.float32),  # merged
            pltpu.VMEM((KV_BUFFERS, Q_BLOCK, Q_HEADS, RANK), jnp.bfloat16),  # q_in
            pltpu.VMEM((KV_BUFFERS, Q_BLOCK, Q_HEADS, ROW_LANES - RANK), jnp.bfloat16),  # q_rope_in
            pltpu.VMEM((Q_ROWS, LANES), jnp.float32),  # row_max
            pltpu.VMEM((Q_ROWS, LANES), jnp.float32),  # row_sum
            pltpu.VMEM((Q_ROWS, RANK), jnp.float32),  # acc
            pltpu.VMEM((1, Q_BLOCK, Q_HEADS, RANK), jnp.bfloat16),  # out_rows
            pltpu.SMEM((KV_BUFFERS,), jnp.int32),  # fetched
            pltpu.SMEM((MAX_SEQS,), jnp.int32),  # bad_row
            pltpu.SMEM((PAGE_BUFFERS,), jnp.int32),  # updated
            pltpu.SemaphoreType.DMA((KV_BUFFERS,)),  # kv_sem
            pltpu.SemaphoreType.DMA((NEW_BUFFERS,)),  # new_sem
            pltpu.SemaphoreType.DMA((PAGE_BUFFERS,)),  # old_sem
            pltpu.SemaphoreType.DMA((PAGE_BUFFERS,)),  # write_sem
            pltpu.SemaphoreType.DMA((KV_BUFFERS,)),  # q_sem
            pltpu.SemaphoreType.DMA((1,)),  # out_sem
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True),
        name="rpa_prefill",
    )(*scalars, *arrays)


def ragged_paged_attention(queries, queries_rope, new_kv, new_rope, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of a batch of prefill chunks only; returns `(out, kv_cache)`, the cache in the donated argument's memory.

    Sequence s has rows [s * CHUNK, (s + 1) * CHUNK) of `queries`: `cu_q_lens` is not used.
    """
    padded_rope, new_rows = pad_rope(queries_rope), rows_of_new_tokens(new_kv, new_rope)
    out, cache = attend_prefill(queries, padded_rope, new_rows, cache_rows(kv_cache), kv_lens, page_indices, distribution)
    return out, rows_cache(cache, kv_cache.shape)
