"""The source of a portable program, which is plain JAX functions: its roles, its constants, and its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rpac.contract.arrays import (
    BITS,
    arg_specs,
    extra_specs,
    head_lanes,
    joins_rows,
    kv_row_shape,
    kv_rows,
    latent_lanes,
)
from rpac.contract.attention import Attention
from rpac.kernels.assemble import Kernel, assembled
from rpac.kernels.constants import Constant, number, tile
from rpac.kernels.header import header
from rpac.kernels.literals import dtype
from rpac.kernels.model_constants import FLOAT8, model_constants
from rpac.kernels.slots import environment
from rpac.plan import KernelPlan, XlaTiles
from rpac.spec import Spec


def portable_text(spec: Spec, plan: KernelPlan) -> str:
    """The source of one plan."""
    context: dict[str, Any] = header(spec, plan) | {
        "kind": plan.kind,
        "features": _features(spec, plan),
        "ways": Ways.of(spec),
        "view": View.of(spec),
    }
    constants = _constants(spec, plan)
    kernels = []
    if plan.decode is not None:
        kernels.append(Kernel("skeletons/decode.py.jinja", {}, constants, ""))
    if plan.block is not None:
        kernels.append(Kernel("skeletons/blocks.py.jinja", {}, constants, ""))
    return assembled(environment("xla"), context, kernels, program=f"programs/{plan.kind}.py.jinja")


@dataclass(frozen=True)
class Ways:
    """The way in which each role is played: for most fields a file of that name, in the folder of the field's name under
    templates/xla/parts.

    `words`: whether the cache has the dtype of the queries. `lanes`: how K and V of a head lie in rows of the cache, which
    have `row_lanes` lanes. `rows`: whether a token has the rows of its heads and no more. `fetch` is the layout of the cache,
    and `new_rows` tells besides whether rows or lanes are padded. `query_dim` is the constant of the last axis of queries.
    """

    words: Literal["one_dtype", "two_dtypes"]
    lanes: Literal["whole", "padded", "joined"]
    rows: Literal["exact", "padded"]
    new_rows: str
    fetch: str
    page_order: Literal["tokens_first", "heads_first"]
    decode_rows: Literal["one", "several"]
    mask: Literal["lengths", "drafts", "tree"]
    quantize: Literal["int8", "float8"]
    row_lanes: str
    query_dim: str
    padding_rows: int
    padding_lanes: int

    @classmethod
    def of(cls, spec: Spec) -> Ways:
        """Those of a spec's programs."""
        model, serving = spec.model, spec.serving
        latent, separate = model.rope_dim is not None, serving.kv_layout == "separate"
        partial = model.head_dim != head_lanes(model)
        exact = not partial and not _padding_rows(spec)
        several = serving.decode_len > 1
        return cls(
            words="two_dtypes" if model.quantized else "one_dtype",
            lanes="joined" if joins_rows(model) else "padded" if partial else "whole",
            rows="exact" if exact else "padded",
            new_rows=serving.kv_layout if exact or latent else f"{serving.kv_layout}_padded",
            fetch=serving.kv_layout,
            page_order="heads_first" if separate else "tokens_first",
            decode_rows="several" if several else "one",
            mask="tree" if serving.tree_mask else "drafts" if several else "lengths",
            quantize="float8" if model.kv_dtype in FLOAT8 else "int8",
            row_lanes="HEAD_LANES" if partial else "HEAD_DIM",
            query_dim="KEY_DIM" if latent else "HEAD_DIM",
            padding_rows=_padding_rows(spec),
            padding_lanes=_padding_lanes(spec),
        )


@dataclass(frozen=True)
class View:
    """What functions are given: `arguments` of the program, the arrays of new tokens among them, and what comes after the
    batch, for decode rows and for blocks. `position` is of the first query of a block, where that matters.
    """

    arguments: tuple[str, ...]
    new_arrays: tuple[str, ...]
    decode_extra: tuple[str, ...]
    block_extra: tuple[str, ...]
    position: tuple[str, ...]
    kv_scale: str | None

    @classmethod
    def of(cls, spec: Spec) -> View:
        """That of a spec's programs."""
        model = spec.model
        extra = tuple(dims.name for dims in extra_specs(spec))
        return cls(
            arguments=tuple(dims.name for dims in arg_specs(spec, 0)),
            new_arrays=("new_kv", "new_rope") if model.rope_dim is not None else ("keys", "values"),
            decode_extra=extra,
            block_extra=tuple(name for name in extra if name != "tree"),  # a tree is of decode rows
            position=("position",) if model.causal else (),
            kv_scale=model.kv_scale,
        )

    def of_decode(self, queries: str, num_seqs: str) -> str:
        """The arguments of `attend_decode`."""
        return ", ".join((queries, "kv_cache", "kv_lens", "page_indices", num_seqs, *self.decode_extra))

    def of_blocks(self, first_seq: str, end_seq: str) -> str:
        """The arguments of `attend_blocks` after its results."""
        batch = ("queries", "kv_cache", "kv_lens", "page_indices", "cu_q_lens")
        return ", ".join((*batch, first_seq, end_seq, *self.block_extra))

    def of_block(self) -> str:
        """The arguments of `attend_block`."""
        return ", ".join(("q", "kv_cache", "page_tables", "seq", *self.position, "end", *self.block_extra))


