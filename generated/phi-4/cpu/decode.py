"""Ragged paged attention of phi-4: decode batches on cpu.

Do not edit: made from spec 6c9ead0fbe73954ed70c91929aa3fa38925aacdd71acb3b0610cb6e0a23e369c by
    rpac build SPEC --target cpu
Change the spec or the templates and run it again.

What was specialized:
- 20 query heads over 5 KV heads, head_dim 128, queries bfloat16, KV bfloat16: constants
- these are one device's part of 2: KV heads in 2 parts
- pages of 128 tokens, 128 a sequence, up to 64 sequences
- token buckets that use it: 64, 2048
- causal, cache updated; no soft cap, sliding window, sinks, ALiBi or KV scales in the spec: none is in the code
- separate K and V in the cache, pages of [2, KV heads, tokens, head_dim] (kv_layout separate)
- only decode batches: the other kernels are not in this program
"""

import jax.numpy as jnp
from jax import lax

Q_HEADS = 20
KV_HEADS = 5
GROUP = 4  # query heads that share a KV head
HEAD_DIM = 128
MAX_SEQS = 64
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 128
ROW_TOKENS = PAGES_PER_SEQ * PAGE_SIZE  # that a sequence's page table has room for
MASKED = -2e+38  # finite, so that a row that is all masked stays a number
DTYPE = jnp.bfloat16
WORD = jnp.uint16  # an integer as wide as DTYPE
KV_PLANES = 2  # rows of a token and head: K and V, or both in one
TOKEN_AXIS = 2  # of a page, along which its tokens lie
SM_SCALE = 0.08838834764831845  # the softmax scale

DECODE_BLOCK = 128  # tokens of KV that are one item of decode work
DECODE_BLOCK_PAGES = 1
DECODE_ITEMS = 3  # items of a step


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


def split_kv(rows):
    """K and V out of `rows` `[2, ..., HEAD_DIM]`."""
    return tuple(rows)


def token_start(page, token):
    """Where token `token` of a page starts in the cache."""
    return page, 0, 0, token, 0


def new_rows(keys, values):
    """K and V of the new tokens as words, as they lie in a page: `[2, KV_HEADS, tokens, HEAD_DIM]`."""
    return jnp.stack([as_words(keys), as_words(values)]).transpose(0, 2, 1, 3)


def fetch_kv(words, page_tables, seqs, blocks, block_pages, live):
    """K and V of some blocks of `block_pages` pages, each `[len(blocks), KV_HEADS, tokens, HEAD_DIM]`.

    Tokens past the first `live[n]` of block n become zero, because they may hold NaN, and 0 * NaN is NaN.
    """
    page = jnp.arange(block_pages)
    ids = page_ids(page_tables, seqs, blocks, page, live)
    pages = words.at[ids].get(mode="promise_in_bounds")
    position = page[:, None] * PAGE_SIZE + jnp.arange(PAGE_SIZE)
    valid = position < live[:, None, None]
    pages = jnp.where(valid[:, :, None, None, :, None], pages, WORD(0))
    # The barrier keeps the transposition on this side of the cast, in words.
    pages = lax.optimization_barrier(pages.transpose(2, 0, 3, 1, 4, 5))
    k, v = split_kv(pages.reshape(KV_PLANES, len(blocks), KV_HEADS, -1, HEAD_DIM))
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


def attend_decode(queries, kv_cache, kv_lens, page_indices, num_seqs):
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
    row_max = jnp.full(shape, MASKED)
    row_sum = jnp.zeros(shape)
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


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of a batch of decode rows only; returns `(out, kv_cache)`, the cache in the donated memory.

    The first rows of `queries` are the new tokens of the sequences in order: `cu_q_lens` is not used. Rows past the last
    sequence are zero in `out`.
    """
    num_seqs = jnp.clip(distribution[0], 0, min(MAX_SEQS, len(queries)))
    edges = jnp.arange(MAX_SEQS + 1)
    good = good_rows(kv_lens, edges, page_indices, len(kv_cache))
    kv_lens = jnp.where(good, kv_lens, 0)
    kv_cache = update_rows(kv_cache, keys, values, kv_lens, page_indices, num_seqs)
    out = attend_decode(queries, kv_cache, kv_lens, page_indices, num_seqs)
    padding = (0, len(queries) - len(out))
    out = jnp.pad(out, (padding, (0, 0), (0, 0)))
    return spoil_bad_rows(out, edges, good, num_seqs), kv_cache
