"""The oracle of latent attention, straight from its definition, one sequence and one head at a time.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) in its absorbed form: the projections up from the
latent vector are in the queries and behind the output. Like `rpac.oracle.attention` it shares nothing with the kernels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rpac.oracle.attention import Array, Int32s


def latent_paged_attention(
    queries: Array,
    queries_rope: Array,
    new_kv: Array,
    new_rope: Array,
    kv_cache: Array,
    kv_lens: Int32s,
    page_indices: Int32s,
    cu_q_lens: Int32s,
    distribution: Int32s,
    *,
    sm_scale: float,
) -> tuple[NDArray[np.float32], Array]:
    """Causal attention of every new token over its sequence, and the cache with the new tokens in it.

    Arguments are those of a program, as numpy arrays, of a batch that `validate` accepts: `queries`
    `[tokens, q_heads, kv_lora_rank]`, `queries_rope` `[tokens, q_heads, rope_dim]`, `new_kv` `[tokens, kv_lora_rank]`,
    `new_rope` `[tokens, rope_dim]`, and a cache `[pages, page_size, lanes]` whose rows are a token's latent vector, its rotary
    key, and padding. A score is sm_scale times the sum of both products; values are the latent vectors.

    Returns the output `[tokens, q_heads, kv_lora_rank]` in float32, zero in the rows past the last sequence, and a new cache:
    each new token's row as given with zeros in its padding, every other bit as it was.
    """
    _, q_heads, rank = queries.shape
    rope_end = rank + queries_rope.shape[2]
    page_size = kv_cache.shape[1]
    page_tables = page_indices.reshape(len(kv_lens), -1)
    cache = kv_cache.copy()
    out = np.zeros(queries.shape, np.float32)
    rows = [(seq, int(cu_q_lens[seq]), int(cu_q_lens[seq + 1])) for seq in range(int(distribution[2]))]
    for seq, start, end in rows:
        for token in range(start, end):
            position = int(kv_lens[seq]) - end + token
            row = cache[page_tables[seq, position // page_size], position % page_size]  # a view
            row[:] = 0
            row[:rank] = new_kv[token]
            row[rank:rope_end] = new_rope[token]
    for seq, start, end in rows:
        positions = np.arange(int(kv_lens[seq]))
        held = cache[page_tables[seq, positions // page_size], positions % page_size].astype(np.float64)
        latent, rope = held[:, :rank], held[:, rank:rope_end]
        visible = positions <= positions[len(positions) - (end - start) :, None]
        for head in range(q_heads):
            nope_scores = queries[start:end, head].astype(np.float64) @ latent.T
            rope_scores = queries_rope[start:end, head].astype(np.float64) @ rope.T
            scores = np.where(visible, sm_scale * (nope_scores + rope_scores), -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[start:end, head] = weights / weights.sum(axis=-1, keepdims=True) @ latent
    return out, cache
