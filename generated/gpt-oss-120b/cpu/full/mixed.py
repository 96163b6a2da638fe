"""Ragged paged attention of gpt-oss-120b, full layers: mixed batches on cpu.

Do not edit: made from spec 623a068067c941bea572da917de4730a962bd2653c2fc3dc293059a64040709c by
    rpac build SPEC --target cpu
Change the spec or the templates and run it again.

What was specialized:
- 8 query heads over 1 KV heads, head_dim 64, queries bfloat16, KV bfloat16: constants
- these are one device's part of 8: KV heads in 8 parts
- pages of 128 tokens, 128 a sequence, up to 64 sequences
- token buckets that use it: 64, 2048
- causal, cache updated; attention sinks, an argument, in the softmax's sum; no soft cap, sliding window, ALiBi or KV
  scales in the spec: none is in the code
"""

import jax.numpy as jnp
from jax import lax

Q_HEADS = 8
KV_HEADS = 1
GROUP = 8  # query heads that share a KV head
HEAD_DIM = 64
HEAD_LANES = 128  # of a row of the cache: K in the lower ones, V in the upper
MAX_SEQS = 64
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 128
ROW_TOKENS = PAGES_PER_SEQ * PAGE_SIZE  # that a sequence's page table has room for
MASKED = -2e+38  # finite, so that a row that is all masked stays a number
DTYPE = jnp.bfloat16
WORD = jnp.uint16  # an integer as wide as DTYPE
KV_PLANES = 1  # rows of a token and head: K and V, or both in one
PADDING_ROWS = 1  # rows of a token that hold zeros
TOKEN_SHAPE = (1, 2, 128)  # of a token in the cache
TOKEN_AXIS = 0  # of a page, along which its tokens lie
SM_SCALE = 0.125  # the softmax scale

DECODE_BLOCK = 128  # tokens of KV that are one item of decode work
DECODE_BLOCK_PAGES = 1
DECODE_ITEMS = 16  # items of a step
Q_BLOCK = 32  # new tokens that are computed together
KV_BLOCK = 512  # tokens of KV that they are computed against in a step
KV_BLOCK_PAGES = 4


# Everything here that only moves data moves words. Integers are moved as they are, but to slice, gather, transpose or
# update a bfloat16 array XLA for CPU first turns all of it into float32: the whole cache, for one page.
def as_words(values):
    """The same bits as integers."""
    return lax.bitcast_convert_type(values, WORD)


def as_values(words):
    """The numbers that words are the bits of."""
    return lax.bitcast_convert_type(words, DTYPE)


def cache_words(kv_cache, step):
    """The cache as words, and `step`, the counter of the loop that uses them.

    Tied to the counter, the cast stays inside the loop, where it fuses with the read or the write of a few pages.
    Lifted out of the loop it would copy the cache.
    """
    kv_cache, step = lax.optimization_barrier((kv_cache, step))
    return as_words(kv_cache), step


def cdiv(value, by):
    """`value / by` rounded up, of what is not negative."""
    return lax.div(value + (by - 1), by)


def good_rows(kv_lens, edges, page_indices, num_pages):
    """Which sequences have numbers that can be; sequence s has rows [edges[s], edges[s + 1]) of the queries."""
    new = edges[1:] - edges[:-1]
    fits = (kv_lens >= new) & (kv_lens <= ROW_TOKENS)
    ids = page_indices.reshape(MAX_SEQS, PAGES_PER_SEQ)
    first_token = jnp.arange(PAGES_PER_SEQ) * PAGE_SIZE
    used = first_token < kv_lens[:, None]
    return fits & (((ids >= 0) & (ids < num_pages)) | ~used).all(axis=1)


def spoil_bad_rows(rows, edges, good, end):
    """Results by row of the queries, NaN for those of bad sequences before `end`."""
    row = jnp.arange(len(rows))
    seq = jnp.searchsorted(edges[1:], row, side="right")
    bad = (row < edges[end]) & ~good[jnp.minimum(seq, MAX_SEQS - 1)]
    return jnp.where(bad.reshape(-1, *[1] * (rows.ndim - 1)), jnp.nan, rows)


def stack_kv(keys, values):
    """K and V of the new tokens as words, side by side in one row: `[tokens, KV_HEADS, 1, HEAD_LANES]`."""
    return jnp.concatenate([as_words(keys), as_words(values)], axis=-1)[:, :, None]


