"""Ragged paged attention of mistral-7b: mixed batches on v5p.

Do not edit: made from spec 7f5bc4968c91a8440db970b6df67d4ec707ff9d7b77799f16f3340227e130ff4 by
    rpac build SPEC --target v5p
Change the spec or the templates and run it again.

What was specialized:
- 32 query heads over 8 KV heads, head_dim 128, queries bfloat16, KV bfloat16: constants
- pages of 128 tokens, 32 a sequence, up to 64 sequences
- token buckets that use it: 64
- causal, cache updated; no soft cap, sliding window, sinks, ALiBi or KV scales in the spec: none is in the code
- decode: blocks of 1024 tokens, as long as the expected lengths and the registers for scores allow; 4 buffers, so that
  3 blocks in flight hide the latency of DMAs
- mixed: blocks of 64 queries against 1024 fetched tokens (3 buffers); computes 256 query rows of a head against 512
  tokens at once
- decode, loop: blocks of one sequence; waves of interleaved tiles, each split into K and V, would spill registers
- decode, reading K and V: 32-bit words are split into K and V; interleaved K and V narrower than 32 bits share words,
  which the MXU cannot take
- decode, writing new tokens: K and V of one token packed into the halves of words; 16-bit K and V are interleaved
- decode, mask: by the length of each sequence; a row has one new token, the last of its sequence
- decode, matmuls with K and V: as they are stored; the MXU takes elements of this dtype beside the rows
- decode, starting fetches: before an iteration's matmuls; then no fetch waits for a matmul
- mixed, loop: blocks of queries over blocks of tokens; a fetched token serves all queries of a block
- mixed, reading K and V: 32-bit words are split into K and V; interleaved K and V narrower than 32 bits share words,
  which the MXU cannot take
- mixed, writing new tokens: K and V of one token packed into the halves of words; 16-bit K and V are interleaved
- mixed, mask: by comparing positions; this works with any mask and needs no MXU lanes
- mixed, scores: a row for each query; this needs neither MXU lanes to spare nor whole registers of rows
- mixed, softmax: not paced; this needs no buffers but those of the lookahead, and steps of any length
- mixed, lookahead: steps from a score to its probability: 2 in full tiles, 1 on the diagonal; the MXU works while the
  vector unit does softmax
- mixed, sorting queries: by transposing parts of registers, 4 KV heads at a time; the queries of a token for these
  heads fill one register
- mixed, between blocks: each block makes its own first scores; other tiles, or the splitting of words, may come between
- mixed, sums of probabilities: on the vector unit; this needs no MXU lanes
- mixed, values: whole registers of lanes; the MXU takes them as they lie in the cache
- VMEM: 37,027,840 bytes counted, 50,331,648 allowed, 67,108,864 available
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
Q_HEADS = 32
KV_HEADS = 8
GROUP = 4  # query heads that share a KV head
HEAD_DIM = 128
HEAD_LANES = 128  # of a row of the cache
LANE_TILES = 1  # rows of LANES lanes that hold one head's K
MAX_SEQS = 64
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 32
SCORE_SCALE = 0.12751743082459868  # 0.08838834764831845 (the softmax scale) * log2(e): probabilities are powers of two
MASKED = -2e+38  # finite, so that a row that is all masked stays a number
PRECISION = None  # of matmuls: bfloat16 products are exact in float32
VMEM_LIMIT = 50331648  # bytes
HALF_BITS = 16  # of a 32-bit word
PACKING = 2  # elements of the cache in one 32-bit word
TOKEN_ROWS = 16  # rows of one token in the cache
WORD_ROWS = 8  # the same rows as 32-bit words
PAGE_ROWS = 2048  # rows of one page
SUBLANE_TILE = 1  # tokens of the smallest part of the cache that a DMA or store reaches
SUBLANE_TILE_ROWS = 16  # its rows
TRANSPOSED_HEADS = 4  # KV heads whose queries of one token fill a register
TRANSPOSE_DISTANCES = (2, 1)
HEAD_SUBLANES = 2  # of a register, that one of them has
REGISTER_ROWS = 16  # rows of queries in a register

DECODE_BLOCK = 1024  # tokens of a KV block
DECODE_BLOCK_PAGES = DECODE_BLOCK // PAGE_SIZE
DECODE_KV_BUFFERS = 4  # blocks in VMEM: one that is computed, the others on their way
DECODE_LOOKAHEAD = DECODE_KV_BUFFERS - 1  # iterations that the fetch is ahead
DECODE_WRITE_BUFFERS = 4  # sequences whose results may be on their way out
DECODE_MAX_TOKENS = 64  # new tokens, loaded all at once
DECODE_LOADS = 3  # arrays of new tokens
DECODE_HEAD_QUERY_ROWS = 8  # query rows of a KV head, up to whole sublane tiles
DECODE_HEADS_PER_MATMUL = 1  # KV heads side by side in a matmul
DECODE_CLEARED_TILES = 16  # sublane tiles that are cleared at once
DECODE_PART_TOKENS = DECODE_BLOCK // PACKING  # a word holds one token of each of PACKING parts of a block
DECODE_PART_ROWS = DECODE_PART_TOKENS * TOKEN_ROWS
DECODE_PACKING_BITS = 1  # log2(PACKING)
DECODE_SPLIT_ROWS = 256  # rows of each part that a step of the split takes
DECODE_SPLIT_WORDS = DECODE_SPLIT_ROWS // PACKING
DECODE_SPLIT_STEPS = DECODE_PART_ROWS // DECODE_SPLIT_ROWS
DECODE_SPLIT_STEPS_PER_MATMUL = 2  # so that the split ends with the block
MIXED_Q_BLOCK = 64  # query tokens of a query block
MIXED_Q_ROWS = GROUP * MIXED_Q_BLOCK  # their rows of one KV head
MIXED_KV_BLOCK = 1024  # tokens that are fetched at once
MIXED_BLOCK_PAGES = MIXED_KV_BLOCK // PAGE_SIZE
MIXED_KV_BUFFERS = 3  # KV blocks, and query blocks, in VMEM
MIXED_FETCH_LOOKAHEAD = MIXED_KV_BUFFERS - 1  # steps that the fetch runs ahead
MIXED_COPY_SIZES = (64, 32, 16, 8, 4, 2, 1)  # tokens: of these is every copy of a query block
MIXED_STEP_ROWS = 256  # query rows of a flash step
MIXED_ROW_STEPS = MIXED_Q_ROWS // MIXED_STEP_ROWS  # of a KV head
MIXED_TILE = 512  # tokens of a flash step
MIXED_TILES = MIXED_KV_BLOCK // MIXED_TILE
MIXED_STEP_HEADS = 4  # KV heads whose steps are one iteration
MIXED_ITERATIONS = KV_HEADS // MIXED_STEP_HEADS  # of a tile
MIXED_DIAGONAL_BLOCK = 256  # tokens of a flash step where not all of a tile's tokens count
MIXED_DIAGONAL_BLOCKS = MIXED_TILE // MIXED_DIAGONAL_BLOCK
MIXED_DIAGONAL_HEADS = 2  # KV heads whose steps are one iteration there
MIXED_DIAGONAL_ITERATIONS = KV_HEADS // MIXED_DIAGONAL_HEADS  # of a diagonal block
MIXED_SCORE_LOOKAHEAD = 2  # flash steps that scores are made ahead
MIXED_DIAGONAL_LOOKAHEAD = 1
MIXED_SCORE_BUFFERS = MIXED_SCORE_LOOKAHEAD
MIXED_TOKEN_AXIS = 1  # of scores
MIXED_SORT_TOKENS = 16  # tokens of a query block that are sorted at once
MIXED_SORT_STEPS = MIXED_Q_BLOCK // MIXED_SORT_TOKENS
MIXED_SORT_ROWS = MIXED_SORT_TOKENS * GROUP
MIXED_UNSORT_TOKENS = 16  # tokens of the output that are put back in order at once
MIXED_UNSORT_STEPS = MIXED_Q_BLOCK // MIXED_UNSORT_TOKENS
MIXED_UNSORT_ROWS = MIXED_UNSORT_TOKENS * GROUP
MIXED_TOKENS_APART = MIXED_DIAGONAL_BLOCK // PACKING  # two neighbors in a word of a tile that is taken apart
MIXED_ROWS_APART = MIXED_TOKENS_APART * TOKEN_ROWS
MIXED_TILE_ROWS = MIXED_TILE * TOKEN_ROWS  # rows of a tile in the cache
MIXED_DIAGONAL_ROWS = MIXED_DIAGONAL_BLOCK * TOKEN_ROWS
MIXED_DEINTERLEAVED_ROWS = 512  # rows of each part of a word that are taken at once
MIXED_DEINTERLEAVED_WORDS = MIXED_DEINTERLEAVED_ROWS // PACKING
MIXED_DEINTERLEAVE_STEPS = MIXED_ROWS_APART // MIXED_DEINTERLEAVED_ROWS  # of a diagonal block
MIXED_CLEARED_TILES = 16  # sublane tiles that are zeroed at once
MIXED_PAGE_BUFFERS = 9  # pages under update
MIXED_NEW_BUFFERS = 5  # pages whose new tokens are fetched or in use
MIXED_UPDATE_LOOKAHEAD = 4  # pages that their fetch runs ahead
MIXED_NEW_TOKENS = 64  # tokens of such a fetch
MIXED_MERGE_TOKENS = 16  # new tokens that are put into a page at once
MIXED_MERGE_ROWS = MIXED_MERGE_TOKENS * TOKEN_ROWS


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


class PagedKernel:
    """What kernels share that fetch blocks of `block_pages` whole pages, and compute `computed_tokens` tokens at once."""

    def page_copy(self, seq, block, buffer, page):
        physical = self.page_indices[seq * PAGES_PER_SEQ + block * self.block_pages + page]
        place = self.kv.at[buffer, pl.ds(page * PAGE_ROWS, PAGE_ROWS)]
        return pltpu.make_async_copy(self.cache_hbm.at[physical], place, self.kv_sem.at[buffer])

    def start_page(self, seq, block, buffer, page):
        self.page_copy(seq, block, buffer, page).start()

    def wait_page(self, seq, block, buffer, page):
        self.page_copy(seq, block, buffer, page).wait()

    def pages_of(self, kv_end, block):
        """How many pages of a block hold tokens below `kv_end`."""
        return jnp.minimum(pl.cdiv(kv_end, PAGE_SIZE) - block * self.block_pages, self.block_pages)

    def start_block(self, kv_end, seq, block, buffer):
        """Starts to fetch a block into a buffer, as far as there are tokens below `kv_end`."""
        start_page = functools.partial(self.start_page, seq, block, buffer)
        pages = self.pages_of(kv_end, block)

        @pl.when(pages == self.block_pages)
        def start_full_block():
            for page in range(self.block_pages):
                start_page(page)

        pl.when(pages < self.block_pages)(functools.partial(for_each, 0, pages, start_page))

    def wait_block(self, kv_end, seq, block, buffer):
        """Waits for the copies that `start_block` started."""
        wait_page = functools.partial(self.wait_page, seq, block, buffer)
        pages = self.pages_of(kv_end, block)

        @pl.when(pages == self.block_pages)
        def wait_for_full_block():
            whole = self.kv.at[buffer]
            pltpu.make_async_copy(whole, whole, self.kv_sem.at[buffer]).wait()  # as many bytes, wherever they come from

        pl.when(pages < self.block_pages)(functools.partial(for_each, 0, pages, wait_page))

    def clear_tail(self, buffer, valid):
        """Zeroes the tokens from `valid` to the end of those that are computed: a probability of 0 does not hide a NaN in V."""
        # One sublane tile at a time to where several at a time can go on.
        first = pl.cdiv(valid, SUBLANE_TILE)
        wide = pl.cdiv(first, self.cleared_tiles)
        for_each(first, wide * self.cleared_tiles, functools.partial(self.clear_tiles, buffer, 1))
        wide_end = pl.cdiv(valid, self.computed_tokens) * (self.computed_tokens // (SUBLANE_TILE * self.cleared_tiles))
        for_each(wide, wide_end, functools.partial(self.clear_tiles, buffer, self.cleared_tiles))

    def clear_tiles(self, buffer, tiles, index):
        rows = tiles * SUBLANE_TILE_ROWS
        self.kv[buffer, pl.ds(pl.multiple_of(index * rows, rows), rows)] = jnp.zeros((rows, LANES), self.kv.dtype)


@dataclasses.dataclass
class DecodeKernel(PagedKernel):
    """One call of the decode kernel: its operands, its scratch arrays, and its steps.

    An iteration computes one KV block of one sequence. Blocks are fetched DECODE_LOOKAHEAD iterations ahead, across the ends of
    sequences.

    While a block is computed, the words of the next are split into K and V: the one keeps the MXU busy, the other the stores.
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
    kv: Ref  # bfloat16[DECODE_KV_BUFFERS, DECODE_BLOCK * TOKEN_ROWS, LANES]: fetched blocks
    k_words: Ref  # uint32[2, DECODE_PART_TOKENS * WORD_ROWS, LANES]: keys of one tile, two tokens a word
    v_words: Ref  # uint32[2, DECODE_PART_TOKENS * WORD_ROWS, LANES]: values of one tile, two tokens a word
    q_all: Ref  # bfloat16[DECODE_MAX_TOKENS, Q_HEADS, HEAD_DIM]: queries of every sequence
    new_keys: Ref  # bfloat16[DECODE_MAX_TOKENS, KV_HEADS, HEAD_DIM]: new keys of every sequence
    new_values: Ref  # bfloat16[DECODE_MAX_TOKENS, KV_HEADS, HEAD_DIM]: new values of every sequence
    packed: Ref  # uint32[SUBLANE_TILE * WORD_ROWS, LANES]: a new token in the cache's form
    new_out: Ref  # bfloat16[DECODE_WRITE_BUFFERS, SUBLANE_TILE_ROWS, LANES]: rows on their way to the cache
    q_rows: Ref  # float32[KV_HEADS * DECODE_HEAD_QUERY_ROWS, DECODE_HEADS_PER_MATMUL * HEAD_LANES]: queries of one sequence by KV head
    row_max: Ref  # float32[KV_HEADS * DECODE_HEAD_QUERY_ROWS, LANES]: running maximum, the same in every lane
    row_sum: Ref  # float32[KV_HEADS * DECODE_HEAD_QUERY_ROWS, LANES]: running sum, the same in every lane
    acc: Ref  # float32[KV_HEADS * DECODE_HEAD_QUERY_ROWS, HEAD_LANES]: running output
    out_rows: Ref  # bfloat16[DECODE_WRITE_BUFFERS, Q_HEADS, HEAD_DIM]: outputs on their way out
    kv_sem: Ref  # DMA[DECODE_KV_BUFFERS]: fetches
    load_sem: Ref  # DMA[DECODE_LOADS]: queries, keys, values
    write_sem: Ref  # DMA[DECODE_WRITE_BUFFERS]: cache writes
    out_sem: Ref  # DMA[DECODE_WRITE_BUFFERS]: outputs

    block_pages = DECODE_BLOCK_PAGES
    computed_tokens = DECODE_BLOCK
    cleared_tiles = DECODE_CLEARED_TILES

    def run(self):
        """Attention of the sequences [0, distribution[0]), whose new tokens may have to get into the cache first."""
        self.num_seqs = self.distribution[0]
        pl.when(self.num_seqs > 0)(self.attend)

    def attend(self):
        """Goes through the KV blocks of all sequences."""
        start = (jnp.int32(0), jnp.int32(0))
        fetched = start
        for iteration in range(DECODE_LOOKAHEAD):
            fetched = self.fetch_block(iteration, *fetched)
        loads = self.load_copies()
        for load in loads:
            load.start()
        self.q_rows[...] = jnp.zeros_like(self.q_rows)
        for load in loads:
            load.wait()
        self.wait_and_patch(0, *start)
        Deinterleave(self, 0, 0).finish()
        lax.while_loop(self.has_block, self.iterate, (jnp.int32(0), *start, *fetched))
        for_each(0, jnp.minimum(self.num_seqs, DECODE_WRITE_BUFFERS), self.drain)

    def load_copies(self):
        """The copies of what is loaded for all sequences at once."""
        arrays = [(self.q_hbm, self.q_all), (self.k_hbm, self.new_keys), (self.v_hbm, self.new_values)]
        return [
            pltpu.make_async_copy(source.at[pl.ds(0, DECODE_MAX_TOKENS)], target, self.load_sem.at[i])
            for i, (source, target) in enumerate(arrays)
        ]

    def has_block(self, carry):
        """Whether there is another block."""
        return carry[1] < self.num_seqs

    def iterate(self, carry):
        """Computes one block, starts the fetch of a later one, and waits for the next one."""
        iteration, seq, block, *fetched = carry
        fetched = self.fetch_block(iteration + DECODE_LOOKAHEAD, *fetched)
        kv_len = self.kv_lens[seq]
        limits = self.limits(seq, block, kv_len)
        following = self.next_block(seq, block)

        @pl.when(following[0] < self.num_seqs)
        def wait_for_next_block():
            self.wait_and_patch(iteration + 1, *following)

        pl.when(block == 0)(functools.partial(self.load_queries, seq))
        self.compute_block(iteration, limits)
        pl.when((block + 1) * DECODE_BLOCK >= kv_len)(functools.partial(self.store_output, seq))
        return iteration + 1, *following, *fetched

    # Blocks.

    def next_block(self, seq, block):
        """The block after a block, which may be of the next sequence."""
        last = (block + 1) * DECODE_BLOCK >= self.kv_lens[seq]
        return jnp.where(last, seq + 1, seq), jnp.where(last, 0, block + 1)

    def fetch_block(self, iteration, seq, block):
        """Starts the fetch of the block of an iteration, if there is one; returns the block after it."""

        @pl.when(seq < self.num_seqs)
        def start_fetch():
            kv_len = self.kv_lens[seq]
            self.start_block(kv_len, seq, block, lax.rem(iteration, DECODE_KV_BUFFERS))

        next_seq, next_block = self.next_block(jnp.minimum(seq, self.num_seqs - 1), block)
        return jnp.where(seq < self.num_seqs, next_seq, seq), jnp.where(seq < self.num_seqs, next_block, block)

    # Reading K and V: words are split into one half of an array while the other half is read.

    def compute_block(self, iteration, limits):
        """One block, in the half of the iteration's parity, while the next one goes to the other half."""
        next_buffer = lax.rem(iteration + 1, DECODE_KV_BUFFERS)
        pl.when(lax.rem(iteration, 2) == 0)(functools.partial(self.flash_step, limits, 0, next_buffer))
        pl.when(lax.rem(iteration, 2) == 1)(functools.partial(self.flash_step, limits, 1, next_buffer))

    def token_of_column(self, shape):
        """The token of each column of scores: the PACKING parts of a block, interleaved."""
        column = lax.broadcasted_iota(jnp.int32, shape, 1)
        return (column >> DECODE_PACKING_BITS) + (column & (PACKING - 1)) * DECODE_PART_TOKENS

    def head_rows(self, words, half, head):
        """`[DECODE_BLOCK, HEAD_LANES]` of one head's K or V, in the order of `token_of_column`."""
        lanes = [words[half, pl.ds(head * LANE_TILES + i, DECODE_PART_TOKENS, stride=WORD_ROWS), :] for i in range(LANE_TILES)]
        return words_as_rows(jnp.concatenate(lanes, axis=1))

    def head_keys(self, half, head):
        return self.head_rows(self.k_words, half, head)

    def head_values(self, half, head):
        return self.head_rows(self.v_words, half, head)

    # Scores, softmax and values of one block.

    def flash_step(self, limits, half, next_buffer):
        """One block: scores of every KV head's query rows, one softmax over all of them, and the weighted values."""
        next_block = Deinterleave(self, next_buffer, 1 - half)
        scores = []
        for heads in head_sets():
            product = self.multiply_keys(half, heads)
            scores.append(product)
            next_block.advance(DECODE_SPLIT_STEPS_PER_MATMUL)
        scores = jnp.concatenate(scores, axis=0) * SCORE_SCALE
        scores = jnp.where(self.visible_tokens(scores.shape, *limits), scores, MASKED)
        p, alpha = self.softmax(scores)
        for heads in head_sets():
            product = self.multiply_values(half, heads, p)
            next_block.advance(DECODE_SPLIT_STEPS_PER_MATMUL)
            self.accumulate_pv(heads, alpha, product)
        next_block.finish()

    def multiply_keys(self, half, heads):
        """The query rows of one head times its keys, `[DECODE_HEAD_QUERY_ROWS, DECODE_BLOCK]`."""
        queries = self.q_rows[rows_of(heads)].astype(jnp.bfloat16)
        return matmul(queries, self.head_keys(half, heads[0]), 1)

    def multiply_values(self, half, heads, p):
        """The probabilities of one head times its values, `[DECODE_HEAD_QUERY_ROWS, HEAD_LANES]`."""
        p = p[rows_of(heads)]
        return matmul(p, self.head_values(half, heads[0]), 0)

    def softmax(self, scores):
        """Probabilities relative to the running maximum, and what is left of what was summed before."""
        old_max = self.row_max[...]
        new_max = jnp.maximum(old_max, jnp.max(scores, axis=1, keepdims=True))
        p = jnp.exp2(scores - broadcast_lanes(new_max, DECODE_BLOCK))
        alpha = jnp.exp2(old_max - new_max)
        self.row_max[...] = new_max
        self.row_sum[...] = alpha * self.row_sum[...] + jnp.sum(p, axis=1, keepdims=True)
        return p.astype(jnp.bfloat16), alpha

    def accumulate_pv(self, heads, alpha, product):
        """Adds the weighted values of some heads: each head's own lanes of the product."""
        for i, head in enumerate(heads):
            rows = rows_of([head])
            own = product[rows_of([i]), i * HEAD_LANES : (i + 1) * HEAD_LANES]
            self.acc[rows] = broadcast_lanes(alpha[rows], HEAD_LANES) * self.acc[rows] + own

    # What the queries of a sequence see of a block: its tokens.

    def limits(self, seq, block, kv_len):
        """The end of the block's tokens that are seen."""
        end = jnp.minimum(kv_len - block * DECODE_BLOCK, DECODE_BLOCK)
        return (end,)

    def visible_tokens(self, shape, end):
        """Which scores count."""
        token = self.token_of_column(shape)
        return token < end

    # What a sequence begins and ends with.

    def wait_and_patch(self, iteration, seq, block):
        """Waits for a block; at the end of its sequence, puts the new tokens in and clears what lies behind."""
        buffer = lax.rem(iteration, DECODE_KV_BUFFERS)
        kv_len = self.kv_lens[seq]
        self.wait_block(kv_len, seq, block, buffer)

        @pl.when((block + 1) * DECODE_BLOCK >= kv_len)
        def patch_last_block():
            self.update_cache(seq, block, buffer)
            self.clear_tail(buffer, kv_len - block * DECODE_BLOCK)

    def load_queries(self, seq):
        """Puts the queries of a sequence into rows by KV head, and clears the running softmax."""
        queries = self.q_all[seq].astype(jnp.float32)
        for head, (heads,), rows in self.query_rows():
            self.q_rows[rows, lanes_of(head)] = queries[heads]
        self.clear_state()

    def out_copy(self, seq):
        buffer = lax.rem(seq, DECODE_WRITE_BUFFERS)
        return pltpu.make_async_copy(self.out_rows.at[buffer], self.out_hbm.at[seq], self.out_sem.at[buffer])

    def query_rows(self):
        """For each KV head: where its queries are among those of a sequence, and its rows."""
        for head in range(KV_HEADS):
            row = head * DECODE_HEAD_QUERY_ROWS
            yield head, (slice(head * GROUP, (head + 1) * GROUP),), slice(row, row + GROUP)

    def clear_state(self):
        """The running softmax as before a sequence's first block."""
        self.row_max[...] = jnp.full_like(self.row_max, MASKED)
        self.row_sum[...] = jnp.full_like(self.row_sum, 0.0)
        self.acc[...] = jnp.zeros_like(self.acc)

    def store_output(self, seq):
        """Sends a sequence's output on its way, once an earlier one's has left the buffer."""

        @pl.when(seq >= DECODE_WRITE_BUFFERS)
        def wait_for_buffer():
            self.out_copy(seq - DECODE_WRITE_BUFFERS).wait()

        out = (self.acc[...] / broadcast_lanes(self.row_sum[...], HEAD_LANES)).astype(self.out_rows.dtype)
        for head, place, rows in self.query_rows():
            self.out_rows[lax.rem(seq, DECODE_WRITE_BUFFERS), *place] = out[rows]
        self.out_copy(seq).start()

    def drain(self, index):
        """Waits for what the last sequences have sent."""
        self.wait_for_writes(self.num_seqs - 1 - index)
        self.out_copy(self.num_seqs - 1 - index).wait()

    # The new token goes into the fetched block, and from a copy of its sublane tile back to its page.

    def update_cache(self, seq, block, buffer):
        """Puts a sequence's new token into its last block, and starts its way to the cache."""

        @pl.when(seq >= DECODE_WRITE_BUFFERS)
        def wait_for_buffer():
            self.wait_for_writes(seq - DECODE_WRITE_BUFFERS)

        token = self.kv_lens[seq] - 1 - block * DECODE_BLOCK
        rows = rows_of_tile(token // SUBLANE_TILE)
        for i in range(SUBLANE_TILE):
            pack_token(self.new_keys[seq], self.new_values[seq], self.packed, i)
        words = self.packed[...]
        self.kv[buffer, rows] = words_as_rows(words)
        self.new_out[lax.rem(seq, DECODE_WRITE_BUFFERS)] = words_as_rows(words)
        self.cache_write(seq).start()

    def cache_write(self, seq):
        """The copy of the sublane tile with a sequence's new token to the cache."""
        buffer = lax.rem(seq, DECODE_WRITE_BUFFERS)
        position = self.kv_lens[seq] - 1
        page = self.page_indices[seq * PAGES_PER_SEQ + position // PAGE_SIZE]
        target = self.cache_hbm.at[page, rows_of_tile(lax.rem(position, PAGE_SIZE) // SUBLANE_TILE)]
        return pltpu.make_async_copy(self.new_out.at[buffer], target, self.write_sem.at[buffer])

    def wait_for_writes(self, seq):
        """Waits until the new token of a sequence is in the cache."""
        self.cache_write(seq).wait()


@dataclasses.dataclass
class Deinterleave:
    """The split of a block's words into K and V, in steps that are done beside other work.

    The words go to `half` 0 or 1 of `k_words` and `v_words`. Such a word holds token t of the block in its low half and
    token t + DECODE_PART_TOKENS in its high half.
    """

    kernel: DecodeKernel
    buffer: jax.Array  # the block's place in `kernel.kv`
    half: int
    done: int = 0  # steps

    def advance(self, steps):
        kernel = self.kernel
        for step in range(self.done, min(self.done + steps, DECODE_SPLIT_STEPS)):
            first = step * DECODE_SPLIT_ROWS
            low = rows_as_words(kernel.kv[self.buffer, pl.ds(first, DECODE_SPLIT_ROWS)])
            high = rows_as_words(kernel.kv[self.buffer, pl.ds(DECODE_PART_ROWS + first, DECODE_SPLIT_ROWS)])
            words = pl.ds(step * DECODE_SPLIT_WORDS, DECODE_SPLIT_WORDS)
            kernel.k_words[self.half, words] = (low & jnp.uint32(0xFFFF)) | (high << HALF_BITS)
            kernel.v_words[self.half, words] = (low >> HALF_BITS) | (high & jnp.uint32(0xFFFF0000))
        self.done += steps

    def finish(self):
        self.advance(DECODE_SPLIT_STEPS)


def head_sets():
    """The KV heads, as many at a time as share a matmul."""
    return [range(first, first + DECODE_HEADS_PER_MATMUL) for first in range(0, KV_HEADS, DECODE_HEADS_PER_MATMUL)]


def rows_of(heads):
    """The query rows of consecutive KV heads."""
    return slice(heads[0] * DECODE_HEAD_QUERY_ROWS, (heads[-1] + 1) * DECODE_HEAD_QUERY_ROWS)


def lanes_of(head):
    """The lanes of a KV head in a matmul."""
    first = head % DECODE_HEADS_PER_MATMUL * HEAD_LANES
    return slice(first, first + HEAD_LANES)


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
            pltpu.VMEM((DECODE_KV_BUFFERS, DECODE_BLOCK * TOKEN_ROWS, LANES), jnp.bfloat16),  # kv
            pltpu.VMEM((2, DECODE_PART_TOKENS * WORD_ROWS, LANES), jnp.uint32),  # k_words
            pltpu.VMEM((2, DECODE_PART_TOKENS * WORD_ROWS, LANES), jnp.uint32),  # v_words
            pltpu.VMEM((DECODE_MAX_TOKENS, Q_HEADS, HEAD_DIM), jnp.bfloat16),  # q_all
            pltpu.VMEM((DECODE_MAX_TOKENS, KV_HEADS, HEAD_DIM), jnp.bfloat16),  # new_keys
            pltpu.VMEM((DECODE_MAX_TOKENS, KV_HEADS, HEAD_DIM), jnp.bfloat16),  # new_values
            pltpu.VMEM((SUBLANE_TILE * WORD_ROWS, LANES), jnp.uint32),  # packed
            pltpu.VMEM((DECODE_WRITE_BUFFERS, SUBLANE_TILE_ROWS, LANES), jnp.bfloat16),  # new_out
            pltpu.VMEM((KV_HEADS * DECODE_HEAD_QUERY_ROWS, DECODE_HEADS_PER_MATMUL * HEAD_LANES), jnp.float32),  # q_rows
            pltpu.VMEM((KV_HEADS * DECODE_HEAD_QUERY_ROWS, LANES), jnp.float32),  # row_max
            pltpu.VMEM((KV_HEADS * DECODE_HEAD_QUERY_ROWS, LANES), jnp.float32),  # row_sum
            pltpu.VMEM((KV_HEADS * DECODE_HEAD_QUERY_ROWS, HEAD_LANES), jnp.float32),  # acc
            pltpu.VMEM((DECODE_WRITE_BUFFERS, Q_HEADS, HEAD_DIM), jnp.bfloat16),  # out_rows
            pltpu.SemaphoreType.DMA((DECODE_KV_BUFFERS,)),  # kv_sem
            pltpu.SemaphoreType.DMA((DECODE_LOADS,)),  # load_sem
            pltpu.SemaphoreType.DMA((DECODE_WRITE_BUFFERS,)),  # write_sem
            pltpu.SemaphoreType.DMA((DECODE_WRITE_BUFFERS,)),  # out_sem
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True),
        name="rpa_decode",
    )(*scalars, *arrays)


@dataclasses.dataclass
class MixedKernel(PagedKernel):
    """Any number of new tokens for each of the sequences [distribution[0], distribution[2]).

    A step is one KV block against one query block. The fetch runs MIXED_FETCH_LOOKAHEAD steps ahead, across the ends of both.
    """

    # Scalars in SMEM.
    kv_lens: Ref  # int32[MAX_SEQS]
    page_indices: Ref  # int32[MAX_SEQS * PAGES_PER_SEQ]
    cu_q_lens: Ref  # int32[MAX_SEQS + 1]
    distribution: Ref  # int32[3]
    # Arrays in HBM.
    q_hbm: Ref  # bfloat16[tokens, Q_HEADS, HEAD_DIM]
    k_hbm: Ref  # bfloat16[tokens, KV_HEADS, HEAD_DIM]
    v_hbm: Ref  # bfloat16[tokens, KV_HEADS, HEAD_DIM]
    cache_in: Ref  # bfloat16[pages, PAGE_ROWS, LANES]: the memory of cache_hbm
    out_in: Ref  # bfloat16[tokens, Q_HEADS, HEAD_DIM]: the memory of out_hbm
    out_hbm: Ref  # bfloat16[tokens, Q_HEADS, HEAD_DIM]
    cache_hbm: Ref  # bfloat16[pages, PAGE_ROWS, LANES]
    # Scratch arrays in VMEM, and semaphores.
    kv: Ref  # bfloat16[MIXED_KV_BUFFERS, MIXED_KV_BLOCK * TOKEN_ROWS, LANES]: fetched blocks
    k_words: Ref  # uint32[MIXED_TILE // PACKING * WORD_ROWS, LANES]: keys of one tile, two tokens a word
    v_words: Ref  # uint32[MIXED_TILE // PACKING * WORD_ROWS, LANES]: values of one tile, two tokens a word
    new_keys: Ref  # bfloat16[MIXED_NEW_BUFFERS, 2 * PAGE_SIZE + MIXED_NEW_TOKENS, KV_HEADS, HEAD_DIM]: new keys, around the page they go to
    new_values: Ref  # bfloat16[MIXED_NEW_BUFFERS, 2 * PAGE_SIZE + MIXED_NEW_TOKENS, KV_HEADS, HEAD_DIM]: new values, around the page they go to
    page_rows: Ref  # bfloat16[MIXED_PAGE_BUFFERS, PAGE_ROWS, LANES]: pages to update
    packed: Ref  # uint32[MIXED_MERGE_TOKENS * WORD_ROWS, LANES]: new tokens in the cache's form
    q_in: Ref  # bfloat16[MIXED_KV_BUFFERS, MIXED_Q_BLOCK, Q_HEADS, HEAD_DIM]: query blocks as they come
    q_rows: Ref  # bfloat16[KV_HEADS, MIXED_Q_ROWS, HEAD_LANES]: a query block by KV head
    next_scores: Ref  # float32[MIXED_SCORE_BUFFERS, MIXED_STEP_ROWS, MIXED_TILE]: the first scores of the next iteration
    row_max: Ref  # float32[KV_HEADS, MIXED_Q_ROWS, LANES]: running maximum
    row_sum: Ref  # float32[KV_HEADS, MIXED_Q_ROWS, LANES]: running sum, the same in every lane
    acc: Ref  # float32[KV_HEADS, MIXED_Q_ROWS, HEAD_LANES]: running output
    out_rows: Ref  # bfloat16[1, MIXED_Q_BLOCK, Q_HEADS, HEAD_DIM]: an output block on its way out
    kv_sem: Ref  # DMA[MIXED_KV_BUFFERS]: fetches
    new_sem: Ref  # DMA[MIXED_NEW_BUFFERS]: new keys and values
    old_sem: Ref  # DMA[MIXED_PAGE_BUFFERS]: pages that hold old tokens
    write_sem: Ref  # DMA[MIXED_PAGE_BUFFERS]: cache writes
    q_sem: Ref  # DMA[MIXED_KV_BUFFERS]: query blocks
    out_sem: Ref  # DMA[1]: output blocks

    block_pages = MIXED_BLOCK_PAGES
    computed_tokens = MIXED_DIAGONAL_BLOCK
    cleared_tiles = MIXED_CLEARED_TILES

    def run(self):
        self.first_seq, self.end_seq = self.sequences()
        pl.when(self.first_seq < self.end_seq)(self.attend)

    def attend(self):
        """Goes through the query blocks of all sequences, and for each through the KV blocks that it sees."""
        start = (self.first_seq, jnp.int32(0), jnp.int32(0), jnp.int32(0))
        # The first block comes while the last pages go, if none of these is in it.
        early = self.first_page(self.first_seq) >= self.block_pages
        self.update_pages(functools.partial(self.start_fetch, 0, start, early))
        self.clear_all()
        self.start_fetch(0, start, ~early)
        fetched = self.next_fetch(start)
        for step in range(1, MIXED_FETCH_LOOKAHEAD):
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
        fetched = self.fetch_ahead(step + MIXED_FETCH_LOOKAHEAD, *fetched)
        buffer = lax.rem(step, MIXED_KV_BUFFERS)
        end = self.kv_end(seq, q_block)
        valid = jnp.minimum(end - block * MIXED_KV_BLOCK, MIXED_KV_BLOCK)
        last = (block + 1) * MIXED_KV_BLOCK >= end
        first_query = self.kv_lens[seq] - self.q_len(seq) + q_block * MIXED_Q_BLOCK
        pl.when(block == 0)(functools.partial(self.load_query_block, seq, q_block, q_step))
        self.wait_block(end, seq, block, buffer)
        pl.when(last)(functools.partial(self.clear_tail, buffer, valid))
        self.attend_block(buffer, block, valid, first_query)
        pl.when(last)(functools.partial(self.store_query_block, seq, q_block, q_step, sent))
        sent = tuple(jnp.where(last, new, old) for new, old in zip((seq, q_block), sent))
        return step + 1, self.advance(*at), fetched, sent

    def load_query_block(self, seq, q_block, q_step):
        """Waits for a query block and sorts its rows."""
        self.for_query_copies(seq, q_block, lax.rem(q_step, MIXED_KV_BUFFERS), wait_copy)
        self.load_queries(lax.rem(q_step, MIXED_KV_BUFFERS))

    def store_query_block(self, seq, q_block, q_step, sent):
        """Starts to write the output of a query block, once that of the block before, `sent`, has been written."""
        pl.when(q_step > 0)(functools.partial(self.wait_output, sent))
        self.store_output()
        self.for_copies(seq, q_block, self.out_copy, start_copy)

    def wait_output(self, sent):
        self.for_copies(*sent, self.out_copy, wait_copy)

    # ---- Sequences: any number of new tokens each.

    def sequences(self):
        """The first sequence of the kernel, and the end of them."""
        return self.distribution[0], self.distribution[2]

    def q_start(self, seq):
        """The row of a sequence's first new token."""
        return self.cu_q_lens[seq]

    def q_len(self, seq):
        """The number of its new tokens."""
        return self.cu_q_lens[seq + 1] - self.cu_q_lens[seq]

    def queries_end(self, seq, q_block):
        """The number of tokens of a sequence up to the last query of a block."""
        new = self.q_len(seq)
        return self.kv_lens[seq] - new + jnp.minimum((q_block + 1) * MIXED_Q_BLOCK, new)

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
        self.merge_page(step, seq, page)
        return step + 1, *self.next_page(seq, page), *fetched

    def wait_last_write(self, steps, index):
        """Waits for one of the last writes: all have as many bytes."""
        page = self.first_page(self.first_seq)
        self.page_write(self.first_seq, page, lax.rem(steps - 1 - index, MIXED_PAGE_BUFFERS)).wait()

    def first_page(self, seq):
        """The first page of a sequence that gets new tokens."""
        return lax.div(self.kv_lens[seq] - self.q_len(seq), PAGE_SIZE)

    def next_page(self, seq, page):
        """The page after a page, maybe of the next sequence."""
        last = (page + 1) * PAGE_SIZE >= self.kv_lens[seq]
        next_seq = jnp.where(last, seq + 1, seq)
        return next_seq, jnp.where(last, self.first_page(jnp.minimum(next_seq, self.end_seq - 1)), page + 1)

    def new_span(self, seq, page):
        """The new tokens of a page, as a range within it."""
        kv_len = self.kv_lens[seq]
        first = jnp.maximum(kv_len - self.q_len(seq) - page * PAGE_SIZE, 0)
        return first, jnp.minimum(kv_len - page * PAGE_SIZE, PAGE_SIZE)

    def load_page(self, step, seq, page):
        """Starts the copies of a page's new tokens, and of its old ones if it has any; returns the page after it."""
        buffer = lax.rem(step, MIXED_PAGE_BUFFERS)
        pl.when(seq < self.end_seq)(functools.partial(self.start_page_copies, step, seq, page, buffer))
        next_seq, next_index = self.next_page(jnp.minimum(seq, self.end_seq - 1), page)
        return jnp.where(seq < self.end_seq, next_seq, seq), jnp.where(seq < self.end_seq, next_index, page)

    def start_page_copies(self, step, seq, page, buffer):
        """Starts them once the buffer is free."""

        @pl.when(step >= MIXED_PAGE_BUFFERS)
        def wait_for_buffer():
            self.page_write(seq, page, buffer).wait()  # the write of MIXED_PAGE_BUFFERS steps ago: as many bytes, this semaphore

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
        """The copies of a page's new keys and values."""
        # A copy has a fixed size: it is moved back at the end of the array, and lands moved by as much.
        wanted = self.q_start(seq) + page * PAGE_SIZE - (self.kv_lens[seq] - self.q_len(seq))
        source = jnp.clip(wanted, 0, self.k_hbm.shape[0] - MIXED_NEW_TOKENS)
        take, put = pl.ds(source, MIXED_NEW_TOKENS), pl.ds(PAGE_SIZE + source - wanted, MIXED_NEW_TOKENS)
        return (
            pltpu.make_async_copy(self.k_hbm.at[take], self.new_keys.at[buffer, put], self.new_sem.at[buffer]),
            pltpu.make_async_copy(self.v_hbm.at[take], self.new_values.at[buffer, put], self.new_sem.at[buffer]),
        )

    def merge_tokens(self, buffer, new_buffer, first, end, index):
        """Puts new tokens into MIXED_MERGE_TOKENS tokens of a page, where they lie in `[first, end)`."""
        start = index * MIXED_MERGE_TOKENS
        for i in range(MIXED_MERGE_TOKENS):
            keys = self.new_keys[new_buffer, PAGE_SIZE + start + i]
            pack_token(keys, self.new_values[new_buffer, PAGE_SIZE + start + i], self.packed, i)
        rows = pl.ds(pl.multiple_of(index * MIXED_MERGE_ROWS, MIXED_MERGE_ROWS), MIXED_MERGE_ROWS)
        token = start + token_of_word(MIXED_MERGE_TOKENS)
        is_new = (token >= first) & (token < end)
        words = jnp.where(is_new, self.packed[...], rows_as_words(self.page_rows[buffer, rows]))
        self.page_rows[buffer, rows] = words_as_rows(words)

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
        self.start_block(end, seq, block, lax.rem(step, MIXED_KV_BUFFERS))

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
        return pltpu.make_async_copy(self.q_hbm.at[pl.ds(row, size)], place, self.q_sem.at[buffer])

    def out_copy(self, row, first, size):
        source = self.out_rows.at[0, pl.ds(first, size)]
        return pltpu.make_async_copy(source, self.out_hbm.at[pl.ds(row, size)], self.out_sem.at[0])

    # ---- The order of query rows: by KV head, then query, then head of the group.

    def query_of(self, row):
        """Which query of the block a row of a KV head is of."""
        return row // GROUP

    def clear_all(self):
        """Sets all running maxima as they are before a first tile."""
        for_each(0, KV_HEADS * MIXED_ROW_STEPS, self.clear_step)

    def clear_step(self, step):
        rows = pl.ds(lax.rem(step, MIXED_ROW_STEPS) * MIXED_STEP_ROWS, MIXED_STEP_ROWS)
        self.clear_max(lax.div(step, MIXED_ROW_STEPS), rows)

    def load_queries(self, buffer):
        """Sorts a query block by KV head, `[KV_HEADS, MIXED_Q_ROWS, HEAD_LANES]`."""
        for_each(0, MIXED_SORT_STEPS, functools.partial(self.sort_tokens, buffer))

    def sort_tokens(self, buffer, step):
        """Sorts MIXED_SORT_TOKENS tokens."""
        tokens = pl.ds(pl.multiple_of(step * MIXED_SORT_TOKENS, MIXED_SORT_TOKENS), MIXED_SORT_TOKENS)
        rows = pl.ds(pl.multiple_of(step * MIXED_SORT_ROWS, MIXED_SORT_ROWS), MIXED_SORT_ROWS)
        for first in range(0, KV_HEADS, TRANSPOSED_HEADS):
            queries = self.q_in[buffer, tokens, first * GROUP : (first + TRANSPOSED_HEADS) * GROUP]
            words = pltpu.bitcast(queries, jnp.uint32)
            words = words.reshape(MIXED_SORT_TOKENS // TRANSPOSED_HEADS, TRANSPOSED_HEADS, SUBLANES, HEAD_LANES)
            for i, part in enumerate(transpose_heads([words[:, i] for i in range(TRANSPOSED_HEADS)])):
                self.q_rows[first + i, rows] = pltpu.bitcast(part, self.q_rows.dtype).reshape(MIXED_SORT_ROWS, HEAD_LANES)

    def store_output(self):
        """Puts a block's output back in the order of its tokens, and sets the running maxima for the next one."""
        for_each(0, MIXED_UNSORT_STEPS, self.unsort_tokens)

    def unsort_tokens(self, step):
        """Puts MIXED_UNSORT_TOKENS tokens back."""
        tokens = pl.ds(pl.multiple_of(step * MIXED_UNSORT_TOKENS, MIXED_UNSORT_TOKENS), MIXED_UNSORT_TOKENS)
        rows = pl.ds(pl.multiple_of(step * MIXED_UNSORT_ROWS, MIXED_UNSORT_ROWS), MIXED_UNSORT_ROWS)
        for first in range(0, KV_HEADS, TRANSPOSED_HEADS):
            heads = slice(first * GROUP, (first + TRANSPOSED_HEADS) * GROUP)
            shape = (MIXED_UNSORT_TOKENS // TRANSPOSED_HEADS, REGISTER_ROWS, HEAD_DIM)
            outs = [self.take_output(first + i, rows).reshape(shape) for i in range(TRANSPOSED_HEADS)]
            words = jnp.stack(transpose_heads([pltpu.bitcast(out, jnp.uint32) for out in outs]), axis=1)
            words = words.reshape(MIXED_UNSORT_TOKENS, SUBLANES, HEAD_DIM)
            self.out_rows[0, tokens, heads] = pltpu.bitcast(words, self.out_rows.dtype)

    # ---- Reading of one head's K and V: `tokens` tokens, from token `first` of a block on.

    def head_rows_of(self, words, first, tokens, head):
        """`[tokens, HEAD_LANES]` of one head out of the tile that was taken apart last, in the order of `tokens_in_order`."""
        first_row = lax.div(lax.rem(first, MIXED_TILE), PACKING) * WORD_ROWS
        return words_as_rows(load_words(words, first_row, head, tokens // PACKING))

    def head_keys(self, buffer, first, tokens, head):
        return self.head_rows_of(self.k_words, first, tokens, head)

    def head_values(self, buffer, first, tokens, head):
        return self.head_rows_of(self.v_words, first, tokens, head)

    def tokens_in_order(self, shape, axis):
        """The token of each index along an axis of a diagonal block's: the halves of the words, interleaved."""
        index = lax.broadcasted_iota(jnp.int32, shape, axis)
        return (index >> 1) + (index & 1) * MIXED_TOKENS_APART

    def deinterleave_tile(self, buffer, tile):
        """Takes the words of a tile apart, into those of K and of V.

        A word of either holds two tokens of a diagonal block: token t in its low half, t + MIXED_TOKENS_APART in its high one.
        """
        half = jnp.uint32(0xFFFF)
        deinterleave_rows = functools.partial(self.deinterleave_rows, buffer, tile, half)
        for_each(0, MIXED_DIAGONAL_BLOCKS * MIXED_DEINTERLEAVE_STEPS, deinterleave_rows)

    def deinterleave_rows(self, buffer, tile, half, step):
        """MIXED_DEINTERLEAVED_ROWS rows of either half: few enough to stay in registers."""
        block, step_of_block = lax.div(step, MIXED_DEINTERLEAVE_STEPS), lax.rem(step, MIXED_DEINTERLEAVE_STEPS)
        first = tile * MIXED_TILE_ROWS + block * MIXED_DIAGONAL_ROWS + step_of_block * MIXED_DEINTERLEAVED_ROWS
        lower = pl.multiple_of(first, MIXED_DEINTERLEAVED_ROWS)
        upper = pl.multiple_of(first + MIXED_ROWS_APART, MIXED_DEINTERLEAVED_ROWS)
        low = rows_as_words(self.kv[buffer, pl.ds(lower, MIXED_DEINTERLEAVED_ROWS)])
        high = rows_as_words(self.kv[buffer, pl.ds(upper, MIXED_DEINTERLEAVED_ROWS)])
        words = pl.ds(pl.multiple_of(step * MIXED_DEINTERLEAVED_WORDS, MIXED_DEINTERLEAVED_WORDS), MIXED_DEINTERLEAVED_WORDS)
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

    def take_output(self, head, rows):
        """The output of some rows of a KV head, `[rows, HEAD_DIM]`; sets their running maxima for the next block."""
        out = self.acc[head, rows] / broadcast_lanes(self.sums(head, rows), HEAD_LANES)
        self.clear_max(head, rows)
        return out.astype(self.out_rows.dtype)

    def at(self, head, rows):
        """Where some rows of a KV head are in the running state."""
        return head, rows

    def score(self, buffer, first, tokens, head, rows):
        """The scores of some rows of a KV head against `tokens` tokens from token `first` of a block on."""
        return self.scores_of(self.q_rows[head, rows], self.head_keys(buffer, first, tokens, head), head)

    def state_before(self, head, rows, begins):
        """The running sum and output of some rows of a KV head; if they begin, what the block before left does not count."""
        old_sum = jnp.where(begins, 0.0, self.row_sum[self.at(head, rows)])
        return old_sum, jnp.where(begins, 0.0, self.acc[self.at(head, rows)])

    # ---- Flash attention of tiles of one KV block.

    def attend_block(self, buffer, block, valid, first_query):
        """Attends to one KV block: the tiles that all queries see whole, then those that some see in part."""
        first_query = first_query - block * MIXED_KV_BLOCK
        full = jnp.clip(lax.div(first_query + 1, MIXED_TILE), 0, MIXED_TILES)
        FullTiles(self, buffer, block == 0, 0, full).run()
        for_each(full, pl.cdiv(valid, MIXED_TILE), functools.partial(self.attend_partial_tile, buffer, block, valid, first_query))

    def attend_partial_tile(self, buffer, block, valid, first_query, tile):
        PartialTile(self, buffer, block + tile == 0, tile, valid, first_query).run()

    def flash(self, tiles):
        """Takes the iterations of some tiles: each is the flash steps of some heads against one tile.

        A step is MIXED_STEP_ROWS query rows of one head. An iteration is one piece of code, in which scores are made `lookahead`
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
        self.row_sum[head, rows] = alpha * old_sum + jnp.sum(p, axis=1, keepdims=True)
        pv = matmul(p.astype(jnp.bfloat16), self.head_values(buffer, first, tokens, head), 0)
        self.acc[head, rows] = broadcast_lanes(alpha, HEAD_LANES) * old_acc + pv

    def sums(self, head, rows):
        """The running sums of some rows of a KV head."""
        return self.row_sum[head, rows]


@dataclasses.dataclass
class FullTiles:
    """Tiles of a KV block that all queries of the query block see whole: `count` tiles from `first_tile` on.

    `begins`: whether the query block has seen no tile before them.
    """

    kernel: MixedKernel
    buffer: jax.Array
    begins: jax.Array
    first_tile: jax.Array
    count: jax.Array

    tokens, heads, lookahead = MIXED_TILE, MIXED_STEP_HEADS, MIXED_SCORE_LOOKAHEAD

    def run(self):
        for_each(self.first_tile, self.count, self.take_tile)

    def take_tile(self, tile):
        """Takes one tile, whose words hold both K and V and must be taken apart."""
        self.kernel.deinterleave_tile(self.buffer, tile)
        one = dataclasses.replace(self, begins=self.begins & (tile == self.first_tile), first_tile=tile)
        one.iterations = MIXED_ITERATIONS
        self.kernel.flash(one)

    def tile_of(self, iteration):
        """The first token of an iteration's tile, and the first of its heads."""
        tile = self.first_tile + lax.div(iteration, MIXED_ITERATIONS)
        first_head = lax.rem(iteration, MIXED_ITERATIONS) * MIXED_STEP_HEADS
        return tile * MIXED_TILE, first_head

    def scores(self, first, tokens, head, rows):
        """The scores of some rows against a tile."""
        return self.kernel.score(self.buffer, first, tokens, head, rows)


@dataclasses.dataclass
class PartialTile:
    """A tile of which some queries do not see all tokens, as far as there are tokens: a diagonal block at a time.

    `begins`: whether the query block has seen no tile before it.
    """

    kernel: MixedKernel
    buffer: jax.Array
    begins: jax.Array
    tile: jax.Array
    valid: jax.Array
    first_query: jax.Array

    tokens, heads, lookahead = MIXED_DIAGONAL_BLOCK, MIXED_DIAGONAL_HEADS, MIXED_DIAGONAL_LOOKAHEAD

    def run(self):
        self.kernel.deinterleave_tile(self.buffer, self.tile)
        self.first_block = self.tile * MIXED_DIAGONAL_BLOCKS
        blocks = jnp.minimum(MIXED_DIAGONAL_BLOCKS, pl.cdiv(self.valid, MIXED_DIAGONAL_BLOCK) - self.first_block)
        self.iterations = blocks * MIXED_DIAGONAL_ITERATIONS
        self.kernel.flash(self)

    def tile_of(self, iteration):
        """The first token of an iteration's diagonal block, and the first of its heads."""
        block = self.first_block + lax.div(iteration, MIXED_DIAGONAL_ITERATIONS)
        return block * MIXED_DIAGONAL_BLOCK, lax.rem(iteration, MIXED_DIAGONAL_ITERATIONS) * MIXED_DIAGONAL_HEADS

    def scores(self, first, tokens, head, rows):
        """The scores of some rows against a diagonal block, masked where a query does not see a token."""
        kernel = self.kernel
        scores = kernel.score(self.buffer, first, tokens, head, rows)
        query = kernel.query_positions(self.first_query, first, rows, tokens)
        token = kernel.tokens_in_order(scores.shape, MIXED_TOKEN_AXIS)
        return jnp.where(visible(token, query), scores, MASKED)


def visible(token, query):
    """Whether a query sees a token."""
    return token <= query


def flash_steps(heads):
    """The head and the rows of each flash step of an iteration."""
    return [(head, pl.ds(row, MIXED_STEP_ROWS)) for head in range(heads) for row in range(0, MIXED_Q_ROWS, MIXED_STEP_ROWS)]


def load_words(words, first_row, head, count):
    """Loads every WORD_ROWS-th row of words, `count` of them: those of one head."""
    return words[pl.ds(first_row + head, count, stride=WORD_ROWS), :]


def transpose_heads(parts):
    """Transposes TRANSPOSED_HEADS registers of as many KV heads of one token to registers of tokens of one KV head, or back."""
    sublane = lax.broadcasted_iota(jnp.int32, parts[0].shape, 1)
    for apart in TRANSPOSE_DISTANCES:
        low = sublane & (apart * HEAD_SUBLANES) == 0
        for i in range(TRANSPOSED_HEADS):
            if i & apart == 0:
                a, b = parts[i], parts[i + apart]
                parts[i] = jnp.where(low, a, pltpu.roll(b, apart * HEAD_SUBLANES, 1))
                parts[i + apart] = jnp.where(low, pltpu.roll(a, SUBLANES - apart * HEAD_SUBLANES, 1), b)
    return parts


def mixed_kernel(*refs):
    MixedKernel(*refs).run()


def attend_mixed(queries, keys, values, cache, out, kv_lens, page_indices, cu_q_lens, distribution):
    """`(out, cache)` of the sequences that are not decode; other rows of `out` stay as they are."""
    scalars = (kv_lens, page_indices, cu_q_lens, distribution)
    arrays = (queries, keys, values, cache, out)
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
            pltpu.VMEM((MIXED_KV_BUFFERS, MIXED_KV_BLOCK * TOKEN_ROWS, LANES), jnp.bfloat16),  # kv
            pltpu.VMEM((MIXED_TILE // PACKING * WORD_ROWS, LANES), jnp.uint32),  # k_words
            pltpu.VMEM((MIXED_TILE // PACKING * WORD_ROWS, LANES), jnp.uint32),  # v_words
            pltpu.VMEM((MIXED_NEW_BUFFERS, 2 * PAGE_SIZE + MIXED_NEW_TOKENS, KV_HEADS, HEAD_DIM), jnp.bfloat16),  # new_keys
            pltpu.VMEM((MIXED_NEW_BUFFERS, 2 * PAGE_SIZE + MIXED_NEW_TOKENS, KV_HEADS, HEAD_DIM), jnp.bfloat16),  # new_values
            pltpu.VMEM((MIXED_PAGE_BUFFERS, PAGE_ROWS, LANES), jnp.bfloat16),  # page_rows
            pltpu.VMEM((MIXED_MERGE_TOKENS * WORD_ROWS, LANES), jnp.uint32),  # packed
            pltpu.VMEM((MIXED_KV_BUFFERS, MIXED_Q_BLOCK, Q_HEADS, HEAD_DIM), jnp.bfloat16),  # q_in
            pltpu.VMEM((KV_HEADS, MIXED_Q_ROWS, HEAD_LANES), jnp.bfloat16),  # q_rows
            pltpu.VMEM((MIXED_SCORE_BUFFERS, MIXED_STEP_ROWS, MIXED_TILE), jnp.float32),  # next_scores
            pltpu.VMEM((KV_HEADS, MIXED_Q_ROWS, LANES), jnp.float32),  # row_max
            pltpu.VMEM((KV_HEADS, MIXED_Q_ROWS, LANES), jnp.float32),  # row_sum
            pltpu.VMEM((KV_HEADS, MIXED_Q_ROWS, HEAD_LANES), jnp.float32),  # acc
            pltpu.VMEM((1, MIXED_Q_BLOCK, Q_HEADS, HEAD_DIM), jnp.bfloat16),  # out_rows
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


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of any batch, decode rows first; returns `(out, kv_cache)`, the cache in the donated argument's memory.
    """
    out, cache = attend_decode(queries, keys, values, cache_rows(kv_cache), kv_lens, page_indices, distribution)
    out, cache = attend_mixed(queries, keys, values, cache, out, kv_lens, page_indices, cu_q_lens, distribution)
    return out, rows_cache(cache, kv_cache.shape)
