"""The arrays of a call: random where the contract reads them, poison everywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rpac.batch import Limits, validate
from rpac.check.batches import CheckBatch
from rpac.contract import arrays as layout
from rpac.contract.attention import Attention
from rpac.contract.features import SAMPLES
from rpac.spec import Spec

Array = NDArray[Any]
Int32s = NDArray[np.int32]

SIGNALING_NAN = {2: 0x7F81, 4: 0x7F800001, 1: 0x7F}  # bfloat16, float32, and of 8 bits any; by the bytes of an element
# Where there is no NaN, a code far from those of numbers that are used.
POISON = {"int8": 127}
CODES = {"int8": 32}  # how much larger the codes of numbers about 1 are; their scales are as much smaller
# What metadata holds where nothing may read it: as an index, one wraps around and the other is out of bounds.
GARBAGE = (-7, np.iinfo(np.int32).max)


class Arguments(NamedTuple):
    """The arguments of a program, as numpy arrays; `by_token`, those before the cache, and `extra` by name, in order."""

    by_token: Mapping[str, Array]
    kv_cache: Array
    kv_lens: Int32s
    page_indices: Int32s
    cu_q_lens: Int32s
    distribution: Int32s
    extra: Mapping[str, Array]

    @property
    def queries(self) -> Array:
        """`[tokens, q_heads, ...]`"""
        return self.by_token["queries"]

    @property
    def of_batch(self) -> tuple[Array, ...]:
        """Those that every program of a kind of attention takes."""
        return (*self.by_token.values(), *self[1:-1])

    @property
    def in_order(self) -> tuple[Array, ...]:
        """All, as the program takes them."""
        return (*self.of_batch, *self.extra.values())


def make_arguments(spec: Spec, batch: CheckBatch, tokens: int, pages: int, rng: np.random.Generator) -> Arguments:
    """The call of a batch in a bucket of `tokens`, on a cache of `pages` pages, which are dealt out shuffled.

    NaN are: pages of no row, rows of the cache past a sequence's old tokens (past its new ones, where the cache is not
    updated), and the padding of queries, keys and values; those in the cache signaling ones, so that a kernel that takes
    them through arithmetic does not keep them bit for bit.
    Raises BatchError where the batch breaks the batch contract.
    """
    # The generated code takes the number of pages from the cache, and a cache of all of them would take gigabytes.
    spec = replace(spec, serving=replace(spec.serving, num_pages=pages))
    serving = spec.serving
    taken = layout.arg_specs(spec, tokens)
    arrays = {
        dims.name: np.full(dims.shape, POISON.get(dims.dtype, np.nan), dims.dtype)
        for dims in taken[: layout.index_of(taken, "kv_cache") + 1]
    }
    kv_cache = arrays.pop("kv_cache")
    kv_cache.view(f"uint{8 * kv_cache.itemsize}").fill(SIGNALING_NAN[kv_cache.itemsize])
    for array in arrays.values():
        array[: batch.new_tokens] = _normal(rng, array[: batch.new_tokens])

    kv_lens, page_indices, cu_q_lens, _ = (_garbage(dims.shape) for dims in layout.metadata_specs(serving))
    count = len(batch.q_lens)
    kv_lens[:count] = batch.kv_lens
    cu_q_lens[: count + 1] = np.cumsum([0, *batch.q_lens])
    distribution = np.array(batch.distribution, np.int32)
    table = page_indices.reshape(serving.max_num_seqs, serving.pages_per_seq)  # a view
    by_token = np.moveaxis(kv_cache, layout.TOKEN_AXES[serving.kv_layout], 1)  # a view
    free = iter(rng.permutation(pages).tolist())
    shared = [next(free) for _ in range(batch.shared_pages)]
    for row, (q_len, kv_len) in enumerate(zip(batch.q_lens, batch.kv_lens, strict=True)):
        context = kv_len - q_len if spec.model.update_cache else kv_len
        mine = [*shared, *_take(free, layout.cdiv(kv_len, serving.page_size) - len(shared))]
        table[row, : len(mine)] = mine
        held = np.arange(0 if row == 0 else len(shared) * serving.page_size, context)
        at = table[row, held // serving.page_size], held % serving.page_size
        by_token[at] = _normal(rng, by_token[at])
    limits = Limits.of(spec)
    if limits.is_local:
        _poison_unseen(batch, spec.model, serving.page_size, table, kv_cache)
    validate(limits, tokens, kv_lens, page_indices, cu_q_lens, distribution)
    extra = {dims.name: _random(rng, dims) for dims in layout.extra_specs(spec)}
    if "kv_scales" in extra:
        extra["kv_scales"] /= np.float32(CODES.get(spec.model.kv_dtype, 1))
    return Arguments(arrays, kv_cache, kv_lens, page_indices, cu_q_lens, distribution, extra)


def _poison_unseen(batch: CheckBatch, model: Attention, page_size: int, table: Int32s, kv_cache: Array) -> None:
    """Makes pages before what all new tokens see NaN, and garbage of their entries in the table."""
    used: set[int] = set()
    seen: set[int] = set()
    for row, (q_len, kv_len) in enumerate(zip(batch.q_lens, batch.kv_lens, strict=True)):
        first = model.first_seen(kv_len - q_len) // page_size
        mine = table[row, : layout.cdiv(kv_len, page_size)]
        used.update(mine.tolist())
        seen.update(mine[first:].tolist())
        mine[:first] = _garbage((first,))
    kv_cache.view(f"uint{8 * kv_cache.itemsize}")[sorted(used - seen)] = SIGNALING_NAN[kv_cache.itemsize]


def _random(rng: np.random.Generator, dims: layout.ArrayDims) -> Array:
    """An argument beside the batch; of a tree any bits, but that every new token sees itself."""
    if dims.name == "tree":
        return _any_bits(rng, dims.shape) | np.left_shift(np.int32(1), np.arange(dims.shape[1], dtype=np.int32))
    numbers: Array = SAMPLES[dims.name](_normal(rng, np.empty(dims.shape, dims.dtype)))
    return numbers


def _any_bits(rng: np.random.Generator, shape: tuple[int, ...]) -> Int32s:
    int32 = np.iinfo(np.int32)
    return rng.integers(int32.min, int32.max, shape, np.int32, endpoint=True)


def _normal(rng: np.random.Generator, like: Array) -> Array:
    return (
        (rng.standard_normal(like.shape, np.float32) * CODES.get(like.dtype.name, 1)).clip(-127, 127).astype(like.dtype)
    )


def _garbage(shape: tuple[int, ...]) -> Int32s:
    return np.resize(np.array(GARBAGE, np.int32), shape)


def _take(numbers: Iterator[int], count: int) -> Iterator[int]:
    return (next(numbers) for _ in range(count))