def split_kv(rows):
    """K and V out of `rows` `[1, ..., HEAD_LANES]`, in which they are side by side."""
    return rows[0, ..., :HEAD_DIM], rows[0, ..., HEAD_DIM:]


def unpack_rows(pages):
    """Pages `[blocks, pages, ...]` as the rows of their tokens: `[blocks, tokens, KV_HEADS, KV_PLANES, HEAD_LANES]`."""
    rows = pages.reshape(len(pages), -1, KV_HEADS * KV_PLANES + PADDING_ROWS, HEAD_LANES)
    return rows[:, :, : KV_HEADS * KV_PLANES].reshape(len(pages), -1, KV_HEADS, KV_PLANES, HEAD_LANES)


def token_start(page, token):
    """Where token `token` of a page starts in the cache."""
    return page, token, 0, 0, 0


def over_page(of_tokens):
    """`of_tokens` `[PAGE_SIZE]` with the axes of a page."""
    return of_tokens[:, None, None, None]


def pad_tokens(rows):
    """Rows of tokens with PAGE_SIZE more before the first and after the last."""
    return jnp.pad(rows, ((PAGE_SIZE, PAGE_SIZE), (0, 0), (0, 0), (0, 0)))


def new_rows(keys, values):
    """K and V of the new tokens as words, as they lie in a page: `[tokens, *TOKEN_SHAPE]`."""
    rows = stack_kv(keys, values).reshape(len(keys), -1, HEAD_LANES)
    rows = jnp.pad(rows, ((0, 0), (0, PADDING_ROWS), (0, 0)))
    return rows.reshape(-1, *TOKEN_SHAPE)


def fetch_kv(words, page_tables, seqs, blocks, block_pages, live):
    """K and V of some blocks of `block_pages` pages, each `[len(blocks), KV_HEADS, tokens, HEAD_DIM]`.

    Tokens past the first `live[n]` of block n become zero, because they may hold NaN, and 0 * NaN is NaN.
    """
    ids = page_ids(page_tables, seqs, blocks, jnp.arange(block_pages), live)
    rows = unpack_rows(words.at[ids].get(mode="promise_in_bounds"))
    valid = jnp.arange(rows.shape[1]) < live[:, None]
    rows = jnp.where(valid[:, :, None, None, None], rows, WORD(0))
    # The barrier keeps the transposition on this side of the cast, in words.
    k, v = split_kv(lax.optimization_barrier(rows.transpose(3, 0, 2, 1, 4)))
    return as_values(k), as_values(v)


def page_ids(page_tables, seqs, blocks, page, live):
    """The ids of the pages of some blocks, `[len(blocks), len(page)]`; `page` counts the pages of a block.

    Block `blocks[n]` of sequence `seqs[n]` has `live[n]` tokens that count. Page table entries past them may hold
    anything, and page 0 is read instead.
    """
    entry = jnp.minimum(blocks[:, None] * len(page) + page, PAGES_PER_SEQ - 1)
    ids = page_tables.at[seqs[:, None], entry].get(mode="promise_in_bounds")
    return jnp.where(page * PAGE_SIZE < live[:, None], ids, 0)


def new_token(token, kv_lens):
    """The sequence of a new token of the decode rows, and its position there."""
    return token, kv_lens[token] - 1


def load_queries(queries, num_rows):
    """The queries of each sequence by KV head: `[num_rows, KV_HEADS, GROUP, HEAD_DIM]`."""
    return queries[:num_rows].reshape(num_rows, KV_HEADS, GROUP, HEAD_DIM)


def by_query_row(of_heads):
    """A number of each query head for each row of a KV head's queries: `[KV_HEADS, GROUP]`."""
    return of_heads.reshape(KV_HEADS, GROUP)


def out_by_token(out):
    """The output of each sequence by token: `[num_rows, Q_HEADS, HEAD_DIM]`."""
    return out.astype(DTYPE).reshape(len(out), Q_HEADS, HEAD_DIM)


