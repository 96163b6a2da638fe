"""Ragged paged attention of tiny: prefill batches on v6e.

Do not edit: made from spec 3de066af1377b317d86956a1fbe291a7894ac227d8fccddc375bafff6a375652 by
    rpac build SPEC --target v6e
Change the spec or the templates and run it again.

What was specialized:
- 4 query heads over 2 KV heads, head_dim 128, queries bfloat16, KV bfloat16: constants
- pages of 16 tokens, 32 a sequence, up to 4 sequences
- token buckets that use it: 32
- causal, cache updated; no soft cap, sliding window, sinks, ALiBi or KV scales in the spec: none is in the code
- only prefill batches: the other kernels are not in this program
- prefill: blocks of 16 queries against 128 fetched tokens (3 buffers); computes 32 query rows of a head against 128
  tokens at once
- page tables: in SMEM; the tables of all sequences fit there, where a page id is one load away
- prefill, loop: blocks of queries over blocks of tokens; a fetched token serves all queries of a block
- prefill, reading K and V: 32-bit words are split into K and V; interleaved K and V narrower than 32 bits share words,
  which the MXU cannot take
- prefill, writing new tokens: K and V of one token packed into the halves of words; 16-bit K and V are interleaved
- prefill, mask: by comparing positions; this works with any mask and needs no MXU lanes
- prefill, scores: a row for each query; this needs neither MXU lanes to spare nor whole registers of rows
- prefill, softmax: not paced; this needs no buffers but those of the lookahead, and steps of any length
- prefill, lookahead: steps from a score to its probability: 1 in full tiles, 1 on the diagonal; the MXU works while the
  vector unit does softmax
- prefill, sorting queries: by strided loads and stores; the queries of a token for a KV head are no whole part of a
  register
- prefill, between blocks: each block makes its own first scores; other tiles, or the splitting of words, may come
  between
- prefill, sums of probabilities: by ones beside the values; MXU lanes to spare add them at no cost
- prefill, values: whole registers of lanes; the MXU takes them as they lie in the cache
- VMEM: 1,327,104 bytes counted, 16,777,216 allowed, 134,217,728 available
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Ref, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
Q_HEADS = 4
KV_HEADS = 2
GROUP = 2  # query heads that share a KV head
PADDED_Q_HEADS = 8  # Q_HEADS, up to whole sublane tiles
HEAD_DIM = 128
HEAD_LANES = 128  # of a row of the cache
LANE_TILES = 1  # rows of LANES lanes that hold one head's K
MAX_SEQS = 4
PAGE_SIZE = 16  # tokens
PAGES_PER_SEQ = 32
ROW_TOKENS = PAGES_PER_SEQ * PAGE_SIZE  # that a sequence's page table has room for
CHUNK_LEAST = 16  # tokens of a sequence
CHUNK = 16  # new tokens of every sequence
SCORE_SCALE = 0.12751743082459868  # 0.08838834764831845 (the softmax scale) * log2(e): probabilities are powers of two
MASKED = -2e+38  # finite, so that a row that is all masked stays a number
PRECISION = None  # of matmuls: bfloat16 products are exact in float32
VMEM_LIMIT = 16777216  # bytes
HALF_BITS = 16  # of a 32-bit word
PACKING = 2  # elements of the cache in one 32-bit word
TOKEN_ROWS = 4  # rows of one token in the cache
WORD_ROWS = 2  # the same rows as 32-bit words
PAGE_ROWS = 64  # rows of one page
SUBLANE_TILE = 4  # tokens of the smallest part of the cache that a DMA or store reaches
SUBLANE_TILE_ROWS = 16  # its rows

Q_BLOCK = 16  # query tokens of a query block
Q_ROWS = GROUP * Q_BLOCK  # their rows of one KV head
KV_BLOCK = 128  # tokens that are fetched at once
BLOCK_PAGES = KV_BLOCK // PAGE_SIZE
KV_BUFFERS = 3  # KV blocks, and query blocks, in VMEM
FETCH_LOOKAHEAD = KV_BUFFERS - 1  # steps that the fetch runs ahead
STEP_ROWS = 32  # query rows of a flash step
ROW_STEPS = Q_ROWS // STEP_ROWS  # of a KV head
TILE = 128  # tokens of a flash step
TILES = KV_BLOCK // TILE
STEP_HEADS = 2  # KV heads whose steps are one iteration
ITERATIONS = KV_HEADS // STEP_HEADS  # of a tile
DIAGONAL_BLOCK = 128  # tokens of a flash step where not all of a tile's tokens count
DIAGONAL_BLOCKS = TILE // DIAGONAL_BLOCK
DIAGONAL_HEADS = 2  # KV heads whose steps are one iteration there
DIAGONAL_ITERATIONS = KV_HEADS // DIAGONAL_HEADS  # of a diagonal block
SCORE_LOOKAHEAD = 1  # flash steps that scores are made ahead
DIAGONAL_LOOKAHEAD = 1
SCORE_BUFFERS = SCORE_LOOKAHEAD
TOKEN_AXIS = 1  # of scores
SORT_TOKENS = 16  # tokens of a query block that are sorted at once
SORT_STEPS = Q_BLOCK // SORT_TOKENS
TOKENS_APART = DIAGONAL_BLOCK // PACKING  # two neighbors in a word of a tile that is taken apart
ROWS_APART = TOKENS_APART * TOKEN_ROWS
TILE_ROWS = TILE * TOKEN_ROWS  # rows of a tile in the cache
DIAGONAL_ROWS = DIAGONAL_BLOCK * TOKEN_ROWS
DEINTERLEAVED_ROWS = 256  # rows of each part of a word that are taken at once
DEINTERLEAVED_WORDS = DEINTERLEAVED_ROWS // PACKING
DEINTERLEAVE_STEPS = ROWS_APART // DEINTERLEAVED_ROWS  # of a diagonal block
CLEARED_TILES = 16  # sublane tiles that are zeroed at once
PAGE_BUFFERS = 9  # pages under update
NEW_BUFFERS = 5  # pages whose new tokens are fetched or in use
UPDATE_LOOKAHEAD = 4  # pages that their fetch runs ahead
NEW_TOKENS = 16  # tokens of such a fetch
MERGE_TOKENS = 16  # new tokens that are put into a page at once
MERGE_ROWS = MERGE_TOKENS * TOKEN_ROWS


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


def start_copy(copy):
    copy.start()


def wait_copy(copy):
    copy.wait()


def broadcast_lanes(rows, lanes):
    """Rows that hold one value in all LANES lanes, over `lanes` lanes: cheaper than a broadcast from one lane."""
    return jnp.concatenate([rows] * (lanes // LANES), axis=1)


def float_rows(keys, values):
    """The same in float32."""
    return (new.astype(jnp.float32) for new in (keys, values))


def matmul(rows, matrix, contracted):
    """`rows` times `matrix` along its dimension `contracted`, in float32."""
    dims = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(rows, matrix, dims, precision=PRECISION, preferred_element_type=jnp.float32)


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
    """The cache as rows of LANES lanes, `[pages, PAGE_ROWS, LANES]`: by token, then KV head, then K and V.

    The bytes lie the same: the compiler makes it a bitcast.
    """
    return kv_cache.reshape(kv_cache.shape[0], PAGE_ROWS, LANES)


def rows_cache(rows, shape):
    """The inverse of `cache_rows`."""
    return rows.reshape(shape)


def pack_token(keys, values, packed, token):
    """Lays one token's new keys and values `[KV_HEADS, HEAD_DIM]` into 32-bit words: K in the low half, V in the high."""
    # A bfloat16 is the high half of a float32.
    keys, values = (pltpu.bitcast(rows, jnp.uint32) for rows in float_rows(keys, values))
    words = (keys >> HALF_BITS) | values
    for tile in range(LANE_TILES):
        lanes = slice(tile * LANES, (tile + 1) * LANES)
        packed[pl.ds(token * WORD_ROWS + tile, KV_HEADS, stride=LANE_TILES)] = words[:, lanes]


