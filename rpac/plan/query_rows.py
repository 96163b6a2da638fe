"""How the queries of a decode row lie in registers, and its new tokens in the cache: what follows from `serving.decode_len`."""

from __future__ import annotations

from dataclasses import dataclass

from rpac.contract.arrays import LANES, SUBLANES, align, cdiv, head_lanes
from rpac.contract.attention import Attention
from rpac.plan.buffers import all_heads_rows
from rpac.plan.recipe import Read
from rpac.spec import Spec


@dataclass(frozen=True)
class Sets:
    """How query rows are put together for matmuls: `heads` KV heads share `rows` rows.

    Where a matmul is with one KV head, fewer rows than the registers' 8 cost as much as 8, so heads of few queries share
    them; `count` sets hold all heads. `queries` are those of one KV head, of all new tokens of a sequence.

    Where it is with all KV heads, `kept` says how many sets' rows of scores are kept. A column of scores is of one KV head;
    where a lane is of the same KV head in all registers, the rows of that head's set are taken out of all, so that one set
    is kept. Otherwise all heads make one set. A set has rows for each `halves` of a head's lanes, which are scored apart.
    """

    heads: int
    rows: int
    count: int
    queries: int
    kept: int
    halves: int = 1

    @classmethod
    def of(cls, spec: Spec, read: Read) -> Sets:
        """The sets of a model's heads, where K and V are read so."""
        queries = head_queries(spec)
        heads = SUBLANES // queries if SUBLANES % queries == 0 else 1
        count = cdiv(spec.model.kv_heads, heads)
        if read != "all_heads":
            return cls(heads, align(queries, SUBLANES), count, queries, count)
        halves = head_lanes(spec.model) // LANES
        if count * halves > 1 and LANES % all_heads_rows(spec.model) == 0:
            return cls(heads, align(queries, SUBLANES), count, queries, 1, halves)
        return cls(spec.model.kv_heads, align(spec.model.kv_heads * queries, SUBLANES), 1, queries, 1)

    @property
    def keeps_own(self) -> bool:
        """Whether scores of a row of K are kept with the queries of one set only."""
        return self.kept < self.count * self.halves

    def padded(self, model: Attention) -> bool:
        """Whether some rows of a set are no query's."""
        return self.count * self.rows != model.kv_heads * self.queries


def head_queries(spec: Spec) -> int:
    """Queries of a decode row that share a KV head: a group's for each of its new tokens."""
    return spec.model.group * spec.serving.decode_len


def head_rows(spec: Spec) -> int:
    """The whole registers' rows that they lie in where K and V are interleaved."""
    return align(head_queries(spec), SUBLANES)


def by_sequence(spec: Spec, count: int) -> tuple[int, ...]:
    """The leading axes of an array that holds something for each new token of `count` sequences."""
    return (count,) if spec.serving.decode_len == 1 else (count, spec.serving.decode_len)


def sublane_tiles_by_sequence(spec: Spec, count: int, tile_tokens: int) -> tuple[int, ...]:
    """The leading axes of an array that holds something for each sublane tile, of `tile_tokens` tokens of the cache, that the
    new tokens of `count` sequences may lie in.
    """
    new_tokens = spec.serving.decode_len
    return (count,) if new_tokens == 1 else (count, (new_tokens - 2) // tile_tokens + 2)
