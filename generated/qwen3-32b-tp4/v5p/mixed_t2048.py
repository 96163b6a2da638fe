"""Ragged paged attention of qwen3-32b-tp4: mixed batches on v5p.

Do not edit: made from spec 52b51eec8e17a736b5d8082899399f480b6f7225d9b72a8208b51bf174547415 by
    rpac build SPEC --target v5p
Change the spec or the templates and run it again.

What was specialized:
- 16 query heads over 2 KV heads, head_dim 128, queries bfloat16, KV bfloat16: constants
- pages of 128 tokens, 256 a sequence, up to 64 sequences
- token buckets that use it: 256, 1024, 2048
- causal, cache updated; no soft cap, sliding window, sinks, ALiBi or KV scales in the spec: none is in the code
- decode: tiles of 1024 tokens, no longer than the expected lengths; waves of 4, so that one fills the other's waits;
  fetched 4 waves ahead, which hides the latency of DMAs
- mixed: blocks of 256 queries against 1024 fetched tokens (3 buffers); computes 256 query rows of a head against 512
  tokens at once
- page tables: in SMEM; the tables of all sequences fit there, where a page id is one load away
- decode, loop: waves of tiles of any sequences; tiles of short sequences hide each other's latency
- decode, reading K and V: all heads at once, in the order of the cache; 32-bit words are split into K and V in
  registers; a mask leaves each query the scores of its own KV head, so that no row has to be moved or stored
- decode, writing new tokens: K and V of one token packed into the halves of words; 16-bit K and V are interleaved
- decode, mask: by the length of each sequence; a row has one new token, the last of its sequence
- decode, matmuls with K and V: as they are stored; the MXU takes elements of this dtype beside the rows
- decode, starting fetches: between the tiles of a wave; their scalar instructions take no time where the MXU takes K
  and V meanwhile
- mixed, loop: blocks of queries over blocks of tokens; a fetched token serves all queries of a block
- mixed, reading K and V: 32-bit words are split into K and V; interleaved K and V narrower than 32 bits share words,
  which the MXU cannot take
- mixed, writing new tokens: K and V of one token packed into the halves of words; 16-bit K and V are interleaved
- mixed, mask: by comparing positions; this works with any mask and needs no MXU lanes
- mixed, scores: a row for each query; this needs neither MXU lanes to spare nor whole registers of rows
- mixed, softmax: not paced; this needs no buffers but those of the lookahead, and steps of any length
- mixed, lookahead: steps from a score to its probability: 3 in full tiles, 3 on the diagonal; the MXU works while the
  vector unit does softmax
- mixed, sorting queries: by transposing parts of registers, 2 KV heads at a time; the queries of a token for these
  heads fill one register
- mixed, between blocks: each block makes its own first scores; other tiles, or the splitting of words, may come between
- mixed, sums of probabilities: on the vector unit; this needs no MXU lanes
- mixed, values: whole registers of lanes; the MXU takes them as they lie in the cache
- VMEM: 24,133,632 bytes counted, 33,554,432 allowed, 67,108,864 available
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
Q_HEADS = 16
KV_HEADS = 2
GROUP = 8  # query heads that share a KV head
HEAD_DIM = 128
HEAD_LANES = 128  # of a row of the cache
LANE_TILES = 1  # rows of LANES lanes that hold one head's K
MAX_SEQS = 64
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 256
ROW_TOKENS = PAGES_PER_SEQ * PAGE_SIZE  # that a sequence's page table has room for
LEAST_LEN = 1  # tokens of a decode row
MAX_NEW = ROW_TOKENS  # new tokens that a sequence may have
CHECKED_PAGES = 8  # page ids that are checked before the first of them is used: as many wait in registers
SCORE_SCALE = 0.12751743082459868  # 0.08838834764831845 (the softmax scale) * log2(e): probabilities are powers of two
MASKED = -2e+38  # finite, so that a row that is all masked stays a number
PRECISION = None  # of matmuls: bfloat16 products are exact in float32
VMEM_LIMIT = 33554432  # bytes
HALF_BITS = 16  # of a 32-bit word
PACKING = 2  # elements of the cache in one 32-bit word
TOKEN_ROWS = 4  # rows of one token in the cache
WORD_ROWS = 2  # the same rows as 32-bit words
PAGE_ROWS = 512  # rows of one page
SUBLANE_TILE = 4  # tokens of the smallest part of the cache that a DMA or store reaches
SUBLANE_TILE_ROWS = 16  # its rows
TRANSPOSED_HEADS = 2  # KV heads whose queries of one token fill a register
TRANSPOSE_DISTANCES = (1,)
HEAD_SUBLANES = 4  # of a register, that one of them has
REGISTER_ROWS = 16  # rows of queries in a register

DECODE_TILE = 1024  # tokens that are fetched and computed at once, of one sequence
DECODE_TILES_PER_WAVE = 4  # which fill the waits of each other
DECODE_LOOKAHEAD = 4  # waves from the fetch of one to its softmax
DECODE_WAVE_BUFFERS = DECODE_LOOKAHEAD + 1  # waves that are fetched or computed
DECODE_TILE_BUFFERS = DECODE_WAVE_BUFFERS * DECODE_TILES_PER_WAVE
DECODE_TILE_PAGES = DECODE_TILE // PAGE_SIZE
DECODE_MAX_ROWS = 64  # sequences of the largest batch
DECODE_PACKED_AT_ONCE = 8  # sequences whose new tokens are packed at once
DECODE_NO_SEQ = DECODE_MAX_ROWS  # in place of a sequence where there is no tile
DECODE_MAX_TOKENS = DECODE_MAX_ROWS  # new tokens of the largest batch
DECODE_WRITE_BUFFERS = 64  # sequences whose new tokens are on their way to the cache
DECODE_TILES_LOADED = 1  # whose loads may be early: those after them wait for the MXU
DECODE_HEADS_PER_SET = 1  # KV heads whose queries are the rows of one matmul: they fill a register
DECODE_HEAD_SETS = 2
DECODE_SET_ROWS = 8  # rows of these queries, whole registers
DECODE_HEAD_QUERY_ROWS = 8  # of them those of one KV head
DECODE_ROW_SETS = DECODE_HEAD_SETS
DECODE_QUERY_ROWS = DECODE_ROW_SETS * DECODE_SET_ROWS
DECODE_SCORE_SETS = 1  # whose rows of scores are kept
DECODE_SCORE_ROWS = DECODE_SCORE_SETS * DECODE_SET_ROWS  # of them, for each row of K
DECODE_NO_TOKEN = 1073741824  # a number that no token of a sequence has
DECODE_VALUES_SHIFT = 16  # bits of K in a pair of K and V
DECODE_ROW_DTYPE = jnp.int16  # of as many bits as an element of the cache
DECODE_PAIR_DTYPE = jnp.int32  # of K and V; with one KV head, of all rows of a token
DECODE_TOKEN_COLUMNS = 2  # rows of K of one token, all heads
DECODE_HEAD_COLUMNS = 1  # of them those of one head
DECODE_COLUMNS = DECODE_TILE * DECODE_TOKEN_COLUMNS  # rows of K, and of V, of all heads of a tile
DECODE_CLEARED_TILES = 16  # sublane tiles that are cleared at once
DECODE_FIRST_TILES = 1  # of the first wave, scored while the others are on their way
DECODE_FIRST_STEPS = DECODE_TILES_PER_WAVE // DECODE_FIRST_TILES
DECODE_LOADS = 3  # queries, keys, values
MIXED_DECODE_ROWS = 64  # sequences of the largest batch for the decode kernel
MIXED_Q_BLOCK = 256  # query tokens of a query block
MIXED_Q_ROWS = GROUP * MIXED_Q_BLOCK  # their rows of one KV head
MIXED_KV_BLOCK = 1024  # tokens that are fetched at once
MIXED_BLOCK_PAGES = MIXED_KV_BLOCK // PAGE_SIZE
MIXED_KV_BUFFERS = 3  # KV blocks, and query blocks, in VMEM
MIXED_FETCH_LOOKAHEAD = MIXED_KV_BUFFERS - 1  # steps that the fetch runs ahead
MIXED_COPY_SIZES = (256, 128, 64, 32, 16, 8, 4, 2, 1)  # tokens: of these is every copy of a query block
MIXED_STEP_ROWS = 256  # query rows of a flash step
MIXED_ROW_STEPS = MIXED_Q_ROWS // MIXED_STEP_ROWS  # of a KV head
MIXED_TILE = 512  # tokens of a flash step
MIXED_TILES = MIXED_KV_BLOCK // MIXED_TILE
MIXED_STEP_HEADS = 1  # KV heads whose steps are one iteration
MIXED_ITERATIONS = KV_HEADS // MIXED_STEP_HEADS  # of a tile
MIXED_DIAGONAL_BLOCK = 256  # tokens of a flash step where not all of a tile's tokens count
MIXED_DIAGONAL_BLOCKS = MIXED_TILE // MIXED_DIAGONAL_BLOCK
MIXED_DIAGONAL_HEADS = 1  # KV heads whose steps are one iteration there
MIXED_DIAGONAL_ITERATIONS = KV_HEADS // MIXED_DIAGONAL_HEADS  # of a diagonal block
MIXED_SCORE_LOOKAHEAD = 3  # flash steps that scores are made ahead
MIXED_DIAGONAL_LOOKAHEAD = 3
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
MIXED_NEW_TOKENS = 128  # tokens of such a fetch
MIXED_MERGE_TOKENS = 16  # new tokens that are put into a page at once
MIXED_MERGE_ROWS = MIXED_MERGE_TOKENS * TOKEN_ROWS


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
class DecodeKernel(PagedKernel):
    """One new token for each of the sequences [0, distribution[0]): update its page, attend to all tokens that it sees.

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
    q_hbm: Ref  # bfloat16[tokens, Q_HEADS, HEAD_DIM]
    k_hbm: Ref  # bfloat16[tokens, KV_HEADS, HEAD_DIM]
    v_hbm: Ref  # bfloat16[tokens, KV_HEADS, HEAD_DIM]
    cache_in: Ref  # bfloat16[pages, PAGE_ROWS, LANES]: the memory of cache_hbm
    out_hbm: Ref  # bfloat16[tokens, Q_HEADS, HEAD_DIM]
    cache_hbm: Ref  # bfloat16[pages, PAGE_ROWS, LANES]
    # Scratch arrays in VMEM, and semaphores.
    kv: Ref  # bfloat16[DECODE_TILE_BUFFERS, DECODE_TILE * TOKEN_ROWS, LANES]: fetched tiles
    q_in: Ref  # bfloat16[DECODE_MAX_ROWS + 1, Q_HEADS, HEAD_DIM]: queries of every sequence, and of no sequence
    new_keys: Ref  # bfloat16[DECODE_MAX_TOKENS, KV_HEADS, HEAD_DIM]: new keys of every sequence
    new_values: Ref  # bfloat16[DECODE_MAX_TOKENS, KV_HEADS, HEAD_DIM]: new values of every sequence
    new_out: Ref  # bfloat16[DECODE_WRITE_BUFFERS, SUBLANE_TILE_ROWS, LANES]: new tokens on their way to the cache
    packed: Ref  # uint32[DECODE_MAX_ROWS, SUBLANE_TILE * WORD_ROWS, LANES]: new tokens in the cache's form
    tile_max: Ref  # float32[DECODE_TILES_PER_WAVE, DECODE_QUERY_ROWS, LANES]: the largest score of each tile, the same in every lane
    column_token: Ref  # int32[DECODE_SCORE_ROWS, DECODE_COLUMNS]: the token of each score of an own KV head
    scores: Ref  # float32[DECODE_TILES_PER_WAVE, DECODE_SCORE_ROWS, DECODE_COLUMNS]: scores of a wave, for the next iteration
    row_max: Ref  # float32[DECODE_QUERY_ROWS, LANES]: running maximum, the same in every lane
    row_sum: Ref  # float32[DECODE_QUERY_ROWS, LANES]: running sum, the same in every lane
    acc: Ref  # float32[DECODE_QUERY_ROWS, LANES]: running output
    out_all: Ref  # bfloat16[DECODE_MAX_ROWS + 1, Q_HEADS, HEAD_DIM]: outputs of every sequence, and of no sequence
    tile_seq: Ref  # int32[DECODE_TILE_BUFFERS]: the sequence of each tile in flight
    tile_first: Ref  # int32[DECODE_TILE_BUFFERS]: its first token
    tile_left: Ref  # int32[DECODE_TILE_BUFFERS]: tokens of its sequence from there on
    last_slot: Ref  # int32[DECODE_MAX_ROWS + 1]: the last tile of each sequence so far
    bad_row: Ref  # int32[DECODE_MAX_ROWS + 1]: whether each sequence is bad, so far
    good_rows: Ref  # int32[1]: how many sequences are not bad, of those that have come to their end
    kv_sem: Ref  # DMA[DECODE_WAVE_BUFFERS + DECODE_FIRST_STEPS]: fetches
    load_sem: Ref  # DMA[DECODE_LOADS]: queries, keys, values
    write_sem: Ref  # DMA[1]: cache writes
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
        self.load_column_tokens()
        ahead = (jnp.int32(0), jnp.int32(0))
        ahead = lax.fori_loop(1, DECODE_LOOKAHEAD + 1, self.fetch_first_wave, ahead)
        for load in loads:
            load.wait()
        for_each(0, pl.cdiv(self.num_seqs, DECODE_PACKED_AT_ONCE), self.pack_new_tokens)
        for_each(0, DECODE_FIRST_STEPS, self.score_first_tiles)
        wave, *_ = lax.while_loop(more_waves, self.iterate, (jnp.int32(1), jnp.bool_(True), *ahead))
        self.write_results(wave)

    def fetch_first_wave(self, wave, ahead):
        """Starts the fetch of a wave before the loop, as `fetch_wave`."""
        ahead = self.fetch_wave(wave, *ahead)
        return ahead

    def fetch_sem(self, wave, i):
        """The semaphore of the pages of a tile: one for each wave, and one for each step of the first."""
        return jnp.where(wave == 1, DECODE_WAVE_BUFFERS + i // DECODE_FIRST_TILES, lax.rem(wave, DECODE_WAVE_BUFFERS))

    def score_first_tiles(self, step):
        """Makes the scores of some tiles of the first wave, while the others are still on their way."""
        first = step * DECODE_FIRST_TILES
        self.wait_and_patch(self.slot(1, first), DECODE_FIRST_TILES, DECODE_WAVE_BUFFERS + step)
        for i in range(DECODE_FIRST_TILES):
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
        """Computes a wave's values and the next wave's scores; fetches a wave DECODE_LOOKAHEAD waves later."""
        wave, _, *ahead = carry
        self.wait_and_patch(self.slot(wave + 1, 0), DECODE_TILES_PER_WAVE, lax.rem(wave + 1, DECODE_WAVE_BUFFERS))
        ahead = self.compute_wave(wave, ahead)
        more = self.tile_seq[self.slot(wave + 1, 0)] < DECODE_NO_SEQ
        return wave + 1, more, *ahead

    # ---- the tiles in flight: each one's sequence, its first token, and the tokens that the sequence has from there on

    def slot(self, wave, i):
        """The buffer of tile `i` of a wave."""
        return lax.rem(wave, DECODE_WAVE_BUFFERS) * DECODE_TILES_PER_WAVE + i

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

    def load_queries(self, wave, i):
        """The queries of a tile's sequence, float32[Q_HEADS, HEAD_LANES]."""
        return self.q_in[self.tile_seq[self.slot(wave, i)]].astype(jnp.float32)

    def store_output(self, wave, i, row_max, row_sum, acc):
        """The output of a tile's sequence, as it is after this tile."""
        out = acc / broadcast_lanes(row_sum, LANES)
        self.out_all[self.tile_seq[self.slot(wave, i)]] = out.astype(self.out_all.dtype)

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
        for i in range(DECODE_TILES_PER_WAVE):
            made = self.keep_scores(wave + 1, i)
            p, tile_max, tile_sum = softmax
            if i + 1 < DECODE_TILES_PER_WAVE:
                softmax = self.softmax(wave, i + 1, paced_by(self.largest_of_tile(i + 1), made))
            state = self.merge(wave, i, state, tile_max, tile_sum, self.accumulate_pv(wave, i, p))
            if i >= DECODE_TILES_LOADED:
                self.wait_for_scores(wave, i - DECODE_TILES_LOADED)
            ahead = self.fetch_tile(wave + DECODE_LOOKAHEAD, i, *ahead)
        return state, ahead

    def wait_for_scores(self, wave, i):
        """Keeps what follows behind half of a tile's scores.

        The compiler cannot tell which tile a fetch overwrites, so that it keeps fetches behind all loads of K and V before
        them, and loads behind fetches. It would load tiles long before the MXU can take them, and spill them. A store to
        where `kv` is free again keeps its place among these loads and fetches, and it waits for what it stores.
        """
        made = self.scores[i, DECODE_SCORE_ROWS - SUBLANES :, pl.ds(DECODE_COLUMNS // 2 // LANES * LANES, LANES)]
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
        p = jnp.exp2(self.scores[i] - broadcast_lanes(self.score_rows(tile_max), DECODE_COLUMNS))
        tile_sum = reduce_lanes(self.spread_weights(lane_partial_sum(p)))
        return self.spread_weights(p), tile_max, tile_sum

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
        new_acc = jnp.where(begins, 0.0, old_acc) * broadcast_lanes(alpha, LANES)
        new_acc = new_acc + values * broadcast_lanes(beta, LANES)
        self.store_output(wave, i, new_max, new_sum, new_acc)
        return new_max, new_sum, new_acc

    # ---- all heads of a tile at once: rows of K and V in the order of the cache, by token and then by KV head

    cleared_tiles = DECODE_CLEARED_TILES

    def compute_scores(self, wave, i):
        """The scores of a tile, float32[DECODE_QUERY_ROWS, DECODE_COLUMNS]: of all queries with K of all heads."""
        queries = jnp.concatenate(list(self.query_sets(self.load_queries(wave, i))), axis=0)
        return matmul_keys(self.split_queries(queries), self.tile_keys(wave, i))

    def accumulate_pv(self, wave, i, p):
        """The weighted values of a tile, float32[DECODE_QUERY_ROWS, LANES]."""
        return matmul_values(p, self.tile_values(wave, i))

    def token_of_column(self, rows):
        """The token of each score, int32[rows, DECODE_COLUMNS]; of another KV head's than the query's none that a sequence has."""
        return self.column_token[...]

    # ---- scores of each row of K with the queries of one set of heads: the one that its own KV head is in. A lane is of the same
    # KV head in all registers, because DECODE_TOKEN_COLUMNS divides LANES.

    def score_rows(self, rows):
        """Of each lane the rows of its own set, `[DECODE_SCORE_ROWS, lanes]`, out of those of all queries."""
        sets = jnp.split(rows, DECODE_ROW_SETS, axis=0)
        own, set_of_lane = sets[0], broadcast_lanes(self.set_of_lane(), rows.shape[1])
        for index, others in enumerate(sets[1:], 1):
            own = jnp.where(set_of_lane >= index, others, own)
        return own

    def spread_maxima(self, rows):
        """Maxima by lane as rows of all queries, `[DECODE_QUERY_ROWS, lanes]`, and MASKED where a lane is of another set."""
        return self.spread_rows(rows, MASKED)

    def spread_weights(self, rows):
        """The same of probabilities or their sums, and 0 where a lane is of another set."""
        return self.spread_rows(rows, 0.0)

    def spread_rows(self, rows, nothing):
        set_of_lane = broadcast_lanes(self.set_of_lane(), rows.shape[1])
        return jnp.concatenate([jnp.where(set_of_lane == i, rows, nothing) for i in range(DECODE_ROW_SETS)], axis=0)

    def set_of_lane(self):
        """The set of rows of each lane, by its KV head and its lane tile, int32[DECODE_SCORE_ROWS, LANES]."""
        column = lax.rem(lax.broadcasted_iota(jnp.int32, (DECODE_SCORE_ROWS, LANES), 1), DECODE_TOKEN_COLUMNS)
        return lax.div(lax.div(column, DECODE_HEAD_COLUMNS), DECODE_HEADS_PER_SET) * DECODE_HEAD_COLUMNS + lax.rem(column, DECODE_HEAD_COLUMNS)

    def is_own(self, row, head):
        """Whether a row of scores is of a query of a KV head, which is in its set."""
        return lax.rem(head, DECODE_HEADS_PER_SET) == lax.div(row, DECODE_HEAD_QUERY_ROWS)

    def whole_scores(self, scores):
        """Scores with whole rows of K."""
        return scores

    def split_queries(self, queries):
        """The rows of a matmul with K of all heads."""
        return queries

    # A word holds K in the lower bits of an integer of DECODE_PAIR_DTYPE, and V above. Or it holds a row of both, and padding above: the
    # MXU takes such a row as either, beside queries that have zeros where V is.

    def tile_keys(self, wave, i):
        """K of all heads of a tile, `[DECODE_COLUMNS, LANES]`."""
        return lower_rows(self.kv[self.slot(wave, i)])

    def tile_values(self, wave, i):
        """V of all heads of a tile, `[DECODE_COLUMNS, LANES]`."""
        return lower_rows(rows_as_words(self.kv[self.slot(wave, i)]) >> DECODE_VALUES_SHIFT)

    def query_sets(self, queries):
        """The queries of each set of heads."""
        for index in range(DECODE_HEAD_SETS):
            yield queries[index * DECODE_SET_ROWS : (index + 1) * DECODE_SET_ROWS]

    # ---- bounds checks: `bad_row` says of which sequences a number cannot be

    def is_row(self, seq):
        """Whether the number of a sequence's tokens can be one: from LEAST_LEN to ROW_TOKENS."""
        return (self.kv_lens[seq] - LEAST_LEN).astype(jnp.uint32) <= jnp.uint32(ROW_TOKENS - LEAST_LEN)

    def row_len(self, seq):
        """The number of a sequence's tokens; 0 where that cannot be."""
        return jnp.where(self.is_row(seq), self.kv_lens[seq], 0)

    def load_column_tokens(self):
        """Says for each score which token it is of; DECODE_NO_TOKEN where the query has another KV head than K."""
        row = lax.broadcasted_iota(jnp.int32, self.column_token.shape, 0)
        column = lax.broadcasted_iota(jnp.int32, self.column_token.shape, 1)
        token, head = lax.div(column, DECODE_TOKEN_COLUMNS), lax.div(lax.rem(column, DECODE_TOKEN_COLUMNS), DECODE_HEAD_COLUMNS)
        self.column_token[...] = jnp.where(self.is_own(row, head), token, DECODE_NO_TOKEN)

    def pack_new_tokens(self, index):
        """Packs the new tokens of some sequences, so that their latencies hide each other, and the first wave's hides them."""
        for seq in [index * DECODE_PACKED_AT_ONCE + i for i in range(DECODE_PACKED_AT_ONCE)]:
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
    return isinstance(i, int) and i == DECODE_TILES_PER_WAVE - 1


def copy_of_tokens(source, target, sem):
    """A copy of the rows of all new tokens."""
    return pltpu.make_async_copy(source.at[pl.ds(0, DECODE_MAX_TOKENS)], target.at[pl.ds(0, DECODE_MAX_TOKENS)], sem)


def wait_for_bytes(array, sem):
    """Waits until as many bytes have arrived as an array has, whichever copies brought them."""
    pltpu.make_async_copy(array, array, sem).wait()


def lower_rows(pairs):
    """The rows in the lower bits of integers of DECODE_PAIR_DTYPE. One operation of the vector unit takes two registers."""
    return pltpu.bitcast(pltpu.bitcast(pairs, DECODE_PAIR_DTYPE).astype(DECODE_ROW_DTYPE), jnp.bfloat16)


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
            pltpu.VMEM((DECODE_TILE_BUFFERS, DECODE_TILE * TOKEN_ROWS, LANES), jnp.bfloat16),  # kv
            pltpu.VMEM((DECODE_MAX_ROWS + 1, Q_HEADS, HEAD_DIM), jnp.bfloat16),  # q_in
            pltpu.VMEM((DECODE_MAX_TOKENS, KV_HEADS, HEAD_DIM), jnp.bfloat16),  # new_keys
            pltpu.VMEM((DECODE_MAX_TOKENS, KV_HEADS, HEAD_DIM), jnp.bfloat16),  # new_values
            pltpu.VMEM((DECODE_WRITE_BUFFERS, SUBLANE_TILE_ROWS, LANES), jnp.bfloat16),  # new_out
            pltpu.VMEM((DECODE_MAX_ROWS, SUBLANE_TILE * WORD_ROWS, LANES), jnp.uint32),  # packed
            pltpu.VMEM((DECODE_TILES_PER_WAVE, DECODE_QUERY_ROWS, LANES), jnp.float32),  # tile_max
            pltpu.VMEM((DECODE_SCORE_ROWS, DECODE_COLUMNS), jnp.int32),  # column_token
            pltpu.VMEM((DECODE_TILES_PER_WAVE, DECODE_SCORE_ROWS, DECODE_COLUMNS), jnp.float32),  # scores
            pltpu.VMEM((DECODE_QUERY_ROWS, LANES), jnp.float32),  # row_max
            pltpu.VMEM((DECODE_QUERY_ROWS, LANES), jnp.float32),  # row_sum
            pltpu.VMEM((DECODE_QUERY_ROWS, LANES), jnp.float32),  # acc
            pltpu.VMEM((DECODE_MAX_ROWS + 1, Q_HEADS, HEAD_DIM), jnp.bfloat16),  # out_all
            pltpu.SMEM((DECODE_TILE_BUFFERS,), jnp.int32),  # tile_seq
            pltpu.SMEM((DECODE_TILE_BUFFERS,), jnp.int32),  # tile_first
            pltpu.SMEM((DECODE_TILE_BUFFERS,), jnp.int32),  # tile_left
            pltpu.SMEM((DECODE_MAX_ROWS + 1,), jnp.int32),  # last_slot
            pltpu.SMEM((DECODE_MAX_ROWS + 1,), jnp.int32),  # bad_row
            pltpu.SMEM((1,), jnp.int32),  # good_rows
            pltpu.SemaphoreType.DMA((DECODE_WAVE_BUFFERS + DECODE_FIRST_STEPS,)),  # kv_sem
            pltpu.SemaphoreType.DMA((DECODE_LOADS,)),  # load_sem
            pltpu.SemaphoreType.DMA((1,)),  # write_sem
            pltpu.SemaphoreType.DMA((1,)),  # out_sem
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
    fetched: Ref  # int32[MIXED_KV_BUFFERS]: pages that are fetched into each buffer
    bad_row: Ref  # int32[MAX_SEQS]: whether each sequence is bad
    q_starts: Ref  # int32[MAX_SEQS]: the row of each sequence's first new token
    q_lens: Ref  # int32[MAX_SEQS]: the number of its new tokens
    row_lens: Ref  # int32[MAX_SEQS]: the number of its tokens
    updated: Ref  # int32[MIXED_PAGE_BUFFERS]: whether each page under update is written
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
        lax.fori_loop(self.first_seq, self.end_seq, self.check_row, self.first_seq)
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
        first_query = self.row_len(seq) - self.q_len(seq) + q_block * MIXED_Q_BLOCK
        pl.when(block == 0)(functools.partial(self.load_query_block, seq, q_block, q_step))
        self.wait_block(end, block, buffer)
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
        pl.when(self.bad_row[seq] > 0)(functools.partial(for_each, 0, self.out_rows.shape[1], self.spoil_output))
        self.for_copies(seq, q_block, self.out_copy, start_copy)

    def wait_output(self, sent):
        self.for_copies(*sent, self.out_copy, wait_copy)

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
        """The copies of a page's new keys and values."""
        # A copy has a fixed size: it is moved back at the end of the array, and lands moved by as much.
        wanted = self.q_start(seq) + page * PAGE_SIZE - (self.row_len(seq) - self.q_len(seq))
        source = jnp.clip(wanted, 0, self.k_hbm.shape[0] - MIXED_NEW_TOKENS)
        take = pl.ds(source, MIXED_NEW_TOKENS)
        put = pl.ds(PAGE_SIZE + source - wanted, MIXED_NEW_TOKENS)
        return (
            self.new_token_copy(self.k_hbm, self.new_keys, take, put, buffer),
            self.new_token_copy(self.v_hbm, self.new_values, take, put, buffer),
        )

    def new_token_copy(self, source, target, take, put, buffer):
        place = target.at[buffer, put]
        return pltpu.make_async_copy(source.at[take], place, self.new_sem.at[buffer])

    def merge_tokens(self, buffer, new_buffer, first, end, index):
        """Puts new tokens into MIXED_MERGE_TOKENS tokens of a page, where they lie in `[first, end)`."""
        start = index * MIXED_MERGE_TOKENS
        for i in range(MIXED_MERGE_TOKENS):
            keys = self.new_keys[new_buffer, PAGE_SIZE + start + i]
            values = self.new_values[new_buffer, PAGE_SIZE + start + i]
            pack_token(keys, values, self.packed, i)
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
        self.start_block(end, seq, seq * PAGES_PER_SEQ, block, lax.rem(step, MIXED_KV_BUFFERS))

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

    def tile_max(self, step):
        """The largest of a step's scores."""
        return jnp.max(self.step_max[step % MIXED_SCORE_BUFFERS], axis=1, keepdims=True)

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


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of any batch, decode rows first; returns `(out, kv_cache)`, the cache in the donated argument's memory.
    """
    out, cache = attend_decode(queries, keys, values, cache_rows(kv_cache), kv_lens, page_indices, distribution)
    out, cache = attend_mixed(queries, keys, values, cache, out, kv_lens, page_indices, cu_q_lens, distribution)
    return out, rows_cache(cache, kv_cache.shape)
