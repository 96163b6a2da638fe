"""Ragged paged attention of llama3-70b-tp8: decode batches on v5p.

Do not edit: made from spec a5cc5d5f3cb9ea471348a043ab804f02b5cec644f37d8faee2a518792eefe895 by
    rpac build SPEC --target v5p
Change the spec or the templates and run it again.

What was specialized:
- 8 query heads over 1 KV heads, head_dim 128, queries bfloat16, KV bfloat16: constants
- these are one device's part of 8: KV heads in 8 parts
- pages of 128 tokens, 64 a sequence, up to 64 sequences
- token buckets that use it: 64, 256, 1024, 2048
- causal, cache updated; no soft cap, sliding window, sinks, ALiBi or KV scales in the spec: none is in the code
- only decode batches: the other kernels are not in this program
- decode: blocks of 1024 tokens, as long as the expected lengths and the registers for scores allow; 16 buffers, so that
  15 blocks in flight hide the latency of DMAs
- decode, loop: blocks of one sequence; waves of interleaved tiles, each split into K and V, would spill registers
- decode, reading K and V: 32-bit words are split into K and V; interleaved K and V narrower than 32 bits share words,
  which the MXU cannot take
- decode, writing new tokens: K and V of one token packed into the halves of words; 16-bit K and V are interleaved
- decode, mask: by the length of each sequence; a row has one new token, the last of its sequence
- decode, matmuls with K and V: as they are stored; the MXU takes elements of this dtype beside the rows
- decode, starting fetches: before an iteration's matmuls; then no fetch waits for a matmul
- VMEM: 9,744,384 bytes counted, 25,165,824 allowed, 67,108,864 available
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Ref, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
Q_HEADS = 8
KV_HEADS = 1
GROUP = 8  # query heads that share a KV head
HEAD_DIM = 128
HEAD_LANES = 128  # of a row of the cache
LANE_TILES = 1  # rows of LANES lanes that hold one head's K
MAX_SEQS = 64
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 64
SCORE_SCALE = 0.12751743082459868  # 0.08838834764831845 (the softmax scale) * log2(e): probabilities are powers of two
MASKED = -2e+38  # finite, so that a row that is all masked stays a number
PRECISION = None  # of matmuls: bfloat16 products are exact in float32
VMEM_LIMIT = 25165824  # bytes
HALF_BITS = 16  # of a 32-bit word
PACKING = 2  # elements of the cache in one 32-bit word
TOKEN_ROWS = 2  # rows of one token in the cache
WORD_ROWS = 1  # the same rows as 32-bit words
PAGE_ROWS = 256  # rows of one page
SUBLANE_TILE = 8  # tokens of the smallest part of the cache that a DMA or store reaches
SUBLANE_TILE_ROWS = 16  # its rows

BLOCK = 1024  # tokens of a KV block
BLOCK_PAGES = BLOCK // PAGE_SIZE
KV_BUFFERS = 16  # blocks in VMEM: one that is computed, the others on their way
LOOKAHEAD = KV_BUFFERS - 1  # iterations that the fetch is ahead
WRITE_BUFFERS = 4  # sequences whose results may be on their way out
MAX_TOKENS = 64  # new tokens, loaded all at once
LOADS = 3  # arrays of new tokens
HEAD_QUERY_ROWS = 8  # query rows of a KV head, up to whole sublane tiles
HEADS_PER_MATMUL = 1  # KV heads side by side in a matmul
CLEARED_TILES = 16  # sublane tiles that are cleared at once
PART_TOKENS = BLOCK // PACKING  # a word holds one token of each of PACKING parts of a block
PART_ROWS = PART_TOKENS * TOKEN_ROWS
PACKING_BITS = 1  # log2(PACKING)
SPLIT_ROWS = 128  # rows of each part that a step of the split takes
SPLIT_WORDS = SPLIT_ROWS // PACKING
SPLIT_STEPS = PART_ROWS // SPLIT_ROWS
SPLIT_STEPS_PER_MATMUL = 4  # so that the split ends with the block


def for_each(first, end, body):
    """Runs `body(index)` for each index in [first, end), as one piece of code."""

    def run(index, _):
        body(index)
        return 0

    lax.fori_loop(first, end, run, 0)


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
        rows = rows_of_tile(valid // SUBLANE_TILE)
        clear_in_tile = functools.partial(self.clear_in_tile, buffer, rows, valid)
        pl.when(lax.rem(valid, SUBLANE_TILE) > 0)(clear_in_tile)
        # One sublane tile at a time to where several at a time can go on.
        first = pl.cdiv(valid, SUBLANE_TILE)
        wide = pl.cdiv(first, self.cleared_tiles)
        for_each(first, wide * self.cleared_tiles, functools.partial(self.clear_tiles, buffer, 1))
        wide_end = pl.cdiv(valid, self.computed_tokens) * (self.computed_tokens // (SUBLANE_TILE * self.cleared_tiles))
        for_each(wide, wide_end, functools.partial(self.clear_tiles, buffer, self.cleared_tiles))

    def clear_in_tile(self, buffer, rows, valid):
        words = rows_as_words(self.kv[buffer, rows])
        kept = token_of_word(SUBLANE_TILE) < lax.rem(valid, SUBLANE_TILE)
        self.kv[buffer, rows] = words_as_rows(jnp.where(kept, words, jnp.zeros_like(words)))

    def clear_tiles(self, buffer, tiles, index):
        rows = tiles * SUBLANE_TILE_ROWS
        self.kv[buffer, pl.ds(pl.multiple_of(index * rows, rows), rows)] = jnp.zeros((rows, LANES), self.kv.dtype)


@dataclasses.dataclass
class DecodeKernel(PagedKernel):
    """One call of the decode kernel: its operands, its scratch arrays, and its steps.

    An iteration computes one KV block of one sequence. Blocks are fetched LOOKAHEAD iterations ahead, across the ends of
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
    kv: Ref  # bfloat16[KV_BUFFERS, BLOCK * TOKEN_ROWS, LANES]: fetched blocks
    k_words: Ref  # uint32[2, PART_TOKENS * WORD_ROWS, LANES]: keys of one tile, two tokens a word
    v_words: Ref  # uint32[2, PART_TOKENS * WORD_ROWS, LANES]: values of one tile, two tokens a word
    q_all: Ref  # bfloat16[MAX_TOKENS, Q_HEADS, HEAD_DIM]: queries of every sequence
    new_keys: Ref  # bfloat16[MAX_TOKENS, KV_HEADS, HEAD_DIM]: new keys of every sequence
    new_values: Ref  # bfloat16[MAX_TOKENS, KV_HEADS, HEAD_DIM]: new values of every sequence
    packed: Ref  # uint32[SUBLANE_TILE * WORD_ROWS, LANES]: a new token in the cache's form
    new_out: Ref  # bfloat16[WRITE_BUFFERS, SUBLANE_TILE_ROWS, LANES]: rows on their way to the cache
    q_rows: Ref  # float32[KV_HEADS * HEAD_QUERY_ROWS, HEADS_PER_MATMUL * HEAD_LANES]: queries of one sequence by KV head
    row_max: Ref  # float32[KV_HEADS * HEAD_QUERY_ROWS, LANES]: running maximum, the same in every lane
    row_sum: Ref  # float32[KV_HEADS * HEAD_QUERY_ROWS, LANES]: running sum, the same in every lane
    acc: Ref  # float32[KV_HEADS * HEAD_QUERY_ROWS, HEAD_LANES]: running output
    out_rows: Ref  # bfloat16[WRITE_BUFFERS, Q_HEADS, HEAD_DIM]: outputs on their way out
    kv_sem: Ref  # DMA[KV_BUFFERS]: fetches
    load_sem: Ref  # DMA[LOADS]: queries, keys, values
    write_sem: Ref  # DMA[WRITE_BUFFERS]: cache writes
    out_sem: Ref  # DMA[WRITE_BUFFERS]: outputs

    block_pages = BLOCK_PAGES
    computed_tokens = BLOCK
    cleared_tiles = CLEARED_TILES

    def run(self):
        """Attention of the sequences [0, distribution[0]), whose new tokens may have to get into the cache first."""
        self.num_seqs = self.distribution[0]
        pl.when(self.num_seqs > 0)(self.attend)

    def attend(self):
        """Goes through the KV blocks of all sequences."""
        start = (jnp.int32(0), jnp.int32(0))
        fetched = start
        for iteration in range(LOOKAHEAD):
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
        for_each(0, jnp.minimum(self.num_seqs, WRITE_BUFFERS), self.drain)

    def load_copies(self):
        """The copies of what is loaded for all sequences at once."""
        arrays = [(self.q_hbm, self.q_all), (self.k_hbm, self.new_keys), (self.v_hbm, self.new_values)]
        return [
            pltpu.make_async_copy(source.at[pl.ds(0, MAX_TOKENS)], target, self.load_sem.at[i])
            for i, (source, target) in enumerate(arrays)
        ]

    def has_block(self, carry):
        """Whether there is another block."""
        return carry[1] < self.num_seqs

    def iterate(self, carry):
        """Computes one block, starts the fetch of a later one, and waits for the next one."""
        iteration, seq, block, *fetched = carry
        fetched = self.fetch_block(iteration + LOOKAHEAD, *fetched)
        kv_len = self.kv_lens[seq]
        limits = self.limits(seq, block, kv_len)
        following = self.next_block(seq, block)

        @pl.when(following[0] < self.num_seqs)
        def wait_for_next_block():
            self.wait_and_patch(iteration + 1, *following)

        pl.when(block == 0)(functools.partial(self.load_queries, seq))
        self.compute_block(iteration, limits)
        pl.when((block + 1) * BLOCK >= kv_len)(functools.partial(self.store_output, seq))
        return iteration + 1, *following, *fetched

    # Blocks.

    def next_block(self, seq, block):
        """The block after a block, which may be of the next sequence."""
        last = (block + 1) * BLOCK >= self.kv_lens[seq]
        return jnp.where(last, seq + 1, seq), jnp.where(last, 0, block + 1)

    def fetch_block(self, iteration, seq, block):
        """Starts the fetch of the block of an iteration, if there is one; returns the block after it."""

        @pl.when(seq < self.num_seqs)
        def start_fetch():
            kv_len = self.kv_lens[seq]
            self.start_block(kv_len, seq, block, lax.rem(iteration, KV_BUFFERS))

        next_seq, next_block = self.next_block(jnp.minimum(seq, self.num_seqs - 1), block)
        return jnp.where(seq < self.num_seqs, next_seq, seq), jnp.where(seq < self.num_seqs, next_block, block)

    # Reading K and V: words are split into one half of an array while the other half is read.

    def compute_block(self, iteration, limits):
        """One block, in the half of the iteration's parity, while the next one goes to the other half."""
        next_buffer = lax.rem(iteration + 1, KV_BUFFERS)
        pl.when(lax.rem(iteration, 2) == 0)(functools.partial(self.flash_step, limits, 0, next_buffer))
        pl.when(lax.rem(iteration, 2) == 1)(functools.partial(self.flash_step, limits, 1, next_buffer))

    def token_of_column(self, shape):
        """The token of each column of scores: the PACKING parts of a block, interleaved."""
        column = lax.broadcasted_iota(jnp.int32, shape, 1)
        return (column >> PACKING_BITS) + (column & (PACKING - 1)) * PART_TOKENS

    def head_rows(self, words, half, head):
        """`[BLOCK, HEAD_LANES]` of one head's K or V, in the order of `token_of_column`."""
        lanes = [words[half, pl.ds(head * LANE_TILES + i, PART_TOKENS, stride=WORD_ROWS), :] for i in range(LANE_TILES)]
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
            next_block.advance(SPLIT_STEPS_PER_MATMUL)
        scores = jnp.concatenate(scores, axis=0) * SCORE_SCALE
        scores = jnp.where(self.visible_tokens(scores.shape, *limits), scores, MASKED)
        p, alpha = self.softmax(scores)
        for heads in head_sets():
            product = self.multiply_values(half, heads, p)
            next_block.advance(SPLIT_STEPS_PER_MATMUL)
            self.accumulate_pv(heads, alpha, product)
        next_block.finish()

    def multiply_keys(self, half, heads):
        """The query rows of one head times its keys, `[HEAD_QUERY_ROWS, BLOCK]`."""
        queries = self.q_rows[rows_of(heads)].astype(jnp.bfloat16)
        return matmul(queries, self.head_keys(half, heads[0]), 1)

    def multiply_values(self, half, heads, p):
        """The probabilities of one head times its values, `[HEAD_QUERY_ROWS, HEAD_LANES]`."""
        p = p[rows_of(heads)]
        return matmul(p, self.head_values(half, heads[0]), 0)

    def softmax(self, scores):
        """Probabilities relative to the running maximum, and what is left of what was summed before."""
        old_max = self.row_max[...]
        new_max = jnp.maximum(old_max, jnp.max(scores, axis=1, keepdims=True))
        p = jnp.exp2(scores - broadcast_lanes(new_max, BLOCK))
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
        end = jnp.minimum(kv_len - block * BLOCK, BLOCK)
        return (end,)

    def visible_tokens(self, shape, end):
        """Which scores count."""
        token = self.token_of_column(shape)
        return token < end

    # What a sequence begins and ends with.

    def wait_and_patch(self, iteration, seq, block):
        """Waits for a block; at the end of its sequence, puts the new tokens in and clears what lies behind."""
        buffer = lax.rem(iteration, KV_BUFFERS)
        kv_len = self.kv_lens[seq]
        self.wait_block(kv_len, seq, block, buffer)

        @pl.when((block + 1) * BLOCK >= kv_len)
        def patch_last_block():
            self.update_cache(seq, block, buffer)
            self.clear_tail(buffer, kv_len - block * BLOCK)

    def load_queries(self, seq):
        """Puts the queries of a sequence into rows by KV head, and clears the running softmax."""
        queries = self.q_all[seq].astype(jnp.float32)
        for head, (heads,), rows in self.query_rows():
            self.q_rows[rows, lanes_of(head)] = queries[heads]
        self.clear_state()

    def out_copy(self, seq):
        buffer = lax.rem(seq, WRITE_BUFFERS)
        return pltpu.make_async_copy(self.out_rows.at[buffer], self.out_hbm.at[seq], self.out_sem.at[buffer])

    def query_rows(self):
        """For each KV head: where its queries are among those of a sequence, and its rows."""
        for head in range(KV_HEADS):
            row = head * HEAD_QUERY_ROWS
            yield head, (slice(head * GROUP, (head + 1) * GROUP),), slice(row, row + GROUP)

    def clear_state(self):
        """The running softmax as before a sequence's first block."""
        self.row_max[...] = jnp.full_like(self.row_max, MASKED)
        self.row_sum[...] = jnp.full_like(self.row_sum, 0.0)
        self.acc[...] = jnp.zeros_like(self.acc)

    def store_output(self, seq):
        """Sends a sequence's output on its way, once an earlier one's has left the buffer."""

        @pl.when(seq >= WRITE_BUFFERS)
        def wait_for_buffer():
            self.out_copy(seq - WRITE_BUFFERS).wait()

        out = (self.acc[...] / broadcast_lanes(self.row_sum[...], HEAD_LANES)).astype(self.out_rows.dtype)
        for head, place, rows in self.query_rows():
            self.out_rows[lax.rem(seq, WRITE_BUFFERS), *place] = out[rows]
        self.out_copy(seq).start()

    def drain(self, index):
        """Waits for what the last sequences have sent."""
        self.wait_for_writes(self.num_seqs - 1 - index)
        self.out_copy(self.num_seqs - 1 - index).wait()

    # The new token goes into the fetched block, and from a copy of its sublane tile back to its page.

    def update_cache(self, seq, block, buffer):
        """Puts a sequence's new token into its last block, and starts its way to the cache."""

        @pl.when(seq >= WRITE_BUFFERS)
        def wait_for_buffer():
            self.wait_for_writes(seq - WRITE_BUFFERS)

        token = self.kv_lens[seq] - 1 - block * BLOCK
        rows = rows_of_tile(token // SUBLANE_TILE)
        for i in range(SUBLANE_TILE):
            pack_token(self.new_keys[seq], self.new_values[seq], self.packed, i)
        is_new = token_of_word(SUBLANE_TILE) == lax.rem(token, SUBLANE_TILE)
        words = jnp.where(is_new, self.packed[...], rows_as_words(self.kv[buffer, rows]))
        self.kv[buffer, rows] = words_as_rows(words)
        self.new_out[lax.rem(seq, WRITE_BUFFERS)] = words_as_rows(words)
        self.cache_write(seq).start()

    def cache_write(self, seq):
        """The copy of the sublane tile with a sequence's new token to the cache."""
        buffer = lax.rem(seq, WRITE_BUFFERS)
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
    token t + PART_TOKENS in its high half.
    """

    kernel: DecodeKernel
    buffer: jax.Array  # the block's place in `kernel.kv`
    half: int
    done: int = 0  # steps

    def advance(self, steps):
        kernel = self.kernel
        for step in range(self.done, min(self.done + steps, SPLIT_STEPS)):
            first = step * SPLIT_ROWS
            low = rows_as_words(kernel.kv[self.buffer, pl.ds(first, SPLIT_ROWS)])
            high = rows_as_words(kernel.kv[self.buffer, pl.ds(PART_ROWS + first, SPLIT_ROWS)])
            words = pl.ds(step * SPLIT_WORDS, SPLIT_WORDS)
            kernel.k_words[self.half, words] = (low & jnp.uint32(0xFFFF)) | (high << HALF_BITS)
            kernel.v_words[self.half, words] = (low >> HALF_BITS) | (high & jnp.uint32(0xFFFF0000))
        self.done += steps

    def finish(self):
        self.advance(SPLIT_STEPS)


def head_sets():
    """The KV heads, as many at a time as share a matmul."""
    return [range(first, first + HEADS_PER_MATMUL) for first in range(0, KV_HEADS, HEADS_PER_MATMUL)]


def rows_of(heads):
    """The query rows of consecutive KV heads."""
    return slice(heads[0] * HEAD_QUERY_ROWS, (heads[-1] + 1) * HEAD_QUERY_ROWS)


def lanes_of(head):
    """The lanes of a KV head in a matmul."""
    first = head % HEADS_PER_MATMUL * HEAD_LANES
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
            pltpu.VMEM((KV_BUFFERS, BLOCK * TOKEN_ROWS, LANES), jnp.bfloat16),  # kv
            pltpu.VMEM((2, PART_TOKENS * WORD_ROWS, LANES), jnp.uint32),  # k_words
            pltpu.VMEM((2, PART_TOKENS * WORD_ROWS, LANES), jnp.uint32),  # v_words
            pltpu.VMEM((MAX_TOKENS, Q_HEADS, HEAD_DIM), jnp.bfloat16),  # q_all
            pltpu.VMEM((MAX_TOKENS, KV_HEADS, HEAD_DIM), jnp.bfloat16),  # new_keys
            pltpu.VMEM((MAX_TOKENS, KV_HEADS, HEAD_DIM), jnp.bfloat16),  # new_values
            pltpu.VMEM((SUBLANE_TILE * WORD_ROWS, LANES), jnp.uint32),  # packed
            pltpu.VMEM((WRITE_BUFFERS, SUBLANE_TILE_ROWS, LANES), jnp.bfloat16),  # new_out
            pltpu.VMEM((KV_HEADS * HEAD_QUERY_ROWS, HEADS_PER_MATMUL * HEAD_LANES), jnp.float32),  # q_rows
            pltpu.VMEM((KV_HEADS * HEAD_QUERY_ROWS, LANES), jnp.float32),  # row_max
            pltpu.VMEM((KV_HEADS * HEAD_QUERY_ROWS, LANES), jnp.float32),  # row_sum
            pltpu.VMEM((KV_HEADS * HEAD_QUERY_ROWS, HEAD_LANES), jnp.float32),  # acc
            pltpu.VMEM((WRITE_BUFFERS, Q_HEADS, HEAD_DIM), jnp.bfloat16),  # out_rows
            pltpu.SemaphoreType.DMA((KV_BUFFERS,)),  # kv_sem
            pltpu.SemaphoreType.DMA((LOADS,)),  # load_sem
            pltpu.SemaphoreType.DMA((WRITE_BUFFERS,)),  # write_sem
            pltpu.SemaphoreType.DMA((WRITE_BUFFERS,)),  # out_sem
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT, disable_bounds_checks=True),
        name="rpa_decode",
    )(*scalars, *arrays)


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of a batch of decode rows only; returns `(out, kv_cache)`, the cache in the donated argument's memory.

    Sequence s has row s of `queries`: `cu_q_lens` is not used.
    """
    out, cache = attend_decode(queries, keys, values, cache_rows(kv_cache), kv_lens, page_indices, distribution)
    return out, rows_cache(cache, kv_cache.shape)
