"""The adapter beside tokamax: its signature, and its reference function, lse included."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import ABSOLUTE, Absent, TracedEngine, calls, claim, require_equal, require_signature
from signatures import TOKAMAX

from rpac.adapters import tokamax as adapters

# What the package imports to time its kernels, and nothing called here uses.
Absent("tensorboardX", "xprof")


def main(path: str, seed: int) -> None:
    from tokamax import ops

    engine = TracedEngine(path)
    attention = adapters.ragged_paged_attention(engine)
    claim("one function by two names", ops.ragged_paged_attention is ops.batched_ragged_paged_attention)
    require_signature("tokamax", TOKAMAX, ops.ragged_paged_attention, attention)

    scale = engine.model.sm_scale
    reference = partial(ops.ragged_paged_attention, sm_scale=scale, implementation="reference", return_lse=True)
    for call in calls(engine, seed):
        # The reference takes a cache with K and V of each head on one axis, and the batch's rows as they are.
        by_head = flat(call.kv_cache)
        *tokens, kv_cache = call.arrays
        out, cache, lse = reference(*tokens, by_head, *call.metadata)
        wanted = out, cache.reshape(kv_cache.shape)
        require_equal("host", call, attention(*tokens, kv_cache, *call.metadata, sm_scale=scale), wanted)
        got = attention(*tokens, flat(call.kv_cache), *call.metadata, sm_scale=scale)
        require_equal("host, the reference's cache", call, got, (out, cache))
        in_jit = jax.jit(lambda *given: attention(*given, sm_scale=scale, return_lse=True))
        *got, mine = in_jit(*call.arrays, *call.metadata)
        require_equal("in jit", call, got, wanted)
        live = call.batch.num_tokens
        error = np.abs(np.asarray(mine, np.float32) - np.asarray(lse, np.float32))[:live].max()
        claim(f"in jit, q_lens {[row.q_len for row in call.batch]}: lse within {error:.4f}", error < ABSOLUTE)
    claim("engine.traced was called", engine.traces > 0)


def flat(kv_cache: Any) -> Any:
    pages, page_size, *_, head_dim = kv_cache.shape
    return jnp.array(kv_cache).reshape(pages, page_size, -1, head_dim)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
