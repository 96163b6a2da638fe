"""What the templates of attention over K and V heads show, but for headers: from a spec and a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rpac.contract.arrays import BITS, SUBLANES, align, extra_specs, head_lanes, joins_rows, kv_rows, packing
from rpac.contract.attention import Attention
from rpac.devices.chip import is_tpu
from rpac.kernels.decode import draft_context, extra_of_blocks
from rpac.kernels.tiles import MASKED, tile_context
from rpac.plan import KernelPlan, LatentBlockTiles, RowDims
from rpac.plan.access import read_of
from rpac.plan.buffers import sublane_tile_tokens
from rpac.plan.recipe import SPLIT
from rpac.spec import Spec

# Of each 8-bit float: its smallest normal number, the step between numbers from 1 on, its largest number.
FLOAT8 = {"float8_e4m3fn": (2.0**-6, 2.0**-3, 448.0), "float8_e5m2": (2.0**-14, 2.0**-2, 57344.0)}


def grouped_context(spec: Spec, plan: KernelPlan) -> dict[str, Any]:
    """The context of a program's template, but for its header."""
    model, serving, block = spec.model, spec.serving, plan.block
    assert not isinstance(block, LatentBlockTiles)  # of another kind of attention
    rows = RowDims.of(model)
    computed = model.q_dtype if model.quantized else model.kv_dtype
    highest = computed == "float32"
    return {
        "kind": plan.kind,
        "q_heads": model.q_heads,
        "kv_heads": model.kv_heads,
        "group": model.group,
        "q_stride": align(model.q_heads, SUBLANES),
        "head_dim": model.head_dim,
        "query_dim": "HEAD_DIM",
        "new_arrays": ("keys", "values"),
        "updates": model.update_cache,
        "new_args": "keys, values, " if model.update_cache else "",
        "new_hbm": " k_hbm, v_hbm," if model.update_cache else "",
        "new_loads": ", (k_hbm, new_keys), (v_hbm, new_values)" if model.update_cache else "",
        "puts_in": f"puts the new token{'s' * (serving.decode_len > 1)} in and " if model.update_cache else "",
        "head_lanes": head_lanes(model),
        "joins_rows": joins_rows(model),
        "kinds": 1 if joins_rows(model) else 2,
        # Whether a token's rows in the cache are its keys and values as they are, with no padding and nothing joined.
        "plain_rows": model.head_dim == head_lanes(model) and rows.token_rows == 2 * model.kv_heads * rows.lane_tiles,
        "token_row_count": rows.token_rows // rows.lane_tiles,
        "values_lanes": "HEAD_DIM:" if joins_rows(model) else ":HEAD_DIM",
        "values_kind": 0 if joins_rows(model) else 1,
        **_lanes_context(model),
        "q_jnp": f"jnp.{model.q_dtype}",
        "kv_dtype": model.kv_dtype,
        **_quantized_context(model),
        "kv_jnp": f"jnp.{model.kv_dtype}",
        "word_dtype": f"uint{BITS[model.kv_dtype]}",
        "packing": packing(model.kv_dtype),
        # Without it a float32 product would be made of bfloat16 ones.
        "precision_tail": ", precision=lax.Precision.HIGHEST" if highest else "",
        "sm_scale": repr(model.sm_scale),
        "score_scale": repr(model.sm_scale * math.log2(math.e)),
        "masked": repr(MASKED),
        "soft_cap": model.soft_cap,
        "cap_scale": model.soft_cap and repr(model.sm_scale / model.soft_cap),
        "cap_log2": model.soft_cap and repr(model.soft_cap * math.log2(math.e)),
        "window": model.sliding_window,
        "attention_chunk": model.attention_chunk,
        "late": model.late,
        "sinks": model.sinks,
        **_score_context(spec, plan),
        **draft_context(spec),
        "causal": model.causal,
        "lse": serving.log_sum_exp,
        "log2_e": repr(math.log2(math.e)),
        "kv_layout": serving.kv_layout,
        "splits_words": read_of(spec) in SPLIT,
        "row_words": read_of(spec) == "split_rows",
        "to_mxu": f".astype(jnp.{computed})" if model.quantized else "",
        "place_bits": packing(model.kv_dtype).bit_length() - 1,
        "padding_rows": rows.token_rows // rows.lane_tiles - kv_rows(model),
        "kv_stride": align(model.kv_heads, SUBLANES),
        "page_size": serving.page_size,
        "pages_per_seq": serving.pages_per_seq,
        "max_seqs": serving.max_num_seqs,
        "prefill_chunk": serving.prefill_chunk,
        "lane_tiles": rows.lane_tiles,
        "lane_step": (1 if joins_rows(model) else 2) * rows.lane_tiles,
        "values_row": 0 if joins_rows(model) else rows.lane_tiles,
        "word_rows": rows.packed_rows,
        "token_rows": rows.token_rows,
        "page_rows": serving.page_size * rows.token_rows,
        "unit": sublane_tile_tokens(model) if serving.kv_layout == "separate" else rows.sublane_tile,
        "unit_rows": rows.sublane_tile_rows,
        "row_order": _row_order(model, rows),
        "vmem_limit": plan.vmem_limit,
        "decode_call": _call_context(spec, "decode"),
        "block_call": _call_context(spec, plan.kind),
        "ln_2": repr(math.log(2)),
        "decode": tile_context(spec, plan.decode, plan.recipe, shared=plan.block is not None),
        "block": tile_context(spec, block, plan.recipe),
    }


