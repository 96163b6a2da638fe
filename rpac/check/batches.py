"""Which batches a kernel is tried on: the edges of its plan, and random ones."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rpac.batch import Limits
from rpac.contract.arrays import cdiv
from rpac.plan import BlockTiles, DecodeBlocks, DecodeWaves, KernelPlan, LatentBlockTiles, XlaTiles
from rpac.plan.buffers import sublane_tile_tokens
from rpac.spec import Spec

MAX_EDGE_ROWS = 8  # of one batch of edges
RANDOM_ROWS = 6
# The interpreter takes seconds for as many.
RANDOM_LEN = 1536  # tokens of one row
RANDOM_NEW = 512  # new tokens of all rows, in a prefill batch
NEIGHBORS = 6  # rows of the batch in which some hold poison


@dataclass(frozen=True)
class CheckBatch:
    """A batch by its rows: new tokens and length of each, and how many of the first are decode, then prefill rows.

    The first `shared_pages` pages of every row are the same pages, which no row writes.
    """

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    decodes: int
    prefills: int = 0
    shared_pages: int = 0

    @property
    def distribution(self) -> tuple[int, int, int]:
        """(i, j, k) of the batch contract."""
        return self.decodes, self.decodes + self.prefills, len(self.q_lens)

    @property
    def new_tokens(self) -> int:
        """Tokens of all rows together, without padding."""
        return sum(self.q_lens)

    def pages(self, page_size: int) -> int:
        """How many pages of the cache the batch uses."""
        own = sum(cdiv(kv_len, page_size) - self.shared_pages for kv_len in self.kv_lens)
        return own + self.shared_pages


def batches_of(spec: Spec, plan: KernelPlan, rng: np.random.Generator, random_batches: int) -> tuple[CheckBatch, ...]:
    """The batches that cover the edges of a plan, and `random_batches` more drawn from `rng`."""
    maker = _maker(spec, plan)
    drawn = (maker.random(f"random {index}", rng) for index in range(random_batches))
    return (*maker.edges(), *drawn)


def neighbors_of(spec: Spec, plan: KernelPlan) -> CheckBatch | None:
    """A batch of rows with old tokens, short and long by turns, some of which may hold poison; None where only one row fits."""
    batch = _maker(spec, plan).neighbors("neighbors")
    return batch if len(batch.q_lens) > 1 else None


def _maker(spec: Spec, plan: KernelPlan) -> _Batches:
    makers: dict[str, type[_Batches]] = {"decode": _Decode, "prefill": _Prefill, "mixed": _Mixed}
    return makers[plan.kind](spec, plan)


class _Batches(ABC):
    """The sizes, in tokens, where a plan changes what it does, and batches around them."""

    def __init__(self, spec: Spec, plan: KernelPlan) -> None:
        self.page = spec.serving.page_size
        self.max_len = spec.serving.max_model_len
        self.max_seqs = spec.serving.max_num_seqs
        self.chunk = spec.serving.prefill_chunk
        self.new = spec.serving.decode_len
        self.unit = sublane_tile_tokens(spec.model)
        self.window = spec.model.sliding_window
        self.attention_chunk = spec.model.attention_chunk
        self.few_keys = Limits.of(spec).few_keys  # rows may be shorter than their queries
        self.buckets = plan.tokens
        self.decode_block, self.decode_tile = _block_and_tile(plan.decode)
        self.groups = plan.decode.wave_buffers if isinstance(plan.decode, DecodeWaves) else 0
        self.block, self.tile = _block_and_tile(plan.block)
        self.q_block = plan.block.q_block if plan.block else 0
        self.piece = plan.block.diagonal_block(self.page) if isinstance(plan.block, BlockTiles) else self.tile

    @abstractmethod
    def edges(self) -> Iterator[CheckBatch]:
        """Batches that together cover the edges of the plan."""

    @abstractmethod
    def random(self, name: str, rng: np.random.Generator) -> CheckBatch:
        """A batch of a few rows of any length that the kind allows."""

    @abstractmethod
    def neighbors(self, name: str) -> CheckBatch:
        """A batch of as many as NEIGHBORS rows, which have old tokens wherever a row can have some."""

    def short_and_long(self, q_lens: Sequence[int], block: int) -> list[int]:
        """A length for each of `q_lens`: a page and a little more, or a block and half a page.

        Each of both is before a row of its kind and before one of the other, so that a short row follows a long one in the
        same buffers.
        """
        old = self.page + 1, min(block + self.page // 2, RANDOM_LEN)
        # Rows 1 and 2 of every four are long. Few rows have the same length.
        return [min(old[row % 4 in (1, 2)] + row % 3 + q_len, self.max_len) for row, q_len in enumerate(q_lens)]

    def length(self, q_len: int, size: int, off: int) -> int | None:
        """The least length that holds `q_len` tokens and lies `off` tokens past a multiple of `size`."""
        length = size * max(1, -(-(q_len - off) // size)) + off
        return length if length <= self.max_len else None

    def lengths(self, q_len: int, sizes: Iterable[int]) -> list[int]:
        """Lengths of a token less, none and one more than a multiple of each size; one may serve several sizes."""
        found: list[int] = []
        for size, off in itertools.product(sorted(set(sizes), reverse=True), (-1, 0, 1)):
            length = self.length(q_len, size, off)
            if length is not None and not any((kept - off) % size == 0 for kept in found):
                found.append(length)
        return found

    def diagonals(self, q_len: int) -> list[int]:
        """Lengths around the end of a tile's first piece, and those where the first query sees all but one token of a tile,
        and all.
        """
        offs = (self.piece - 1, self.piece, self.piece + 1) if self.piece < self.tile else ()
        ends = [length for off in offs if (length := self.length(q_len, self.tile, off)) is not None]
        return [*ends, *(q_len + self.tile - off for off in (2, 1) if q_len + self.tile - off <= self.max_len)]

    def around_starts(self, q_len: int, sizes: Iterable[int]) -> list[int]:
        """Lengths where the window of the first of `q_len` new tokens begins at the first token of its sequence, at the first
        of a page, or of what is computed or fetched at once after that; a token before, and one after.
        """
        if self.attention_chunk is not None:
            return self.around_chunk_ends(q_len)
        if self.window is None:
            return []
        starts = sorted({0, self.page, *(self.page + size for size in sizes)})
        lengths = (self.window + q_len - 1 + start + off for start in starts for off in (-1, 0, 1))
        return list(dict.fromkeys(length for length in lengths if q_len <= length <= self.max_len))

    def around_chunk_ends(self, q_len: int) -> list[int]:
        """Lengths where the last, a middle and the first of `q_len` new tokens are at the end of a chunk of the sequence; a
        token before, and one after.
        """
        assert self.attention_chunk is not None
        ends = (parts * self.attention_chunk + after for parts in (1, 2) for after in (0, q_len // 2, q_len - 1))
        lengths = (end + off for end in ends for off in (-1, 0, 1))
        return list(dict.fromkeys(length for length in lengths if q_len <= length <= self.max_len))

    def random_len(self, rng: np.random.Generator, low: int) -> int:
        high = max(low, min(self.max_len, RANDOM_LEN))
        return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))


def _block_and_tile(
    tiles: DecodeBlocks | DecodeWaves | BlockTiles | LatentBlockTiles | XlaTiles | None,
) -> tuple[int, int]:
    """What is fetched at once and what is computed at once: the same in a portable program, and in a block of latents."""
    if tiles is None:
        return 0, 0
    if isinstance(tiles, DecodeWaves):
        return tiles.tiles_per_wave * tiles.tile, tiles.tile
    return tiles.block, tiles.tile if isinstance(tiles, BlockTiles) else tiles.block


class _Decode(_Batches):
    @property
    def max_rows(self) -> int:
        return min(self.max_seqs, self.buckets[-1] // self.new)

    def edges(self) -> Iterator[CheckBatch]:
        # Where the new tokens are several, each of them is the first past the end of each size.
        sizes = (self.page, self.decode_tile, self.decode_block, *([self.unit] if self.new > 1 else []))
        marks = {size + off for size in sizes for off in range(-1, self.new + 1)}
        marks |= {self.new, self.new + 1, 2 * self.decode_block + 1}
        marks |= set(self.around_starts(self.new, (self.decode_tile, self.decode_block)))
        lengths = sorted(length for length in marks if self.new <= length <= self.max_len)
        size = min(self.max_rows, MAX_EDGE_ROWS)
        for index in range(0, len(lengths), size):
            part = lengths[index : index + size]
            # Long beside short, so that the fetch runs ahead over sequences of any length.
            yield self.rows(f"lengths {' '.join(map(str, part))}", part[::2] + part[1::2])
        yield self.rows("empty", [])
        yield self.rows("one sequence, full table", [self.max_len])
        yield self.many("max sequences, shared prefix", self.max_rows)
        if self.groups:
            yield from self.around_groups()

    def around_groups(self) -> Iterator[CheckBatch]:
        """Rows that begin and end where groups do, enough that buffers are used again; and the end of the page table."""
        count = min(self.max_rows, self.groups + 1)
        each = min(cdiv(self.groups + 1, count), self.max_len // self.decode_block)
        if each:
            yield self.rows("whole groups", [each * self.decode_block] * count)
        yield self.rows("max sequences, full table of the last", [self.new] * (self.max_rows - 1) + [self.max_len])

    def rows(self, name: str, kv_lens: Sequence[int], shared_pages: int = 0) -> CheckBatch:
        return CheckBatch(name, (self.new,) * len(kv_lens), tuple(kv_lens), len(kv_lens), 0, shared_pages)

    def many(self, name: str, count: int) -> CheckBatch:
        """Rows that end close to a tile's end, which is least to clear, all pages shared but those of new tokens."""
        length = min(max(self.decode_tile, 2 * self.page), self.max_len)
        lengths = [max(length - row % 4, self.new) for row in range(count)]
        return self.rows(name, lengths, max(length - 3 - self.new, 0) // self.page)

    def neighbors(self, name: str) -> CheckBatch:
        count = min(self.max_rows, NEIGHBORS)
        return self.rows(name, self.short_and_long([self.new] * count, self.decode_block))

    def random(self, name: str, rng: np.random.Generator) -> CheckBatch:
        count = int(rng.integers(1, min(self.max_rows, RANDOM_ROWS) + 1))
        return self.rows(name, [self.random_len(rng, self.new) for _ in range(count)])


class _Prefill(_Batches):
    def edges(self) -> Iterator[CheckBatch]:
        # Their first chunk, their second, and ends around a page, a piece, a tile and a block.
        lengths = [self.chunk, 2 * self.chunk, *self.lengths(self.chunk, (self.page, self.tile, self.block))]
        lengths += [*self.diagonals(self.chunk), *self.around_starts(self.chunk, (self.tile, self.block))]
        lengths = list(dict.fromkeys(length for length in lengths if length <= self.max_len))
        size = min(self.buckets[0] // self.chunk, self.max_seqs)
        for index in range(0, len(lengths), size):
            part = lengths[index : index + size]
            yield self.rows(f"lengths {' '.join(map(str, part))}", part)
        yield self.rows("empty", [])
        yield self.rows("one sequence, full table", [self.max_len])
        # From one page into the next: the most pages that as many rows update, more than there are buffers for.
        length = self.length(self.chunk, self.page, 1) or self.chunk
        shared = min((self.max_len - length) // self.page, 2)
        yield self.rows("full bucket, shared prefix", [length + shared * self.page] * size, shared)
        if self.few_keys and self.chunk > 1:
            yield self.rows("fewer keys than queries", [1, self.chunk - 1, self.chunk][:size])

    def rows(self, name: str, kv_lens: Sequence[int], shared_pages: int = 0) -> CheckBatch:
        count = len(kv_lens)
        return CheckBatch(name, (self.chunk,) * count, tuple(kv_lens), 0, count, shared_pages)

    def neighbors(self, name: str) -> CheckBatch:
        # Another bucket is another program to compile, so the smallest that has room for two.
        fitting = (bucket for bucket in self.buckets if bucket >= 2 * self.chunk)
        room = min(next(fitting, self.buckets[-1]), max(RANDOM_NEW, 2 * self.chunk))
        count = min(room // self.chunk, self.max_seqs, NEIGHBORS)
        return self.rows(name, self.short_and_long([self.chunk] * count, self.block))

    def random(self, name: str, rng: np.random.Generator) -> CheckBatch:
        most = min(self.buckets[0] // self.chunk, self.max_seqs, max(RANDOM_NEW // self.chunk, 1))
        count = int(rng.integers(1, most + 1))
        return self.rows(name, [self.random_len(rng, 1 if self.few_keys else self.chunk) for _ in range(count)])


class _Mixed(_Batches):
    """Rows are pairs of new tokens and length. Unless they need more, batches fit the plan's smallest bucket."""

    @property
    def bucket(self) -> int:
        return self.buckets[0]

    def edges(self) -> Iterator[CheckBatch]:
        page, bucket, full = self.page, self.bucket, self.max_len
        for part in self.packed([*self.around_ends(), *self.around_pages(), *self.around_windows()]):
            yield self.mixed("rows " + " ".join(f"{q_len}:{kv_len}" for q_len, kv_len in part), part)
        yield self.mixed("empty", [])
        new = self.new
        some = [(new, min(length, full)) for length in (page + new, new, self.decode_tile + 1)]
        some = some[: min(bucket // new, self.max_seqs)]
        yield self.mixed("only decode", some, decodes=len(some))
        yield self.mixed("full bucket", self.filling(bucket))
        yield self.mixed("one sequence, full table", [(min(self.q_block, bucket, full), full)])
        yield self.many("max sequences, shared prefix")
        if self.few_keys and self.bucket > 1:
            most = min(self.q_block + 1, self.bucket)
            for part in self.packed([(most, 1), (2, 1), (most, most - 1), (1, 1)]):
                yield self.mixed(f"fewer keys than queries, {len(part)} rows", part)
        if self.chunk < self.buckets[-1]:
            yield from self.with_chunks()

    def around_ends(self) -> Iterator[tuple[int, int]]:
        """As many new tokens as a query block, one less and one more, at lengths around a page, a piece, a tile and a block."""
        most = min(self.bucket, self.max_len)
        q_lens = itertools.chain((min(self.q_block + off, most) for off in (1, -1, 0)), itertools.repeat(min(2, most)))
        for length in [*self.lengths(2, (self.page, self.tile, self.block)), *self.diagonals(2)]:
            yield min(next(q_lens), length), length

    def around_pages(self) -> Iterator[tuple[int, int]]:
        """New tokens that begin and end around the end of a page, and a single one that is no decode row."""
        page = self.page
        for context, q_len in ((0, 1), (page - 1, 1), (page, 1), (page - 1, 2), (page - 1, page + 2)):
            if q_len <= self.bucket and context + q_len <= self.max_len:
                yield q_len, context + q_len

    def around_windows(self) -> Iterator[tuple[int, int]]:
        """Rows of two new tokens at the edges of the window, and of more than a query block, whose second begins elsewhere."""
        if self.bucket > 1:
            yield from ((2, length) for length in self.around_starts(2, (self.tile, self.block)))
        most = min(self.q_block + 2, self.bucket, self.max_len)
        yield from ((most, length) for length in self.around_starts(most, ())[-1:])

    def filling(self, tokens: int) -> list[tuple[int, int]]:
        """Rows that fill a bucket to its last token, the last one from the end of one page into the next."""
        last = min(3, tokens, self.max_len - self.page + 1)
        rest = tokens - last
        count = -(-rest // self.max_len)
        first = [rest // count + (row < rest % count) for row in range(count)] if count else []
        rows = [*((q_len, q_len) for q_len in first), (last, self.page - 1 + last)]
        return rows if len(rows) <= self.max_seqs else [(min(tokens, self.max_len),) * 2]

    def with_chunks(self) -> Iterator[CheckBatch]:
        """Rows of a chunk, one token less and one more, and every part of a batch at once."""
        chunk, room = self.chunk, self.buckets[-1]
        page = self.page
        second = min(2 * chunk, self.max_len)
        yield self.mixed("only prefill", [(chunk, second)], prefills=1)
        if 1 < chunk < self.max_len and 2 * chunk <= room and self.max_seqs > 1:
            yield self.mixed("around a chunk", [(chunk + 1, min(chunk + page, self.max_len)), (chunk - 1, chunk - 1)])
        rest = min(room - chunk - self.new, page + 1)
        if rest > 0 and self.max_seqs > 2:
            rows = [
                (self.new, min(page + self.new, self.max_len)),
                (chunk, chunk),
                (rest, min(2 * page + 1, self.max_len)),
            ]
            yield self.mixed("everything", rows, decodes=1, prefills=1)

    def many(self, name: str) -> CheckBatch:
        """As many rows as there can be: decode rows and up to four of a few tokens, whose first pages are shared."""
        count = min(self.max_seqs, self.bucket // self.new)
        length = min(max(self.decode_tile, 2 * self.page), self.max_len)
        decodes = count - min(4, count)
        room = self.bucket - count * self.new
        new = [self.new if row < decodes else 1 if row - decodes >= room else 2 for row in range(count)]
        rows = [(q_len, max(length - row % 4, q_len)) for row, q_len in enumerate(new)]
        shared = max(length - 3 - max(self.new, 2), 0) // self.page
        return self.mixed(name, rows, decodes=decodes, shared_pages=shared)

    def neighbors(self, name: str) -> CheckBatch:
        """Decode rows, then as many of a token more where there is room."""
        count = min(self.max_seqs, self.bucket // self.new, NEIGHBORS)
        decodes = count - count // 2
        room = self.bucket - count * self.new
        q_lens = [self.new + (decodes <= row < decodes + room) for row in range(count)]
        lengths = self.short_and_long(q_lens, max(self.decode_block, self.block))
        return self.mixed(name, list(zip(q_lens, lengths, strict=True)), decodes=decodes)

    def packed(self, rows: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """The rows in order, as few batches of the smallest bucket as that takes."""
        part: list[tuple[int, int]] = []
        most = min(self.max_seqs, MAX_EDGE_ROWS)
        for row in dict.fromkeys(rows):
            if part and (len(part) == most or sum(q_len for q_len, _ in part) + row[0] > self.bucket):
                yield part
                part = []
            part.append(row)
        yield part

    def mixed(
        self, name: str, rows: Sequence[tuple[int, int]], decodes: int = 0, prefills: int = 0, shared_pages: int = 0
    ) -> CheckBatch:
        q_lens, kv_lens = tuple(q for q, _ in rows), tuple(kv for _, kv in rows)
        return CheckBatch(name, q_lens, kv_lens, decodes, prefills, shared_pages)

    def random(self, name: str, rng: np.random.Generator) -> CheckBatch:
        count = int(rng.integers(1, min(self.max_seqs, self.bucket // self.new, RANDOM_ROWS) + 1))
        decodes = int(rng.integers(0, count + 1))
        room = self.bucket - decodes * self.new
        q_lens = [self.new] * decodes
        for left in range(count - decodes, 0, -1):
            q_lens.append(int(rng.integers(1, min(room - (left - 1), self.max_len) + 1)))
            room -= q_lens[-1]
        return self.mixed(
            name, [(q_len, self.random_len(rng, 1 if self.few_keys else q_len)) for q_len in q_lens], decodes=decodes
        )