def update_rows(kv_cache, keys, values, kv_lens, page_indices, num_seqs):
    """Writes the new tokens of the sequences [0, num_seqs) in place; they are the first rows of `keys` and `values`."""
    rows = new_rows(keys, values)

    token = jnp.arange(min(rows.shape[TOKEN_AXIS], MAX_SEQS))
    written = (token < num_seqs) & (kv_lens[token] > 0)
    order = jnp.argsort(~written)

    def write(token, kv_cache):
        words, token = cache_words(kv_cache, token)
        token = order[token]
        seq, position = new_token(token, kv_lens)
        page = page_indices[seq * PAGES_PER_SEQ + lax.div(position, PAGE_SIZE)]
        row = lax.dynamic_slice_in_dim(rows, token, 1, TOKEN_AXIS)
        words = lax.dynamic_update_slice(words, row[None], token_start(page, lax.rem(position, PAGE_SIZE)))
        return as_values(words)

    return lax.fori_loop(0, written.sum(), write, kv_cache)


def attend_decode(queries, kv_cache, kv_lens, page_indices, num_seqs, sinks):
    """Attention of the new tokens of the sequences [0, num_seqs), which are the first rows of `queries`.

    Returns `[rows, Q_HEADS, HEAD_DIM]` for as many rows as there can be, zero past the last sequence.

    The KV blocks of all sequences form one list, and a step takes the next DECODE_ITEMS of it, whichever sequences
    they are of: the work is that of the blocks in use, and a step of it is large enough to occupy the cores.
    """
    num_rows = min(len(queries), MAX_SEQS)
    queries = load_queries(queries, num_rows)
    page_tables = page_indices.reshape(MAX_SEQS, PAGES_PER_SEQ)
    row = jnp.arange(num_rows)
    kv_lens = jnp.where(row < num_seqs, kv_lens[:num_rows], 0)
    blocks = cdiv(kv_lens, DECODE_BLOCK)
    block_end = jnp.cumsum(blocks)  # where the items of each sequence end in the list
    num_items = block_end[-1]

    def step(index, state):
        words, index = cache_words(kv_cache, index)
        item = index * DECODE_ITEMS + jnp.arange(DECODE_ITEMS)
        seq = jnp.minimum(jnp.sum(item[:, None] >= block_end, axis=1), num_rows - 1)
        block = item - (block_end - blocks)[seq]
        live = jnp.where(item < num_items, kv_lens[seq] - block * DECODE_BLOCK, 0)
        k, v = fetch_kv(words, page_tables, seq, block, DECODE_BLOCK_PAGES, live)
        scores = jnp.einsum("nhgd,nhtd->nhgt", queries[seq], k, preferred_element_type=jnp.float32)
        visible = jnp.arange(DECODE_BLOCK) < live[:, None]
        visible = visible[:, None, None]
        scores = jnp.where(visible, scores * SM_SCALE, MASKED)
        item_max = scores.max(axis=-1)
        p = jnp.exp(scores - item_max[..., None])
        item_sum = p.sum(axis=-1)
        item_acc = jnp.einsum("nhgt,nhtd->nhgd", p.astype(DTYPE), v, preferred_element_type=jnp.float32)
        return merge_items(state, seq, item < num_items, item_max, item_sum, item_acc)

    # A step updates as many rows as it has items, from its first sequence on: the state has room for the last step's.
    shape = (num_rows + DECODE_ITEMS, KV_HEADS, GROUP)
    # A sink is in the sum from the start, where the maximum is its own; it has no value.
    row_max = jnp.broadcast_to(by_query_row(sinks), shape)
    row_sum = jnp.ones(shape)
    state = row_max, row_sum, jnp.zeros((*shape, HEAD_DIM))
    row_max, row_sum, acc = lax.fori_loop(0, cdiv(num_items, DECODE_ITEMS), step, state)
    out = acc[:num_rows] / row_sum[:num_rows, ..., None]
    out = jnp.where((row < num_seqs)[:, None, None, None], out, 0)
    return out_by_token(out)


