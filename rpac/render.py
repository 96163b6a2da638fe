"""`KernelPlan` + templates -> source text: pure, byte-reproducible. Every number a template shows is worked out here."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

import rpac
from rpac.chip import is_tpu
from rpac.layout import BITS, SUBLANES, align, extra_specs, head_lanes, joins_rows, kv_rows, packing
from rpac.plan import (
    BlockTiles,
    Buffer,
    DecodeTiles,
    GroupTiles,
    KernelPlan,
    LatentBlockTiles,
    LatentDecodeTiles,
    RowDims,
)
from rpac.plan.tiles import RULE, XlaTiles, exchange_of, splits_rows, splits_words, unit_tokens
from rpac.render_decode import draft_context, draft_lines, extra_of_blocks, interleaved_rows, separate_rows
from rpac.render_latent import latent_context, latent_lines
from rpac.spec import Model, Spec

MASKED = -2.0e38
CLEAR_UNITS = 16  # zeroed by one turn of a loop: enough to hide what the turn itself costs
SPLIT_PHASES = 2  # of a decode step that the split of the next block is spread over: products with K and with V
SPLIT_PIECE = 128  # bfloat16 rows that are split at once beside other work: 8 registers
SHORT_SPLIT_PIECE = 256  # likewise where a decode kernel shares its program: slower by 5%, for half as many operations
SPLIT_ROWS = 512  # bfloat16 rows that are split into K and V in one turn of a loop: 32 registers
SORT_TOKENS = 16  # tokens of a query block that one turn of a loop moves; divides every query block
# Of each 8-bit float: its smallest normal number, the step between numbers from 1 on, its largest number.
FLOAT8 = {"float8_e4m3fn": (2.0**-6, 2.0**-3, 448.0), "float8_e5m2": (2.0**-14, 2.0**-2, 57344.0)}
HEADER_END = '"""\n'


