"""What the templates of latent attention show, but for headers: from a spec and a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from rpac.contract.arrays import BITS, latent_lanes
from rpac.kernels.tiles import MASKED, declared, old_fields, update_context
from rpac.plan import KernelPlan, LatentBlockTiles, LatentWaves, XlaTiles
from rpac.plan.buffers import sublane_tile_tokens
from rpac.spec import Spec

MASKED_STEPS: Final = 4  # flash steps on the diagonal that are one piece of code: few blocks are there

# Of shared parts of templates: what latent attention has not.
_WITHOUT: Final[Mapping[str, Any]] = {
    "soft_cap": None,
    "window": None,
    "attention_chunk": None,
    "late": False,
    "sinks": False,
    "quantized": False,
    "quantize": "caller",
    "kv_scale": None,
    "partial": False,
    "joins_rows": False,
    "before": "",
    "causal": True,
    "kv_end": "kv_end(seq, q_block)",
    "lse": False,
    "extra_args": "",
    "block_args": "",
    "decode_len": 1,
    "sight_by_row": False,
    "tree_mask": False,
    "updates": True,
    "puts_in": "puts the new token in and ",
}


def latent_context(spec: Spec, plan: KernelPlan) -> dict[str, Any]:
    """The context of a program's template, but for its header."""
    model, serving = spec.model, spec.serving
    assert model.rope_dim is not None  # the caller asked
    lanes = latent_lanes(model)
    return {
        **_WITHOUT,
        "masked": repr(MASKED),
        "kind": plan.kind,
        "q_heads": model.q_heads,
        "rank": model.head_dim,
        "rope_dim": model.rope_dim,
        "key_dim": model.head_dim + model.rope_dim,
        "lanes": lanes,
        "padding": lanes - model.head_dim - model.rope_dim,
        "query_dim": "KEY_DIM",
        "new_arrays": ("new_kv", "new_rope"),
        "kv_dtype": model.kv_dtype,
        "kv_jnp": f"jnp.{model.kv_dtype}",
        "mxu_jnp": f"jnp.{model.kv_dtype}",
        "word_dtype": f"uint{BITS[model.kv_dtype]}",
        # Without it a float32 product would be made of bfloat16 ones.
        "precision_tail": ", precision=lax.Precision.HIGHEST" if model.kv_dtype == "float32" else "",
        "sm_scale": repr(model.sm_scale),
        "score_scale": repr(model.sm_scale * math.log2(math.e)),
        "scored": (("{} * SM_SCALE") if isinstance(plan.decode or plan.block, XlaTiles) else "{} * SCORE_SCALE").format,
        "kv_layout": serving.kv_layout,
        "page_size": serving.page_size,
        "pages_per_seq": serving.pages_per_seq,
        "max_seqs": serving.max_num_seqs,
        "prefill_chunk": serving.prefill_chunk,
        "unit": sublane_tile_tokens(model),
        "vmem_limit": plan.vmem_limit,
        "decode": _tiles(spec, plan, plan.decode),
        "block": _tiles(spec, plan, plan.block),
    }


def _tiles(spec: Spec, plan: KernelPlan, tiles: Any) -> dict[str, Any]:
    model, page = spec.model, spec.serving.page_size
    match tiles:
        case XlaTiles():
            return {**old_fields(tiles), "block_pages": tiles.block // page}
        case LatentWaves():
            return {
                **old_fields(tiles),
                "buffers_declared": [declared(buffer) for buffer in tiles.scratch(spec, plan.recipe)],
                "halves": False,
                "groups": tiles.wave_buffers,
                "slots": tiles.wave_buffers * tiles.tiles_per_wave,
                "group_tokens": tiles.tiles_per_wave * tiles.tile,
                "tile_pages": tiles.tile // page,
                "tile_units": tiles.tile // sublane_tile_tokens(model),
                "even": spec.serving.pages_per_seq * page % tiles.tile == 0,
                "table_end": spec.serving.max_num_seqs * spec.serving.pages_per_seq - 1,
            }
        case LatentBlockTiles():
            row_steps = tiles.q_block * model.q_heads // tiles.step_rows
            masked_steps = math.gcd(row_steps, MASKED_STEPS)
            mixed = plan.kind == "mixed"
            scalars = 4 if mixed else 3
            cache = scalars + 3  # after queries, their rotary parts and the new tokens
            return {
                **old_fields(tiles),
                "buffers_declared": [declared(buffer) for buffer in tiles.scratch(spec, plan.recipe)],
                "in_smem": scalars,
                "in_hbm": 5 if mixed else 4,
                "aliases": repr({cache: 1, cache + 1: 0} if mixed else {cache: 1}),
                "ahead": tiles.buffers - 1,
                "block_pages": tiles.block // page,
                "block_units": tiles.block // sublane_tile_tokens(model),
                "row_steps": row_steps,
                "masked_steps": masked_steps,
                "masked_turns": row_steps // masked_steps,
                "step_tokens": tiles.step_rows // model.q_heads,
                **update_context(),
            }
    return {}
