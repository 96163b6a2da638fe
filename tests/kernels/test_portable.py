"""The portable kernels compute what the oracle does, write new tokens and nothing else, and never copy the cache."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpac.contract import arrays as layout
from rpac.contract.attention import KV_LAYOUTS, Attention, Serving
from rpac.kernels import render
from rpac.oracle import attention as reference
from rpac.plan import KernelPlan, XlaTiles
from rpac.plan.families import make_recipe
from rpac.spec import Spec

GARBAGE = np.iinfo(np.int32).max  # where the contract lets metadata hold anything

# Values are in [-1, 1]. In bfloat16 the probabilities and the result are rounded once each, by 2**-9 at most.
TOLERANCE = {"bfloat16": 2.0**-8 + 1e-5, "float32": 1e-5}


@dataclass(frozen=True)
class Case:
    """A program: the spec and the tiles that it is made for, and its token bucket.

    Nothing divides anything: the last block of a full page table runs over its end, and so does that of a chunk.
    """

    kind: str
    dtype: str = "bfloat16"
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    page_size: int = 16
    pages_per_seq: int = 7
    num_pages: int = 256
    max_seqs: int = 8
    chunk: int = 20
    kv_layout: str = "interleaved"
    tokens: int = 64
    decode_tiles: XlaTiles = XlaTiles(block=32, blocks=3)  # noqa: RUF009 - frozen
    block_tiles: XlaTiles = XlaTiles(block=32, q_block=8)  # noqa: RUF009

    def __str__(self) -> str:
        return f"{self.kind}-{self.dtype}-{self.q_heads}:{self.kv_heads}-{self.head_dim}-{self.kv_layout}"

    @property
    def max_len(self) -> int:
        return self.page_size * self.pages_per_seq

    @property
    def spec(self) -> Spec:
        scale = self.head_dim**-0.5
        model = Attention(self.q_heads, self.kv_heads, self.head_dim, self.dtype, self.dtype, scale)
        serving = Serving(
            page_size=self.page_size,
            max_model_len=self.max_len,
            max_num_tokens=self.tokens,
            token_buckets=(self.tokens,),
            max_num_seqs=self.max_seqs,
            prefill_chunk=self.chunk,
            context_lens=(self.max_len,),
            num_pages=self.num_pages,
            kv_layout=self.kv_layout,
        )
        return Spec("test", model, serving, ("cpu",), source="", file="test.yaml")

    @property
    def plan(self) -> KernelPlan:
        decode = self.decode_tiles if self.kind != "prefill" else None
        block = self.block_tiles if self.kind != "decode" else None
        recipe = make_recipe(self.spec, "cpu", self.kind, decode, block)
        return KernelPlan("cpu", self.kind, (self.tokens,), f"cpu/{self.kind}.py", decode, block, 0, 0, 0, 0, 0, recipe)

    def shapes(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(dims.shape, dims.dtype) for dims in layout.arg_specs(self.spec, self.tokens)]


@functools.cache
def program(case: Case) -> Any:
    """The case's kernel, compiled as it is for serving: from an export that went through bytes."""
    module: dict[str, Any] = {}
    exec(render(case.spec, case.plan).text, module)
    kernel = jax.jit(module["ragged_paged_attention"], donate_argnames="kv_cache")
    exported = jax.export.export(kernel, platforms=["cpu"])(*case.shapes())
    loaded = jax.export.deserialize(exported.serialize())
    return jax.jit(loaded.call, donate_argnums=3).lower(*case.shapes()).compile()


@dataclass(frozen=True)
class Sequences:
    """A batch by its rows: how many new tokens each has, its length with them, and the distribution."""

    q_lens: Sequence[int]
    kv_lens: Sequence[int]
    distribution: tuple[int, int, int]


def decode_rows(*kv_lens: int) -> Sequences:
    count = len(kv_lens)
    return Sequences([1] * count, kv_lens, (count, count, count))


