"""Ragged paged attention of gpt-oss-120b, full layers: prefill batches on tpu7x.

Do not edit: made from spec 623a068067c941bea572da917de4730a962bd2653c2fc3dc293059a64040709c by
    rpac build gpt-oss-120b.yaml --target tpu7x
Change the spec or the templates and run it again.

What was specialized:
- 8 query heads over 1 KV heads, head_dim 64, queries bfloat16, KV bfloat16: constants
- these are one device's part of 8: KV heads in 8 parts
- pages of 128 tokens, 128 a sequence, up to 64 sequences
- token buckets that use it: 2048
- causal, cache updated; attention sinks, an argument, in the softmax's sum; no window, soft cap or KV scales in the spec: none is in the code
- only prefill batches: the other kernels are not in this program
- prefill: blocks of 256 queries against 1024 fetched tokens (3 buffers); computes 256 query rows of a head against 512 tokens at once
- VMEM: 15,151,104 bytes counted, 25,165,824 allowed, 67,108,864 there
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

KV_HEADS = 1
GROUP = 8  # query heads that share a KV head
HEAD_DIM = 128  # lanes of a head: of its keys, then of its values
OWN_DIM = 64  # lanes of either
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 128
CHUNK = 512  # new tokens of every sequence
SCORE_SCALE = 0.18033688011112042  # 0.125 (the softmax scale) * log2(e): probabilities are powers of two
LOG2_E = 1.4426950408889634  # sinks are natural logarithms
MASKED = -2e+38  # finite, so that a row with nothing in it yet stays a number

# The cache of one layer is seen as rows of 128 lanes: by token, then KV head, K in the lower lanes and V in the upper.
PAGE_ROWS = 256  # 2 of each token
UNIT = 8  # tokens of the smallest piece that a DMA or a store reaches
UNIT_ROWS = 16


def pack_token(keys, values, packed, token):
    """Lays one token's new keys and values `[KV_HEADS, OWN_DIM]` into rows: of each head its key, then its value."""
    (rows,) = cache_rows_of(keys.astype(jnp.float32), values.astype(jnp.float32))
    rows = jnp.concatenate([rows, jnp.zeros((1, HEAD_DIM))], axis=0)
    packed[token * 1 : (token + 1) * 1] = rows_as_words(rows.astype(jnp.bfloat16))


def rows_as_words(rows):
    return pltpu.bitcast(rows, jnp.uint32)


def words_as_rows(words):
    return pltpu.bitcast(words, jnp.bfloat16)


def by_place(words):
    """Words of 2 rows a token, of as many tokens, as words of 2 tokens a row: transposes them."""
    low, high = words
    return (low & jnp.uint32(0xFFFF)) | (high << 16), (low >> 16) | (high & jnp.uint32(0xFFFF0000))


def token_of_word(tokens):
    """Which of `tokens` consecutive tokens each packed row belongs to."""
    return lax.broadcasted_iota(jnp.int32, (tokens * 1, 128), 0) // 1


def whole_lanes(rows):
    """Rows of OWN_DIM lanes, with zeros up to HEAD_DIM."""
    return jnp.concatenate([rows, jnp.zeros((*rows.shape[:-1], HEAD_DIM - OWN_DIM), rows.dtype)], axis=-1)


def cache_rows_of(keys, values):
    """The rows of new keys and values `[..., OWN_DIM]` in the cache, `[..., HEAD_DIM]` each: one of both."""
    return (jnp.concatenate([keys, values], axis=-1),)


def products(rows, matrix, contracted):
    """`rows` times `matrix` along its dimension `contracted`, in float32."""
    dims = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(rows, matrix, dims, preferred_element_type=jnp.float32)


