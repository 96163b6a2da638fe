"""The call that the package's documentation shows: it runs as it stands, and each sequence gets its own output."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import rpac
from rpac.engine import load
from rpac.oracle.attention import ragged_paged_attention

# In an order that is not the rows': a chunk of a prompt, a decode row, and a longer part of a prompt.
Q_LENS, CONTEXT_LENS, PAGE_TABLES = [4, 1, 2, 1], [17, 20, 0, 3], [[0, 1], [2, 3], [4], [5]]


def documented() -> str:
    """The lines of the package's docstring that are code."""
    return "\n".join(re.findall(r"^    (.*)$|^$", str(rpac.__doc__), re.MULTILINE))


def test_the_snippet_gives_each_sequence_its_own_attention(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(small, target="cpu")
    model = engine.model
    rng = np.random.default_rng(0)
    queries, keys, values = (
        [rng.standard_normal((size, heads, model.head_dim), np.float32) for size in Q_LENS]
        for heads in (model.q_heads, model.kv_heads, model.kv_heads)
    )
    given: dict[str, Any] = {
        "rpac": rpac, "queries": queries, "keys": keys, "values": values,
        "q_lens": Q_LENS, "context_lens": CONTEXT_LENS, "page_tables": PAGE_TABLES,
    }  # fmt: skip
    opened = []
    monkeypatch.setattr(rpac, "load", lambda path: opened.append(path) or engine, raising=False)
    exec(documented(), given)
    assert opened
    cache = np.zeros(engine.new_cache().shape, np.float32)
    for index, (size, context) in enumerate(zip(Q_LENS, CONTEXT_LENS, strict=True)):
        # The sequence alone, by the oracle; what is in the cache before the call is zeros.
        alone = rpac.Batch.build(engine.limits, [size], [context], [PAGE_TABLES[index]])
        arrays = [alone.pack([array[index]]) for array in (queries, keys, values)]
        wanted, _ = ragged_paged_attention(
            *arrays, cache, *alone.metadata, sm_scale=model.sm_scale, kv_layout=engine.kv_layout
        )
        np.testing.assert_allclose(given["outputs"][index], alone.unpack(wanted)[0], atol=1e-4)


def test_a_new_cache_is_what_every_program_takes(small: Path) -> None:
    engine = load(small, target="cpu")
    cache = engine.new_cache()
    dims = next(iter(engine.programs.values())).args[3]
    assert (cache.shape, cache.dtype.name) == (dims.shape, dims.dtype)
    assert cache.sharding.is_equivalent_to(engine.sharding("kv_cache"), cache.ndim)
    assert not np.asarray(cache).any()
    assert engine.new_cache() is not cache
    jax.block_until_ready(cache)