def is_page(physical, cache):
    """Whether a page id is one of the cache's: below zero it is a large number, too."""
    return physical.astype(jnp.uint32) < jnp.uint32(cache.shape[0])


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
        place = self.kv.at[buffer, pl.ds(page * PAGE_ROWS, PAGE_ROWS)]
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
class PrefillKernel(PagedKernel):
    """CHUNK new tokens for each of the sequences [0, distribution[1]).

    A step is one KV block against one query block. The fetch runs FETCH_LOOKAHEAD steps ahead, across the ends of both.
    """

    # Scalars in SMEM.
    kv_lens: Ref  # int32[MAX_SEQS]
    page_indices: Ref  # int32[MAX_SEQS * PAGES_PER_SEQ]
    distribution: Ref  # int32[3]
    # Arrays in HBM.
    q_hbm: Ref  # bfloat16[tokens, Q_HEADS, HEAD_DIM]
    k_hbm: Ref  # bfloat16[tokens, KV_HEADS, HEAD_DIM]
    v_hbm: Ref  # bfloat16[tokens, KV_HEADS, HEAD_DIM]
    cache_in: Ref  # bfloat16[pages, PAGE_ROWS, LANES]: the memory of cache_hbm
    out_hbm: Ref  # bfloat16[tokens, Q_HEADS, HEAD_DIM]
    cache_hbm: Ref  # bfloat16[pages, PAGE_ROWS, LANES]
    # Scratch arrays in VMEM, and semaphores.
    kv: Ref  # bfloat16[KV_BUFFERS, KV_BLOCK * TOKEN_ROWS, LANES]: fetched blocks
    k_words: Ref  # uint32[TILE // PACKING * WORD_ROWS, LANES]: keys of one tile, two tokens a word
    v_words: Ref  # uint32[TILE // PACKING * WORD_ROWS, LANES]: values of one tile, two tokens a word
    new_keys: Ref  # bfloat16[NEW_BUFFERS, 2 * PAGE_SIZE + NEW_TOKENS, KV_HEADS, HEAD_DIM]: new keys, around the page they go to
    new_values: Ref  # bfloat16[NEW_BUFFERS, 2 * PAGE_SIZE + NEW_TOKENS, KV_HEADS, HEAD_DIM]: new values, around the page they go to
    page_rows: Ref  # bfloat16[PAGE_BUFFERS, PAGE_ROWS, LANES]: pages to update
    packed: Ref  # uint32[MERGE_TOKENS * WORD_ROWS, LANES]: new tokens in the cache's form
    q_in: Ref  # bfloat16[KV_BUFFERS, Q_BLOCK, Q_HEADS, HEAD_DIM]: query blocks as they come
    by_token: Ref  # float32[Q_BLOCK * PADDED_Q_HEADS, LANES]: a query block by token
    q_rows: Ref  # bfloat16[KV_HEADS, Q_ROWS, HEAD_LANES]: a query block by KV head
    next_scores: Ref  # float32[SCORE_BUFFERS, STEP_ROWS, TILE]: the first scores of the next iteration
    row_max: Ref  # float32[KV_HEADS, Q_ROWS, LANES]: running maximum
    row_sum: Ref  # float32[KV_HEADS, Q_ROWS, LANES]: running sum, the same in every lane
    acc: Ref  # float32[KV_HEADS, Q_ROWS, HEAD_LANES]: running output
    out_rows: Ref  # bfloat16[1, Q_BLOCK, Q_HEADS, HEAD_DIM]: an output block on its way out
    fetched: Ref  # int32[KV_BUFFERS]: pages that are fetched into each buffer
    bad_row: Ref  # int32[MAX_SEQS]: whether each sequence is bad
    updated: Ref  # int32[PAGE_BUFFERS]: whether each page under update is written
    kv_sem: Ref  # DMA[KV_BUFFERS]: fetches
    new_sem: Ref  # DMA[NEW_BUFFERS]: new keys and values
    old_sem: Ref  # DMA[PAGE_BUFFERS]: pages that hold old tokens
    write_sem: Ref  # DMA[PAGE_BUFFERS]: cache writes
    q_sem: Ref  # DMA[KV_BUFFERS]: query blocks
    out_sem: Ref  # DMA[1]: output blocks

    block_pages = BLOCK_PAGES
    computed_tokens = DIAGONAL_BLOCK
    cleared_tiles = CLEARED_TILES

    def run(self):
        self.first_seq, self.end_seq = self.sequences()
        pl.when(self.first_seq < self.end_seq)(self.attend)

    def attend(self):
        """Goes through the query blocks of all sequences, and for each through the KV blocks that it sees."""
        start = (self.first_seq, jnp.int32(0), jnp.int32(0), jnp.int32(0))
        for_each(0, self.end_seq, self.check_row)
        # The first block comes while the last pages go, if none of these is in it.
        early = self.first_page(self.first_seq) >= self.block_pages
        self.update_pages(functools.partial(self.start_fetch, 0, start, early))
        self.clear_all()
        self.start_fetch(0, start, ~early)
        fetched = self.next_fetch(start)
        for step in range(1, FETCH_LOOKAHEAD):
            fetched = self.fetch_ahead(step, *fetched)
        state = (jnp.int32(0), start, fetched, start[:2])
        _, _, _, sent, *_ = lax.while_loop(self.has_work, self.step, state)
        self.wait_output(sent)

    def has_work(self, carry):
        """Whether there is a step to take."""
        return carry[1][0] < self.end_seq

    def step(self, carry):
        """Takes one step; `at` is its sequence, its query block (of the sequence, and of all) and its KV block."""
        step, at, fetched, sent = carry
        seq, q_block, q_step, block = at
        fetched = self.fetch_ahead(step + FETCH_LOOKAHEAD, *fetched)
        buffer = lax.rem(step, KV_BUFFERS)
        end = self.kv_end(seq, q_block)
        valid = jnp.minimum(end - block * KV_BLOCK, KV_BLOCK)
        last = (block + 1) * KV_BLOCK >= end
        first_query = self.row_len(seq) - self.q_len(seq) + q_block * Q_BLOCK
        pl.when(block == 0)(functools.partial(self.load_query_block, seq, q_block, q_step))
        self.wait_block(end, block, buffer)
        pl.when(last)(functools.partial(self.clear_tail, buffer, valid))
        self.attend_block(buffer, block, valid, first_query)
        pl.when(last)(functools.partial(self.store_query_block, seq, q_block, q_step, sent))
        sent = tuple(jnp.where(last, new, old) for new, old in zip((seq, q_block), sent))
        return step + 1, self.advance(*at), fetched, sent

    def load_query_block(self, seq, q_block, q_step):
        """Waits for a query block and sorts its rows."""
        self.for_query_copies(seq, q_block, lax.rem(q_step, KV_BUFFERS), wait_copy)
        self.load_queries(lax.rem(q_step, KV_BUFFERS))

    def store_query_block(self, seq, q_block, q_step, sent):
        """Starts to write the output of a query block, once that of the block before, `sent`, has been written."""
        pl.when(q_step > 0)(functools.partial(self.wait_output, sent))
        self.store_output()
        pl.when(self.bad_row[seq] > 0)(functools.partial(for_each, 0, self.out_rows.shape[1], self.spoil_output))
        self.for_copies(seq, q_block, self.out_copy, start_copy)

    def wait_output(self, sent):
        self.for_copies(*sent, self.out_copy, wait_copy)

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
        """The copies of a page's new keys and values."""
        # A copy has a fixed size: it is moved back at the end of the array, and lands moved by as much.
        wanted = self.q_start(seq) + page * PAGE_SIZE - (self.row_len(seq) - self.q_len(seq))
        source = jnp.clip(wanted, 0, self.k_hbm.shape[0] - NEW_TOKENS)
        take = pl.ds(source, NEW_TOKENS)
        put = pl.ds(PAGE_SIZE + source - wanted, NEW_TOKENS)
        return (
            self.new_token_copy(self.k_hbm, self.new_keys, take, put, buffer),
            self.new_token_copy(self.v_hbm, self.new_values, take, put, buffer),
        )

    def new_token_copy(self, source, target, take, put, buffer):
        place = target.at[buffer, put]
        return pltpu.make_async_copy(source.at[take], place, self.new_sem.at[buffer])

    def merge_tokens(self, buffer, new_buffer, first, end, index):
        """Puts new tokens into MERGE_TOKENS tokens of a page, where they lie in `[first, end)`."""
        start = index * MERGE_TOKENS
        for i in range(MERGE_TOKENS):
            keys = self.new_keys[new_buffer, PAGE_SIZE + start + i]
            values = self.new_values[new_buffer, PAGE_SIZE + start + i]
            pack_token(keys, values, self.packed, i)
        rows = pl.ds(pl.multiple_of(index * MERGE_ROWS, MERGE_ROWS), MERGE_ROWS)
        token = start + token_of_word(MERGE_TOKENS)
        is_new = (token >= first) & (token < end)
        words = jnp.where(is_new, self.packed[...], rows_as_words(self.page_rows[buffer, rows]))
        self.page_rows[buffer, rows] = words_as_rows(words)

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

    # ---- Query blocks, in and out in their natural layout, sorted by KV head inside.

    def for_query_copies(self, seq, q_block, buffer, act):
        """Acts on the copies of a query block."""
        self.for_copies(seq, q_block, functools.partial(self.query_copy, buffer), act)

    def query_copy(self, buffer, row, first, size):
        place = self.q_in.at[buffer, pl.ds(first, size)]
        source = self.q_hbm.at[pl.ds(row, size)]
        return pltpu.make_async_copy(source, place, self.q_sem.at[buffer])

    def out_copy(self, row, first, size):
        source = self.out_rows.at[0, pl.ds(first, size)]
        target = self.out_hbm.at[pl.ds(row, size)]
        return pltpu.make_async_copy(source, target, self.out_sem.at[0])

    # ---- The order of query rows: by query head, then query.

    def query_of(self, row):
        """Which query of the block a row of a KV head is of."""
        return lax.rem(row, Q_BLOCK)

    def rows_of_head(self, head):
        """Where one query head's queries are among the rows of its KV head."""
        return pl.ds(pl.multiple_of(lax.rem(head, GROUP) * Q_BLOCK, Q_BLOCK), Q_BLOCK)

    def clear_all(self):
        """Sets all running maxima as they are before a first tile."""
        for_each(0, KV_HEADS * ROW_STEPS, self.clear_step)

    def clear_step(self, step):
        rows = pl.ds(lax.rem(step, ROW_STEPS) * STEP_ROWS, STEP_ROWS)
        self.clear_max(lax.div(step, ROW_STEPS), rows)

    def load_queries(self, buffer):
        """Sorts a query block by query head, `[KV_HEADS, Q_ROWS, HEAD_LANES]`."""
        for_each(0, SORT_STEPS, functools.partial(self.spread_tokens, buffer))
        for_each(0, Q_HEADS, self.sort_head)

    def sort_head(self, head):
        rows = self.rows_of_head(head)
        sort_rows(self.by_token, pl.ds(head, Q_BLOCK, stride=PADDED_Q_HEADS), self.q_rows, head, rows)

    def store_output(self):
        """Puts a block's output back in the order of its tokens, and sets the running maxima for the next one."""
        for_each(0, Q_HEADS, self.unsort_head)
        for_each(0, SORT_STEPS, self.gather_tokens)

    def unsort_head(self, head):
        rows = self.rows_of_head(head)
        strided = pl.ds(head, Q_BLOCK, stride=PADDED_Q_HEADS)
        out = self.acc[head // GROUP, rows] / broadcast_lanes(self.sums(head // GROUP, rows), HEAD_LANES)
        self.clear_max(head // GROUP, rows)
        store_rows(self.by_token, strided, out)

    def spread_tokens(self, buffer, step):
        """Lays SORT_TOKENS tokens into rows of one query head each."""
        for i in range(SORT_TOKENS):
            token = step * SORT_TOKENS + i
            queries = self.q_in[buffer, token].astype(jnp.float32)
            rows = pl.ds(pl.multiple_of(token * PADDED_Q_HEADS, PADDED_Q_HEADS), Q_HEADS)
            store_rows(self.by_token, rows, queries)

    def gather_tokens(self, step):
        """Gathers SORT_TOKENS tokens of the output from such rows."""
        for i in range(SORT_TOKENS):
            token = step * SORT_TOKENS + i
            rows = pl.ds(pl.multiple_of(token * PADDED_Q_HEADS, PADDED_Q_HEADS), Q_HEADS)
            out = load_rows(self.by_token, rows)
            self.out_rows[0, token] = out.astype(self.out_rows.dtype)

    # ---- Reading of one head's K and V: `tokens` tokens, from token `first` of a block on.

    def head_rows_of(self, words, first, tokens, head):
        """`[tokens, HEAD_LANES]` of one head out of the tile that was taken apart last, in the order of `tokens_in_order`."""
        first_row = lax.div(lax.rem(first, TILE), PACKING) * WORD_ROWS
        return words_as_rows(load_words(words, first_row, head, tokens // PACKING))

    def head_keys(self, buffer, first, tokens, head):
        return self.head_rows_of(self.k_words, first, tokens, head)

    def head_values(self, buffer, first, tokens, head):
        return self.head_rows_of(self.v_words, first, tokens, head)

    def tokens_in_order(self, shape, axis):
        """The token of each index along an axis of a diagonal block's: the halves of the words, interleaved."""
        index = lax.broadcasted_iota(jnp.int32, shape, axis)
        return (index >> 1) + (index & 1) * TOKENS_APART

    def deinterleave_tile(self, buffer, tile):
        """Takes the words of a tile apart, into those of K and of V.

        A word of either holds two tokens of a diagonal block: token t in its low half, t + TOKENS_APART in its high one.
        """
        half = jnp.uint32(0xFFFF)
        deinterleave_rows = functools.partial(self.deinterleave_rows, buffer, tile, half)
        for_each(0, DIAGONAL_BLOCKS * DEINTERLEAVE_STEPS, deinterleave_rows)

    def deinterleave_rows(self, buffer, tile, half, step):
        """DEINTERLEAVED_ROWS rows of either half: few enough to stay in registers."""
        block, step_of_block = lax.div(step, DEINTERLEAVE_STEPS), lax.rem(step, DEINTERLEAVE_STEPS)
        first = tile * TILE_ROWS + block * DIAGONAL_ROWS + step_of_block * DEINTERLEAVED_ROWS
        lower = pl.multiple_of(first, DEINTERLEAVED_ROWS)
        upper = pl.multiple_of(first + ROWS_APART, DEINTERLEAVED_ROWS)
        low = rows_as_words(self.kv[buffer, pl.ds(lower, DEINTERLEAVED_ROWS)])
        high = rows_as_words(self.kv[buffer, pl.ds(upper, DEINTERLEAVED_ROWS)])
        words = pl.ds(pl.multiple_of(step * DEINTERLEAVED_WORDS, DEINTERLEAVED_WORDS), DEINTERLEAVED_WORDS)
        self.k_words[words] = (low & half) | (high << 16)
        self.v_words[words] = (low >> 16) | (high & ~half)

    # ---- Scores `[query rows, tokens]`, as logarithms to base 2; running maxima and sums are the same in every lane.

    def scores_of(self, queries, keys, head):
        """The scores of some query rows of a KV head against some tokens."""
        return matmul(queries, keys, 1) * SCORE_SCALE

    def query_positions(self, first_query, first, rows, tokens):
        """The position of each row's query, relative to token `first`, beside each of `tokens` tokens."""
        row = rows.start + lax.broadcasted_iota(jnp.int32, (rows.size, LANES), 0)
        return broadcast_lanes(first_query - first + self.query_of(row), tokens)

    def clear_max(self, head, rows):
        """Sets the running maxima of some rows of a KV head as they are before a first tile."""
        self.row_max[head, rows] = jnp.full((rows.size, LANES), MASKED)

    def at(self, head, rows):
        """Where some rows of a KV head are in the running state."""
        return head, rows

    def score(self, buffer, first, tokens, head, rows):
        """The scores of some rows of a KV head against `tokens` tokens from token `first` of a block on."""
        queries = self.q_rows[head, rows]
        return self.scores_of(queries, self.head_keys(buffer, first, tokens, head), head)

    def state_before(self, head, rows, begins):
        """The running sum and output of some rows of a KV head; if they begin, what the block before left does not count."""
        old_sum = jnp.where(begins, 0.0, self.row_sum[self.at(head, rows)])
        return old_sum, jnp.where(begins, 0.0, self.acc[self.at(head, rows)])

    # ---- Flash attention of tiles of one KV block.

    def attend_block(self, buffer, block, valid, first_query):
        """Attends to one KV block: the tiles that all queries see whole, then those that some see in part."""
        first_query = first_query - block * KV_BLOCK
        full = jnp.clip(lax.div(first_query + 1, TILE), 0, TILES)
        FullTiles(self, buffer, block == 0, 0, full).run()
        for_each(full, pl.cdiv(valid, TILE), functools.partial(self.attend_partial_tile, buffer, block, valid, first_query))

    def attend_partial_tile(self, buffer, block, valid, first_query, tile):
        PartialTile(self, buffer, block + tile == 0, tile, valid, first_query).run()

    def flash(self, tiles):
        """Takes the iterations of some tiles: each is the flash steps of some heads against one tile.

        A step is STEP_ROWS query rows of one head. An iteration is one piece of code, in which scores are made `lookahead`
        steps before they are used, the first of the next iteration at its end: so the MXU and the vector units work at once.
        """
        self.make_first_scores(tiles)
        for_each(0, tiles.iterations, functools.partial(self.flash_iteration, tiles))

    def make_first_scores(self, tiles):
        """The scores that the first iteration finds."""
        for i in range(tiles.lookahead):
            self.next_scores[i, :, : tiles.tokens] = self.step_scores(tiles, 0, i)

    def step_scores(self, tiles, iteration, step):
        """The scores of one step of an iteration."""
        first, first_head = tiles.tile_of(iteration)
        head, rows = flash_steps(tiles.heads)[step]
        return tiles.scores(first, tiles.tokens, first_head + head, rows)

    def flash_iteration(self, tiles, iteration):
        """One iteration, with the first scores of the next."""
        first, first_head = tiles.tile_of(iteration)
        begins = tiles.begins & (first == tiles.tile_of(0)[0])
        steps = flash_steps(tiles.heads)
        scores = [self.next_scores[i, :, : tiles.tokens] for i in range(tiles.lookahead)]
        for i, (head, rows) in enumerate(steps):
            later = i + tiles.lookahead
            if later < len(steps):
                scores.append(self.step_scores(tiles, iteration, later))
            else:
                following = jnp.minimum(iteration + 1, tiles.iterations - 1)
                next_scores = self.step_scores(tiles, following, later - len(steps))
                self.next_scores[later - len(steps), :, : tiles.tokens] = next_scores
            self.add_tokens(scores[i], tiles.buffer, first, first_head + head, rows, begins)

    def add_tokens(self, scores, buffer, first, head, rows, begins):
        """Adds the tokens of some scores to the running softmax of some rows of a head."""
        tokens = scores.shape[1]
        old_sum, old_acc = self.state_before(head, rows, begins)
        old_max = self.row_max[head, rows]
        new_max = jnp.maximum(old_max, jnp.max(scores, axis=1, keepdims=True))
        p = jnp.exp2(scores - broadcast_lanes(new_max, tokens))
        alpha = jnp.exp2(old_max - new_max)
        self.row_max[head, rows] = new_max
        # The MXU is wider than a head: ones beside the values make the sum of the probabilities at no cost.
        values = self.head_values(buffer, first, tokens, head)
        values = jnp.concatenate([values, jnp.ones((tokens, LANES), jnp.bfloat16)], axis=1)
        pv = matmul(p.astype(jnp.bfloat16), values, 0)
        self.row_sum[head, rows] = alpha * old_sum + pv[:, HEAD_LANES:]
        self.acc[head, rows] = broadcast_lanes(alpha, HEAD_LANES) * old_acc + pv[:, :HEAD_LANES]

    def sums(self, head, rows):
        """The running sums of some rows of a KV head."""
        return self.row_sum[head, rows]


@dataclasses.dataclass
class FullTiles:
    """Tiles of a KV block that all queries of the query block see whole: `count` tiles from `first_tile` on.

    `begins`: whether the query block has seen no tile before them.
    """

    kernel: PrefillKernel
    buffer: jax.Array
    begins: jax.Array
    first_tile: jax.Array
    count: jax.Array

    tokens, heads, lookahead = TILE, STEP_HEADS, SCORE_LOOKAHEAD

    def run(self):
        for_each(self.first_tile, self.count, self.take_tile)

    def take_tile(self, tile):
        """Takes one tile, whose words hold both K and V and must be taken apart."""
        self.kernel.deinterleave_tile(self.buffer, tile)
        one = dataclasses.replace(self, begins=self.begins & (tile == self.first_tile), first_tile=tile)
        one.iterations = ITERATIONS
        self.kernel.flash(one)

    def tile_of(self, iteration):
        """The first token of an iteration's tile, and the first of its heads."""
        tile = self.first_tile + lax.div(iteration, ITERATIONS)
        first_head = lax.rem(iteration, ITERATIONS) * STEP_HEADS
        return tile * TILE, first_head

    def scores(self, first, tokens, head, rows):
        """The scores of some rows against a tile."""
        return self.kernel.score(self.buffer, first, tokens, head, rows)


@dataclasses.dataclass
class PartialTile:
    """A tile of which some queries do not see all tokens, as far as there are tokens: a diagonal block at a time.

    `begins`: whether the query block has seen no tile before it.
    """

    kernel: PrefillKernel
    buffer: jax.Array
    begins: jax.Array
    tile: jax.Array
    valid: jax.Array
    first_query: jax.Array

    tokens, heads, lookahead = DIAGONAL_BLOCK, DIAGONAL_HEADS, DIAGONAL_LOOKAHEAD

    def run(self):
        self.kernel.deinterleave_tile(self.buffer, self.tile)
        self.first_block = self.tile * DIAGONAL_BLOCKS
        blocks = jnp.minimum(DIAGONAL_BLOCKS, pl.cdiv(self.valid, DIAGONAL_BLOCK) - self.first_block)
        self.iterations = blocks * DIAGONAL_ITERATIONS
        self.kernel.flash(self)

    def tile_of(self, iteration):
        """The first token of an iteration's diagonal block, and the first of its heads."""
        block = self.first_block + lax.div(iteration, DIAGONAL_ITERATIONS)
        return block * DIAGONAL_BLOCK, lax.rem(iteration, DIAGONAL_ITERATIONS) * DIAGONAL_HEADS

    def scores(self, first, tokens, head, rows):
        """The scores of some rows against a diagonal block, masked where a query does not see a token."""
        kernel = self.kernel
        scores = kernel.score(self.buffer, first, tokens, head, rows)
        query = kernel.query_positions(self.first_query, first, rows, tokens)
        token = kernel.tokens_in_order(scores.shape, TOKEN_AXIS)
        return jnp.where(visible(token, query), scores, MASKED)


def visible(token, query):
    """Whether a query sees a token."""
    return token <= query


def flash_steps(heads):
    """The head and the rows of each flash step of an iteration."""
    return [(head, pl.ds(row, STEP_ROWS)) for head in range(heads) for row in range(0, Q_ROWS, STEP_ROWS)]


def store_rows(ref, rows, values):
    """Stores rows of LANES lanes."""
    ref[rows, :] = values


def load_rows(ref, rows):
    """Loads rows of LANES lanes."""
    return ref[rows, :]


def sort_rows(by_token, strided, q_rows, head, rows):
    """Moves the rows of a query head to those of its KV head."""
    q_rows[head // GROUP, rows] = by_token[strided, :].astype(q_rows.dtype)


def load_words(words, first_row, head, count):
    """Loads every WORD_ROWS-th row of words, `count` of them: those of one head."""
    return words[pl.ds(first_row + head, count, stride=WORD_ROWS), :]


def prefill_kernel(*refs):
    PrefillKernel(*refs).run()


def attend_prefill(queries, keys, values, cache, kv_lens, page_indices, distribution):
    """`(out, cache)` of the prefill sequences; other rows of `out` are undefined."""
    scalars = (kv_lens, page_indices, distribution)
    arrays = (queries, keys, values, cache)
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
            pltpu.VMEM((KV_BUFFERS, KV_BLOCK * TOKEN_ROWS, LANES), jnp.bfloat16),  # kv
            pltpu.VMEM((TILE // PACKING * WORD_ROWS, LANES), jnp.uint32),  # k_words
            pltpu.VMEM((TILE // PACKING * WORD_ROWS, LANES), jnp.uint32),  # v_words
            pltpu.VMEM((NEW_BUFFERS, 2 * PAGE_SIZE + NEW_TOKENS, KV_HEADS, HEAD_DIM), jnp.bfloat16),  # new_keys
            pltpu.VMEM((NEW_BUFFERS, 2 * PAGE_SIZE + NEW_TOKENS, KV_HEADS, HEAD_DIM), jnp.bfloat16),  # new_values
            pltpu.VMEM((PAGE_BUFFERS, PAGE_ROWS, LANES), jnp.bfloat16),  # page_rows
            pltpu.VMEM((MERGE_TOKENS * WORD_ROWS, LANES), jnp.uint32),  # packed
            pltpu.VMEM((KV_BUFFERS, Q_BLOCK, Q_HEADS, HEAD_DIM), jnp.bfloat16),  # q_in
            pltpu.VMEM((Q_BLOCK * PADDED_Q_HEADS, LANES), jnp.float32),  # by_token
            pltpu.VMEM((KV_HEADS, Q_ROWS, HEAD_LANES), jnp.bfloat16),  # q_rows
            pltpu.VMEM((SCORE_BUFFERS, STEP_ROWS, TILE), jnp.float32),  # next_scores
            pltpu.VMEM((KV_HEADS, Q_ROWS, LANES), jnp.float32),  # row_max
            pltpu.VMEM((KV_HEADS, Q_ROWS, LANES), jnp.float32),  # row_sum
            pltpu.VMEM((KV_HEADS, Q_ROWS, HEAD_LANES), jnp.float32),  # acc
            pltpu.VMEM((1, Q_BLOCK, Q_HEADS, HEAD_DIM), jnp.bfloat16),  # out_rows
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


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of a batch of prefill chunks only; returns `(out, kv_cache)`, the cache in the donated argument's memory.

    Sequence s has rows [s * CHUNK, (s + 1) * CHUNK) of `queries`: `cu_q_lens` is not used.
    """
    out, cache = attend_prefill(queries, keys, values, cache_rows(kv_cache), kv_lens, page_indices, distribution)
    return out, rows_cache(cache, kv_cache.shape)
