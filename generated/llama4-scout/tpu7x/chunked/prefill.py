"""Ragged paged attention of llama4-scout, chunked layers: prefill batches on tpu7x.

Do not edit: made from spec 6285f3168a6b3952fdf6bf2eed5896cd4ba02c84cad325d3c898f8bef0b023f8 by
    rpac build llama4-scout.yaml --target tpu7x
Change the spec or the templates and run it again.

What was specialized:
- 5 query heads over 1 KV heads, head_dim 128, queries bfloat16, KV bfloat16: constants
- these are one device's part of 8: KV heads in 8 parts
- pages of 128 tokens, 256 a sequence, up to 32 sequences
- token buckets that use it: 2048
- causal inside its own chunk of 8192 tokens, nothing fetched before it, cache updated; no window, soft cap, sinks or KV scales in the spec: none is in the code
- K and V apart in the cache, pages of [2, KV heads, tokens, head_dim] (kv_layout separate)
- only prefill batches: the other kernels are not in this program
- prefill: blocks of 256 queries against 2048 fetched tokens (3 buffers); computes 256 query rows of a head against 512 tokens at once
- VMEM: 16,384,000 bytes counted, 25,165,824 allowed, 67,108,864 there
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Q_HEADS = 5
KV_HEADS = 1
GROUP = 5  # query heads that share a KV head
HEAD_DIM = 128
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 256
CHUNK = 512  # new tokens of every sequence
SCORE_SCALE = 0.12751743082459868  # 0.08838834764831845 (the softmax scale) * log2(e): probabilities are powers of two
ATTENTION_CHUNK = 8192  # tokens of each part of a sequence, which sees nothing of those before
MASKED = -2e+38  # finite, so that a row with nothing in it yet stays a number

UNIT = 16  # tokens of the smallest piece of the cache that a DMA or a store reaches


def widen(rows, lanes):
    """Rows that hold one value in all 128 lanes, over `lanes` lanes: cheaper than a broadcast from one lane."""
    return jnp.concatenate([rows] * (lanes // 128), axis=1)


def products(rows, matrix, contracted):
    """`rows` times `matrix` along its dimension `contracted`, in float32."""
    dims = (((1,), (contracted,)), ((), ()))
    return lax.dot_general(rows, matrix, dims, preferred_element_type=jnp.float32)


def prefill_kernel(
    # scalars in SMEM
    kv_lens, page_indices, distribution,
    # arrays in HBM; the cache is updated in place
    q_hbm, k_hbm, v_hbm, _cache, out_hbm, cache_hbm,
    # scratch
    kv,
    new_keys,
    new_values,
    page_rows,
    q_in,
    by_token,
    q_rows,
    next_scores,
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
            start = pl.multiple_of(piece * 16, 16)
            tokens = pl.ds(start, 16)
            # As words of two tokens, so that the old ones stay bit for bit whatever they are.
            low = start + 2 * lax.broadcasted_iota(jnp.int32, (8, HEAD_DIM), 0)
            low_mask = jnp.where((low >= first) & (low < end), jnp.uint32(0xFFFF), jnp.uint32(0))
            mask = low_mask | jnp.where((low + 1 >= first) & (low + 1 < end), jnp.uint32(0xFFFF0000), jnp.uint32(0))

            new_tokens = pl.ds(PAGE_SIZE + start, 16)
            new = [array[new_slot, new_tokens].astype(jnp.float32) for array in (new_keys, new_values)]
            for kind, rows in enumerate(new):
                by_head = jnp.swapaxes(rows, 0, 1)
                for head in range(KV_HEADS):
                    old = page_rows[slot, kind, head, tokens]
                    words, old = pltpu.bitcast(by_head[head].astype(old.dtype), jnp.uint32), pltpu.bitcast(old, jnp.uint32)
                    page_rows[slot, kind, head, tokens] = pltpu.bitcast((words & mask) | (old & ~mask), page_rows.dtype)
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

    # ---- fetch KV: whole pages, into one of 3 buffers of 2048 tokens

    # `entry` is where in the page table the chunk's first page is, and `kv_end` counts the tokens from there on.
    def page_copy(entry, block, slot, page):
        physical = page_indices[entry + block * 16 + page]
        return pltpu.make_async_copy(cache_hbm.at[physical], kv.at[slot, page], kv_sem.at[slot])

    def pages_of(kv_end, block):
        return jnp.minimum(pl.cdiv(kv_end, PAGE_SIZE) - block * 16, 16)

    def start_block(kv_end, entry, block, slot):
        def one(page, _):
            page_copy(entry, block, slot, page).start()
            return 0

        pages = pages_of(kv_end, block)

        @pl.when(pages == 16)
        def _():
            for page in range(16):
                one(page, 0)

        @pl.when(pages < 16)
        def _():
            lax.fori_loop(0, pages, one, 0)

    def wait_block(kv_end, entry, block, slot):
        def one(page, _):
            page_copy(entry, block, slot, page).wait()
            return 0

        pages = pages_of(kv_end, block)

        @pl.when(pages == 16)
        def _():
            pltpu.make_async_copy(kv.at[slot], kv.at[slot], kv_sem.at[slot]).wait()  # for as many bytes, from anywhere

        @pl.when(pages < 16)
        def _():
            lax.fori_loop(0, pages, one, 0)

    def first_token(seq, q_block):
        """Where the chunk of a block's first query begins; nothing before it is fetched."""
        first_query = kv_lens[seq] - q_len(seq) + q_block * 256
        return lax.div(first_query, ATTENTION_CHUNK) * ATTENTION_CHUNK

    def entry(seq, q_block):
        return seq * PAGES_PER_SEQ + lax.div(first_token(seq, q_block), PAGE_SIZE)

    def kv_end(seq, q_block):
        """The number of tokens from there on to the last query of the block."""
        return kv_lens[seq] - CHUNK + (q_block + 1) * 256 - first_token(seq, q_block)

    def advance(seq, q_block, q_step, block):
        last = (block + 1) * 2048 >= kv_end(seq, q_block)
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

            start_block(kv_end(seq, q_block), entry(seq, q_block), block, lax.rem(step, 3))

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

    def clear(head, rows):
        """The running maximum of some rows of a KV head, as before their first tile."""
        row_max[head, rows] = jnp.full((rows.size, 128), MASKED)

    def clear_all():
        def one(piece):
            rows = pl.ds(lax.rem(piece, 5) * 256, 256)
            clear(lax.div(piece, 5), rows)

        loop(KV_HEADS * 5, one)

    def query_of(row):
        """Which query of the block a row is of: rows go by head, then query."""
        return lax.rem(row, 256)

    def begin(slot):
        """Sorts a query block by head, `[KV_HEADS, GROUP * 256, HEAD_DIM]`."""

        def spread(piece):
            for i in range(16):
                token = piece * 16 + i
                queries = q_in[slot, token].astype(jnp.float32)
                rows = pl.ds(pl.multiple_of(token * 8, 8), Q_HEADS)
                by_token[rows] = queries

        def sort(head):
            rows = head_rows(head)
            strided = pl.ds(head, 256, stride=8)
            q_rows[head // GROUP, rows] = by_token[strided, :].astype(q_rows.dtype)

        loop(16, spread)
        loop(Q_HEADS, sort)

    def head_rows(head):
        """Where one query head's tokens are among the rows of its KV head."""
        return pl.ds(pl.multiple_of(lax.rem(head, GROUP) * 256, 256), 256)

    def finish(slot):
        """Puts a block's output back in the order of its tokens, and clears the running maximum for the next one."""

        def unsort(head):
            rows = head_rows(head)
            strided = pl.ds(head, 256, stride=8)
            out = acc[head // GROUP, rows] / widen(row_sum[head // GROUP, rows], HEAD_DIM)
            clear(head // GROUP, rows)
            by_token[strided, :] = out

        def gather(piece):
            for i in range(16):
                token = piece * 16 + i
                rows = pl.ds(pl.multiple_of(token * 8, 8), Q_HEADS)
                out = by_token[rows]
                out_rows[slot, token] = out.astype(out_rows.dtype)

        loop(Q_HEADS, unsort)
        loop(16, gather)

    def clear_tail(slot, valid):
        """Zeroes V from token `valid` to the end of those that are computed: a weight of 0 does not hide a NaN."""
        row = lax.broadcasted_iota(jnp.int32, (UNIT, HEAD_DIM), 0)

        def clear(unit, _):
            token = unit * UNIT
            tokens = pl.ds(pl.multiple_of(lax.rem(token, PAGE_SIZE), UNIT), UNIT)
            for head in range(KV_HEADS):
                old = kv[slot, token // PAGE_SIZE, 1, head, tokens].astype(jnp.float32)
                kv[slot, token // PAGE_SIZE, 1, head, tokens] = jnp.where(token + row < valid, old, 0.0).astype(kv.dtype)
            return 0

        lax.fori_loop(valid // UNIT, pl.cdiv(valid, 256) * 16, clear, 0)

    # ---- read KV: `tokens` tokens of one head, from token `first` of a block on, both whole pages

    def head_of(slot, kind, first, tokens, head):
        pages = pl.ds(lax.div(first, PAGE_SIZE), tokens // PAGE_SIZE)
        return kv[slot, pages, kind, head].reshape(tokens, HEAD_DIM)

    def head_keys(slot, first, tokens, head):
        return head_of(slot, 0, first, tokens, head)

    def head_values(slot, first, tokens, head):
        return head_of(slot, 1, first, tokens, head)

    def piece_tokens(shape, axis):
        """The token of each index along an axis of a piece's."""
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    # ---- flash steps: 256 query rows of one head against one tile, or on the diagonal against one piece of it

    def scores_of(queries, keys, head):
        """`[query rows, tokens]`, as logarithms to base 2."""
        return products(queries, keys, 1) * SCORE_SCALE

    def score(slot, first, tokens, head, rows):
        return scores_of(q_rows[head, rows], head_keys(slot, first, tokens, head), head)

    def state_before(head, rows, begins):
        """The running sum and output of some rows of a KV head; where they begin, what the block before left counts for nothing."""
        return jnp.where(begins, 0.0, row_sum[head, rows]), jnp.where(begins, 0.0, acc[head, rows])

    def weigh(scores, slot, first, head, rows, begins):
        tokens = scores.shape[1]
        old_sum, old_acc = state_before(head, rows, begins)
        old_max = row_max[head, rows]
        new_max = jnp.maximum(old_max, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - widen(new_max, tokens))
        rescale = jnp.exp2(old_max - new_max)
        row_max[head, rows] = new_max
        # The MXU is wider than a head: ones beside the values make the sum of the weights at no cost.
        values = jnp.concatenate([head_values(slot, first, tokens, head), jnp.ones((tokens, 128), jnp.bfloat16)], axis=1)
        part = products(weights.astype(jnp.bfloat16), values, 0)
        row_sum[head, rows] = rescale * old_sum + part[:, HEAD_DIM:]
        acc[head, rows] = widen(rescale, HEAD_DIM) * old_acc + part[:, :HEAD_DIM]

    def flash_turns(turns, heads, ahead, tokens, place, score_of, slot, begins):
        """Takes turns of some heads against the `tokens` tokens from `place(turn)` on, which is a token and the first head.

        A turn is one piece of code, in which scores are made `ahead` steps before they are weighed, the first of the next turn
        at its end: so the MXU and the vector units work at once.
        """
        steps = [(head, pl.ds(row, 256)) for head in range(heads) for row in range(0, 1280, 256)]

        def scores_of(turn, step):
            first, head = place(turn)
            return score_of(first, head + steps[step][0], steps[step][1])

        def one_turn(turn, _):
            first, first_head = place(turn)
            on_first_tokens = begins & (first == place(0)[0])
            scores = [next_scores[i, :, :tokens] for i in range(ahead)]
            for i, (head, rows) in enumerate(steps):
                later = i + ahead
                if later < len(steps):
                    scores.append(scores_of(turn, later))
                else:
                    following = jnp.minimum(turn + 1, turns - 1)
                    next_scores[later - len(steps), :, :tokens] = scores_of(following, later - len(steps))
                weigh(scores[i], slot, first, first_head + head, rows, on_first_tokens)
            return 0

        for i in range(ahead):
            next_scores[i, :, :tokens] = scores_of(0, i)
        lax.fori_loop(0, turns, one_turn, 0)

    def plain_tiles(slot, begin, count, begins):
        """Tiles that all queries of the block see whole, from tile `begin` on."""

        def score_of(first, head, rows):
            return score(slot, first, 512, head, rows)

        def place_from(first_tile):
            def place(turn):
                tile, head = first_tile + lax.div(turn, 1), lax.rem(turn, 1) * 1
                return tile * 512, head

            return place

        @pl.when(count > 0)
        def _():
            turns = count * 1
            flash_turns(turns, 1, 2, 512, place_from(begin), score_of, slot, begins)

    def seen(token, query, chunk_end):
        return (token <= query) & ((token >= chunk_end) | (query < chunk_end))

    def diagonal_tile(slot, tile, valid, begins, first_query, chunk_end):
        """A tile that some query sees in part, as far as there are tokens. `first_query` is seen from the block's start."""

        first_piece = tile * 2
        pieces = jnp.minimum(2, pl.cdiv(valid, 256) - first_piece)

        def score_of(first, head, rows):
            scores = score(slot, first, 256, head, rows)
            row = rows.start + lax.broadcasted_iota(jnp.int32, (rows.size, 128), 0)
            query = widen(first_query - first + query_of(row), 256)
            return jnp.where(seen(piece_tokens(scores.shape, 1), query, chunk_end - first), scores, MASKED)

        def place(turn):
            piece = first_piece + lax.div(turn, 1)
            return piece * 256, lax.rem(turn, 1) * 1

        flash_turns(pieces * 1, 1, 2, 256, place, score_of, slot, begins)

    def attend(start, fetched):
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
            valid = jnp.minimum(end - block * 2048, 2048)
            last = (block + 1) * 2048 >= end
            first_query = kv_lens[seq] - q_len(seq) + q_block * 256 - first_token(seq, q_block)

            @pl.when(block == 0)
            def _():
                query_copies(seq, q_block, lax.rem(q_step, 3), lambda copy: copy.wait())
                begin(lax.rem(q_step, 3))

            wait_block(end, entry(seq, q_block), block, slot)

            @pl.when(last)
            def _():
                clear_tail(slot, valid)

            query = first_query - block * 2048
            count = pl.cdiv(valid, 512)
            # Tiles in order: where the last query is in another chunk, those of the first one's; whole ones, those on the diagonal.
            chunk_end = ATTENTION_CHUNK - block * 2048
            left = jnp.clip(lax.div(chunk_end + 511, 512), 0, count)
            left = jnp.where(query + 255 >= chunk_end, left, 0)
            plain = jnp.maximum(jnp.clip(lax.div(query + 1, 512), 0, 4) - left, 0)
            plain_tiles(slot, left, plain, block == 0)

            def in_part(index, _):
                begins = (block == 0) & (plain + index == 0)
                diagonal_tile(slot, jnp.where(index < left, index, index + plain), valid, begins, query, chunk_end)
                return 0

            lax.fori_loop(0, count - plain, in_part, 0)

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
        early = first_page(first_seq) - lax.div(first_token(first_seq, 0), PAGE_SIZE) >= 16
        update_cache(lambda: start_fetch(0, start, early))
        attend(start, early)


def attend_prefill(queries, keys, values, rows, kv_lens, page_indices, distribution):
    """`(out, rows)` of the prefill sequences; other rows of `out` are not written."""
    smem, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)
    return pl.pallas_call(
        prefill_kernel,
        in_specs=[smem] * 3 + [hbm] * 4,
        out_specs=[hbm] * 2,
        out_shape=[jax.ShapeDtypeStruct(queries.shape, queries.dtype), jax.ShapeDtypeStruct(rows.shape, rows.dtype)],
        input_output_aliases={6: 1},
        scratch_shapes=[
            pltpu.VMEM((3, 16, 2, 1, 128, 128), jnp.bfloat16),  # kv: fetched blocks
            pltpu.VMEM((5, 384, 1, 128), jnp.bfloat16),  # new_keys: new keys, around the page they go to
            pltpu.VMEM((5, 384, 1, 128), jnp.bfloat16),  # new_values: new values, likewise
            pltpu.VMEM((9, 2, 1, 128, 128), jnp.bfloat16),  # page_rows: pages to update
            pltpu.VMEM((3, 256, 5, 128), jnp.bfloat16),  # q_in: query blocks as they come
            pltpu.VMEM((2048, 128), jnp.float32),  # by_token: one by token
            pltpu.VMEM((1, 1280, 128), jnp.bfloat16),  # q_rows: one by KV head
            pltpu.VMEM((2, 256, 512), jnp.float32),  # next_scores: the first scores of the next turn
            pltpu.VMEM((1, 1280, 128), jnp.float32),  # row_max: running maximum
            pltpu.VMEM((1, 1280, 128), jnp.float32),  # row_sum: running sum, the same in every lane
            pltpu.VMEM((1, 1280, 128), jnp.float32),  # acc: running output
            pltpu.VMEM((1, 256, 5, 128), jnp.bfloat16),  # out_rows: an output block on its way out
            pltpu.SemaphoreType.DMA((3,)),  # kv_sem: fetches
            pltpu.SemaphoreType.DMA((5,)),  # new_sem: new keys and values
            pltpu.SemaphoreType.DMA((9,)),  # old_sem: pages that hold old tokens
            pltpu.SemaphoreType.DMA((9,)),  # write_sem: cache writes
            pltpu.SemaphoreType.DMA((3,)),  # q_sem: query blocks
            pltpu.SemaphoreType.DMA((1,)),  # out_sem: output blocks
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=25165824, disable_bounds_checks=True),
        name="rpa_prefill",
    )(kv_lens, page_indices, distribution, queries, keys, values, rows)


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of a batch of prefill chunks only; returns `(out, kv_cache)`, the cache in the donated argument's memory.

    Sequence s has rows [s * CHUNK, (s + 1) * CHUNK) of `queries`: `cu_q_lens` has nothing to add.
    """
    return attend_prefill(queries, keys, values, kv_cache, kv_lens, page_indices, distribution)