def merge_items(state, seq, is_item, item_max, item_sum, item_acc):
    """Folds the partial softmax of each item into the row of its sequence; some items may share one."""
    row_max, row_sum, acc = state
    first = seq[0]
    old_max, old_sum, old_acc = (lax.dynamic_slice_in_dim(part, first, DECODE_ITEMS) for part in state)
    of_row = (seq == first + jnp.arange(DECODE_ITEMS)[:, None]) & is_item  # [rows, items]
    of_row = of_row[:, :, None, None]
    new_max = jnp.maximum(old_max, jnp.where(of_row, item_max, MASKED).max(axis=1))
    alpha = jnp.exp(old_max - new_max)
    beta = jnp.exp(item_max - new_max[:, None])
    # Selected, because an item of another sequence may hold NaN, and 0 * NaN is NaN.
    new_sum = old_sum * alpha + jnp.where(of_row, beta * item_sum, 0).sum(axis=1)
    new_acc = old_acc * alpha[..., None]
    # Unrolled, because XLA for CPU takes longer for a select within a reduction.
    for item in range(DECODE_ITEMS):
        share = beta[:, item, ..., None] * item_acc[item]
        new_acc += jnp.where(of_row[:, item, ..., None], share, 0)
    return (
        lax.dynamic_update_slice_in_dim(row_max, new_max, first, 0),
        lax.dynamic_update_slice_in_dim(row_sum, new_sum, first, 0),
        lax.dynamic_update_slice_in_dim(acc, new_acc, first, 0),
    )


def new_tokens(cu_q_lens, seq):
    """Where the new tokens of a sequence start in `queries`, and how many there are."""
    return cu_q_lens[seq], cu_q_lens[seq + 1] - cu_q_lens[seq]


def update_pages(kv_cache, keys, values, kv_lens, page_indices, cu_q_lens, first_seq, end_seq):
    """Writes the new tokens of the sequences [first_seq, end_seq) in place, a page at a time; its other rows stay."""
    # Padded, because the page of the first token may start before it, and that of the last end after it.
    rows = pad_tokens(new_rows(keys, values))

    def sequence(seq, kv_cache):
        start, count = new_tokens(cu_q_lens, seq)
        count = jnp.where(kv_lens[seq] > 0, count, 0)  # of a bad sequence none
        end = kv_lens[seq]
        begin = end - count

        def page(index, kv_cache):
            words, index = cache_words(kv_cache, index)
            page_id = page_indices[seq * PAGES_PER_SEQ + index]
            first = index * PAGE_SIZE
            new = lax.dynamic_slice_in_dim(rows, PAGE_SIZE + start + first - begin, PAGE_SIZE, TOKEN_AXIS)

            def keep_old():
                words, _ = cache_words(kv_cache, index)
                old = lax.dynamic_index_in_dim(words, page_id, keepdims=False)
                position = first + jnp.arange(PAGE_SIZE)
                is_new = (position >= begin) & (position < end)
                return jnp.where(over_page(is_new), new, old)

            # The read has a branch to itself, because fused with the write it would make a copy of the cache.
            is_full = (begin <= first) & (first + PAGE_SIZE <= end)
            merged = lax.cond(is_full, lambda: new, keep_old)
            words = lax.dynamic_update_index_in_dim(words, merged, page_id, 0)
            return as_values(words)

        return lax.fori_loop(lax.div(begin, PAGE_SIZE), cdiv(end, PAGE_SIZE), page, kv_cache)

    return lax.fori_loop(first_seq, end_seq, sequence, kv_cache)


def attend_blocks(out, queries, kv_cache, kv_lens, page_indices, cu_q_lens, first_seq, end_seq, sinks):
    """Attention of the new tokens of the sequences [first_seq, end_seq), by blocks of Q_BLOCK of them.

    `queries` `[tokens + Q_BLOCK, Q_HEADS, HEAD_DIM]` and `out` `[tokens + Q_BLOCK, Q_HEADS, HEAD_DIM]` are words. The
    last block of a sequence may run over its end: the sequences that follow write over those rows, and the caller clears
    what is left past the last.
    """
    page_tables = page_indices.reshape(MAX_SEQS, PAGES_PER_SEQ)

    def sequence(seq, out):
        start, count = new_tokens(cu_q_lens, seq)
        count = jnp.where(kv_lens[seq] > 0, count, 0)  # of a bad sequence none
        begin = kv_lens[seq] - count

        def q_block(index, out):
            row = start + index * Q_BLOCK
            position = begin + index * Q_BLOCK
            q = lax.dynamic_slice_in_dim(queries, row, Q_BLOCK)
            end = jnp.minimum(position + Q_BLOCK, kv_lens[seq])
            attended = attend_block(q, kv_cache, page_tables, seq, position, end, sinks)
            out = lax.dynamic_update_slice_in_dim(out, attended, row, 0)
            return out

        return lax.fori_loop(0, cdiv(count, Q_BLOCK), q_block, out)

    return lax.fori_loop(first_seq, end_seq, sequence, out)


