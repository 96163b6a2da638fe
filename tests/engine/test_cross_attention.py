"""Attention across to another sequence's tokens: its K and V written by a helper, and fewer of them than queries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import rpac as run_rpac

import rpac
from rpac.batch import Batch, Limits
from rpac.contract import arrays as layout
from rpac.contract.attention import Attention
from rpac.engine.fill import fill, places
from rpac.errors import BatchError, SelectionError
from rpac.oracle.attention import split_kv

SMALL = Path(__file__).with_name("small.yaml")
LENS, TABLES = [5, 16, 33], [[4], [2, 7], [9, 0, 3]]  # the second table has a page more than its sequence needs


@pytest.mark.parametrize("kv_layout", ["interleaved", "separate"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 128), (1, 128), (3, 64), (2, 96)])
def test_k_and_v_lie_where_programs_read_them(kv_layout: str, dtype: str, kv_heads: int, head_dim: int) -> None:
    model = Attention(2 * kv_heads, kv_heads, head_dim, dtype, dtype, 1.0)
    limits = Limits(16, 4, 4, 12, 4, (8,))
    rng = np.random.default_rng(0)
    k, v = (rng.integers(-9, 9, (sum(LENS), kv_heads, head_dim)).astype(jnp.dtype(dtype)) for _ in "kv")
    shape = layout.kv_cache_shape(Served(model, limits, kv_layout))  # type: ignore[arg-type]
    before = np.full(shape, 7, jnp.dtype(dtype))
    pages, tokens = places(limits, LENS, TABLES)
    after = np.asarray(fill(jnp.asarray(before), k, v, pages, tokens, model, kv_layout))
    start = 0
    for length, table in zip(LENS, TABLES, strict=True):
        at = np.arange(length)
        for found, wanted in zip(split_kv(after, kv_heads, head_dim, kv_layout), (k, v), strict=True):
            read = found[np.array(table)[at // 16], at % 16]
            np.testing.assert_array_equal(read, wanted[start : start + length])
        start += length
    others = sorted(set(range(12)) - set(pages.tolist()))
    np.testing.assert_array_equal(after[others], before[others])


class Served:
    """A spec, as far as the shape of a cache goes."""

    def __init__(self, model: Attention, limits: Limits, kv_layout: str) -> None:
        self.model = model
        self.serving = ServedPages(limits.page_size, limits.num_pages, kv_layout)


class ServedPages:
    def __init__(self, page_size: int, num_pages: int, kv_layout: str) -> None:
        self.page_size, self.num_pages, self.kv_layout = page_size, num_pages, kv_layout


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> rpac.Engine:
    folder = tmp_path_factory.mktemp("cross")
    text = SMALL.read_text().replace(
        "  kv_dtype: float32", "  kv_dtype: float32\n  causal: false\n  update_cache: false"
    )
    (folder / "cross.yaml").write_text(text)
    done = run_rpac("build", folder / "cross.yaml", "-o", folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return rpac.load(folder / "small.rpac", target="cpu")


@pytest.mark.parametrize("q_lens", [[1, 1, 1], [4, 4], [1, 4, 3], [7, 1]], ids=str)
@pytest.mark.parametrize("source", [1, 2, 3, 17], ids=str)
def test_queries_attend_to_sources_of_any_length(engine: rpac.Engine, q_lens: list[int], source: int) -> None:
    model, rng = engine.model, np.random.default_rng(0)
    lens = [source + row for row in range(len(q_lens))]
    tables = [[2 * row, 2 * row + 1] for row in range(len(q_lens))]
    keys, values = rng.standard_normal((2, sum(lens), model.kv_heads, model.head_dim)).astype(np.float32)
    queries = [rng.standard_normal((size, model.q_heads, model.head_dim), np.float32) for size in q_lens]
    cache = engine.write_kv(engine.new_cache(), keys, values, lens, tables)
    batch = Batch.build(engine.limits, q_lens, None, tables, kv_lens=lens)
    out, _ = engine(batch.pack(queries), cache, *batch.metadata)
    start = 0
    for query, found, length in zip(queries, batch.unpack(np.asarray(out)), lens, strict=True):
        k, v = (array[start : start + length, 0] for array in (keys, values))  # one KV head
        weights = jax.nn.softmax(model.sm_scale * np.einsum("qhd,kd->qhk", query, k), axis=-1)
        np.testing.assert_allclose(found, np.einsum("qhk,kd->qhd", weights, v), atol=1e-4)
        start += length


def test_a_source_without_tokens_is_refused_and_says_what_to_do(engine: rpac.Engine) -> None:
    batch = Batch.build(engine.limits, [1, 4], None, [[0], [1]], kv_lens=[3, 3])
    metadata = [array.copy() for array in batch.metadata]
    metadata[0][1] = 0
    with pytest.raises(
        BatchError, match=r"row 1 \(prefill\): kv_lens\[1\] is 0; must be 1 or more, .* leave the row out"
    ):
        Batch.of_arrays(engine.limits, batch.tokens, *metadata)


def test_fewer_keys_than_queries_are_for_programs_that_read_alone(engine: rpac.Engine) -> None:
    limits = replace(engine.limits, few_keys=False)
    with pytest.raises(BatchError, match=r"kv_lens\[0\] is 3, below its 4 new tokens"):
        Batch.build(limits, [4], None, [[0]], kv_lens=[3])
    same = Batch.build(limits, [4, 1], None, [[0], [1]], kv_lens=[9, 3])
    assert list(same) == list(Batch.build(limits, [4, 1], [5, 2], [[0], [1]]))


BUILDS: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"context_lens": [1], "kv_lens": [2]}, "found both of context_lens and kv_lens; must be one of the two"),
    "neither": ({"context_lens": None}, "found neither of context_lens and kv_lens"),
    "zero": ({"context_lens": None, "kv_lens": [0]}, "kv_lens[0] is 0; must be an integer from 1 to"),
    "count": ({"context_lens": None, "kv_lens": [3, 3]}, "found 1 q_lens, 2 kv_lens and 1 page_tables"),
    "table": ({"context_lens": None, "kv_lens": [17]}, "page_tables[0] has 1 pages of 16 tokens; must hold its 17 tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "text"), BUILDS.values(), ids=BUILDS)
def test_lengths_that_make_no_batch(engine: rpac.Engine, given: dict[str, Any], text: str) -> None:
    with pytest.raises(BatchError) as raised:
        Batch.build(engine.limits, [1], page_tables=[[0]], **given)
    assert text in str(raised.value)


WRITES: dict[str, tuple[dict[str, Any], str]] = {
    "short table": ({"kv_lens": [17]}, "sequence 0: page_tables[0] has 1 pages of 16 tokens; must hold its 17 tokens; give it 2"),
    "no page": ({"page_tables": [[12]]}, "page 12 is in a page table; must be 0 to 11"),
    "twice": ({"kv_lens": [2, 1], "page_tables": [[3], [3]]}, "page 3 is given twice; must be given once"),
    "tables": ({"page_tables": []}, "found 1 kv_lens and 0 page_tables; must be one of each for a sequence"),
    "tokens": ({"kv_lens": [2]}, "keys is float32[3, 1, 128]; must be float32[2, 1, 128]"),
    "dtype": ({"values": np.zeros((3, 1, 128), np.float16)}, "values is float16[3, 1, 128]; must be float32[3, 1, 128]"),
    "numpy cache": ({"kv_cache": np.zeros((12, 16, 2, 1, 128), np.float32)}, "kv_cache is a ndarray; must be a jax array"),
    "other cache": ({"kv_cache": np.zeros((1, 16, 2, 1, 128), np.float32)}, "must be float32[12, 16, 2, 1, 128], kv_layout"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "text"), WRITES.values(), ids=WRITES)
def test_k_and_v_that_do_not_fit(engine: rpac.Engine, given: dict[str, Any], text: str) -> None:
    new = np.zeros((3, 1, 128), np.float32)
    good = {"kv_cache": engine.new_cache(), "keys": new, "values": new, "kv_lens": [3], "page_tables": [[0]]}
    with pytest.raises(BatchError) as raised:
        engine.write_kv(**{**good, **given})
    assert text in str(raised.value)
    engine.write_kv(**good)


def test_a_limit_of_devices_is_named(engine: rpac.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "model", replace(engine.model, rope_dim=64))
    with pytest.raises(
        SelectionError, match="the bundle is for latent attention; must be for grouped attention on one"
    ):
        engine.write_kv(engine.new_cache(), None, None, [1], [[0]])