def prefill_kernel(
    # scalars in SMEM
    kv_lens, page_indices, distribution, sinks,
    # arrays in HBM; the cache is updated in place
    q_hbm, k_hbm, v_hbm, _cache, out_hbm, cache_hbm,
    # scratch
    kv,
    row_words,
    new_keys,
    new_values,
    page_rows,
    packed,
    q_in,
    q_rows,
    which_query,
    limits,
    next_scores,
    step_max,
    sink_rows,
    row_max,
    row_sum,
    acc,
    out_rows,
    kv_sem,
    new_sem,
    old_sem,
    write_sem,
    q_sem,
    out_sem,
):  # fmt: skip
    """CHUNK new tokens for each of the sequences [0, distribution[1]): update their pages, then attend, causally.

    A step is one KV block against one query block. The fetch runs 2 steps ahead, across the ends of both.
    """
    first_seq = jnp.int32(0)
    end_seq = distribution[1]

    def q_start(seq):
        return seq * CHUNK

    def q_len(seq):
        return CHUNK

    # ---- update cache: page by page, old tokens kept, new ones packed in; 4 pages ahead, 9 in flight

    def page_span(seq, page):
        """The new tokens of a page, as a range within it."""
        kv_len = kv_lens[seq]
        return jnp.maximum(kv_len - q_len(seq) - page * PAGE_SIZE, 0), jnp.minimum(kv_len - page * PAGE_SIZE, PAGE_SIZE)

    def new_token_copies(seq, page, new_slot):
        # A copy has a fixed size: it is moved back at the end of the array, and lands moved by as much.
        wanted = q_start(seq) + page * PAGE_SIZE - (kv_lens[seq] - q_len(seq))
        source = jnp.clip(wanted, 0, k_hbm.shape[0] - 128)
        take, put = pl.ds(source, 128), pl.ds(PAGE_SIZE + source - wanted, 128)
        return (
            pltpu.make_async_copy(k_hbm.at[take], new_keys.at[new_slot, put], new_sem.at[new_slot]),
            pltpu.make_async_copy(v_hbm.at[take], new_values.at[new_slot, put], new_sem.at[new_slot]),
        )

    def old_page_copy(seq, page, slot):
        physical = page_indices[seq * PAGES_PER_SEQ + page]
        return pltpu.make_async_copy(cache_hbm.at[physical], page_rows.at[slot], old_sem.at[slot])

    def page_write(seq, page, slot):
        physical = page_indices[seq * PAGES_PER_SEQ + page]
        return pltpu.make_async_copy(page_rows.at[slot], cache_hbm.at[physical], write_sem.at[slot])

    def first_page(seq):
        return lax.div(kv_lens[seq] - q_len(seq), PAGE_SIZE)

    def next_page(seq, page):
        last = (page + 1) * PAGE_SIZE >= kv_lens[seq]
        next_seq = jnp.where(last, seq + 1, seq)
        return next_seq, jnp.where(last, first_page(jnp.minimum(next_seq, end_seq - 1)), page + 1)

    def load_page(step, seq, page):
        slot = lax.rem(step, 9)

        @pl.when(seq < end_seq)
        def _():
            @pl.when(step >= 9)
            def _():
                page_write(seq, page, slot).wait()  # the write of 9 steps ago: as many bytes, this semaphore

            for copy in new_token_copies(seq, page, lax.rem(step, 5)):
                copy.start()
            first, end = page_span(seq, page)

            @pl.when((first > 0) | (end < PAGE_SIZE))
            def _():
                old_page_copy(seq, page, slot).start()

        next_seq, next_index = next_page(jnp.minimum(seq, end_seq - 1), page)
        return jnp.where(seq < end_seq, next_seq, seq), jnp.where(seq < end_seq, next_index, page)

    def merge_page(step, seq, page):
        slot, new_slot = lax.rem(step, 9), lax.rem(step, 5)
        first, end = page_span(seq, page)
        for copy in new_token_copies(seq, page, new_slot):
            copy.wait()

        @pl.when((first > 0) | (end < PAGE_SIZE))
        def _():
            old_page_copy(seq, page, slot).wait()

        def merge(piece, _):
            start = piece * 16
            for i in range(16):
                pack_token(new_keys[new_slot, PAGE_SIZE + start + i], new_values[new_slot, PAGE_SIZE + start + i], packed, i)
            rows = pl.ds(pl.multiple_of(piece * 32, 32), 32)
            token = start + token_of_word(16)
            words = jnp.where((token >= first) & (token < end), packed[...], rows_as_words(page_rows[slot, rows]))
            page_rows[slot, rows] = words_as_rows(words)
            return 0

        lax.fori_loop(lax.div(first, 16), pl.cdiv(end, 16), merge, 0)
        page_write(seq, page, slot).start()

    def update_cache(meanwhile):
        """Updates all pages; `meanwhile` is called before it waits for the last of them to be written."""

        def body(carry):
            step, seq, page, *ahead = carry
            ahead = load_page(step + 4, *ahead)
            merge_page(step, seq, page)
            return step + 1, *next_page(seq, page), *ahead

        start = (first_seq, first_page(first_seq))
        ahead = start
        for step in range(4):
            ahead = load_page(jnp.int32(step), *ahead)
        steps, *_ = lax.while_loop(lambda carry: carry[1] < end_seq, body, (jnp.int32(0), *start, *ahead))

        meanwhile()

        def drain(i, _):
            page_write(first_seq, first_page(first_seq), lax.rem(steps - 1 - i, 9)).wait()
            return 0

        lax.fori_loop(0, jnp.minimum(steps, 9), drain, 0)

    # ---- fetch KV: whole pages, into one of 3 buffers of 1024 tokens

    def page_copy(seq, block, slot, page):
        physical = page_indices[seq * PAGES_PER_SEQ + block * 8 + page]
        rows = pl.ds(page * PAGE_ROWS, PAGE_ROWS)
        return pltpu.make_async_copy(cache_hbm.at[physical], kv.at[slot, rows], kv_sem.at[slot])

    def pages_of(kv_end, block):
        return jnp.minimum(pl.cdiv(kv_end, PAGE_SIZE) - block * 8, 8)

    def start_block(kv_end, seq, block, slot):
        def one(page, _):
            page_copy(seq, block, slot, page).start()
            return 0

        pages = pages_of(kv_end, block)

        @pl.when(pages == 8)
        def _():
            for page in range(8):
                one(page, 0)

        @pl.when(pages < 8)
        def _():
            lax.fori_loop(0, pages, one, 0)

    def wait_block(kv_end, seq, block, slot):
        def one(page, _):
            page_copy(seq, block, slot, page).wait()
            return 0

        pages = pages_of(kv_end, block)

        @pl.when(pages == 8)
        def _():
            pltpu.make_async_copy(kv.at[slot], kv.at[slot], kv_sem.at[slot]).wait()  # for as many bytes, from anywhere

        @pl.when(pages < 8)
        def _():
            lax.fori_loop(0, pages, one, 0)

    def kv_end(seq, q_block):
        """The number of tokens that the last query of a block attends to."""
        return kv_lens[seq] - CHUNK + (q_block + 1) * 256

    def advance(seq, q_block, q_step, block):
        last = (block + 1) * 1024 >= kv_end(seq, q_block)
        last_of_seq = last & ((q_block + 1) * 256 >= q_len(seq))
        return (
            jnp.where(last_of_seq, seq + 1, seq),
            jnp.where(last, jnp.where(last_of_seq, 0, q_block + 1), q_block),
            jnp.where(last, q_step + 1, q_step),
            jnp.where(last, 0, block + 1),
        )

    def start_fetch(step, at, wanted=True):
        seq, q_block, q_step, block = at

        @pl.when((seq < end_seq) & wanted)
        def _():
            @pl.when(block == 0)
            def _():
                query_copies(seq, q_block, lax.rem(q_step, 3), lambda copy: copy.start())

            start_block(kv_end(seq, q_block), seq, block, lax.rem(step, 3))

    def next_fetch(at):
        seq, *within = at
        following = advance(jnp.minimum(seq, end_seq - 1), *within)
        return tuple(jnp.where(seq < end_seq, new, old) for new, old in zip(following, at))

    def fetch_ahead(step, *at):
        start_fetch(step, at)
        return next_fetch(at)

    # ---- query blocks: 256 tokens in and out in their natural layout, by KV head inside

    def block_copies(seq, block, make, act):
        act(make(q_start(seq) + block * 256, 0, 256))

    def query_copies(seq, block, slot, act):
        def make(token, first, size):
            return pltpu.make_async_copy(q_hbm.at[pl.ds(token, size)], q_in.at[slot, pl.ds(first, size)], q_sem.at[slot])

        block_copies(seq, block, make, act)

    def out_copies(seq, block, slot, act):
        def make(token, first, size):
            return pltpu.make_async_copy(out_rows.at[slot, pl.ds(first, size)], out_hbm.at[pl.ds(token, size)], out_sem.at[slot])

        block_copies(seq, block, make, act)

    def loop(count, body):
        """Runs `body(index)` for each index below `count`, as one piece of code."""

        def turn(index, _):
            body(index)
            return 0

        lax.fori_loop(0, count, turn, 0)

    def load_sinks():
        """The sinks of each KV head's queries, by lane, in the order in which rows repeat them."""
        of_group = lax.broadcasted_iota(jnp.int32, sink_rows.shape[1:], 1) % GROUP
        for head in range(KV_HEADS):
            row = jnp.full(of_group.shape, sinks[head * GROUP])
            for i in range(1, GROUP):
                row = jnp.where(of_group == i, sinks[head * GROUP + i], row)
            sink_rows[head] = row * LOG2_E

    def clear(head, rows):
        """The running maximum of some rows of a KV head, as before their first tile: each row's sink."""
        row_max[head, :, rows] = jnp.concatenate([sink_rows[head]] * (rows.size // 128), axis=1)

    def clear_all():
        def one(piece):
            rows = pl.ds(lax.rem(piece, 8) * 256, 256)
            clear(lax.div(piece, 8), rows)

        loop(KV_HEADS * 8, one)

    def query_of(row):
        """Which query of the block a row is of: rows go by query, then head."""
        return row // GROUP

    def begin(slot):
        """Sorts a query block by KV head, `[KV_HEADS, 256 * GROUP, HEAD_DIM]`."""

        def sort(piece):
            tokens = pl.ds(pl.multiple_of(piece * 16, 16), 16)
            rows = pl.ds(pl.multiple_of(piece * 128, 128), 128)
            for first in range(0, KV_HEADS, 1):
                queries = q_in[slot, tokens, first * GROUP : (first + 1) * GROUP]
                q_rows[first, rows] = whole_lanes(queries).reshape(128, HEAD_DIM)

        loop(16, sort)

    def finish(slot):
        """Puts a block's output back in the order of its tokens, and clears the running maximum for the next one."""

        def unsort(piece):
            tokens = pl.ds(pl.multiple_of(piece * 32, 32), 32)
            rows = pl.ds(pl.multiple_of(piece * 256, 256), 256)

            def out_of(head):
                scale = 1.0 / row_sum[head, :, rows]
                out = in_rows(by_register(acc[head, :, rows]) * scale)
                clear(head, rows)
                return out.astype(out_rows.dtype).T

            for first in range(0, KV_HEADS, 1):
                heads = slice(first * GROUP, (first + 1) * GROUP)
                out_rows[slot, tokens, heads] = out_of(first).reshape(32, GROUP, OWN_DIM)

        loop(8, unsort)

    def clear_tail(slot, valid):
        """Zeroes the tokens from `valid` to the end of those that are computed: a weight of 0 does not hide a NaN in V."""
        rows = pl.ds(pl.multiple_of(valid // UNIT * UNIT_ROWS, UNIT_ROWS), UNIT_ROWS)

        @pl.when(lax.rem(valid, UNIT) > 0)
        def _():
            words = rows_as_words(kv[slot, rows])
            kv[slot, rows] = words_as_rows(jnp.where(token_of_word(UNIT) < lax.rem(valid, UNIT), words, jnp.zeros_like(words)))

        def zero(units):
            def one(index, _):
                rows = units * UNIT_ROWS
                kv[slot, pl.ds(pl.multiple_of(index * rows, rows), rows)] = jnp.zeros((rows, 128), kv.dtype)
                return 0

            return one

        # One unit at a time to where 16 at a time can go on.
        first = pl.cdiv(valid, UNIT)
        wide = pl.cdiv(first, 16)
        lax.fori_loop(first, wide * 16, zero(1), 0)
        lax.fori_loop(wide, pl.cdiv(valid, 256) * 2, zero(16), 0)

    # ---- read KV: `tokens` tokens of one head, from token `first` of a block on

    def split_tile(slot, tile):
        """Splits a tile's words by the place of rows in them. A word then holds 2 tokens of a piece of 256: token t
        of the piece in its lowest part, t + 128 in the next, and so on.
        """

        def split(turn, _):  # few enough rows at a time to stay in registers
            piece, part = lax.div(turn, 1), lax.rem(turn, 1)
            first = tile * 1024 + piece * 512 + part * 256
            firsts = [pl.multiple_of(first + part * 256, 256) for part in range(2)]
            words = [rows_as_words(kv[slot, pl.ds(first, 256)]) for first in firsts]
            to = pl.ds(pl.multiple_of(turn * 128, 128), 128)
            for place, part in enumerate(by_place(words)):
                row_words[place, to] = part
            return 0

        lax.fori_loop(0, 2, split, 0)

    def row_of(first, tokens, row):
        """`[tokens, HEAD_DIM]` of one row of each token out of the tile that was split last, in the order of `piece_tokens`."""
        place, word = lax.rem(row, 2), lax.div(row, 2)
        start = lax.div(lax.rem(first, 512), 2) * 1 + word
        words = row_words[place, pl.ds(start, tokens // 2, stride=1), :]
        return words_as_rows(words)

    def head_keys(slot, first, tokens, head):
        return row_of(first, tokens, head)

    def head_values(slot, first, tokens, head):
        return row_of(first, tokens, head)

    def piece_tokens(shape, axis):
        """The token of each index along an axis of a piece's: the parts of the words, interleaved."""
        index = lax.broadcasted_iota(jnp.int32, shape, axis)
        return (index >> 1) + (index & 1) * 128

    # ---- flash steps: 256 query rows of one head against one tile, or on the diagonal against one piece of it

    def scores_of(queries, keys, head):
        """`[tokens, query rows]`, as logarithms to base 2."""
        return products(keys, queries, 1) * SCORE_SCALE

    def score(slot, first, tokens, head, rows):
        return scores_of(q_rows[head, rows], head_keys(slot, first, tokens, head), head)

    def state_before(head, rows, begins):
        """The running sum and output of some rows of a KV head; where they begin, what the block before left counts for nothing."""
        return jnp.where(begins, 1.0, row_sum[head, :, rows]), jnp.where(begins, 0.0, acc[head, :, rows])

    # Scores are turned, with tokens along sublanes and query rows along lanes: so weights are the matrix that the MXU keeps,
    # values what it multiplies, and its width is full of queries, not half empty for a head is narrower.

    def by_register(rows):
        """`[rows / 8, 8, lanes]`: what is the same in all 8 sublanes is spread over registers at no cost."""
        return rows.reshape(rows.shape[0] // 8, 8, rows.shape[1])

    def in_rows(registers):
        return registers.reshape(registers.shape[0] * 8, registers.shape[2])

    def in_all_rows(parts):
        """The largest of 8 rows, in each of them."""
        return jnp.broadcast_to(jnp.max(parts, axis=0, keepdims=True), parts.shape)

    def after(value, most):
        """`value`, once scores are there of which `most` is the largest: none is below -inf, which the compiler does not know."""
        return jnp.where(most < -jnp.inf, most, value)

    def largest(scores):
        """Of each query row's scores, by sublane."""
        return jnp.max(by_register(scores), axis=0)

    def weights_of(scores, top):
        return in_rows(jnp.exp2(by_register(scores) - top))

    def values_and_ones(slot, first, tokens, head):
        """`[OWN_DIM + 16, tokens]`: rows of ones below the values make the sums of the weights."""
        values = head_values(slot, first, tokens, head).T[OWN_DIM:]
        return jnp.concatenate([values, jnp.ones((16, tokens), values.dtype)])

    def flash_turns(turns, heads, ahead, tied_to, tokens, place, score_of, slot, begins):
        """Takes turns of some heads against the `tokens` tokens from `place(turn)` on, which is a token and the first head.

        A turn is one piece of code, in which scores are made `ahead` steps before they are weighed, 256 tokens at a time, the first
        of the next turn at its end. The compiler would make weights as soon as it can, far ahead of the MXU, and spill them:
        so each part of them waits for scores that the MXU makes meanwhile, the last but `tied_to`.
        """
        steps = [(head, pl.ds(row, 256)) for head in range(heads) for row in range(0, 2048, 256)]
        parts = [pl.ds(first, 256) for first in range(0, tokens, 256)]

        def make(turn, step, part):
            first, head = place(turn)
            scores = score_of(first + part.start, head + steps[step][0], steps[step][1])
            next_scores[step % 8, part] = scores
            return largest(scores)

        def keep_most(step, made):
            step_max[step % 8] = in_all_rows(jnp.max(jnp.stack(made), axis=0))

        def one_turn(turn, _):
            first, first_head = place(turn)
            on_first_tokens = begins & (first == place(0)[0])
            made = []
            for i, (head, rows) in enumerate(steps):
                head = first_head + head
                if rows.start == 0:
                    values = values_and_ones(slot, first, tokens, head)
                later = (i + ahead) % len(steps)
                turn_of_later = turn if later > i else jnp.minimum(turn + 1, turns - 1)
                old_max = row_max[head, :, rows]
                new_max = jnp.maximum(old_max, step_max[i % 8])
                rescale = jnp.exp2(old_max - new_max)
                weights = []
                for part in parts:
                    made.append(make(turn_of_later, later, part))
                    base = after(new_max, made[-tied_to]) if len(made) >= tied_to else new_max
                    weights.append(weights_of(next_scores[i % 8, part], base))
                keep_most(later, made[-len(parts) :])
                weights = jnp.concatenate(weights, axis=0)
                row_max[head, :, rows] = new_max
                old_sum, old_acc = state_before(head, rows, on_first_tokens)
                output = products(values, weights.astype(jnp.bfloat16), 0)
                row_sum[head, :, rows] = rescale * old_sum + output[OWN_DIM : OWN_DIM + 8]
                acc[head, :, rows] = in_rows(rescale * by_register(old_acc) + by_register(output[:OWN_DIM]))
            return 0

        for i in range(ahead):
            keep_most(i, [make(0, i, part) for part in parts])
        lax.fori_loop(0, turns, one_turn, 0)

    def plain_tiles(slot, count, begins):
        """Tiles that all queries of the block see whole."""

        def score_of(first, head, rows):
            return score(slot, first, 256, head, rows)

        def place_from(first_tile):
            def place(turn):
                tile, head = first_tile + lax.div(turn, 1), lax.rem(turn, 1) * 1
                return tile * 512, head

            return place

        def one(tile, _):
            split_tile(slot, tile)
            flash_turns(1, 1, 3, 5, 512, place_from(tile), score_of, slot, begins & (tile == 0))
            return 0

        lax.fori_loop(0, count, one, 0)

    def diagonal_tile(slot, tile, valid, begins, first_query):
        """A tile that some query sees in part, as far as there are tokens. `first_query` is seen from the block's start."""
        split_tile(slot, tile)

        first_piece = tile * 2
        pieces = jnp.minimum(2, pl.cdiv(valid, 256) - first_piece)

        # The MXU is wider than a head: beside the keys it multiplies, for each query of a step, how far it may look.
        def make_limits(piece, _):
            shape = (256, 128)
            token = (first_piece + piece) * 256 + piece_tokens(shape, 0)
            for step, row in enumerate(range(0, 2048, 256)):
                query = first_query + query_of(row) + lax.broadcasted_iota(jnp.int32, shape, 1)
                limits[piece, step] = jnp.where(token <= query, 0.0, MASKED).astype(limits.dtype)
            return 0

        lax.fori_loop(0, pieces, make_limits, 0)

        def score_of(first, head, rows):
            queries = jnp.concatenate([q_rows[head, rows], which_query[...]], axis=1)
            own_limits = limits[lax.div(first, 256) - first_piece, rows.start // 256]
            keys = jnp.concatenate([head_keys(slot, first, 256, head), own_limits], axis=1)
            return scores_of(queries, keys, head)

        def place(turn):
            piece = first_piece + lax.div(turn, 1)
            return piece * 256, lax.rem(turn, 1) * 1

        flash_turns(pieces * 1, 1, 6, 6, 256, place, score_of, slot, begins)

    def attend(start, fetched):
        row, lane = (lax.broadcasted_iota(jnp.int32, which_query.shape, axis) for axis in range(2))
        which_query[...] = jnp.where(query_of(row) == lane, 1.0, 0.0).astype(which_query.dtype)
        load_sinks()
        clear_all()
        start_fetch(0, start, ~fetched)
        ahead = next_fetch(start)
        for step in range(1, 2):
            ahead = fetch_ahead(step, *ahead)

        def body(carry):
            step, at, ahead, sent = carry
            seq, q_block, q_step, block = at
            ahead = fetch_ahead(step + 2, *ahead)
            slot = lax.rem(step, 3)
            end = kv_end(seq, q_block)
            valid = jnp.minimum(end - block * 1024, 1024)
            last = (block + 1) * 1024 >= end
            first_query = kv_lens[seq] - q_len(seq) + q_block * 256

            @pl.when(block == 0)
            def _():
                query_copies(seq, q_block, lax.rem(q_step, 3), lambda copy: copy.wait())
                begin(lax.rem(q_step, 3))

            wait_block(end, seq, block, slot)

            @pl.when(last)
            def _():
                clear_tail(slot, valid)

            seen = first_query - block * 1024
            plain = jnp.clip(lax.div(seen + 1, 512), 0, 2)
            plain_tiles(slot, plain, block == 0)

            def diagonal(tile, _):
                diagonal_tile(slot, tile, valid, block + tile == 0, seen)
                return 0

            lax.fori_loop(plain, pl.cdiv(valid, 512), diagonal, 0)

            @pl.when(last)
            def _():
                @pl.when(q_step > 0)
                def _():
                    out_copies(*sent, 0, lambda copy: copy.wait())

                finish(0)
                out_copies(seq, q_block, 0, lambda copy: copy.start())

            sent = tuple(jnp.where(last, new, old) for new, old in zip((seq, q_block), sent))
            return step + 1, advance(*at), ahead, sent

        state = (jnp.int32(0), start, ahead, start[:2])
        _, _, _, sent = lax.while_loop(lambda carry: carry[1][0] < end_seq, body, state)
        out_copies(*sent, 0, lambda copy: copy.wait())

    @pl.when(first_seq < end_seq)
    def _():
        start = (first_seq, jnp.int32(0), jnp.int32(0), jnp.int32(0))
        # The first block comes while the last pages go, if none of these is in it.
        early = first_page(first_seq) >= 8
        update_cache(lambda: start_fetch(0, start, early))
        attend(start, early)


def attend_prefill(queries, keys, values, rows, kv_lens, page_indices, distribution, sinks):
    """`(out, rows)` of the prefill sequences; other rows of `out` are not written."""
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        prefill_kernel,
        in_specs=[smem] * 4 + [hbm] * 4,
        out_specs=[hbm] * 2,
        out_shape=[jax.ShapeDtypeStruct(queries.shape, queries.dtype), jax.ShapeDtypeStruct(rows.shape, rows.dtype)],
        input_output_aliases={7: 1},
        scratch_shapes=[
            pltpu.VMEM((3, 2048, 128), jnp.bfloat16),  # kv: fetched blocks
            pltpu.VMEM((2, 256, 128), jnp.uint32),  # row_words: a tile by row of a token, 2 tokens a word
            pltpu.VMEM((5, 384, 1, 64), jnp.bfloat16),  # new_keys: new keys, around the page they go to
            pltpu.VMEM((5, 384, 1, 64), jnp.bfloat16),  # new_values: new values, likewise
            pltpu.VMEM((9, 256, 128), jnp.bfloat16),  # page_rows: pages to update
            pltpu.VMEM((16, 128), jnp.uint32),  # packed: new tokens in the cache's form
            pltpu.VMEM((3, 256, 8, 64), jnp.bfloat16),  # q_in: query blocks as they come
            pltpu.VMEM((1, 2048, 128), jnp.bfloat16),  # q_rows: one by KV head
            pltpu.VMEM((256, 128), jnp.bfloat16),  # which_query: a 1 where a lane is the row's query
            pltpu.VMEM((2, 8, 256, 128), jnp.bfloat16),  # limits: by token and query: 0, or what masks a score
            pltpu.VMEM((8, 512, 256), jnp.float32),  # next_scores: scores of the next steps
            pltpu.VMEM((8, 8, 256), jnp.float32),  # step_max: their largest
            pltpu.VMEM((1, 8, 128), jnp.float32),  # sink_rows: sinks, the same in every lane
            pltpu.VMEM((1, 8, 2048), jnp.float32),  # row_max: running maximum
            pltpu.VMEM((1, 8, 2048), jnp.float32),  # row_sum: running sum, the same in every sublane
            pltpu.VMEM((1, 64, 2048), jnp.float32),  # acc: running output
            pltpu.VMEM((1, 256, 8, 64), jnp.bfloat16),  # out_rows: an output block on its way out
            pltpu.SemaphoreType.DMA((3,)),  # kv_sem: fetches
            pltpu.SemaphoreType.DMA((5,)),  # new_sem: new keys and values
            pltpu.SemaphoreType.DMA((9,)),  # old_sem: pages that hold old tokens
            pltpu.SemaphoreType.DMA((9,)),  # write_sem: cache writes
            pltpu.SemaphoreType.DMA((3,)),  # q_sem: query blocks
            pltpu.SemaphoreType.DMA((1,)),  # out_sem: output blocks
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=25165824, disable_bounds_checks=True),
        name="rpa_prefill",
    )(kv_lens, page_indices, distribution, sinks, queries, keys, values, rows)


def cache_rows(kv_cache):
    """The cache as rows of 128 lanes, `[pages, PAGE_ROWS, 128]`. The bytes lie the same: the compiler makes it a bitcast."""
    return kv_cache.reshape(kv_cache.shape[0], PAGE_ROWS, 128)


def rows_cache(rows, shape):
    """The inverse of `cache_rows`."""
    return rows.reshape(shape)


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, sinks):
    """Attention of a batch of prefill chunks only; returns `(out, kv_cache)`, the cache in the donated argument's memory.

    Sequence s has rows [s * CHUNK, (s + 1) * CHUNK) of `queries`: `cu_q_lens` has nothing to add.
    """
    out, rows = attend_prefill(queries, keys, values, cache_rows(kv_cache), kv_lens, page_indices, distribution, sinks)
    return out, rows_cache(rows, kv_cache.shape)
