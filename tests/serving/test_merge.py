"""Parts of an attention merged are the whole, in each use; a part that saw nothing counts for nothing."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import rpac

HEADS, DIM = 4, 16
Part = tuple[jax.Array, jax.Array]


def attention(queries: Any, keys: Any, values: Any, sinks: Any = None) -> Part:
    """`[tokens, HEADS, DIM]` against `[keys, HEADS, DIM]`, all seen, in float64."""
    scores = np.einsum("thd,khd->thk", queries, keys).astype(np.float64)
    logits = (
        scores
        if sinks is None
        else np.concatenate([scores, np.broadcast_to(sinks[:, None], (*scores.shape[:2], 1))], -1)
    )
    lse = np.logaddexp.reduce(logits, axis=-1)
    out = np.einsum("thk,khd->thd", np.exp(scores - lse[..., None]), values)
    return jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32)


def random(seed: int, keys: int, tokens: int = 3) -> Any:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((count, HEADS, DIM)) for count in (tokens, keys, keys))


def same(one: Part, other: Part) -> None:
    for left, right in zip(one, other, strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("cuts", [(10,), (1, 2, 39), (7, 14, 21, 28)])
def test_a_sequence_in_parts_is_the_sequence(cuts: tuple[int, ...]) -> None:
    queries, keys, values = random(0, 40)
    ends = [0, *cuts, 40]
    parts = [attention(queries, keys[a:b], values[a:b]) for a, b in itertools.pairwise(ends)]
    same(rpac.merge(parts), attention(queries, keys, values))
    same(jax.jit(rpac.merge)(parts), attention(queries, keys, values))
    same(rpac.merge([rpac.merge(parts[:1]), rpac.merge(parts[1:])]), attention(queries, keys, values))


def test_a_shared_prefix_is_attended_to_once_for_all() -> None:
    queries, keys, values = random(1, 30)
    prefix, own = slice(0, 16), [slice(16, 20), slice(20, 27), slice(27, 30)]
    shared = attention(queries, keys[prefix], values[prefix])
    rows = [attention(queries[i : i + 1], keys[one], values[one]) for i, one in enumerate(own)]
    merged = rpac.merge([shared, tuple(jnp.concatenate(part) for part in zip(*rows, strict=True))])  # type: ignore[list-item]
    for i, one in enumerate(own):
        seen = np.r_[prefix, one]
        same((merged[0][i : i + 1], merged[1][i : i + 1]), attention(queries[i : i + 1], keys[seen], values[seen]))


def test_a_sink_is_in_one_part() -> None:
    queries, keys, values = random(2, 20)
    sinks = np.array([1.0, -2.0, 5.0, 0.0])
    parts = [
        attention(queries, keys[:5], values[:5], sinks),
        attention(queries, keys[5:], values[5:], np.full(4, -np.inf)),
    ]
    same(rpac.merge(parts), attention(queries, keys, values, sinks))


def test_a_part_that_saw_nothing_counts_for_nothing_whatever_its_output_is() -> None:
    queries, keys, values = random(3, 20)
    whole = attention(queries, keys, values)
    nothing = jnp.full_like(whole[0], jnp.nan), jnp.full_like(whole[1], -jnp.inf)
    same(rpac.merge([nothing, whole, nothing]), whole)
    out, lse = rpac.merge([nothing, nothing])
    assert not out.any() and np.isneginf(lse).all()


def test_large_sums_do_not_overflow_and_the_dtype_is_that_of_the_parts() -> None:
    queries, keys, values = random(4, 8)
    out, lse = attention(queries, keys, values)
    merged, total = rpac.merge([(out.astype(jnp.bfloat16), lse + 3e4), (out.astype(jnp.bfloat16), lse + 3e4)])
    assert merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(merged.astype(jnp.float32), out, rtol=2**-7, atol=1e-6)
    np.testing.assert_allclose(total, lse + 3e4 + np.log(2), rtol=1e-6)


def test_no_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="must be one or more"):
        rpac.merge([])


def test_a_context_over_devices_is_merged_across_them() -> None:
    """With vmap's axis in place of a mesh's: the collectives are the same, and no second device is needed."""
    queries, keys, values = random(5, 32)
    parts = [attention(queries, keys[i : i + 8], values[i : i + 8]) for i in range(0, 32, 8)]
    outs, lses = (jnp.stack(part) for part in zip(*parts, strict=True))
    merged = jax.vmap(lambda out, lse: rpac.merge_across(out, lse, "context"), axis_name="context")(outs, lses)
    for device in range(4):
        same((merged[0][device], merged[1][device]), attention(queries, keys, values))


def test_merge_across_runs_under_shard_map() -> None:
    whole = attention(*random(6, 8))
    mesh = jax.make_mesh((1,), ("context",))
    run = jax.shard_map(lambda out, lse: rpac.merge_across(out, lse, "context"), mesh=mesh, in_specs=P(), out_specs=P())
    same(run(*whole), whole)