def _quantized_context(model: Attention) -> dict[str, Any]:
    """What 8-bit K and V need, beside their dtype."""
    context: dict[str, Any] = {
        "quantized": model.quantized,
        "quantize": model.quantize,
        "kv_scale": model.kv_scale,
        # Weights, and K and V on their way to the MXU.
        "mxu_jnp": f"jnp.{model.q_dtype if model.quantized else model.kv_dtype}",
    }
    if model.kv_dtype in FLOAT8:
        smallest_normal, step, largest = FLOAT8[model.kv_dtype]
        context |= {
            "kv_smallest_normal": repr(smallest_normal),
            "kv_step": repr(step),
            "kv_largest": repr(largest),
        }
    return context


def _lanes_context(model: Attention) -> dict[str, Any]:
    """How arrays whose rows are no whole registers are written in a kernel, whose own rows are."""
    partial = model.head_dim != head_lanes(model)
    return {
        "partial": partial,
        "own_dim": "OWN_DIM" if partial else "HEAD_DIM",
        "whole": "whole_lanes({})".format if partial else str,
        "own": "own_lanes({})".format if partial else str,
    }


def _score_context(spec: Spec, plan: KernelPlan) -> dict[str, Any]:
    """How scores are scaled and capped.

    Scales of K, where there are, differ by head: they are multiplied in with the scale as soon as there are products.
    """
    model = spec.model
    scale = "CAP_SCALE" if model.soft_cap else "SCORE_SCALE"
    capped = "capped({})" if model.soft_cap else None
    scored = capped or ("{}" if model.kv_scale else "{} * SCORE_SCALE")
    if not is_tpu(plan.target):
        scale = "CAP_SCALE" if model.soft_cap else "SM_SCALE"
        by = f"({scale} * kv_scales[0, :, None, None])" if model.kv_scale else scale
        scored = f"SOFT_CAP * jnp.tanh({{}} * {by})" if model.soft_cap else f"{{}} * {by}"
    return {
        "head_scale": f" * ({scale} * kv_scales[0, head])" if model.kv_scale else "",
        "scored": scored.format,
    }


def _call_context(spec: Spec, kernel: str) -> Mapping[str, Any]:
    """How many operands of a kernel lie in SMEM, how many in HBM, and which of them are whose results' memory.

    Scalars of the batch come first, then arguments beside it; then queries, keys, values, cache, and the output where it
    is given, with the logarithms of sums where there are any.
    """
    extra = len(extra_specs(spec) if kernel == "decode" else extra_of_blocks(spec))
    in_smem = (4 if kernel == "mixed" else 3) + extra
    arrays = 3 if spec.model.update_cache else 1  # before the cache
    cache, lse = in_smem + arrays, spec.serving.log_sum_exp
    aliases = {cache: 1}
    if kernel == "mixed":
        aliases |= {cache + 1: 0, cache + 2: 2} if lse else {cache + 1: 0}
    return {
        "in_smem": in_smem,
        "in_hbm": arrays + len(aliases),
        "out_hbm": 2 + lse,
        "aliases": repr(aliases),
    }


def _row_order(model: Attention, rows: RowDims) -> str:
    if joins_rows(model):
        return "by token, then KV head, K in the lower lanes and V in the upper"
    lanes = "lane tile" if rows.lane_tiles > 1 else ""
    order = [lanes, "K and V"] if packing(model.kv_dtype) > 1 else ["K and V", lanes]
    return ", then ".join(["by token", "KV head", *filter(None, order)])
