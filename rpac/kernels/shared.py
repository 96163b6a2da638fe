"""What all kernels of attention over K and V heads show: a view for their templates, and their scratch arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from rpac.contract.arrays import (
    head_lanes,
    joins_rows,
    packing,
)
from rpac.contract.attention import Attention
from rpac.contract.features import ARGUMENTS
from rpac.kernels.calls import Call, call_of, program_of
from rpac.kernels.constants import Constant, tile
from rpac.kernels.literals import dtype
from rpac.kernels.model_constants import computed_in, padding_rows
from rpac.plan import Buffer, DecodeBlocks, DecodeWaves, KernelPlan, RowDims
from rpac.plan.bounds import MIXED
from rpac.plan.buffers import sublane_tile_tokens
from rpac.plan.page_table import entries_of, padded_entries
from rpac.plan.recipe import Recipe, Write
from rpac.spec import Spec

CLEARED_AT_ONCE: Final = 16  # sublane tiles: enough to hide what an iteration of the loop costs


def query_row_shapes(rows: str) -> dict[str, str]:
    """The shapes of the arrays over whose `rows` a decode kernel spreads arguments, in constants."""
    return {one.query_rows[0]: f"{rows}, LANES" for one in ARGUMENTS if one.query_rows is not None}


@dataclass(frozen=True)
class Shared:
    """What the templates of all these kernels ask of a spec.

    Dtypes are expressions of the source: `mxu_dtype` is what probabilities, keys and values are on their way to the MXU.
    `row`: a head's K (or V) is a whole row of registers, a padded one, or joined in one with the other. `cache_view`: how
    the cache is seen: as rows of 128 lanes, or by tiles of rows. `new_tokens` of a decode row: one, or several. `pad`,
    `unpad`, `kv_rows` and `scaled` are given an expression. `pads_table`: page tables in HBM need padding. `pages`: whether
    page ids are checked.
    """

    layout: str
    row: Literal["whole", "padded", "joined"]
    cache_view: Literal["rows", "packed_lane_tiles", "latent_tiles"]
    q_dtype: str
    kv_dtype: str
    mxu_dtype: str
    packing: int
    sublane_tile: int
    padding_rows: int
    row_order: str
    new_tokens: Literal["one", "several"]
    write: Write
    quantized: bool
    quantize: Literal["int8", "float8"]
    tensor_scale: bool
    head_scales: bool
    pads_table: bool
    pages: Literal["checked", "trusted"]

    @classmethod
    def of(cls, spec: Spec, recipe: Recipe) -> Shared:
        """The view of a spec."""
        kernel = recipe.decode or recipe.block
        assert kernel is not None
        model = spec.model
        padded = model.head_dim != head_lanes(model)
        rows, pack = RowDims.of(model), packing(model.kv_dtype)
        return cls(
            layout=spec.serving.kv_layout,
            row="joined" if joins_rows(model) else "padded" if padded else "whole",
            cache_view=_cache_view(spec),
            q_dtype=dtype(model.q_dtype),
            kv_dtype=dtype(model.kv_dtype),
            mxu_dtype=dtype(computed_in(model)),
            packing=pack,
            sublane_tile=sublane_tile_tokens(model) if spec.serving.kv_layout == "separate" else rows.sublane_tile,
            padding_rows=padding_rows(model, rows),
            row_order=_row_order(model, rows),
            new_tokens="one" if spec.serving.decode_len == 1 else "several",
            write=kernel.write,
            quantized=model.quantized,
            quantize="int8" if model.kv_dtype == "int8" else "float8",
            tensor_scale=model.kv_scale == "tensor",
            head_scales=model.kv_scale is not None,
            pads_table=padded_entries(spec) > entries_of(spec),
            pages="checked" if spec.serving.bounds_checks else "trusted",
        )

    @property
    def page_in_block(self) -> str:
        """Where page `page` of a block is in a buffer."""
        return "pl.ds(page * PAGE_ROWS, PAGE_ROWS)" if self.layout == "interleaved" else "page"

    @property
    def to_mxu(self) -> str:
        """What follows keys or values on their way to the MXU."""
        return f".astype({self.mxu_dtype})" if self.quantized else ""

    def pad(self, rows: str) -> str:
        """Rows of a head, with zeros up to whole registers."""
        return rows if self.row == "whole" else f"pad_lanes({rows})"

    def unpad(self, rows: str, operand: bool = False) -> str:
        """The lanes of rows that a head has, in parentheses where it is the `operand` of something."""
        if self.row != "whole":
            return f"unpad_lanes({rows})"
        return f"({rows})" if operand else rows

    @property
    def transpose_words(self) -> str:
        """The function that makes words of tokens of words of rows."""
        return "transpose_bytes" if self.packing == 4 else "transpose_halves"

    def kv_rows(self, keys_and_values: str) -> str:
        """The rows in the cache of new keys and values, which an expression gives as two arguments."""
        return f"({keys_and_values})" if self.row == "whole" else f"kv_rows({keys_and_values})"

    def scaled(self, scores: str) -> str:
        """Scores of all heads times the softmax scale; with scales of K it is in those of each head already."""
        return scores if self.head_scales else f"{scores} * SCORE_SCALE"


def shared_context(
    spec: Spec, plan: KernelPlan, recipe: Recipe, call: Callable[[Spec, str, Recipe], Call] | None = None
) -> dict[str, Any]:
    """The context of every template of a program, but for headers.

    `local` stands among the features for what a sliding window and attention chunks have in common: queries that do not
    see their sequence from its start. `all_heads` stands there for what a decode kernel has that reads K and V so, and
    `hbm_table` for what kernels have that fetch parts of page tables in HBM, and `by_head` and `queries_by_head` for new
    tokens that come by head. `row_scales` stands for the scales of K and V of all heads, and `packed_ahead` and
    `rows_ahead` for new tokens whose words or rows are made before they are needed.
    """
    all_heads = recipe.decode is not None and recipe.decode.read == "all_heads"
    ahead = isinstance(plan.decode, DecodeWaves) and plan.decode.packs_ahead(spec)
    ways = {
        "local": spec.model.late,
        "all_heads": all_heads,
        "row_scales": all_heads and spec.model.kv_scale is not None,
        "hbm_table": recipe.page_table == "hbm",
        **by_head_features(recipe),
        "packed_ahead": all_heads and ahead,
        "rows_ahead": not all_heads and ahead,
    }
    features = (*recipe.features, *(way for way, used in ways.items() if used))
    return {
        "kind": plan.kind,
        "features": features,
        "recipe": recipe,
        "shared": Shared.of(spec, recipe),
        "program": program_of(spec, plan.kind, recipe, call or call_of),
    }


def by_head_features(recipe: Recipe) -> dict[str, bool]:
    """Whether new tokens come by head, as what templates have among the features."""
    return {
        "by_head": bool(recipe.by_head),
        "queries_by_head": "queries" in recipe.by_head,
        "new_by_head": "keys" in recipe.by_head,
        "queries_by_lane": recipe.queries_by_lane,
    }


@dataclass(frozen=True)
class Scratch:
    """One scratch array of a kernel: its name, how a call declares it, and its dtype, shape and purpose in words."""

    name: str
    declaration: str
    comment: str


def scratch_of(
    buffers: Iterable[Buffer], shapes: Mapping[str, str], constants: Sequence[Constant], names: Mapping[str, str]
) -> list[Scratch]:
    """The scratch arrays of a kernel in its words: `shapes` gives each one's shape in constants, `names` another name.

    A shape that is not what the plan says is an error.
    """
    values: dict[str, Any] = {}
    for constant in constants:
        try:
            values[constant.name] = eval(constant.value, {}, values)
        except NameError:  # a dtype, which is no part of a shape
            continue
    made = []
    for buffer in buffers:
        shape = shapes[buffer.name]
        found = tuple(eval(f"({shape},)", {}, values))
        assert found == buffer.shape, f"{buffer.name}: {shape} is {found}, not {buffer.shape}"
        match buffer.dtype:
            case "dma":
                declaration, elements = f"pltpu.SemaphoreType.DMA(({shape},))", "DMA"
            case "smem":
                declaration, elements = f"pltpu.SMEM(({shape},), jnp.int32)", "int32"
            case elements:
                declaration = f"pltpu.VMEM(({shape}), {dtype(elements)})"
        name = names.get(buffer.name, buffer.name)
        made.append(Scratch(name, declaration, f"{elements}[{shape}]: {buffer.note}"))
    return made


def of_kind(kind: str, buffers: Iterable[Buffer]) -> list[Buffer]:
    """Those scratch arrays of a kernel of query blocks that batches of a kind need."""
    return [one for one in buffers if kind == "mixed" or one.name not in MIXED]


def decode_rows(plan: KernelPlan) -> list[Constant]:
    """How many sequences the decode kernel takes that a mixed program has before its other one."""
    if not isinstance(plan.decode, DecodeBlocks | DecodeWaves):
        return []
    return [tile("DECODE_ROWS", plan.decode.max_rows, "sequences of the largest batch for the decode kernel")]


def _cache_view(spec: Spec) -> Literal["rows", "packed_lane_tiles", "latent_tiles"]:
    if spec.model.rope_dim is not None:
        return "latent_tiles"
    packed = packing(spec.model.kv_dtype) > 1
    return "packed_lane_tiles" if RowDims.of(spec.model).lane_tiles > 1 and packed else "rows"


def _row_order(model: Attention, rows: RowDims) -> str:
    if joins_rows(model):
        return "by token, then KV head, with K in the lower lanes and V in the upper"
    lanes = "lane tile" if rows.lane_tiles > 1 else ""
    order = [lanes, "K and V"] if packing(model.kv_dtype) > 1 else ["K and V", lanes]
    return ", then ".join(["by token", "KV head", *filter(None, order)])
