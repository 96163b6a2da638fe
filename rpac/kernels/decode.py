"""What templates show of decode rows: how their queries lie in registers, and what it changes that new tokens are several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rpac.contract.arrays import BITS, extra_specs
from rpac.plan.query_rows import Sets, head_rows
from rpac.spec import Spec


def draft_context(spec: Spec) -> Mapping[str, Any]:
    """The context of a program's template, as far as `serving.decode_len` and `serving.tree_mask` decide it."""
    names = [dims.name for dims in extra_specs(spec)]
    of_blocks = extra_of_blocks(spec)
    # Of one axis, for the rows of two are padded in SMEM.
    operands = [f"{name}.reshape(-1)" if name == "tree" else name for name in names]
    bits = BITS[spec.model.kv_dtype]
    return {
        "decode_len": spec.serving.decode_len,
        "tree_mask": spec.serving.tree_mask,
        "group_rows": head_rows(spec),
        # How far before the end of a sequence the window of its first new token begins.
        "window_reach": "WINDOW" if spec.serving.decode_len == 1 else "(WINDOW + DECODE_LEN - 1)",
        "chunk_reach": "1" if spec.serving.decode_len == 1 else "DECODE_LEN",
        # Whether what a query sees depends on its sequence, not only on how far it is from its end.
        "sight_by_row": spec.serving.tree_mask
        or (spec.serving.decode_len > 1 and spec.model.attention_chunk is not None),
        "element_bits": bits,
        "place_mask": f"0x{(1 << bits) - 1:X}",
        "extra_args": "".join(f", {name}" for name in names),
        "extra_scalars": "".join(f" {name}," for name in names),
        "decode_operands": "".join(f" {operand}," for operand in operands),
        "block_args": "".join(f", {name}" for name in of_blocks),
        "block_scalars": "".join(f" {name}," for name in of_blocks),
    }


def extra_of_blocks(spec: Spec) -> list[str]:
    """The arguments beside the batch that prefill and mixed rows have a use for: a tree is of decode rows."""
    return [dims.name for dims in extra_specs(spec) if dims.name != "tree"]


def interleaved_rows(spec: Spec, pair: int) -> Mapping[str, Any]:
    """Query rows where K and V are interleaved: each KV head's in registers of their own, `pair` heads in a product.

    A mask is made of `mask_rows` rows, which `mask_repeats` times are those of all heads; `head_rows` are one head's.
    """
    rows = head_rows(spec)
    return {
        "head_rows": rows,
        "pair_rows": pair * rows,
        "mask_rows": rows,
        "mask_repeats": spec.model.kv_heads,
        "sink_row": _sink_row(spec, rows, spec.model.group, rows),
    }


def separate_rows(spec: Spec, halves: bool) -> Mapping[str, Any]:
    """Likewise where they lie apart, and heads of few queries share a register. `halves`: two tokens, one of either half of a
    tile, share a row of K and one of V, so that products are of each half's queries, and of each half's weights.
    """
    model, sets = spec.model, Sets.of(spec)
    queries = sets.heads * sets.queries
    rows_of_head = sets.rows // sets.heads
    return {
        "heads_per_set": sets.heads,
        "set_rows": sets.rows,
        "set_queries": queries,
        "halves": halves,
        "weight_rows": sets.rows * (2 if halves else 1),
        "queries_of": ("for_both_halves({})" if halves else "{}").format,
        "scores_of": ("along_tokens({})" if halves else "{}").format,
        "values_of": ("sum_of_halves({})" if halves else "{}").format,
        "sets": sets.count,
        "query_rows": sets.count * sets.rows,
        "padded": sets.padded(model),
        "head_rows": rows_of_head,
        "mask_rows": sets.rows,
        "mask_repeats": sets.count,
        "sink_row": _sink_row(spec, sets.rows, queries, rows_of_head),
        "out_rows": [
            (i * sets.rows, min(queries, model.kv_heads * sets.queries - i * queries)) for i in range(sets.count)
        ],
    }


def _sink_row(spec: Spec, rows: int, heads: int, rows_of_head: int) -> str:
    """The row of query head `head`, as an expression: `heads` of them lie in each `rows` rows.

    Of new token `token` where they are several: each KV head has `rows_of_head` rows, a group for each token in turn.
    """
    if spec.serving.decode_len > 1:
        return f"head // GROUP * {rows_of_head} + token * GROUP + head % GROUP"
    return "head" if rows == heads else f"head // {heads} * {rows} + head % {heads}"
