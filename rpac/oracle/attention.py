"""The oracle: ragged paged attention straight from its definition, one sequence and one head at a time.

Sums and exponentials are taken in float64, so that the result is the float32 nearest to the truth and every
difference from it is the kernel's. Shares nothing with the kernels or with `layout`, on purpose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}  # the largest finite number of each; IEEE-like, after OCP MX

Array = NDArray[Any]
Int32s = NDArray[np.int32]


def ragged_paged_attention(*args: Any, **options: Any) -> tuple[NDArray[np.float32], Array]:
    """The first two results of `attention_with_lse`, whose arguments it takes."""
    out, cache, _ = attention_with_lse(*args, **options)
    return out, cache


def attention_with_lse(
    queries: Array,
    keys: Array | None,
    values: Array | None,
    kv_cache: Array,
    kv_lens: Int32s,
    page_indices: Int32s,
    cu_q_lens: Int32s,
    distribution: Int32s,
    *,
    sm_scale: float,
    kv_layout: str = "interleaved",
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    attention_chunk: int | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    kv_scales: Array | None = None,
    causal: bool = True,
    kv_heads: int | None = None,
    tree: Int32s | None = None,
) -> tuple[NDArray[np.float32], Array, NDArray[np.float32]]:
    """Attention of every new token over its sequence, and the cache with the new tokens in it.

    Arguments are those of a program, as numpy arrays, of a batch that `validate` accepts; `kv_layout` says how K and V
    lie in `kv_cache`, as `split_kv` has it. `soft_cap`: a score s becomes soft_cap * tanh(s / soft_cap).
    `sliding_window`: the query at position p sees those from p - sliding_window + 1 to p. `attention_chunk`: that query sees
    those from the last multiple of it that is not above p, to p. With both, the cache may hold anything before what the
    first new token sees. `sinks` `[q_heads]` are logits, one a query head, that take part in its softmax
    and have no value. `alibi_slopes` `[q_heads]`: a score gets its head's slope times the position of the key minus that of
    the query. `kv_scales` `[2]` or `[2, kv_heads]` are what stored K and V are multiplied by; new keys and values
    of another dtype than the cache's are quantized as they are stored, as `quantized` does. Where not `causal` a query sees
    all of its sequence, what follows it too. `tree` `[rows, new tokens]`: of a decode row s, new token i sees new token j
    where bit j of tree[s, i] is set, and all of the context. `keys` and `values` are None where the cache holds those of the
    new tokens already; then `kv_heads` must be given.

    Returns the output `[tokens, q_heads, head_dim]` in float32, zero in the rows past the last sequence, and a new cache
    in the cache's dtype: each new token's K and V as given, zeros in its padding, every other bit as it was. The caller
    rounds the output to its dtype. Third, the natural logarithm of each softmax's denominator, `[tokens, q_heads]` in
    float32, zero in the same rows.
    """
    _, q_heads, head_dim = queries.shape
    kv_heads = kv_heads if keys is None else keys.shape[1]
    assert kv_heads is not None and (keys is None) == (values is None)
    page_tables = page_indices.reshape(len(kv_lens), -1)
    count = int(distribution[2])

    scales = np.ones((2, kv_heads), np.float32)
    if kv_scales is not None:
        scales[:] = kv_scales.reshape(2, -1)
    cache = kv_cache.copy()
    cached_k, cached_v = split_kv(cache, kv_heads, head_dim, kv_layout)  # views
    page_size = cached_k.shape[1]
    by_token = cache.swapaxes(1, 3) if kv_layout == "separate" else cache  # a view
    if keys is not None and values is not None:
        if keys.dtype != kv_cache.dtype:
            keys, values = (
                quantized(new, scale, kv_cache.dtype) for new, scale in zip((keys, values), scales, strict=True)
            )
        new = [(seq, token) for seq in range(count) for token in range(int(cu_q_lens[seq]), int(cu_q_lens[seq + 1]))]
        for seq, token in new:
            position = int(kv_lens[seq]) - int(cu_q_lens[seq + 1]) + token
            page = page_tables[seq, position // page_size]
            by_token[page, position % page_size] = 0
            cached_k[page, position % page_size] = keys[token]
            cached_v[page, position % page_size] = values[token]

    out = np.zeros(queries.shape, np.float32)
    lse = np.zeros(queries.shape[:2], np.float32)
    for seq in range(count):
        start, end = int(cu_q_lens[seq]), int(cu_q_lens[seq + 1])
        kv_len = int(kv_lens[seq])
        q_positions = np.arange(kv_len - (end - start), kv_len)
        window = kv_len if sliding_window is None else sliding_window
        chunk = kv_len if attention_chunk is None else attention_chunk
        first_seen = np.maximum(np.maximum(q_positions + 1 - window, q_positions // chunk * chunk), 0)
        kv_positions = np.arange(first_seen[0], kv_len)
        at = page_tables[seq, kv_positions // page_size], kv_positions % page_size
        k = cached_k[at].astype(np.float64) * scales[0, :, None]
        v = cached_v[at].astype(np.float64) * scales[1, :, None]
        visible = (kv_positions <= q_positions[:, None]) | (not causal)
        visible &= kv_positions >= first_seen[:, None]
        if tree is not None and seq < distribution[0]:
            for token, column in np.ndindex(end - start, end - start):
                visible[token, column - (end - start)] = int(tree[seq, token]) >> column & 1
        for head in range(q_heads):
            kv_head = head * kv_heads // q_heads
            scores = sm_scale * (queries[start:end, head].astype(np.float64) @ k[:, kv_head].T)
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            if alibi_slopes is not None:
                scores = scores + np.float64(alibi_slopes[head]) * (kv_positions - q_positions[:, None])
            scores = np.where(visible, scores, -np.inf)
            if sinks is not None:
                scores = np.insert(scores, len(k), np.float64(sinks[head]), axis=-1)
            top = scores.max(axis=-1, keepdims=True)
            weights = np.exp(scores - top)
            total = weights.sum(axis=-1, keepdims=True)
            lse[start:end, head] = (top + np.log(total))[:, 0]
            weights /= total
            out[start:end, head] = weights[:, : len(k)] @ v[:, kv_head]
    return out, cache, lse


def quantized(new: Array, scales: Array, dtype: np.dtype[Any]) -> Array:
    """`new` `[tokens, kv_heads, head_dim]` times one over the scale of its head, in float32, as the nearest numbers of
    `dtype`: of two as near the even one, and of what is past its largest that one.
    """
    ratio = new.astype(np.float32) * (1 / scales)[:, None]
    if dtype == np.int8:
        with np.errstate(invalid="ignore"):  # what is no number is padding
            return np.clip(np.rint(ratio), -128, 127).astype(dtype)
    largest = np.float32(LARGEST[dtype.name])
    return np.clip(ratio, -largest, largest).astype(dtype)


def split_kv(kv_cache: Array, kv_heads: int, head_dim: int, kv_layout: str = "interleaved") -> tuple[Array, Array]:
    """K and V of a cache or of some of its pages, without padding, each `[pages, page_size, kv_heads, head_dim]`.

    Both are views of `kv_cache`, which is contiguous. Interleaved, it is `[pages, page_size, words, packing, lanes]`,
    and its rows of lanes are a token's K0, V0, K1, V1, ... and padding; separate, `[pages, 2, kv_heads, page_size,
    lanes]`, all K of a page and then all V. With head_dim 64 a row is a head's K and then its V: interleaved, rows are
    heads; separate, there is 1 in place of 2. Raises ValueError for another layout.
    """
    if kv_layout not in ("interleaved", "separate"):
        raise ValueError(f"kv_layout is {kv_layout!r}; must be 'interleaved' or 'separate'")
    if kv_layout == "separate":
        rows = kv_cache.swapaxes(2, 3).swapaxes(0, 1)
        k, v = rows[0], rows[-1]
    else:
        pages, page_size = kv_cache.shape[:2]
        rows = kv_cache.reshape(pages, page_size, -1, kv_cache.shape[-1])
        k, v = (rows, rows) if head_dim == 64 else (rows[:, :, 0::2], rows[:, :, 1::2])
    first = 64 if head_dim == 64 else 0
    return k[:, :, :kv_heads, :head_dim], v[:, :, :kv_heads, first : first + head_dim]