def _features(spec: Spec, plan: KernelPlan) -> Sequence[str]:
    """The features in use, and more that have a file of macros: `local` is what sliding windows and attention chunks have
    in common.
    """
    model = spec.model
    also = {"local": model.late, "latent": model.rope_dim is not None, "quantized": model.quantized}
    return [*plan.recipe.features, *(name for name, used in also.items() if used)]


def _padding_rows(spec: Spec) -> int:
    """Rows of zeros that a token has in the cache."""
    model = spec.model
    if model.rope_dim is not None:
        return 0
    rows, packed, _ = kv_row_shape(model)
    return rows * packed - kv_rows(model)


def _padding_lanes(spec: Spec) -> int:
    """Lanes of zeros that a token's row has in the cache of latent attention."""
    model = spec.model
    return 0 if model.rope_dim is None else latent_lanes(model) - model.head_dim - model.rope_dim


def _constants(spec: Spec, plan: KernelPlan) -> Sequence[Constant]:
    model, serving = spec.model, spec.serving
    own = [
        *_latent_constants(spec),
        *_dtype_constants(model),
        number("KV_PLANES", 1 if joins_rows(model) else 2, "rows of a token and head: K and V, or both in one"),
        number("PADDING_ROWS", _padding_rows(spec), "rows of a token that hold zeros"),
        number("TOKEN_SHAPE", _token_shape(spec), "of a token in the cache"),
        number("TOKEN_AXIS", 2 if serving.kv_layout == "separate" else 0, "of a page, along which its tokens lie"),
        *_score_constants(model),
    ]
    names = {one.name for one in own}
    shared = [one for one in model_constants(spec, plan) if one.name not in names]
    return [*shared, *own, *_tile_constants(spec, plan)]


def _token_shape(spec: Spec) -> tuple[int, ...]:
    return (1, 1, latent_lanes(spec.model)) if spec.model.rope_dim is not None else kv_row_shape(spec.model)


def _latent_constants(spec: Spec) -> list[Constant]:
    model = spec.model
    if model.rope_dim is None:
        return []
    return [
        number("KV_HEADS", 1, "a token's latent vector, which all query heads share"),
        number("GROUP", model.q_heads),
        number("HEAD_DIM", model.head_dim, "of a latent vector, which is the value"),
        number("KEY_DIM", model.head_dim + model.rope_dim, "of a key: the latent vector and its rotary part"),
        number("PADDING_LANES", _padding_lanes(spec), "lanes of a token that hold zeros"),
    ]


def _dtype_constants(model: Attention) -> list[Constant]:
    word = f"jnp.uint{BITS[model.kv_dtype]}"
    if not model.quantized:
        return [
            number("DTYPE", dtype(model.kv_dtype)),
            number("WORD", word, "an integer as wide as DTYPE"),
        ]
    return [
        number("DTYPE", dtype(model.q_dtype), "of the queries and of all that is computed"),
        number("WORD", word, "an integer as wide as KV_DTYPE"),
        number("BITS_PER_BYTE", 8),
    ]


def _score_constants(model: Attention) -> list[Constant]:
    if not model.soft_cap:
        return [number("SM_SCALE", repr(model.sm_scale), "the softmax scale")]
    return [
        number("SOFT_CAP", repr(model.soft_cap)),
        number(
            "CAP_SCALE", repr(model.sm_scale / model.soft_cap), f"{model.sm_scale!r} (the softmax scale) / SOFT_CAP"
        ),
    ]


def _tile_constants(spec: Spec, plan: KernelPlan) -> list[Constant]:
    """About 1 MiB of KV in a step keeps it in a core's L2, and the loop's own cost out of sight. No tile need divide a
    length, a chunk or the page table.
    """
    page, constants = spec.serving.page_size, []
    if isinstance(plan.decode, XlaTiles):
        constants += [
            tile("DECODE_BLOCK", plan.decode.block, "tokens of KV that are one item of decode work"),
            tile("DECODE_BLOCK_PAGES", plan.decode.block // page),
            tile("DECODE_ITEMS", plan.decode.blocks, "items of a step"),
        ]
    if isinstance(plan.block, XlaTiles):
        constants += [
            tile("Q_BLOCK", plan.block.q_block, "new tokens that are computed together"),
            tile("KV_BLOCK", plan.block.block, "tokens of KV that they are computed against in a step"),
            tile("KV_BLOCK_PAGES", plan.block.block // page),
        ]
    return constants
