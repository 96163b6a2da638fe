"""Ragged paged attention of llama4-scout, global layers: decode batches on cpu.

Do not edit: made from spec 6285f3168a6b3952fdf6bf2eed5896cd4ba02c84cad325d3c898f8bef0b023f8 by
    rpac build llama4-scout.yaml --target cpu
Change the spec or the templates and run it again.

What was specialized:
- 5 query heads over 1 KV heads, head_dim 128, queries bfloat16, KV bfloat16: constants
- these are one device's part of 8: KV heads in 8 parts
- pages of 128 tokens, 256 a sequence, up to 32 sequences
- token buckets that use it: 64, 2048
- causal, cache updated; no window, soft cap, sinks or KV scales in the spec: none is in the code
- K and V apart in the cache, pages of [2, KV heads, tokens, head_dim] (kv_layout separate)
- only decode batches: the other kernels are not in this program
"""

import jax.numpy as jnp
from jax import lax

Q_HEADS = 5
KV_HEADS = 1
GROUP = 5  # query heads that share a KV head
HEAD_DIM = 128
DTYPE = jnp.bfloat16
WORD = jnp.uint16  # an integer as wide as DTYPE
PAGE_SIZE = 128  # tokens
PAGES_PER_SEQ = 256
MAX_SEQS = 32
DECODE_BLOCK = 128  # tokens of KV that are one item of decode work
DECODE_BLOCK_PAGES = 1
DECODE_ITEMS = 16  # items of a step
SM_SCALE = 0.08838834764831845
MASKED = -2e+38  # finite, so that a row with nothing in it yet stays a number


def as_words(values):
    """The same bits as integers.

    Everything here that only moves data moves words. Integers are moved as they are, but to slice, gather, transpose
    or update a bfloat16 array XLA for CPU first turns all of it into float32: the whole cache, for one page.
    """
    return lax.bitcast_convert_type(values, WORD)


def as_values(words):
    return lax.bitcast_convert_type(words, DTYPE)


def cache_words(kv_cache, step):
    """The cache as words, and `step`, the counter of the loop that uses them.

    Tied to the counter, the cast stays inside the loop, where it fuses with the read or the write of a few pages.
    Lifted out of the loop it would copy the cache.
    """
    kv_cache, step = lax.optimization_barrier((kv_cache, step))
    return as_words(kv_cache), step


def new_rows(keys, values):
    """K and V of the new tokens as words, as they lie in a page: `[2, KV_HEADS, tokens, HEAD_DIM]`."""
    return jnp.stack([as_words(keys), as_words(values)]).transpose(0, 2, 1, 3)


def cdiv(value, by):
    """`value / by` rounded up, of what is not negative."""
    return lax.div(value + (by - 1), by)


def fetch_kv(words, page_tables, seqs, blocks, block_pages, live):
    """K and V of some blocks of `block_pages` pages, each `[len(blocks), KV_HEADS, tokens, HEAD_DIM]`.

    Block `blocks[n]` of sequence `seqs[n]` has `live[n]` tokens that count. The rest become zero, for they may hold
    NaN, and 0 * NaN is NaN; page table entries past them may hold anything, and page 0 is read instead.
    """
    page = jnp.arange(block_pages)
    entry = jnp.minimum(blocks[:, None] * block_pages + page, PAGES_PER_SEQ - 1)
    ids = page_tables.at[seqs[:, None], entry].get(mode="promise_in_bounds")
    ids = jnp.where(page * PAGE_SIZE < live[:, None], ids, 0)
    pages = words.at[ids].get(mode="promise_in_bounds")
    position = page[:, None] * PAGE_SIZE + jnp.arange(PAGE_SIZE)
    valid = position < live[:, None, None]
    pages = jnp.where(valid[:, :, None, None, :, None], pages, WORD(0))
    # The barrier keeps the transposition on this side of the cast, in words.
    pages = lax.optimization_barrier(pages.transpose(2, 0, 3, 1, 4, 5))
    k, v = pages.reshape(2, len(blocks), KV_HEADS, -1, HEAD_DIM)
    return as_values(k), as_values(v)


