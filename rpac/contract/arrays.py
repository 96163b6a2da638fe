"""The one authority on shapes: what each argument of a program is, in elements and in bytes.

Dtypes are names ("bfloat16"), so that no array library is needed to reason about a shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from rpac.contract.attention import Attention, Serving
from rpac.contract.features import features_used

LANES = 128
SUBLANES = 8  # of a 32-bit register tile, on every generation supported
WORD_BITS = 32
BITS = {"float32": 32, "int32": 32, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8, "int8": 8}

# How K and V lie in the cache, and the axis of the cache along which the tokens of a page do.
TOKEN_AXES = {"interleaved": 1, "separate": 3, "latent": 1}

Shape = tuple[int, ...]


class ArrayDims(NamedTuple):
    """One array of a program's signature; `dtype` is a name that numpy with ml_dtypes understands."""

    name: str
    shape: Shape
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def nbytes(self) -> int:
        return nbytes(self.shape, self.dtype)


class Served(Protocol):
    """One kind of attention and how it is served: what shapes follow from. A spec with one kind of layer is this."""

    @property
    def model(self) -> Attention: ...

    @property
    def serving(self) -> Serving: ...


class Rows(Protocol):
    """What sizes the metadata; both `Serving` and `Limits` are this."""

    @property
    def max_num_seqs(self) -> int: ...

    @property
    def pages_per_seq(self) -> int: ...


