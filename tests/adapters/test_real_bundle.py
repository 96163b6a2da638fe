"""A bundle with scales, drafts in a tree and lse behind every adapter: what comes out is the oracle's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import rpac as run_rpac
from fake import ADAPTERS, peer_arguments

import rpac
from rpac.oracle.expected import oracle
from rpac.oracle.tolerance import attention_error

NEW = 3  # tokens of a decode row
SPEC = f"""
name: everything
model: {{q_heads: 2, kv_heads: 1, head_dim: 128, q_dtype: float32, kv_dtype: int8, kv_scale: tensor}}
serving:
  {{page_size: 16, max_model_len: 48, max_num_tokens: 8, token_buckets: [8], max_num_seqs: 2, prefill_chunk: 4,
   context_lens: [32], num_pages: 12, decode_len: {NEW}, tree_mask: true, log_sum_exp: true}}
targets: [cpu]
"""
K_SCALE, V_SCALE = 0.03, 0.5
TRACED = ("tpu_inference", "sglang_jax main")  # inside jit too, which takes long to compile

# New tokens of each row as a peer orders them, its distribution, the program that must run.
BATCHES: list[tuple[list[int], list[int], str]] = [
    ([NEW, NEW], [0, 0, 2], "decode"),
    ([NEW, 5], [0, 0, 2], "mixed"),
    ([1, NEW], [1, 1, 2], "mixed"),
    ([1, 1], [2, 2, 2], "mixed"),
    ([5], [0, 0, 1], "mixed"),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> rpac.Engine:
    folder = tmp_path_factory.mktemp("everything")
    (folder / "everything.yaml").write_text(SPEC)
    done = run_rpac("build", folder / "everything.yaml", "-o", folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return rpac.load(folder / "everything.rpac", target="cpu")


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_every_adapter_gives_the_oracles_answer(engine: rpac.Engine, name: str) -> None:
    attention = ADAPTERS[name].make(engine)
    options = {ADAPTERS[name].scale: engine.model.sm_scale, "k_scale": K_SCALE, "v_scale": V_SCALE}
    calls = [lambda *given: attention(*given, **options)]
    if name in TRACED:
        calls.append(jax.jit(calls[0]))
    for q_lens, distribution, kind in BATCHES:
        arrays, metadata, wanted, held = case(engine, q_lens, distribution)
        before = engine.counts.get(rpac.Variant(kind, 8), rpac.Count()).calls  # type: ignore[arg-type]
        for call in calls:
            out, after = call(*arguments(name, engine, arrays, metadata, len(q_lens)))
            np.testing.assert_array_equal(np.asarray(after).reshape(held.shape), held)
            error, _ = attention_error(np.asarray(out)[: sum(q_lens)], wanted[: sum(q_lens)])
            assert error < 1e-4
        assert engine.counts[rpac.Variant(kind, 8)].calls == before + 1  # type: ignore[index]


def case(engine: rpac.Engine, q_lens: list[int], distribution: list[int]) -> tuple[list[Any], Any, Any, Any]:
    """The arrays and the metadata of a call, and the oracle's output and cache."""
    model, rng = engine.model, np.random.default_rng(0)
    contexts = [17 + 4 * row for row in range(len(q_lens))]
    kv_lens, page_indices, cu_q_lens = np.zeros(2, np.int32), np.arange(6, dtype=np.int32), np.zeros(3, np.int32)
    kv_lens[: len(q_lens)] = np.add(q_lens, contexts)
    cu_q_lens[1 : len(q_lens) + 1] = np.cumsum(q_lens)
    cu_q_lens[len(q_lens) + 1 :] = cu_q_lens[len(q_lens)]
    queries = rng.standard_normal((8, model.q_heads, model.head_dim), np.float32)
    keys, values = rng.integers(-99, 99, (2, 8, model.kv_heads, model.head_dim), np.int8)
    cache = rng.integers(-99, 99, engine.new_cache().shape, np.int8)
    metadata = (kv_lens, page_indices, cu_q_lens, np.array(distribution, np.int32))
    # No row is marked as drafts for the oracle, so it attends causally.
    scales = np.array([K_SCALE, V_SCALE], np.float32)
    causal = (*metadata[:3], np.array([0, 0, len(q_lens)], np.int32))
    arrays = [queries, keys, values, cache]
    wanted, held, _ = oracle(model, engine.kv_layout, (*arrays, *causal), {"kv_scales": scales})
    return arrays, metadata, wanted, held


def arguments(name: str, engine: rpac.Engine, arrays: list[Any], metadata: Any, rows: int) -> list[Any]:
    """The call as the peer passes it."""
    given = [jnp.asarray(array) for array in arrays]
    if not name.startswith("sglang_jax"):
        return [*given, *metadata]
    as_mixed = (*metadata[:3], np.array([0, 0, rows], np.int32))
    return peer_arguments(name, rpac.Batch.of_arrays(engine.limits, 8, *as_mixed), given)
