"""What a plan is: tiles of each kernel, the buffers that follow from them, and their bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final, TypeVar

from rpac.layout import LANES, SUBLANES, align, head_lanes, joins_rows, kv_page_shape, kv_row_shape, nbytes, packing
from rpac.plan.query_rows import Sets, by_sequence, head_rows, units_by_sequence
from rpac.spec import Model, Spec

if TYPE_CHECKING:
    from rpac.plan.latent import LatentBlockTiles

SCORES_AHEAD = 3  # flash steps whose scores are made before they are weighed: as many as keep the MXU busy meanwhile
SCORES_AHEAD_AT_MOST = 3 * 256 * 512  # of them all: more are moved in and out of registers more often than it helps
STEPS_PER_SCORE = 2  # at least: scores made ahead are code too
PIECE = 256  # tokens, if whole pages: a tile on the diagonal is computed by pieces, of no fewer than the MXU is wide
_OF_UPDATES: Final = frozenset(
    (
        "new_keys",
        "new_values",
        "packed",
        "by_head",
        "unit_out",
        "page_rows",
        "unit_sem",
        "new_sem",
        "old_sem",
        "write_sem",
    )
)
RULE: Final = "rule"
"""`KernelPlan.origin` of tiles that the rules of this package made, for want of tuned ones."""


@dataclass(frozen=True)
class RowDims:
    """How one token's K and V lie in the cache seen as rows of 128 lanes.

    A *row* has the cache's dtype; a *packed row* has 32 bits a lane, so that two bfloat16 rows (K and V) share one.
    """

    lane_tiles: int
    packed_rows: int
    token_rows: int
    unit: int

    @classmethod
    def of(cls, model: Model) -> RowDims:
        """The rows of a model's cache."""
        words, pack, lanes = kv_row_shape(model)
        lane_tiles = lanes // LANES
        token_rows = words * pack * lane_tiles
        tile_rows = SUBLANES * pack
        return cls(lane_tiles, token_rows // pack, token_rows, tile_rows // math.gcd(tile_rows, token_rows))

    @property
    def unit_rows(self) -> int:
        """Rows of the smallest group of tokens that fills whole register tiles."""
        return self.unit * self.token_rows


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


@dataclass(frozen=True)
class DecodeTiles:
    """Tiles of a decode kernel: `block` tokens are fetched at once and computed at once, `buffers` of them in flight.

    `pair` KV heads share a matrix product, side by side: as many as fill the width of the MXU.
    """

    block: int
    pair: int
    buffers: int
    writes: int
    loaded: int

    def scratch(self, spec: Spec) -> tuple[Buffer, ...]:
        """The scratch arrays, in the order of the kernel's parameters."""
        model = spec.model
        rows = RowDims.of(model)
        query_rows = model.kv_heads * head_rows(spec)
        loaded = self.loaded * spec.serving.decode_len
        new = (loaded, model.kv_heads, model.head_dim)
        units = units_by_sequence(spec, self.writes, rows.unit)
        out = by_sequence(spec, self.writes)
        return needed(
            spec,
            Buffer("kv", (self.buffers, self.block * rows.token_rows, LANES), model.kv_dtype, "fetched blocks"),
            *split_words(spec, self.block, 2),
            Buffer("q_all", (loaded, model.q_heads, model.head_dim), model.q_dtype, "queries of every sequence"),
            Buffer("new_keys", new, new_dtype(model), "new keys of every sequence"),
            Buffer("new_values", new, new_dtype(model), "new values of every sequence"),
            Buffer(
                "packed", (rows.unit * rows.packed_rows, LANES), word_dtype(model), "a new token in the cache's form"
            ),
            Buffer("unit_out", (*units, rows.unit_rows, LANES), model.kv_dtype, "rows on their way to the cache"),
            Buffer(
                "q_rows", (query_rows, self.pair * head_lanes(model)), "float32", "queries of one sequence by KV head"
            ),
            *sink_rows(model, (query_rows, LANES)),
            Buffer("row_max", (query_rows, LANES), "float32", "running maximum, the same in every lane"),
            Buffer("row_sum", (query_rows, LANES), "float32", "running sum, the same in every lane"),
            Buffer("acc", (query_rows, head_lanes(model)), "float32", "running output"),
            Buffer("out_rows", (*out, model.q_heads, model.head_dim), model.q_dtype, "outputs on their way out"),
            *lse_rows(spec, (*out, align(model.q_heads, SUBLANES), LANES)),
            Buffer("kv_sem", (self.buffers,), "dma", "fetches"),
            *load_sem(spec),
            Buffer("unit_sem", (self.writes,), "dma", "cache writes"),
            Buffer("out_sem", (self.writes,), "dma", "outputs"),
            *lse_sem(spec, self.writes),
        )

    def temporaries(self, spec: Spec) -> int:
        """Bytes of the values of one flash step that registers cannot hold: scores and weights."""
        return 2 * nbytes((spec.model.kv_heads * head_rows(spec), self.block), "float32")


@dataclass(frozen=True)
class GroupTiles:
    """Tiles of a decode kernel where K and V lie apart: a turn takes `step` tiles of `tile` tokens of any sequences, the
    fetch runs `ahead` turns before it.
    """

    tile: int
    step: int
    ahead: int
    writes: int
    loaded: int

    @property
    def groups(self) -> int:
        """Groups of `step` tiles that are fetched or in use at once."""
        return self.ahead + 1

    def scratch(self, spec: Spec) -> tuple[Buffer, ...]:
        """The scratch arrays, in the order of the kernel's parameters."""
        model, page_size = spec.model, spec.serving.page_size
        drafts = spec.serving.decode_len
        sets = Sets.of(spec)
        query_rows = sets.count * sets.rows
        new = (self.loaded * drafts, model.kv_heads, model.head_dim)
        queries = ((self.loaded + 1) * drafts, model.q_heads, model.head_dim)
        slots = self.groups * self.step
        kv = (slots, self.tile // page_size, *kv_page_shape(spec))
        kinds, heads, _, lanes = kv_page_shape(spec)
        unit_size = unit_tokens(model)
        unit = (*units_by_sequence(spec, self.writes, unit_size), kinds, heads, unit_size, lanes)
        return needed(
            spec,
            Buffer("kv", kv, model.kv_dtype, "fetched tiles"),
            Buffer("q_in", queries, model.q_dtype, "queries of every sequence, and of none"),
            Buffer("new_keys", new, new_dtype(model), "new keys of every sequence"),
            Buffer("new_values", new, new_dtype(model), "new values of every sequence"),
            Buffer("unit_out", unit, model.kv_dtype, "new tokens on their way to the cache"),
            Buffer("scores", (self.step, query_rows, self.tile), "float32", "scores of a group, from turn to turn"),
            *sink_rows(model, (query_rows, LANES)),
            Buffer("row_max", (query_rows, LANES), "float32", "running maximum, the same in every lane"),
            Buffer("row_sum", (query_rows, LANES), "float32", "running sum, the same in every lane"),
            Buffer("acc", (query_rows, head_lanes(model)), "float32", "running output"),
            Buffer("out_all", queries, model.q_dtype, "outputs of every sequence, and of none"),
            *lse_rows(spec, (queries[0], align(model.q_heads, SUBLANES), LANES)),
            Buffer("tile_seq", (slots,), "smem", "the sequence of each tile in flight"),
            Buffer("tile_first", (slots,), "smem", "its first token"),
            Buffer("tile_left", (slots,), "smem", "tokens of its sequence from there on"),
            Buffer("kv_sem", (self.groups,), "dma", "fetches"),
            *load_sem(spec),
            Buffer("unit_sem", (self.writes,), "dma", "cache writes"),
            Buffer("out_sem", (1,), "dma", "outputs"),
            *lse_sem(spec, 1),
        )

    def temporaries(self, spec: Spec) -> int:
        """Bytes of the values of one turn that registers cannot hold: weights, and scores on their way."""
        sets = Sets.of(spec)
        return 2 * self.step * nbytes((sets.count * sets.rows, self.tile), "float32")


@dataclass(frozen=True)
class BlockTiles:
    """Tiles of a prefill or mixed kernel, in tokens.

    `step_rows` are query rows (tokens times group) of one flash step, `heads` the KV heads whose steps are one piece of
    code, `diagonal_heads` likewise on the diagonal. `spare`: the MXU is wider than a head, with room for 128 more lanes.
    """

    q_block: int
    block: int
    tile: int
    step_rows: int
    heads: int
    diagonal_heads: int
    buffers: int
    update_buffers: int
    merge_tokens: int
    new_tokens: int
    copy_sizes: tuple[int, ...]
    spare: bool

    def piece(self, page_size: int) -> int:
        """Tokens of a part of a tile that is computed where the whole would reach past the diagonal."""
        return PIECE if self.tile % PIECE == 0 and PIECE % page_size == 0 else self.tile

    def masks_by_mxu(self, model: Model) -> bool:
        """Whether queries differ in what they see, each of a step's has a lane in what the MXU has to spare, and nothing undoes
        the mask.
        """
        return (
            model.causal
            and self.spare
            and model.soft_cap is None
            and exchange_of(model) > 0
            and self.step_rows // model.group <= LANES
        )

    def scores_ahead(self, model: Model, heads: int) -> int:
        """Flash steps whose scores are made before they are weighed, where a piece of code has the steps of `heads` heads."""
        steps = heads * (model.group * self.q_block // self.step_rows)
        most = SCORES_AHEAD_AT_MOST // (self.step_rows * self.tile)
        return max(min(SCORES_AHEAD, most, steps // STEPS_PER_SCORE), 1)

    def scratch(self, spec: Spec) -> tuple[Buffer, ...]:
        """The scratch arrays, in the order of the kernel's parameters."""
        model, page_size = spec.model, spec.serving.page_size
        rows = RowDims.of(model)
        q_rows = model.group * self.q_block
        new = (self.update_buffers, 2 * page_size + self.new_tokens, model.kv_heads, model.head_dim)
        queries = (self.q_block, model.q_heads, model.head_dim)
        limits: tuple[Buffer, ...] = ()
        if self.masks_by_mxu(model):
            parts = (q_rows // self.step_rows, self.piece(page_size), LANES)
            limits = (
                Buffer("which_query", (self.step_rows, LANES), model.q_dtype, "a 1 where a lane is the row's query"),
                Buffer("limits", parts, model.q_dtype, "by token and query: 0, or what masks a score"),
            )
        next_scores = (self.scores_ahead(model, self.heads), self.step_rows, self.tile)
        state = (model.kv_heads, q_rows, LANES)
        by_token: tuple[Buffer, ...] = ()
        if not exchange_of(model):
            shape: tuple[int, ...] = (self.q_block * align(model.q_heads, SUBLANES), LANES)
            if rows.lane_tiles > 1:  # a strided load or store is of 128 lanes
                shape = (rows.lane_tiles, *shape)
            by_token = (Buffer("by_token", shape, "float32", "one by token"),)
        kv: tuple[int, ...] = (self.buffers, self.block * rows.token_rows, LANES)
        page: tuple[int, ...] = (self.update_buffers, page_size * rows.token_rows, LANES)
        merged = Buffer(
            "packed", (self.merge_tokens * rows.packed_rows, LANES), word_dtype(model), "new tokens in the cache's form"
        )
        if spec.serving.kv_layout == "separate":
            kv = (self.buffers, self.block // page_size, *kv_page_shape(spec))
            page = (self.update_buffers, *kv_page_shape(spec))
            shape = (self.merge_tokens * align(model.kv_heads, SUBLANES), LANES)
            if rows.lane_tiles > 1:
                shape = (rows.lane_tiles, *shape)
            merged = Buffer("by_head", shape, "float32", "new tokens, to be read by head")
        return needed(
            spec,
            Buffer("kv", kv, model.kv_dtype, "fetched blocks"),
            *split_words(spec, self.tile),
            Buffer("new_keys", new, new_dtype(model), "new keys, around the page they go to"),
            Buffer("new_values", new, new_dtype(model), "new values, likewise"),
            Buffer("page_rows", page, model.kv_dtype, "pages to update"),
            merged,
            Buffer("q_in", (self.buffers, *queries), model.q_dtype, "query blocks as they come"),
            *by_token,
            Buffer("q_rows", (model.kv_heads, q_rows, head_lanes(model)), model.q_dtype, "one by KV head"),
            *limits,
            Buffer("next_scores", next_scores, "float32", "the first scores of the next turn"),
            *(sink_rows(model, (model.kv_heads, align(model.group, SUBLANES), LANES)) if exchange_of(model) else ()),
            Buffer("row_max", state, "float32", "running maximum, the same in every lane"),
            Buffer("row_sum", state, "float32", "running sum, the same in every lane"),
            Buffer("acc", (model.kv_heads, q_rows, head_lanes(model)), "float32", "running output"),
            Buffer("out_rows", (1, *queries), model.q_dtype, "an output block on its way out"),
            *lse_rows(spec, (self.q_block * align(model.q_heads, SUBLANES), LANES)),
            Buffer("kv_sem", (self.buffers,), "dma", "fetches"),
            Buffer("new_sem", (self.update_buffers,), "dma", "new keys and values"),
            Buffer("old_sem", (self.update_buffers,), "dma", "pages that hold old tokens"),
            Buffer("write_sem", (self.update_buffers,), "dma", "cache writes"),
            Buffer("q_sem", (self.buffers,), "dma", "query blocks"),
            Buffer("out_sem", (1,), "dma", "output blocks"),
            *lse_sem(spec, 1),
        )

    def temporaries(self, spec: Spec) -> int:
        """Bytes of the values of one flash step that registers cannot hold: scores and weights."""
        return 8 * nbytes((self.step_rows, self.tile), "float32")


def needed(spec: Spec, *buffers: Buffer) -> tuple[Buffer, ...]:
    """Of the scratch arrays of a kernel those that a spec has a use for: some are for updating the cache alone."""
    return buffers if spec.model.update_cache else tuple(one for one in buffers if one.name not in _OF_UPDATES)


def load_sem(spec: Spec) -> tuple[Buffer, ...]:
    """The semaphores of what a decode kernel loads at its start."""
    if spec.model.update_cache:
        return (Buffer("load_sem", (3,), "dma", "queries, keys, values"),)
    return (Buffer("load_sem", (1,), "dma", "queries"),)


def sink_rows(model: Model, shape: tuple[int, ...]) -> tuple[Buffer, ...]:
    """The array that holds each query row's sink, where there are sinks."""
    return (Buffer("sink_rows", shape, "float32", "sinks, the same in every lane"),) if model.sinks else ()


def lse_rows(spec: Spec, shape: tuple[int, ...]) -> tuple[Buffer, ...]:
    """The array in which the logarithms of the sums leave, where a spec has them: a row a query head."""
    return (
        (Buffer("lse_rows", shape, "float32", "logarithms of sums, the same in every lane"),)
        if spec.serving.log_sum_exp
        else ()
    )


def lse_sem(spec: Spec, count: int) -> tuple[Buffer, ...]:
    """The semaphores that go with it."""
    return (Buffer("lse_sem", (count,), "dma", "logarithms of sums"),) if spec.serving.log_sum_exp else ()


def exchange_of(model: Model) -> int:
    """KV heads whose queries of a token fill one register, where sorting queries by KV head is an exchange of registers'
    parts; 0 where it is not, for parts of a word or of several registers' would have to move.
    """
    pack = packing(model.q_dtype)
    if model.kv_heads == 1 and model.group % SUBLANES == 0:
        return 1
    if model.group % pack or SUBLANES % (model.group // pack) or model.q_heads % (SUBLANES * pack):
        return 0
    return SUBLANES // (model.group // pack)


def word_dtype(model: Model) -> str:
    """The 32-bit type in which new tokens are packed."""
    return "uint32" if packing(model.kv_dtype) > 1 else model.kv_dtype


def unit_tokens(model: Model) -> int:
    """Tokens that share a register where K and V lie apart: the smallest piece that a DMA or a store reaches."""
    return SUBLANES * packing(model.kv_dtype)


def splits_words(spec: Spec) -> bool:
    """Whether K and V share 32-bit words, which a kernel must split before the MXU can take either."""
    return spec.serving.kv_layout == "interleaved" and packing(spec.model.kv_dtype) > 1


def splits_rows(spec: Spec) -> bool:
    """Whether words are split by the place of rows in them, for they hold other rows than one K and its V."""
    return splits_words(spec) and (joins_rows(spec.model) or spec.model.quantized)


def new_dtype(model: Model) -> str:
    """In what a kernel takes new keys and values: 8-bit ones as the integers that their bits are, exact in bfloat16."""
    return "bfloat16" if model.quantized else model.kv_dtype


def split_words(spec: Spec, tile: int, copies: int = 0) -> tuple[Buffer, ...]:
    """The arrays that a tile's K and V are split into, where they share words; `copies` of each, if given."""
    if not splits_words(spec):
        return ()
    pack = packing(spec.model.kv_dtype)
    shape: tuple[int, ...] = (tile // pack * RowDims.of(spec.model).packed_rows, LANES)
    if splits_rows(spec):
        shape = (copies, pack, *shape) if copies else (pack, *shape)
        return (Buffer("row_words", shape, "uint32", f"a tile by row of a token, {pack} tokens a word"),)
    if copies:
        shape = (copies, *shape)
    return (
        Buffer("k_words", shape, "uint32", "keys of one tile, two tokens a word"),
        Buffer("v_words", shape, "uint32", "values of one tile, two tokens a word"),
    )


@dataclass(frozen=True)
class XlaTiles:
    """Tiles of a portable program: `block` tokens of KV a step; `blocks` of them (decode), or `q_block` queries."""

    block: int
    blocks: int = 1
    q_block: int = 1


@dataclass(frozen=True)
class KernelPlan:
    """The plan of one generated source: a case on a target, for the token buckets that share its tiles.

    Bytes are per core. `vmem_need` is what the buffers and the temporaries of the larger of its kernels take,
    `vmem_limit` what the compiler is told it may use, `vmem_bytes` what the core has; zero for cpu. `origin` says where
    the tiles come from: `rule`, alone or with why not from tuning; or `tuned`, with what that rests on.
    """

    target: str
    kind: str
    tokens: tuple[int, ...]
    path: str
    decode: DecodeTiles | GroupTiles | XlaTiles | None
    block: BlockTiles | LatentBlockTiles | XlaTiles | None
    vmem_need: int
    vmem_limit: int
    vmem_bytes: int
    smem_need: int
    smem_bytes: int
    origin: str = RULE

    def as_dict(self) -> Mapping[str, Any]:
        """Plain data for a manifest, a table or a cache key."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KernelPlan:
        """The inverse of `as_dict`, by way of JSON too, for a TPU. Raises ValueError for tiles of other fields."""
        decode, block = decode_tiles_from(data["decode"]), tiles_from(BlockTiles, data["block"])
        return cls(**{**data, "tokens": tuple(data["tokens"]), "decode": decode, "block": block})


AnyTiles = TypeVar("AnyTiles", DecodeTiles, GroupTiles, BlockTiles)
_TYPES: Final = {"int": int, "bool": bool}  # by how a field is annotated; any other is a tuple of integers


def decode_tiles_from(data: Mapping[str, Any] | None) -> DecodeTiles | GroupTiles | None:
    """As `tiles_from`, for the decode tiles of either layout."""
    if isinstance(data, Mapping) and "step" in data:
        return tiles_from(GroupTiles, data)
    return tiles_from(DecodeTiles, data)


def tiles_from(kind: type[AnyTiles], data: Mapping[str, Any] | None) -> AnyTiles | None:
    """The inverse of `asdict` for the tiles of a TPU kernel. Raises ValueError for other fields, or values of others."""
    if data is None:
        return None
    types = {field.name: _TYPES.get(str(field.type), tuple) for field in fields(kind)}
    if not isinstance(data, Mapping) or sorted(data) != sorted(types):
        raise ValueError(f"found {data!r}; must have the fields {', '.join(types)}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if type(value) is not types[name] or not all(type(n) is bool or (type(n) is int and n > 0) for n in numbers):
            raise ValueError(f"{name}: found {data[name]!r}; must be {types[name].__name__}, above 0")
    return kind(**values)