def prefill_rows(case: Case, *kv_lens: int) -> Sequences:
    count = len(kv_lens)
    return Sequences([case.chunk] * count, kv_lens, (0, count, count))


def mixed_rows(decodes: int, prefills: int, *rows: tuple[int, int]) -> Sequences:
    return Sequences([q for q, _ in rows], [kv for _, kv in rows], (decodes, decodes + prefills, len(rows)))


def edges(case: Case) -> list[Sequences]:
    """Lengths on both sides of a page, of a block and of the table; one sequence and as many as there can be."""
    page, block, full = case.page_size, 2 * case.page_size, case.max_len
    marks = [1, 2, page - 1, page, page + 1, block, block + 1, full]
    chunk = case.chunk
    if case.kind == "decode":
        return [decode_rows(*kv_lens) for kv_lens in ([], [1], [full], marks, [full] * case.max_seqs)]
    if case.kind == "prefill":
        lens = [[], [chunk], [block], [block + 1], [full - 1], [full], [full, chunk, full]]
        return [prefill_rows(case, *kv_lens) for kv_lens in lens]
    return [
        mixed_rows(0, 0),
        mixed_rows(0, 0, (case.tokens, full)),
        mixed_rows(0, 0, (1, 1), (1, full)),
        mixed_rows(0, 0, *[(case.tokens // case.max_seqs, full)] * case.max_seqs),
        mixed_rows(2, 1, (1, full), (1, page), (chunk, full), (8, 8), (9, page + 1), (page, block)),
        mixed_rows(3, 0, *[(1, mark) for mark in marks]),
    ]


def random_sequences(case: Case, rng: np.random.Generator) -> Sequences:
    count = int(rng.integers(1, case.max_seqs + 1))
    if case.kind == "decode":
        return decode_rows(*rng.integers(1, case.max_len + 1, count).tolist())
    if case.kind == "prefill":
        count = int(rng.integers(1, case.tokens // case.chunk + 1))
        return prefill_rows(case, *rng.integers(case.chunk, case.max_len + 1, count).tolist())
    decodes = int(rng.integers(0, count + 1))
    q_lens = [1] * decodes
    prefills = int(count > decodes and rng.random() < 0.5)
    q_lens += [case.chunk] * prefills
    while len(q_lens) < count and sum(q_lens) < case.tokens:
        q_lens.append(int(rng.integers(1, min(30, case.tokens - sum(q_lens)) + 1)))
    return mixed_rows(decodes, prefills, *[(q_len, int(rng.integers(q_len, case.max_len + 1))) for q_len in q_lens])


def make_arguments(case: Case, batch: Sequences, rng: np.random.Generator) -> list[np.ndarray[Any, Any]]:
    """The arrays of a call: shuffled pages, NaN where nothing may be read, garbage in metadata that is not in use."""
    count, new = len(batch.q_lens), sum(batch.q_lens)

    def noise(*shape: int) -> np.ndarray[Any, Any]:
        return rng.standard_normal(shape, dtype=np.float32).astype(case.dtype)

    def unit(*shape: int) -> np.ndarray[Any, Any]:
        return rng.uniform(-1, 1, shape).astype(case.dtype)

    queries = noise(case.tokens, case.q_heads, case.head_dim) * rng.choice([1, 8]).astype(case.dtype)
    keys = noise(case.tokens, case.kv_heads, case.head_dim)
    values = unit(case.tokens, case.kv_heads, case.head_dim)
    for array in (queries, keys, values):
        array[new:] = np.nan

    kv_lens = np.full(case.max_seqs, GARBAGE, np.int32)
    kv_lens[:count] = batch.kv_lens
    cu_q_lens = np.full(case.max_seqs + 1, GARBAGE, np.int32)
    cu_q_lens[: count + 1] = np.cumsum([0, *batch.q_lens])
    page_tables = np.full((case.max_seqs, case.pages_per_seq), GARBAGE, np.int32)
    free = rng.permutation(case.num_pages).tolist()
    # Interleaved: rows of a token in the order K0, V0, K1, V1, ...
    cache = np.full((case.num_pages, case.page_size, case.kv_heads, 2, case.head_dim), np.nan).astype(case.dtype)
    for row, (q_len, kv_len) in enumerate(zip(batch.q_lens, batch.kv_lens, strict=True)):
        pages = [free.pop() for _ in range(-(-kv_len // case.page_size))]
        page_tables[row, : len(pages)] = pages
        old = np.arange(kv_len - q_len)
        where = page_tables[row, old // case.page_size], old % case.page_size
        cache[*where, :, 0] = noise(len(old), case.kv_heads, case.head_dim)
        cache[*where, :, 1] = unit(len(old), case.kv_heads, case.head_dim)
    distribution = np.array(batch.distribution, np.int32)
    if case.kv_layout == "separate":
        cache = np.ascontiguousarray(cache.transpose(0, 3, 2, 1, 4))
    cache = cache.reshape(layout.kv_cache_shape(case.spec))
    return [queries, keys, values, cache, kv_lens, page_tables.reshape(-1), cu_q_lens, distribution]


CASES = [
    *(
        Case(kind, dtype, kv_layout=kv_layout)
        for kind in ("decode", "prefill", "mixed")
        for dtype in ("bfloat16", "float32")
        for kv_layout in KV_LAYOUTS
    ),
    Case("mixed", q_heads=8, kv_heads=1),
    Case("mixed", q_heads=3, kv_heads=3, head_dim=256),
    Case("mixed", q_heads=3, kv_heads=3, head_dim=256, kv_layout="separate"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@each_case
def test_attention_and_cache_are_those_of_the_oracle(case: Case) -> None:
    for seed, batch in enumerate([*edges(case), *[None] * 8]):
        rng = np.random.default_rng(seed)
        batch = batch or random_sequences(case, rng)
        print(f"{seed=} {batch=}")
        arguments = make_arguments(case, batch, rng)
        want, want_cache = reference.ragged_paged_attention(
            *arguments, sm_scale=case.spec.model.sm_scale, kv_layout=case.kv_layout
        )
        out, kv_cache = map(np.asarray, program(case)(*map(jnp.asarray, arguments)))
        assert out.dtype == case.dtype
        assert np.abs(out.astype(np.float32) - want).max() <= TOLERANCE[case.dtype]
        assert not out[sum(batch.q_lens) :].any(), "rows of padding are zero"
        np.testing.assert_array_equal(kv_cache.view(np.uint8), want_cache.view(np.uint8))


@each_case
def test_the_donated_cache_is_updated_in_place(case: Case) -> None:
    memory = program(case).memory_analysis()
    cache_bytes = layout.nbytes(layout.kv_cache_shape(case.spec), case.dtype)
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 2, "no part of the program may hold a copy of the cache"


def test_work_follows_the_tokens_in_use_and_not_the_size_of_the_table() -> None:
    case = replace(Case("decode"), pages_per_seq=256, num_pages=2048)
    rng = np.random.default_rng(0)

    def best_of(count: int, call: Callable[[jax.Array], tuple[jax.Array, jax.Array]], cache: jax.Array) -> float:
        times = []
        for _ in range(count):
            start = time.perf_counter()
            _, cache = jax.block_until_ready(call(cache))
            times.append(time.perf_counter() - start)
        return min(times)

    def seconds(*kv_lens: int) -> float:
        arguments = [jnp.asarray(argument) for argument in make_arguments(case, decode_rows(*kv_lens), rng)]
        return best_of(5, lambda cache: program(case)(*arguments[:3], cache, *arguments[4:]), arguments[3])

    one_short, all_full = seconds(10), seconds(*[case.max_len] * case.max_seqs)
    assert one_short * 10 < all_full
