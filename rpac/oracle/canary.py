"""Small calls whose inputs are the same for ever, and the form in which a bundle stores what the oracle says of them.

A canary is run on a program before it serves: a compiler and a runtime that do not fit each other may return zeros in
silence. The inputs are integer arithmetic on an index, of no library's random numbers, so that only answers are stored.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (numpy knows bfloat16 by its name once this is imported)
import numpy as np
from numpy.typing import NDArray

from rpac.batch import Batch, Limits
from rpac.contract import arrays as layout
from rpac.contract.features import SAMPLES
from rpac.contract.kind import Int32s, Kind
from rpac.oracle.tolerance import TOLERANCE, attention_error

Array = NDArray[Any]

SEED = 1
MAX_ROWS = 4
LONG_CHUNK = 128  # new tokens; of such a chunk one row is enough for the oracle to do at a build
MAX_SAMPLES = 64  # heads of a token whose attention is stored
_DIGEST_BYTES = 32


@dataclass(frozen=True, eq=False)
class ProbeCall:
    """One call of a program, on a cache that is zero but for `pages`, which hold `held` `[len(pages), *page_shape]`.

    `by_token` are the arguments before the cache, by name, in order, queries first; `extra` those after the batch's.
    """

    batch: Batch
    by_token: Mapping[str, Array]
    pages: Int32s
    held: Array
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def queries(self) -> Array:
        """`[tokens, q_heads, ...]`; the output has this shape too."""
        return self.by_token["queries"]

    @cached_property
    def samples(self) -> tuple[list[int], list[int]]:
        """The tokens and their query heads that an answer holds: the last token of each row, and others before it."""
        q_heads = self.queries.shape[1]
        each = MAX_SAMPLES // max(len(self.batch), 1)
        found = [
            (row.queries[-1] - index * row.q_len // count, index % q_heads)
            for row in self.batch
            for count in [min(each, row.q_len * q_heads)]
            for index in range(count)
        ]
        return [token for token, _ in found], [head for _, head in found]

    @property
    def digest(self) -> bytes:
        """sha256 over every input but the padding, so that one answer is right for every token bucket."""
        batch = self.batch
        metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
        new = (array[: batch.num_tokens] for array in self.by_token.values())
        arrays = (*new, self.pages, self.held, *metadata, *self.extra.values())
        return hashlib.sha256(b"".join(map(_bytes, arrays))).digest()


class Verdict(NamedTuple):
    """What a program made of a call; `notes` is empty where it is the oracle's answer."""

    error: float
    notes: tuple[str, ...]