@dataclass(frozen=True)
class Source:
    """One generated module. `path` is relative to the spec's folder in generated/ and to source/ in a bundle."""

    path: str
    text: str

    @functools.cached_property
    def sha256(self) -> str:
        """Of the text, 64 hex digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def body(self) -> str:
        """The text after the header: targets whose plans agree have the same."""
        return self.text.split(HEADER_END, 1)[1]


def templates_dir() -> Path:
    """Where the templates are: in the installed package, or beside it in a checkout."""
    package = Path(rpac.__file__).parent
    installed = package / "templates"
    return installed if installed.is_dir() else package.parent / "templates"


def render(spec: Spec, plan: KernelPlan) -> Source:
    """The source of one plan."""
    family = "pallas_tpu" if is_tpu(plan.target) else "xla"
    latent = spec.model.rope_dim is not None
    name = f"latent_{plan.kind}.py.jinja" if latent else f"{plan.kind}.py.jinja"
    context = _latent_context(spec, plan) if latent else _context(spec, plan)
    text = _environment(family).get_template(name).render(context)
    return Source(plan.path, text.rstrip("\n") + "\n")


@functools.cache
def _environment(family: str) -> jinja2.Environment:
    root = templates_dir()
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([root / family, root / "common"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def _latent_context(spec: Spec, plan: KernelPlan) -> dict[str, Any]:
    context = {
        **_header(spec, plan),
        **latent_context(spec, plan),
        "masked": repr(MASKED),
        "causal": True,
        "lse": False,
        "kv_end": "kv_end(seq, q_block)",
    }
    for part in ("decode", "block"):
        tiles = getattr(plan, part)
        if isinstance(tiles, LatentDecodeTiles | LatentBlockTiles):
            context[part]["buffers_declared"] = [_declared(buffer) for buffer in tiles.scratch(spec)]
    return context


def _header(spec: Spec, plan: KernelPlan) -> dict[str, Any]:
    """What the head of every source says."""
    of_layer = f", {spec.layer} layers" if spec.layer else ""
    return {
        "title": f"Ragged paged attention of {spec.name}{of_layer}: {plan.kind} batches on {plan.target}.",
        "spec_hash": spec.hash,
        "command": f"rpac build {Path(spec.file).name} --target {plan.target}",
        "specialized": _specialized(spec, plan),
    }


def _context(spec: Spec, plan: KernelPlan) -> dict[str, Any]:
    model, serving = spec.model, spec.serving
    rows = RowDims.of(model)
    computed = model.q_dtype if model.quantized else model.kv_dtype
    highest = computed == "float32"
    return {
        **_header(spec, plan),
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
        "late": bool(
            model.sliding_window or model.attention_chunk
        ),  # not all queries see their sequence from its start
        "sinks": model.sinks,
        **_score_context(spec, plan),
        **draft_context(spec),
        "causal": model.causal,
        "lse": serving.log_sum_exp,
        "log2_e": repr(math.log2(math.e)),
        "kv_layout": serving.kv_layout,
        "splits_words": splits_words(spec),
        "row_words": splits_rows(spec),
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
        "unit": unit_tokens(model) if serving.kv_layout == "separate" else rows.unit,
        "unit_rows": rows.unit_rows,
        "row_order": _row_order(model, rows),
        "vmem_limit": plan.vmem_limit,
        "decode_call": _call_context(spec, "decode"),
        "block_call": _call_context(spec, plan.kind),
        "ln_2": repr(math.log(2)),
        "decode": _tile_context(spec, plan.decode, shared=plan.block is not None),
        "block": _tile_context(spec, plan.block),
    }


def _quantized_context(model: Model) -> dict[str, Any]:
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


def _lanes_context(model: Model) -> dict[str, Any]:
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


def _row_order(model: Model, rows: RowDims) -> str:
    if joins_rows(model):
        return "by token, then KV head, K in the lower lanes and V in the upper"
    lanes = "lane tile" if rows.lane_tiles > 1 else ""
    order = [lanes, "K and V"] if packing(model.kv_dtype) > 1 else ["K and V", lanes]
    return ", then ".join(["by token", "KV head", *filter(None, order)])


def _tile_context(
    spec: Spec,
    tiles: DecodeTiles | GroupTiles | BlockTiles | LatentBlockTiles | XlaTiles | None,
    *,
    shared: bool = False,
) -> Mapping[str, Any]:
    if tiles is None or isinstance(tiles, LatentBlockTiles):
        return {}
    if isinstance(tiles, GroupTiles):
        return _group_context(spec, tiles)
    page = spec.serving.page_size
    context: dict[str, Any] = {**vars(tiles), "block_pages": tiles.block // page}
    if isinstance(tiles, XlaTiles):
        return context
    rows = RowDims.of(spec.model)
    context |= {"ahead": tiles.buffers - 1, "buffers_declared": [_declared(buffer) for buffer in tiles.scratch(spec)]}
    if isinstance(tiles, DecodeTiles):
        groups = spec.model.kv_heads // tiles.pair
        context |= {
            **_clear_context(tiles.block, rows),
            **_split_context(
                tiles.block, rows, SHORT_SPLIT_PIECE if shared else SPLIT_PIECE, packing(spec.model.kv_dtype)
            ),
            "groups": groups,
            **interleaved_rows(spec, tiles.pair),
        }
        context["split_share"] = math.ceil(context["splits"] / (SPLIT_PHASES * groups))
        return context
    return context | {
        **_clear_context(tiles.tile, rows),
        **_split_context(tiles.piece(page), rows, SPLIT_ROWS, packing(spec.model.kv_dtype)),
        "tiles": tiles.block // tiles.tile,
        # Added to the position of a block's first query and divided by a tile: the tiles that some query's window leaves.
        "window_offset": tiles.q_block - (spec.model.sliding_window or 0) + tiles.tile - 1,
        "tile_rows": tiles.tile * rows.token_rows,
        "tile_units": tiles.tile // unit_tokens(spec.model),
        "piece": tiles.piece(page),
        "pieces": tiles.tile // tiles.piece(page),
        "q_rows": spec.model.group * tiles.q_block,
        "row_steps": spec.model.group * tiles.q_block // tiles.step_rows,
        **_sort_context(spec.model, tiles.q_block),
        "masks_by_mxu": tiles.masks_by_mxu(spec.model),
        "clear_keys": tiles.masks_by_mxu(spec.model),
        "turns": spec.model.kv_heads // tiles.heads,
        "scores_ahead": tiles.scores_ahead(spec.model, tiles.heads),
        "diagonal_ahead": tiles.scores_ahead(spec.model, tiles.diagonal_heads),
        "update_ahead": tiles.update_buffers - 3,  # a page that is written out keeps its buffer for three steps
        "merge_rows": tiles.merge_tokens * rows.token_rows,
    }


def _sort_context(model: Model, q_block: int) -> Mapping[str, Any]:
    """How the rows of a query block go from their order by token to one by head, and back."""
    context = {"sort_tokens": SORT_TOKENS, "sort_pieces": q_block // SORT_TOKENS, "exchange": exchange_of(model)}
    if not context["exchange"]:
        return {**context, "sort_rows": SORT_TOKENS * model.q_heads}
    return {
        **context,
        "exchanges": tuple(1 << bit for bit in reversed(range(context["exchange"].bit_length() - 1))),
        "head_words": model.group // packing(model.q_dtype),
        "vector_rows": SUBLANES * packing(model.q_dtype),
        "sort_rows": SORT_TOKENS * model.group,
        "sort_groups": SORT_TOKENS // context["exchange"],
    }


def _clear_context(tile: int, rows: RowDims) -> Mapping[str, Any]:
    """How the tail of a tile of `tile` tokens is cleared where K and V are interleaved."""
    clear_units = math.gcd(tile // rows.unit, CLEAR_UNITS)
    return {
        "tile": tile,
        "clear_units": clear_units,
        "clears_per_tile": tile // (rows.unit * clear_units),
    }


def _split_context(piece: int, rows: RowDims, at_once: int, pack: int) -> Mapping[str, Any]:
    """How words of K and V are split, `at_once` rows in one go, within pieces of `piece` tokens: its parts, `pack` of them,
    share words.
    """
    part_rows = piece // pack * rows.token_rows
    split_rows = math.gcd(part_rows, at_once)
    return {
        "part": piece // pack,
        "part_rows": part_rows,
        "piece_rows": pack * part_rows,
        "split_rows": split_rows,
        "split_words": split_rows // pack,
        "splits": part_rows // split_rows,
    }


def _group_context(spec: Spec, tiles: GroupTiles) -> Mapping[str, Any]:
    model = spec.model
    return {
        **vars(tiles),
        "groups": tiles.groups,
        "slots": tiles.groups * tiles.step,
        "group_tokens": tiles.step * tiles.tile,
        "tile_pages": tiles.tile // spec.serving.page_size,
        "tile_units": tiles.tile // unit_tokens(model),
        "clear_keys": False,
        # A window begins at any page, and so do its tiles.
        "even": model.sliding_window is None
        and math.gcd(model.attention_chunk or 0, spec.serving.max_model_len) % tiles.tile == 0,
        "table_end": spec.serving.max_num_seqs * spec.serving.pages_per_seq - 1,
        **separate_rows(spec),
        "buffers_declared": [_declared(buffer) for buffer in tiles.scratch(spec)],
    }


def _quantization(model: Model) -> list[str]:
    if not model.quantized:
        return []
    scales = {
        None: "no scales",
        "tensor": "a scale of K and one of V",
        "head": "a scale of K and of V for each KV head",
    }
    by = "this program" if model.quantize == "kernel" else "the caller"
    return [f"KV of 8 bits, {scales[model.kv_scale]}; {by} quantizes new keys and values"]


def _declared(buffer: Buffer) -> Mapping[str, str]:
    if buffer.dtype == "smem":
        declaration = f"pltpu.SMEM({buffer.shape}, jnp.int32)"
    elif buffer.dtype == "dma":
        declaration = f"pltpu.SemaphoreType.DMA({buffer.shape})"
    else:
        declaration = f"pltpu.VMEM({buffer.shape}, jnp.{buffer.dtype})"
    return {"name": buffer.name, "declaration": declaration, "note": buffer.note}


def _features(model: Model) -> str:
    used = {
        "window": model.sliding_window
        and f"a window of {model.sliding_window} tokens, nothing fetched before its page",
        "soft cap": model.soft_cap and f"scores capped at {model.soft_cap} (tanh)",
        "sinks": model.sinks and "attention sinks, an argument, in the softmax's sum",
        "KV scales": model.kv_scale and "KV scales, an argument",
    }
    *names, last = [name for name, text in used.items() if not text] or [""]
    unused = f"{', '.join(names)} or {last}" if names else last
    order = "causal" if model.causal else "not causal: each query sees all of its sequence"
    if model.attention_chunk:
        order += f" inside its own chunk of {model.attention_chunk} tokens, nothing fetched before it"
    given = [
        f"{order}, cache {'updated' if model.update_cache else 'read alone'}",
        *(text for text in used.values() if text),
    ]
    return "; ".join([*given, *([f"no {unused} in the spec: none is in the code"] if unused else [])])


def _specialized(spec: Spec, plan: KernelPlan) -> list[str]:
    """What a reader should know was decided before this source was written, and why."""
    model, serving = spec.model, spec.serving
    lines = [
        f"{model.q_heads} query heads over {model.kv_heads} KV heads, head_dim {model.head_dim}, "
        f"queries {model.q_dtype}, KV {model.kv_dtype}: constants",
        *draft_lines(spec),
        f"pages of {serving.page_size} tokens, {serving.pages_per_seq} a sequence, up to {serving.max_num_seqs} sequences",
        f"token buckets that use it: {', '.join(map(str, plan.tokens))}",
        _features(model),
        *_quantization(model),
    ]
    if model.rope_dim is not None:
        head, cache, *tiles = latent_lines(spec, plan)
        lines = [head, cache, *lines[1:3], "causal, cache updated", *tiles]
    if spec.mesh.devices > 1:
        lines.insert(1, f"these are one device's part of {spec.mesh.devices}: {spec.mesh}")
    if serving.kv_layout == "separate":
        lines.append("K and V apart in the cache, pages of [2, KV heads, tokens, head_dim] (kv_layout separate)")
    if plan.kind != "mixed":
        lines.append(f"only {plan.kind} batches: the other kernels are not in this program")
    if isinstance(plan.decode, DecodeTiles):
        d = plan.decode
        lines.append(
            f"decode: blocks of {d.block} tokens, as long as the expected lengths and the registers for scores allow; "
            f"{d.buffers} buffers, so that DMA latency hides behind {d.buffers - 1} blocks in flight"
        )
    if isinstance(plan.decode, GroupTiles) and model.rope_dim is None:
        g = plan.decode
        lines.append(
            f"decode: tiles of {g.tile} tokens, no longer than the expected lengths, {g.step} of them a turn, so that one "
            f"fills the other's waits; fetched {g.ahead} turns ahead, so that DMA latency hides"
        )
    if isinstance(plan.block, BlockTiles):
        b = plan.block
        lines.append(
            f"{plan.kind}: blocks of {b.q_block} queries against {b.block} fetched tokens ({b.buffers} buffers); "
            f"computes {b.step_rows} query rows of a head against {b.tile} tokens at once"
        )
    if plan.origin != RULE:
        lines.append(plan.origin)
    if is_tpu(plan.target):
        lines.append(f"VMEM: {plan.vmem_need:,} bytes counted, {plan.vmem_limit:,} allowed, {plan.vmem_bytes:,} there")
    return lines