def cdiv(value: int, by: int) -> int:
    """`value / by`, rounded up."""
    return -(-value // by)


def align(value: int, to: int) -> int:
    """`value` rounded up to a multiple of `to`."""
    return cdiv(value, to) * to


def packing(dtype: str) -> int:
    """How many elements of `dtype` share one 32-bit word."""
    return WORD_BITS // BITS[dtype]


def nbytes(shape: Shape, dtype: str) -> int:
    """Bytes of an array without tiling padding."""
    return math.prod(shape) * BITS[dtype] // 8


def head_lanes(model: Attention) -> int:
    """The lanes of a row of the cache: `head_dim` up to whole registers."""
    return align(model.head_dim, LANES)


def latent_lanes(model: Attention) -> int:
    """The lanes of a token's row in the cache of latent attention, up to whole registers."""
    return align(model.head_dim + (model.rope_dim or 0), LANES)


def joins_rows(model: Attention) -> bool:
    """Whether K and V of a token and head share a row: K in its lower lanes, V in its upper, and none left over.

    So head_dim 64 takes no more of the cache and of the HBM's time than its numbers do; RPA v3 keeps it so too.
    """
    return 2 * model.head_dim == LANES


def kv_rows(model: Attention) -> int:
    """Rows of the cache that one token takes."""
    return model.kv_heads if joins_rows(model) else 2 * model.kv_heads


def kv_row_shape(model: Attention) -> Shape:
    """K and V of one token, interleaved: `[ceil(kv_rows / packing), packing, align(head_dim, 128)]`.

    Flattened over its first two axes the order is K0, V0, K1, V1, ...; with head_dim 64 it is K0 and V0, K1 and V1, ...,
    each pair in one row. What is left over, lanes and rows, is padding: the kernels write zeros there with each new
    token, and take nothing from it but that an old token's is finite.
    """
    pack = packing(model.kv_dtype)
    return (cdiv(kv_rows(model), pack), pack, head_lanes(model))


def kv_page_shape(spec: Served) -> Shape:
    """One page of one layer.

    Interleaved: `[page_size, *kv_row_shape]`. Separate: `[2, kv_heads, page_size, align(head_dim, 128)]`, K then V;
    with head_dim 64 `[1, kv_heads, page_size, 128]`, both in one row. Padding is as in `kv_row_shape`.

    Latent: `[page_size, align(kv_lora_rank + rope_dim, 128)]`, a token a row: its latent vector, then its rotary key, then
    padding as in `kv_row_shape` (with 512 and 64 the lanes 0-511, 512-575 and 576-639). Tokens lie along sublanes, so that
    a page is a matrix as the MXU takes it, and the values are its first lanes.
    """
    model, serving = spec.model, spec.serving
    if model.rope_dim is not None:
        return (serving.page_size, latent_lanes(model))
    if serving.kv_layout == "separate":
        return (kv_rows(model) // model.kv_heads, model.kv_heads, serving.page_size, head_lanes(model))
    return (serving.page_size, *kv_row_shape(model))


def kv_cache_shape(spec: Served) -> Shape:
    """The cache of one layer: `[num_pages, *kv_page_shape]`."""
    return (spec.serving.num_pages, *kv_page_shape(spec))


def queries_shape(spec: Served, tokens: int) -> Shape:
    """`[tokens, q_heads, head_dim]`; the output has this shape too."""
    return (tokens, spec.model.q_heads, spec.model.head_dim)


out_shape = queries_shape


def kv_new_shape(spec: Served, tokens: int) -> Shape:
    """`keys` or `values` of the new tokens: `[tokens, kv_heads, head_dim]`."""
    return (tokens, spec.model.kv_heads, spec.model.head_dim)


def kv_lens_shape(rows: Rows) -> Shape:
    """`[max_num_seqs]`"""
    return (rows.max_num_seqs,)


def page_indices_shape(rows: Rows) -> Shape:
    """`[max_num_seqs * pages_per_seq]`: the page tables, row after row."""
    return (rows.max_num_seqs * rows.pages_per_seq,)


def cu_q_lens_shape(rows: Rows) -> Shape:
    """`[max_num_seqs + 1]`"""
    return (rows.max_num_seqs + 1,)


def distribution_shape() -> Shape:
    """`[3]`"""
    return (3,)


def metadata_specs(rows: Rows) -> tuple[ArrayDims, ...]:
    """The int32 arguments that describe a batch, in argument order."""
    return (
        ArrayDims("kv_lens", kv_lens_shape(rows), "int32"),
        ArrayDims("page_indices", page_indices_shape(rows), "int32"),
        ArrayDims("cu_q_lens", cu_q_lens_shape(rows), "int32"),
        ArrayDims("distribution", distribution_shape(), "int32"),
    )


def arg_specs(spec: Served, tokens: int) -> tuple[ArrayDims, ...]:
    """The arguments of a program of one token bucket, in argument order: those of the batch, then `extra_specs`. There are
    no `keys` and `values` where the cache is not updated.

    Of latent attention: `queries` `[tokens, q_heads, kv_lora_rank]` (q_nope after absorption), `queries_rope`
    `[tokens, q_heads, rope_dim]`, `new_kv` `[tokens, kv_lora_rank]`, `new_rope` `[tokens, rope_dim]`, then the cache and the
    metadata as ever. The output is as `queries`.
    """
    model = spec.model
    if model.rope_dim is not None:
        return (
            ArrayDims("queries", queries_shape(spec, tokens), model.q_dtype),
            ArrayDims("queries_rope", (tokens, model.q_heads, model.rope_dim), model.q_dtype),
            ArrayDims("new_kv", (tokens, model.head_dim), model.kv_dtype),
            ArrayDims("new_rope", (tokens, model.rope_dim), model.kv_dtype),
            ArrayDims("kv_cache", kv_cache_shape(spec), model.kv_dtype),
            *metadata_specs(spec.serving),
        )
    return (
        ArrayDims("queries", queries_shape(spec, tokens), model.q_dtype),
        *(
            ArrayDims(name, kv_new_shape(spec, tokens), model.new_dtype)
            for name in ("keys", "values")
            if model.update_cache
        ),
        ArrayDims("kv_cache", kv_cache_shape(spec), model.kv_dtype),
        *metadata_specs(spec.serving),
        *extra_specs(spec),
    )


def extra_specs(spec: Served) -> tuple[ArrayDims, ...]:
    """What a spec's programs take after the batch, in the order of `features.ARGUMENTS`.

    `sinks` `[q_heads]`. `kv_scales`, of K and then of V, `[2, kv_heads]`, or `[2]` where they are of the tensor. `tree`
    `[max_num_seqs, decode_len]` int32: bit j of `tree[s, i]` says whether new token i of decode row s sees new token j.
    Bit i is set, bits from decode_len on mean nothing, and the context is always seen.
    """
    model, serving = spec.model, spec.serving
    return tuple(
        ArrayDims(one.argument.name, one.argument.shape(model, serving), one.argument.dtype)
        for one in features_used(model, serving)
        if one.argument is not None
    )


def index_of(arrays: Sequence[ArrayDims], name: str) -> int:
    """Where an argument or a result is among the others."""
    return next(index for index, dims in enumerate(arrays) if dims.name == name)


def result_specs(spec: Served, tokens: int) -> tuple[ArrayDims, ...]:
    """The results of a program: the output, the cache in the donated argument's memory, and `lse` where the spec has it.

    `lse` `[tokens, q_heads]` is the natural logarithm of the denominator of each softmax, the sink's part included.
    """
    model = spec.model
    return (
        ArrayDims("out", out_shape(spec, tokens), model.q_dtype),
        ArrayDims("kv_cache", kv_cache_shape(spec), model.kv_dtype),
        *((ArrayDims("lse", (tokens, model.q_heads), "float32"),) if spec.serving.log_sum_exp else ()),
    )