def attend_block(q, kv_cache, page_tables, seq, position, end, sinks):
    """One query block over the tokens [0, end) of its sequence; words in and out.

    Its first query is at `position`, and sees the tokens up to its own.
    """
    rows = Q_BLOCK * GROUP  # of one KV head: its group's queries, token after token
    q = q.reshape(Q_BLOCK, KV_HEADS, GROUP, HEAD_DIM).transpose(1, 0, 2, 3).reshape(KV_HEADS, rows, HEAD_DIM)
    q = as_values(lax.optimization_barrier(q))
    position = position + lax.div(jnp.arange(rows), GROUP)

    def kv_block(index, state):
        row_max, row_sum, acc = state
        words, index = cache_words(kv_cache, index)
        begin = index * KV_BLOCK
        k, v = fetch_kv(words, page_tables, seq[None], index[None], KV_BLOCK_PAGES, (end - begin)[None])
        scores = jnp.einsum("hrd,htd->hrt", q, k[0], preferred_element_type=jnp.float32)
        token = begin + jnp.arange(KV_BLOCK)
        visible = token <= position[:, None]
        scores = jnp.where(visible, scores * SM_SCALE, MASKED)
        new_max = jnp.maximum(row_max, scores.max(axis=-1))
        p = jnp.exp(scores - new_max[..., None])
        alpha = jnp.exp(row_max - new_max)
        new_sum = row_sum * alpha + p.sum(axis=-1)
        new_acc = jnp.einsum("hrt,htd->hrd", p.astype(DTYPE), v[0], preferred_element_type=jnp.float32)
        return new_max, new_sum, acc * alpha[..., None] + new_acc

    shape = (KV_HEADS, rows)
    # A sink is in the sum from the start, where the maximum is its own; it has no value.
    row_max = jnp.tile(sinks.reshape(KV_HEADS, GROUP), Q_BLOCK)
    row_sum = jnp.ones(shape)
    state = row_max, row_sum, jnp.zeros((*shape, HEAD_DIM))
    row_max, row_sum, acc = lax.fori_loop(0, cdiv(end, KV_BLOCK), kv_block, state)
    out = as_words((acc / row_sum[..., None]).astype(DTYPE))
    out = out.reshape(KV_HEADS, Q_BLOCK, GROUP, HEAD_DIM).transpose(1, 0, 2, 3)
    return out.reshape(Q_BLOCK, Q_HEADS, HEAD_DIM)


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, sinks):
    """Attention of any batch: decode rows, then the rest; returns `(out, kv_cache)`, the cache in the donated memory.

    Rows past the last sequence are zero in `out`.
    """
    decodes = jnp.clip(distribution[0], 0, min(MAX_SEQS, len(queries)))
    end = jnp.clip(distribution[2], decodes, MAX_SEQS)
    # Edges that fall or pass the queries are moved to where no sequence gets rows of one before it.
    row = jnp.arange(MAX_SEQS + 1)
    cu_q_lens = jnp.where(row <= decodes, row, jnp.clip(cu_q_lens, 0, len(queries)))
    cu_q_lens = edges = lax.cummax(cu_q_lens)
    good = good_rows(kv_lens, edges, page_indices, len(kv_cache))
    kv_lens = jnp.where(good, kv_lens, 0)
    kv_cache = update_rows(kv_cache, keys, values, kv_lens, page_indices, decodes)
    kv_cache = update_pages(kv_cache, keys, values, kv_lens, page_indices, cu_q_lens, decodes, end)
    tokens = len(queries)
    out = attend_decode(queries, kv_cache, kv_lens, page_indices, decodes, sinks)
    out = as_words(out)
    out = jnp.pad(out, ((0, tokens + Q_BLOCK - len(out)), (0, 0), (0, 0)))
    queries = jnp.pad(as_words(queries), ((0, Q_BLOCK), (0, 0), (0, 0)))
    out = attend_blocks(out, queries, kv_cache, kv_lens, page_indices, cu_q_lens, decodes, end, sinks)
    is_token = jnp.arange(tokens) < cu_q_lens[end]
    out = as_values(jnp.where(is_token[:, None, None], out[:tokens], WORD(0)))
    return spoil_bad_rows(out, edges, good, end), kv_cache
