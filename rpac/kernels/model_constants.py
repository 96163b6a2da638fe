"""The constants of a model and of its cache: the same numbers, by the same names, at the top of every kernel."""

from __future__ import annotations

import math
from typing import Final

from rpac.contract.arrays import LANES, SUBLANES, align, head_lanes, joins_rows, kv_rows, packing
from rpac.contract.attention import Attention
from rpac.kernels.constants import Constant, number
from rpac.kernels.literals import dtype
from rpac.plan import KernelPlan, RowDims
from rpac.plan.buffers import sublane_tile_tokens
from rpac.plan.page_table import padded_entries
from rpac.spec import Spec

MASKED: Final = -2.0e38  # a score of no weight

# Of each 8-bit float: its smallest normal number, the step between numbers from 1 on, its largest number.
FLOAT8: Final = {"float8_e4m3fn": (2.0**-6, 2.0**-3, 448.0), "float8_e5m2": (2.0**-14, 2.0**-2, 57344.0)}


def model_constants(spec: Spec, plan: KernelPlan) -> list[Constant]:
    """The constants of a model and its cache, the same for all kernels; those that a source names are in it."""
    model, serving = spec.model, spec.serving
    rows = RowDims.of(model)
    few_keys = not model.causal and not model.update_cache  # then queries may be more than the tokens that they see
    lanes, joined = head_lanes(model), joins_rows(model)
    return [
        number("LANES", LANES),
        number("SUBLANES", SUBLANES),
        number("Q_HEADS", model.q_heads),
        number("KV_HEADS", model.kv_heads),
        number("GROUP", model.group, "query heads that share a KV head"),
        number("PADDED_Q_HEADS", align(model.q_heads, SUBLANES), "Q_HEADS, up to whole sublane tiles"),
        number("PADDED_KV_HEADS", align(model.kv_heads, SUBLANES), "KV_HEADS, up to whole sublane tiles"),
        number("HEAD_DIM", model.head_dim),
        number(
            "HEAD_LANES",
            lanes,
            "of a row of the cache: K in the lower ones, V in the upper" if joined else _lanes_note(model),
        ),
        number("LANE_TILES", rows.lane_tiles, "rows of LANES lanes that hold one head's K"),
        number("MAX_SEQS", serving.max_num_seqs),
        number("PAGE_SIZE", serving.page_size, "tokens"),
        number("PAGES_PER_SEQ", serving.pages_per_seq),
        number("ROW_TOKENS", "PAGES_PER_SEQ * PAGE_SIZE", "that a sequence's page table has room for"),
        number("LEAST_LEN", 1 if few_keys else serving.decode_len, "tokens of a decode row"),
        number("CHUNK_LEAST", 1 if few_keys else serving.prefill_chunk, "tokens of a sequence"),
        number("MAX_NEW", serving.max_num_tokens if few_keys else "ROW_TOKENS", "new tokens that a sequence may have"),
        number(
            "CHECKED_PAGES", 8, "page ids that are checked before the first of them is used: as many wait in registers"
        ),
        number("TABLE_ENTRIES", padded_entries(spec), "of the page tables, up to whole rows"),
        number("DECODE_LEN", serving.decode_len, "new tokens of a decode row"),
        number("CHUNK", serving.prefill_chunk, "new tokens of every sequence"),
        *_score_constants(model),
        number("WINDOW", model.sliding_window, "tokens that a query sees, itself the last of them"),
        number(
            "ATTENTION_CHUNK", model.attention_chunk, "tokens of each chunk of a sequence: a query sees its own only"
        ),
        number("LOG2_E", repr(math.log2(math.e)), "from natural logarithms to those of base 2"),
        number("LN_2", repr(math.log(2))),
        number("MASKED", repr(MASKED), "finite, so that a row that is all masked stays a number"),
        number("PRECISION", *_precision(model)),
        *_quantized_constants(model),
        number("VMEM_LIMIT", plan.vmem_limit, "bytes"),
        number("HALF_BITS", 16, "of a 32-bit word"),
        number("BYTE_BITS", 8),
        number("PACKING", packing(model.kv_dtype), "elements of the cache in one 32-bit word"),
        *_layout_constants(spec, rows),
    ]


def _lanes_note(model: Attention) -> str:
    return "of a row of the cache" + (": HEAD_DIM and padding" if model.head_dim != head_lanes(model) else "")


