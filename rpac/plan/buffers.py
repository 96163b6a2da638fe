"""How tokens lie in a cache's rows, and the scratch arrays of a kernel with their bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from rpac.contract.arrays import LANES, SUBLANES, align, kv_row_shape, kv_rows, nbytes, packing
from rpac.contract.attention import Attention
from rpac.contract.features import features_used
from rpac.plan.recipe import SPLIT, Read
from rpac.spec import Spec

MERGE_TOKENS: Final = 16  # new tokens that are put into a page at once
# Pages whose new tokens are fetched before they are merged, which hides the latency of DMAs. Where pages are so large that no
# tile fits beside so many, fewer do as well: what hides the latency is the bytes in flight, and each page has more of them.
UPDATE_LOOKAHEAD: Final = 4
SHORTER_LOOKAHEADS: Final = tuple(reversed(range(1, UPDATE_LOOKAHEAD)))

_OF_UPDATES: Final = frozenset(
    (
        "new_keys",
        "new_values",
        "k_by_head",
        "v_by_head",
        "packed",
        "by_head",
        "unit_out",
        "page_rows",
        "table_rows",
        "update_at",
        "page_ids",
        "row_sem",
        "unit_sem",
        "new_sem",
        "old_sem",
        "write_sem",
    )
)


@dataclass(frozen=True)
class RowDims:
    """How one token's K and V lie in the cache seen as rows of 128 lanes.

    A *row* has the cache's dtype; a *packed row* has 32 bits a lane, so that two bfloat16 rows (K and V) share one.
    `sublane_tile`: the fewest tokens that fill whole sublane tiles of a register.
    """

    lane_tiles: int
    packed_rows: int
    token_rows: int
    sublane_tile: int

    @classmethod
    def of(cls, model: Attention) -> RowDims:
        """The rows of a model's cache."""
        words, pack, lanes = kv_row_shape(model)
        lane_tiles = lanes // LANES
        token_rows = words * pack * lane_tiles
        tile_rows = SUBLANES * pack
        return cls(lane_tiles, token_rows // pack, token_rows, tile_rows // math.gcd(tile_rows, token_rows))

    @property
    def sublane_tile_rows(self) -> int:
        """Rows of these tokens."""
        return self.sublane_tile * self.token_rows


def all_heads_rows(model: Attention) -> int:
    """Rows of K of one token, of 128 lanes, where those of all heads are read in the order of the cache.

    Padding is among them where words hold rows of several heads.
    """
    rows, heads = RowDims.of(model), heads_per_word(model)
    return rows.packed_rows * heads if model.kv_heads > 1 else rows.lane_tiles


def heads_per_word(model: Attention) -> int:
    """KV heads whose rows share the 32-bit words of an interleaved cache, or could where there are no more heads."""
    return max(packing(model.kv_dtype) * model.kv_heads // kv_rows(model), 1)


@dataclass(frozen=True)
class Buffer:
    """One scratch array of a kernel. `dtype` "dma" is an array of DMA semaphores, "smem" of int32 scalars."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    note: str

    @property
    def vmem_bytes(self) -> int:
        """Bytes in VMEM with the padding that tiling adds; semaphores and scalars lie elsewhere."""
        if self.dtype in ("dma", "smem"):
            return 0
        dtype = "float32" if self.dtype == "uint32" else self.dtype
        *major, rows, lanes = self.shape
        tile = min(SUBLANES * packing(dtype), 1 << max(rows - 1, packing(dtype) - 1).bit_length())
        return nbytes((*major, align(rows, tile), align(lanes, LANES)), dtype)


def needed(spec: Spec, *buffers: Buffer) -> tuple[Buffer, ...]:
    """Those scratch arrays of a kernel that a spec has a use for: some serve only the update of the cache."""
    return buffers if spec.model.update_cache else tuple(one for one in buffers if one.name not in _OF_UPDATES)


def new_buffers(lookahead: int) -> int:
    """Pages whose new tokens are fetched or in use, where an update looks so far ahead."""
    return lookahead + 1


def page_buffers(lookahead: int) -> int:
    """Pages under update: those that are fetched or in use, and as many as are fetched ahead on their way out."""
    return new_buffers(lookahead) + lookahead


def load_sem(spec: Spec) -> tuple[Buffer, ...]:
    """The semaphores of what a decode kernel loads at its start."""
    if spec.model.update_cache:
        return (Buffer("load_sem", (3,), "dma", "queries, keys, values"),)
    return (Buffer("load_sem", (1,), "dma", "queries"),)


def query_row_arguments(spec: Spec, shape: tuple[int, ...]) -> tuple[Buffer, ...]:
    """The arrays over whose rows a decode kernel spreads arguments, one value for each query row."""
    spread = [one.argument.query_rows for one in features_used(spec.model, spec.serving) if one.argument is not None]
    return tuple(Buffer(name, shape, "float32", note) for name, note in filter(None, spread))


def sink_rows(model: Attention, shape: tuple[int, ...]) -> tuple[Buffer, ...]:
    """The array that holds each query row's sink, where there are sinks."""
    return (Buffer("sink_rows", shape, "float32", "sinks, the same in every lane"),) if model.sinks else ()


def lse_rows(spec: Spec, shape: tuple[int, ...]) -> tuple[Buffer, ...]:
    """The array of log-sum-exps on their way out, where a spec asks for them: a row for each query head."""
    return (
        (Buffer("lse_rows", shape, "float32", "log-sum-exps on their way out, the same in every lane"),)
        if spec.serving.log_sum_exp
        else ()
    )


def lse_sem(spec: Spec, count: int) -> tuple[Buffer, ...]:
    """Its semaphores."""
    return (Buffer("lse_sem", (count,), "dma", "log-sum-exps"),) if spec.serving.log_sum_exp else ()


def word_dtype(model: Attention) -> str:
    """The 32-bit type in which new tokens are packed."""
    return "uint32" if packing(model.kv_dtype) > 1 else model.kv_dtype


def sublane_tile_tokens(model: Attention) -> int:
    """Tokens that share a sublane tile where K and V are separate: the fewest that a DMA or a store reaches."""
    return SUBLANES * packing(model.kv_dtype)


def new_dtype(model: Attention) -> str:
    """The dtype in which a kernel takes new keys and values: 8-bit ones are the integers of their bits, exact in bfloat16."""
    return "bfloat16" if model.quantized else model.kv_dtype


def split_buffers(spec: Spec, read: Read, tile: int, copies: int = 0) -> tuple[Buffer, ...]:
    """The arrays that a tile's K and V are split into, where they share words; `copies` of each, if given."""
    if read not in SPLIT:
        return ()
    pack = packing(spec.model.kv_dtype)
    shape: tuple[int, ...] = (tile // pack * RowDims.of(spec.model).packed_rows, LANES)
    if read == "split_rows":
        shape = (copies, pack, *shape) if copies else (pack, *shape)
        return (Buffer("row_words", shape, "uint32", f"a tile by row of a token, {pack} tokens a word"),)
    if copies:
        shape = (copies, *shape)
    return (
        Buffer("k_words", shape, "uint32", "keys of one tile, two tokens a word"),
        Buffer("v_words", shape, "uint32", "values of one tile, two tokens a word"),
    )
