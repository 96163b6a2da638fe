"""What the templates of latent attention show: its decode kernel by waves of tiles, and its kernel of query blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from rpac.contract.arrays import SUBLANES, align, latent_lanes, metadata_specs, packing
from rpac.kernels.assemble import Kernel
from rpac.kernels.calls import Call, Operand, in_smem, tables_in_hbm
from rpac.kernels.constants import Constant, number, tile
from rpac.kernels.literals import dtype_name
from rpac.kernels.model_constants import model_constants
from rpac.kernels.semaphores import BLOCK_SHAPES, WAVE_SHAPES, window_constants
from rpac.kernels.shared import decode_rows, of_kind, scratch_of, shared_context
from rpac.kernels.waves import NAMES, Queries, wave_constants, window_begin
from rpac.plan import KernelPlan, LatentBlockTiles, LatentWaves
from rpac.plan.buffers import new_buffers, page_buffers
from rpac.plan.latent import LOADS, MXU_TOKENS, TILE_TOKENS, is_staged
from rpac.plan.page_table import BlockWindows
from rpac.plan.recipe import Recipe
from rpac.spec import Spec

DIAGONAL_STEPS: Final = 4  # flash steps that are one piece of code: there are few blocks on the diagonal
_SUMMARIES: Final = {
    "prefill": "CHUNK new tokens for each of the sequences [0, distribution[1]).",
    "mixed": "Any number of new tokens for each of the sequences [distribution[0], distribution[2]).",
}
_SEQUENCES: Final = {
    "decode": "the decode sequences; other rows of `out` are undefined",
    "prefill": "the prefill sequences; other rows of `out` are undefined",
    "mixed": "the sequences that are not decode; other rows of `out` stay as they are",
}
_SCALARS: Final = {
    "kv_lens": "MAX_SEQS",
    "page_indices": "MAX_SEQS * PAGES_PER_SEQ",
    "cu_q_lens": "MAX_SEQS + 1",
    "distribution": "3",
}


def latent_shared_context(spec: Spec, plan: KernelPlan, recipe: Recipe) -> dict[str, Any]:
    """The context of every template of a program, but for headers."""
    context = shared_context(spec, plan, recipe, latent_call)
    return {**context, "features": (*context["features"], "latent")}


def latent_call(spec: Spec, kind: str, recipe: Recipe) -> Call:
    """The call of a kernel. The cache is updated in place; a mixed kernel's output is in the memory of the decode kernel's."""
    model, mixed = spec.model, kind == "mixed"
    batch = [dims for dims in metadata_specs(spec.serving) if mixed or dims.name != "cu_q_lens"]
    batch = in_smem(batch, recipe.page_table)
    scalars = tuple(Operand(dims.name, dims.name, f"{dtype_name(dims.dtype)}[{_SCALARS[dims.name]}]") for dims in batch)
    q_dtype, kv_dtype = dtype_name(model.q_dtype), dtype_name(model.kv_dtype)
    out, cache = f"{q_dtype}[tokens, Q_HEADS, RANK]", f"{kv_dtype}[pages, PAGE_TILES, SUBLANE_TILE, ROW_LANES]"
    if kind == "decode":
        # XLA lays the rotary queries of 128 heads out with the heads along lanes: to swap axes is a bitcast then.
        names = ["queries", "queries_rope", "new_kv", "new_rope", "cache"]
        others = [
            Operand("q_rope_hbm", "queries_rope.swapaxes(1, 2)", f"{q_dtype}[tokens, ROPE_DIM, Q_HEADS]"),
            Operand("new_latents_hbm", "new_kv", f"{kv_dtype}[tokens, RANK]"),
            Operand("new_ropes_hbm", "new_rope", f"{kv_dtype}[tokens, ROPE_DIM]"),
        ]
    else:
        names = ["queries", "padded_rope", "new_rows", "cache"]
        others = [
            Operand("q_rope_hbm", "padded_rope", f"{q_dtype}[tokens, Q_HEADS, ROW_LANES - RANK]"),
            Operand("new_hbm", "new_rows", f"{kv_dtype}[tokens, 1, ROW_LANES]"),
        ]
    tables = tables_in_hbm(recipe.page_table)
    names = [*(one.argument for one in tables), *names]
    old_cache = Operand("cache_in", "cache", f"{cache}: the memory of cache_hbm")
    arrays = [*tables, Operand("q_hbm", "queries", out), *others, old_cache]
    aliases = {len(scalars) + len(arrays) - 1: 1}
    if mixed:
        aliases[len(scalars) + len(arrays)] = 0
        arrays.append(Operand("out_in", "out", f"{out}: the memory of out_hbm"))
        names.append("out")
    results = (
        Operand("out_hbm", "queries.shape, queries.dtype", out),
        Operand("cache_hbm", "cache.shape, cache.dtype", cache),
    )
    arguments = (*names, *(dims.name for dims in batch))
    return Call(kind, scalars, tuple(arrays), results, aliases, arguments, "out, cache", _SEQUENCES[kind])


def latent_waves(spec: Spec, plan: KernelPlan, recipe: Recipe) -> Kernel:
    """The decode kernel of a plan."""
    tiles = plan.decode
    assert isinstance(tiles, LatentWaves)
    assert recipe.decode is not None
    staged = is_staged(recipe)
    own = [
        tile("QUERY_ROWS", "Q_HEADS"),
        tile("SCORE_ROWS", "QUERY_ROWS"),
        *_load_constants(tiles),
        tile("MXU_TOKENS", MXU_TOKENS, "tokens whose scores and values are made at once: an MXU takes as many"),
        tile("TILE_CHUNKS", "TILE // MXU_TOKENS"),
        tile("CHUNK_PAGES", "MXU_TOKENS // PAGE_SIZE"),
    ]
    constants = [*_model_constants(spec, plan), *wave_constants(spec, tiles), *own]
    context = {
        "kernel_class": "DecodeKernel",
        "call": latent_call(spec, "decode", recipe),
        "scratch": scratch_of(
            tiles.scratch(spec, plan.recipe), {**_DECODE_SHAPES, **(_STAGED_SHAPES if staged else {})}, constants, NAMES
        ),
        "summary": "One new token for each of the sequences [0, distribution[0]): update its page, attend to all of its tokens.",
        "patches": "stores the new token and clears what lies behind it",
        "queries": Queries("own", "none", pairs=False),
        "value_lanes": "RANK",
        "updates": ["wave_store/latent", f"latent_write/{_words(spec)}"],
        "attention": recipe.decode.read,
        "columns": "TILE",
        "order": "staged" if staged else "one_by_one",
        "start": "empty",
        "write_buffers": "ring",
        "ends": "streamed",
        "state": "stored" if staged else "carried",
        "softmax": "staged" if staged else "whole",
        "window_begin": window_begin(spec, tiles),
        "tiles_fit": spec.serving.pages_per_seq * spec.serving.page_size % tiles.tile == 0,
    }
    return Kernel("skeletons/decode_waves.py.jinja", context, constants, "DECODE_")


def _load_constants(tiles: LatentWaves) -> list[Constant]:
    """What is loaded before the first iteration, and later."""
    rows = tiles.max_rows
    first = max(min(2 * tiles.tiles_per_wave, rows // 2), 1)
    return [
        tile(
            "LOADS", LOADS, "queries, their rotary parts, both of later sequences, new latent vectors, new rotary keys"
        ),
        tile("FIRST_ROWS", first, "sequences whose queries are loaded before the first iteration"),
        tile("LATER_ROWS", max(rows - first, 1), "those whose queries are loaded meanwhile"),
        tile("LATER_WAVE", "FIRST_ROWS // TILES_PER_WAVE", "the first whose iteration may need them"),
        tile("TURNED_ROWS", math.gcd(first, rows, SUBLANES), "whose rotary queries are transposed at once"),
        tile("NEW_ROWS", align(rows, SUBLANES), "new tokens that are loaded: whole tiles"),
    ]


def latent_blocks(spec: Spec, plan: KernelPlan, recipe: Recipe) -> Kernel:
    """The prefill or mixed kernel of a plan."""
    tiles = plan.block
    assert isinstance(tiles, LatentBlockTiles)
    constants = [*_model_constants(spec, plan), *decode_rows(plan), *_block_constants(spec, tiles)]
    context = {
        "kernel_class": f"{plan.kind.capitalize()}Kernel",
        "call": latent_call(spec, plan.kind, recipe),
        "scratch": scratch_of(of_kind(plan.kind, tiles.scratch(spec, plan.recipe)), _BLOCK_SHAPES, constants, {}),
        "summary": _SUMMARIES[plan.kind],
        "merge": f"latent_{_words(spec)}",
    }
    return Kernel("skeletons/latent_blocks.py.jinja", context, constants, f"{plan.kind.upper()}_")


def _words(spec: Spec) -> str:
    """How tokens lie in 32-bit words: two in each, or one."""
    return "halves" if packing(spec.model.kv_dtype) > 1 else "words"


def _model_constants(spec: Spec, plan: KernelPlan) -> list[Constant]:
    model, lanes = spec.model, latent_lanes(spec.model)
    assert model.rope_dim is not None  # the attention is latent
    padding = lanes - model.head_dim - model.rope_dim
    parts = f"the latent vector, {model.rope_dim} of the rotary key" + (f", {padding} of padding" if padding else "")
    return [
        *model_constants(spec, plan),
        number("RANK", model.head_dim, "lanes of a latent vector, which is the value and part of the key"),
        number("ROPE_DIM", model.rope_dim, "lanes of a rotary key"),
        number("ROW_LANES", lanes, f"of a token's row in the cache: {parts}"),
        number(
            "SUBLANE_TILE",
            TILE_TOKENS,
            "tokens of a tile of the cache in HBM, and in VMEM: a copy from one to the other moves no rows",
        ),
        number("PAGE_TILES", spec.serving.page_size // TILE_TOKENS),
    ]


def _block_constants(spec: Spec, tiles: LatentBlockTiles) -> list[Constant]:
    """The tiles of a kernel of query blocks, and what follows from them."""
    row_steps = tiles.q_block * spec.model.q_heads // tiles.step_rows
    return [
        tile("Q_BLOCK", tiles.q_block, "query tokens of a query block"),
        tile("Q_ROWS", "Q_BLOCK * Q_HEADS"),
        tile("KV_BLOCK", tiles.block, "tokens that are fetched and computed at once"),
        tile("KV_BUFFERS", tiles.buffers, "KV blocks, and query blocks, in VMEM"),
        tile("FETCH_LOOKAHEAD", "KV_BUFFERS - 1", "steps that the fetch runs ahead"),
        tile("COPY_SIZES", tiles.copy_sizes, "tokens: of these is every copy of a query block"),
        tile("STEP_ROWS", tiles.step_rows, "query rows of a flash step"),
        tile("STEP_TOKENS", "STEP_ROWS // Q_HEADS"),
        tile("ROW_STEPS", "Q_ROWS // STEP_ROWS", "flash steps of a query block"),
        tile("DIAGONAL_STEPS", math.gcd(row_steps, DIAGONAL_STEPS), "of them, one piece of code on the diagonal"),
        tile("DIAGONAL_ITERATIONS", "ROW_STEPS // DIAGONAL_STEPS"),
        *window_constants(BlockWindows.of_queries(spec, tiles.block, tiles.buffers)),
        tile("PAGE_BUFFERS", page_buffers(tiles.update_lookahead), "pages under update"),
        tile("NEW_BUFFERS", new_buffers(tiles.update_lookahead), "pages whose new tokens are fetched or in use"),
        tile("UPDATE_LOOKAHEAD", tiles.update_lookahead, "pages that their fetch runs ahead"),
        tile("TABLE_ROWS", "UPDATE_LOOKAHEAD + 1", "of the page tables, in SMEM for an update"),
        tile("NEW_TOKENS", tiles.new_tokens, "tokens of such a fetch"),
        tile("MERGE_TOKENS", tiles.merge_tokens, "new tokens that are put into a page at once"),
        tile("MERGE_TILES", "MERGE_TOKENS // SUBLANE_TILE"),
    ]


# The shapes of scratch arrays, in constants.
_DECODE_SHAPES: Final[Mapping[str, str]] = {
    "kv": "TILE_BUFFERS, TILE_PAGES, PAGE_TILES, SUBLANE_TILE, ROW_LANES",
    "q_in": "MAX_ROWS + 1, Q_HEADS, RANK",
    "q_rope_t": "MAX_ROWS, ROPE_DIM, Q_HEADS",
    "q_rope_in": "MAX_ROWS + 1, Q_HEADS, ROPE_DIM",
    "new_latents": "NEW_ROWS, RANK",
    "new_ropes": "NEW_ROWS, ROPE_DIM",
    "new_rows": "NEW_ROWS, ROW_LANES",
    "unit_out": "WRITE_BUFFERS, SUBLANE_TILE, ROW_LANES",
    "scores": "TILES_PER_WAVE, Q_HEADS, TILE",
    "row_max": "Q_HEADS, LANES",
    "row_sum": "Q_HEADS, LANES",
    "acc": "Q_HEADS, RANK",
    "out_all": "MAX_ROWS + 1, Q_HEADS, RANK",
    **WAVE_SHAPES,
}
_STAGED_SHAPES: Final[Mapping[str, str]] = {
    "latents_t": "2, TILE_CHUNKS, RANK // 2, MXU_TOKENS",
    "scores": "2, Q_HEADS, TILE",
    "p": "2, Q_HEADS, TILE",
    "tile_max": "2, Q_HEADS, LANES",
    "alpha": "2, Q_HEADS, LANES",
    "inverse_sum": "2, Q_HEADS, LANES",
}
_BLOCK_SHAPES: Final[Mapping[str, str]] = {
    "kv": "KV_BUFFERS, KV_BLOCK // PAGE_SIZE, PAGE_TILES, SUBLANE_TILE, ROW_LANES",
    "new_in": "NEW_BUFFERS, 2 * PAGE_SIZE + NEW_TOKENS, 1, ROW_LANES",
    "page_rows": "PAGE_BUFFERS, PAGE_TILES, SUBLANE_TILE, ROW_LANES",
    "merged": "MERGE_TOKENS, ROW_LANES",
    "q_in": "KV_BUFFERS, Q_BLOCK, Q_HEADS, RANK",
    "q_rope_in": "KV_BUFFERS, Q_BLOCK, Q_HEADS, ROW_LANES - RANK",
    "row_max": "Q_ROWS, LANES",
    "row_sum": "Q_ROWS, LANES",
    "acc": "Q_ROWS, RANK",
    "out_rows": "1, Q_BLOCK, Q_HEADS, RANK",
    **BLOCK_SHAPES,
}