def make_call(
    kind: Kind,
    dims: Sequence[layout.ArrayDims],
    limits: Limits,
    kv_layout: str,
    q_lens: Sequence[int],
    context_lens: Sequence[int],
    seed: int,
) -> ProbeCall:
    """The call of a program of this kind on these rows, whose pages are spread over the whole cache.

    `dims` are the program's arguments. Raises BatchError where the rows break the contract or need more pages than the cache has.
    """
    batch, pages = spread_batch(kind, limits, q_lens, context_lens)
    cache = layout.index_of(dims, "kv_cache")
    by_token = new_tokens(dims, batch, seed)
    updates = len(by_token) > 1  # the new tokens come with the queries; else the cache holds them
    held = np.zeros((len(pages), *dims[cache].shape[1:]), dims[cache].dtype)
    held_tokens = np.moveaxis(held, layout.TOKEN_AXES[kv_layout], 1)  # a view
    contents = numbers(held_tokens.shape, seed, cache + 1)
    places = {page: place for place, page in enumerate(pages.tolist())}
    for row in batch:
        old = np.arange(row.context_len if updates else row.kv_len)
        at = np.array([places[page] for page in row.pages], np.int64)[old // limits.page_size], old % limits.page_size
        held_tokens[at] = contents[at]
    return ProbeCall(batch, by_token, pages, held, extras(dims, seed))


def spread_batch(
    kind: Kind, limits: Limits, q_lens: Sequence[int], context_lens: Sequence[int]
) -> tuple[Batch, Int32s]:
    """The batch of these rows for a program of this kind, and the pages that it uses, which are spread over the whole cache.

    Raises BatchError where the rows break the contract or need more pages than the cache has.
    """
    counts = [layout.cdiv(q + context, limits.page_size) for q, context in zip(q_lens, context_lens, strict=True)]
    used = sum(counts)
    # From the last page down: an address that overflows does so at the end of the cache.
    last = limits.num_pages - 1
    pages = [last - index * last // max(used - 1, 1) for index in range(used)]
    ends = np.cumsum([0, *counts]).tolist()
    tables = [pages[start:end] for start, end in itertools.pairwise(ends)]
    return _as_kind(kind, Batch.build(limits, q_lens, context_lens, tables)), np.array(pages, np.int32)


def new_tokens(dims: Sequence[layout.ArrayDims], batch: Batch, seed: int) -> dict[str, Array]:
    """The arguments before the cache of a program with arguments `dims`, by name, in order; zeros past the new tokens."""
    by_token = {one.name: np.zeros(one.shape, one.dtype) for one in dims[: layout.index_of(dims, "kv_cache")]}
    for stream, array in enumerate(by_token.values(), start=1):
        new = array[: batch.num_tokens]
        new[:] = numbers(new.shape, seed, stream)
    return by_token


def extras(dims: Sequence[layout.ArrayDims], seed: int) -> dict[str, Array]:
    """The arguments after the batch's of a program with arguments `dims`, by name, in order."""
    first = layout.index_of(dims, "kv_cache") + 2
    more = dims[layout.index_of(dims, "distribution") + 1 :]
    extra: dict[str, Array] = {
        one.name: SAMPLES[one.name](numbers(one.shape, seed, first + i)) for i, one in enumerate(more)
    }
    if "tree" in extra:
        extra["tree"] = _tree(extra["tree"])
    return extra


def canary(kind: Kind, dims: Sequence[layout.ArrayDims], limits: Limits, kv_layout: str) -> ProbeCall:
    """The canary of the program of this kind with arguments `dims`."""
    q_lens, context_lens = canary_rows(kind, dims[0].shape[0], limits)
    return make_call(kind, dims, limits, kv_layout, q_lens, context_lens, SEED)


def answer(call: ProbeCall, out: NDArray[np.float32], pages: Array, lse: NDArray[np.float32] | None = None) -> bytes:
    """What a bundle stores: the inputs' sha256, that of `pages` after the call, and samples of `out` and `lse` in float32.

    `out` is the oracle's, `[tokens, q_heads, head_dim]`; `pages` what the call's pages hold afterwards; `lse`
    `[tokens, q_heads]`, of programs that return it.
    """
    samples = [np.ascontiguousarray(array[call.samples], "<f4").tobytes() for array in (out, lse) if array is not None]
    return b"".join([call.digest, hashlib.sha256(_bytes(pages)).digest(), *samples])


def judge(call: ProbeCall, stored: bytes, out: Array, pages: Array, lse: Array | None = None) -> Verdict:
    """A program's results against a stored answer. Raises ValueError where the answer is not to this call."""
    head_dim = call.queries.shape[-1]
    count = len(call.samples[0])
    sampled = count * (head_dim + (lse is not None))
    if len(stored) != 2 * _DIGEST_BYTES + 4 * sampled or not stored.startswith(call.digest):
        raise ValueError("found the answer to other inputs than this rpac makes")
    wanted = np.frombuffer(stored, "<f4", offset=2 * _DIGEST_BYTES)
    want = wanted[: count * head_dim].reshape(count, 1, head_dim)
    found = out[call.samples].astype(np.float32).reshape(count, 1, head_dim)
    error, (worst, _) = attention_error(found, want)
    notes = []
    tolerance = TOLERANCE[call.queries.dtype.name]
    if not error <= tolerance:
        token, head = (axis[worst] for axis in call.samples)
        zeros = "" if found.any() else ", all that was looked at is zero"
        notes.append(f"attention of query head {head} at token {token} is off by {error:.2g} of {tolerance:.2g}{zeros}")
    if lse is not None:
        off = np.abs(lse[call.samples] - wanted[count * head_dim :]).max(initial=0)
        if not off <= tolerance:
            notes.append(f"lse is off by {off:.2g} of {tolerance:.2g}")
    if hashlib.sha256(_bytes(pages)).digest() != stored[_DIGEST_BYTES : 2 * _DIGEST_BYTES]:
        notes.append("the cache's pages do not hold what the batch writes")
    return Verdict(error, tuple(notes))


def canary_rows(kind: Kind, tokens: int, limits: Limits) -> tuple[list[int], list[int]]:
    """New tokens and context of each row: few, around the end of a page, as many as the cache has pages for."""
    page, chunk, full, new = limits.page_size, limits.prefill_chunk, limits.max_kv_len, limits.decode_len
    wanted = {
        "decode": [(new, page), (new, 0), (new, page - 1), (new, 2 * page + 2)],
        "prefill": [(chunk, page // 2 + 1), (chunk, 0)][: 2 if chunk < LONG_CHUNK else 1],
        "mixed": [(new, page), (min(5, max(tokens - 1, 1)), page - 2), (chunk, page // 2 + 1)],
    }[kind]
    rows: list[tuple[int, int]] = []
    pages = limits.num_pages
    for q_len, context in wanted[: min(MAX_ROWS, limits.max_num_seqs)]:
        q_len, context = min(q_len, full), max(min(context, full - q_len), 0)
        need = layout.cdiv(q_len + context, page)
        if sum(q for q, _ in rows) + q_len <= tokens and need <= pages:
            rows.append((q_len, context))
            pages -= need
    return [q_len for q_len, _ in rows], [context for _, context in rows]


def _as_kind(kind: Kind, batch: Batch) -> Batch:
    """The batch for a program that takes its rows too, where its lists alone would make it another program's."""
    if batch.kind == kind or not len(batch):
        return batch
    count = len(batch)
    distribution = np.array((0, count if kind == "prefill" else 0, count), np.int32)
    metadata = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, distribution)
    return Batch.of_arrays(batch.limits, batch.tokens, *metadata, order=batch.order)


def _tree(numbers: NDArray[np.float32]) -> Int32s:
    """Trees of drafts by `numbers` `[rows, new tokens]`: each new token sees itself and what one before it sees."""
    bits = np.ones(numbers.shape, np.int32)
    for token in range(1, numbers.shape[1]):
        parent = (4 * numbers[:, token] + 8).astype(np.int64) % token
        bits[:, token] = bits[np.arange(len(bits)), parent] | 1 << token
    return bits


def numbers(shape: tuple[int, ...], seed: int, stream: int) -> NDArray[np.float32]:
    """Quarters from -2 to 1.75, exact in every dtype with four significant bits: splitmix64 of the index."""
    mixed = np.arange(math.prod(shape), dtype=np.uint64)
    mixed += np.uint64((seed << 40) + (stream << 36))
    mixed *= np.uint64(0x9E3779B97F4A7C15)  # of arrays: wraps around, modulo 2**64
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    sixteenths = (mixed >> np.uint64(60)).astype(np.float32)
    quarters: NDArray[np.float32] = (sixteenths - np.float32(8)) / np.float32(4)
    return quarters.reshape(shape)


def _bytes(array: Array) -> bytes:
    """The bytes of an array on a machine with the low byte first, wherever this runs."""
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