def _score_constants(model: Attention) -> list[Constant]:
    if model.soft_cap:
        note = f"{model.sm_scale!r} (the softmax scale) / {model.soft_cap} (the soft cap)"
        cap = number("SOFT_CAP", repr(model.soft_cap * math.log2(math.e)), f"{model.soft_cap} * log2(e)")
        return [number("SCORE_SCALE", repr(model.sm_scale / model.soft_cap), note), cap]
    note = f"{model.sm_scale!r} (the softmax scale) * log2(e): probabilities are powers of two"
    return [number("SCORE_SCALE", repr(model.sm_scale * math.log2(math.e)), note)]


def _precision(model: Attention) -> tuple[str, str]:
    if computed_in(model) == "float32":
        return "lax.Precision.HIGHEST", "the default would multiply bfloat16 parts of float32"
    return "None", "of matmuls: bfloat16 products are exact in float32"


def computed_in(model: Attention) -> str:
    """The dtype of the matmuls' operands: the cache's, or of a quantized cache that of the queries."""
    return model.q_dtype if model.quantized else model.kv_dtype


def _quantized_constants(model: Attention) -> list[Constant]:
    if not model.quantized:
        return []
    of_cache = number("KV_DTYPE", dtype(model.kv_dtype), "of the cache")
    if model.kv_dtype not in FLOAT8:
        return [
            of_cache,
            number("KV_SMALLEST", -128),
            number("KV_LARGEST", 127),
            number("ROW_PARTS", 3, "rows of int8 whose sum is a row of a matmul: as exact as float32 to its largest"),
            number("PART_LARGEST", 127.0, "of int8"),
            number("PART_STEPS", 254.0, "of a part in one step of the part before it"),
            number("LEAST_LARGEST", 1e-30, "so that a row of zeros is not divided by zero"),
        ]
    smallest_normal, step, largest = FLOAT8[model.kv_dtype]
    return [
        of_cache,
        number("KV_SMALLEST_NORMAL", repr(smallest_normal)),
        number("KV_STEP", repr(step), "between two numbers from 1 on"),
        number("KV_LARGEST", repr(largest)),
        number("EXPONENT_BITS", "0x7F800000", "of a float32"),
    ]


def _layout_constants(spec: Spec, rows: RowDims) -> list[Constant]:
    match spec.serving.kv_layout:
        case "separate":
            return _separate_constants(spec.model)
        case "interleaved":
            return _interleaved_constants(spec, rows)
    return []


def _separate_constants(model: Attention) -> list[Constant]:
    joined = joins_rows(model)
    return [
        number("KV_PLANES", 1 if joined else 2, "K and V in the same rows" if joined else "K and V"),
        number("K_PLANE", 0, "where K is among them"),
        number("V_PLANE", 0 if joined else 1, "where V is"),
        number(
            "SUBLANE_TILE",
            sublane_tile_tokens(model),
            "tokens of the smallest part of the cache that a DMA or store reaches",
        ),
    ]


def _interleaved_constants(spec: Spec, rows: RowDims) -> list[Constant]:
    """The cache of one layer is seen as rows of LANES lanes."""
    model, page = spec.model, spec.serving.page_size
    of_head = (1 if joins_rows(model) else 2) * rows.lane_tiles
    return [
        number("HEAD_ROWS", of_head, "rows of one head of a token"),
        number("VALUES_ROW", of_head - rows.lane_tiles, "the first of them that is V"),
        number("PADDING_ROWS", padding_rows(model, rows), "rows of a token that hold zeros"),
        number("TOKEN_ROWS", rows.token_rows, "rows of one token in the cache"),
        number("WORD_ROWS", rows.packed_rows, "the same rows as 32-bit words"),
        number("PAGE_ROWS", page * rows.token_rows, "rows of one page"),
        number(
            "SUBLANE_TILE", rows.sublane_tile, "tokens of the smallest part of the cache that a DMA or store reaches"
        ),
        number("SUBLANE_TILE_ROWS", rows.sublane_tile_rows, "its rows"),
    ]


def padding_rows(model: Attention, rows: RowDims) -> int:
    """Rows of a token in an interleaved cache that hold zeros, up to whole words."""
    return rows.token_rows // rows.lane_tiles - kv_rows(model)