def update_rows(kv_cache, keys, values, kv_lens, page_indices, num_seqs):
    """Writes the new token of each of the sequences [0, num_seqs), which is row s of `keys` and `values`, in place."""
    rows = new_rows(keys, values)

    def write(seq, kv_cache):
        words, seq = cache_words(kv_cache, seq)
        position = kv_lens[seq] - 1
        page = page_indices[seq * PAGES_PER_SEQ + lax.div(position, PAGE_SIZE)]
        row = lax.dynamic_slice_in_dim(rows, seq, 1, axis=2)
        words = lax.dynamic_update_slice(words, row[None], (page, 0, 0, lax.rem(position, PAGE_SIZE), 0))
        return as_values(words)

    return lax.fori_loop(0, num_seqs, write, kv_cache)


def attend_decode(queries, kv_cache, kv_lens, page_indices, num_seqs):
    """One query for each of the sequences [0, num_seqs), row s of `queries`.

    Returns `[min(tokens, MAX_SEQS), Q_HEADS, HEAD_DIM]`, zero in the rows past the last sequence.

    The KV blocks of all sequences form one list, and a step takes the next DECODE_ITEMS of it, whichever sequences
    they are of: the work is that of the blocks in use, and a step of it is large enough to occupy the cores.
    """
    num_rows = min(queries.shape[0], MAX_SEQS)
    queries = queries[:num_rows].reshape(num_rows, KV_HEADS, GROUP, HEAD_DIM)
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
        valid = jnp.arange(DECODE_BLOCK) < live[:, None]
        scores = jnp.where(valid[:, None, None], scores * SM_SCALE, MASKED)
        item_max = scores.max(axis=-1)
        p = jnp.exp(scores - item_max[..., None])
        item_sum = p.sum(axis=-1)
        item_acc = jnp.einsum("nhgt,nhtd->nhgd", p.astype(DTYPE), v, preferred_element_type=jnp.float32)
        return merge_items(state, seq, item < num_items, item_max, item_sum, item_acc)

    # A step updates as many rows as it has items, from its first sequence on: the state has room for the last step's.
    shape = (num_rows + DECODE_ITEMS, KV_HEADS, GROUP)
    state = jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, HEAD_DIM))
    _, row_sum, acc = lax.fori_loop(0, cdiv(num_items, DECODE_ITEMS), step, state)
    out = acc[:num_rows] / row_sum[:num_rows, ..., None]
    out = jnp.where((row < num_seqs)[:, None, None, None], out, 0)
    return out.astype(DTYPE).reshape(num_rows, Q_HEADS, HEAD_DIM)


def merge_items(state, seq, is_item, item_max, item_sum, item_acc):
    """Folds the partial softmax of each item into the row of its sequence; some items may share one."""
    row_max, row_sum, acc = state
    first = seq[0]
    old_max, old_sum, old_acc = (lax.dynamic_slice_in_dim(part, first, DECODE_ITEMS) for part in state)
    of_row = (seq == first + jnp.arange(DECODE_ITEMS)[:, None]) & is_item  # [rows, items]
    of_row = of_row[:, :, None, None]
    new_max = jnp.maximum(old_max, jnp.where(of_row, item_max, MASKED).max(axis=1))
    keep = jnp.exp(old_max - new_max)
    take = jnp.where(of_row, jnp.exp(item_max - new_max[:, None]), 0)
    new_sum = old_sum * keep + (take * item_sum).sum(axis=1)
    new_acc = old_acc * keep[..., None] + (take[..., None] * item_acc).sum(axis=1)
    return (
        lax.dynamic_update_slice_in_dim(row_max, new_max, first, 0),
        lax.dynamic_update_slice_in_dim(row_sum, new_sum, first, 0),
        lax.dynamic_update_slice_in_dim(acc, new_acc, first, 0),
    )


def ragged_paged_attention(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):
    """Attention of a batch of decode rows only; returns `(out, kv_cache)`, the cache in the donated memory.

    Row s of `queries` is sequence s: with one new token each, `cu_q_lens` has nothing to add. Rows past the last
    sequence are zero in `out`.
    """
    num_seqs = distribution[0]
    kv_cache = update_rows(kv_cache, keys, values, kv_lens, page_indices, num_seqs)
    out = attend_decode(queries, kv_cache, kv_lens, page_indices, num_seqs)
    return jnp.pad(out, ((0, len(queries) - len(out)), (0, 0), (0, 0))), kv_cache
