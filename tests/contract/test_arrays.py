"""Shapes are those of the contract, for every shipped spec and for the dtypes that a spec may name."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rpac.batch import Limits
from rpac.contract import arrays as layout
from rpac.contract.attention import KV_LAYOUTS
from rpac.oracle.attention import attention_with_lse
from rpac.spec import Spec, load_spec

SPECS = Path(__file__).parents[2] / "specs"
SHIPPED = [load_spec(path) for path in sorted(SPECS.glob("*.yaml"))]
WITH_HEADS = [spec for spec in SHIPPED if spec.model.rope_dim is None]  # of K and V
DEEPSEEK = load_spec(SPECS / "deepseek-v3.yaml")
LLAMA = load_spec(SPECS / "llama3-8b.yaml")


def with_kv(spec: Spec, kv_heads: int, kv_dtype: str, head_dim: int = 128) -> Spec:
    return replace(spec, model=replace(spec.model, kv_heads=kv_heads, kv_dtype=kv_dtype, head_dim=head_dim))


def laid_out(spec: Spec, kv_layout: str) -> Spec:
    return replace(spec, serving=replace(spec.serving, kv_layout=kv_layout))


def test_llama_has_the_arguments_of_rpa_v3() -> None:
    assert layout.arg_specs(LLAMA, 256) == (
        ("queries", (256, 32, 128), "bfloat16"),
        ("keys", (256, 8, 128), "bfloat16"),
        ("values", (256, 8, 128), "bfloat16"),
        ("kv_cache", (1024, 128, 8, 2, 128), "bfloat16"),
        ("kv_lens", (64,), "int32"),
        ("page_indices", (64 * 64,), "int32"),
        ("cu_q_lens", (65,), "int32"),
        ("distribution", (3,), "int32"),
    )


def test_latent_attention_has_queries_in_two_parts_and_one_row_a_token() -> None:
    assert layout.arg_specs(DEEPSEEK, 64) == (
        ("queries", (64, 128, 512), "bfloat16"),
        ("queries_rope", (64, 128, 64), "bfloat16"),
        ("new_kv", (64, 512), "bfloat16"),
        ("new_rope", (64, 64), "bfloat16"),
        ("kv_cache", (4096, 128, 640), "bfloat16"),
        ("kv_lens", (64,), "int32"),
        ("page_indices", (64 * 64,), "int32"),
        ("cu_q_lens", (65,), "int32"),
        ("distribution", (3,), "int32"),
    )
    assert [tuple(dims) for dims in layout.result_specs(DEEPSEEK, 64)] == [
        ("out", (64, 128, 512), "bfloat16"),
        ("kv_cache", (4096, 128, 640), "bfloat16"),
    ]


def test_results_are_an_output_like_the_queries_and_the_cache() -> None:
    queries, _, _, cache, *_ = layout.arg_specs(LLAMA, 256)
    out, new_cache = layout.result_specs(LLAMA, 256)
    assert (out.shape, out.dtype) == (queries.shape, queries.dtype)
    assert new_cache == cache


@pytest.mark.parametrize(
    "kv_heads, kv_dtype, row",
    [
        (8, "bfloat16", (8, 2, 128)),
        (1, "bfloat16", (1, 2, 128)),
        (3, "bfloat16", (3, 2, 128)),
        (8, "float32", (16, 1, 128)),
        (1, "float32", (2, 1, 128)),
        (8, "int8", (4, 4, 128)),
        (3, "float8_e4m3fn", (2, 4, 128)),
    ],
)
def test_k_and_v_of_a_token_fill_whole_words(kv_heads: int, kv_dtype: str, row: tuple[int, ...]) -> None:
    assert layout.kv_row_shape(with_kv(LLAMA, kv_heads, kv_dtype).model) == row


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_separate_k_and_v_are_the_halves_of_a_page_with_tokens_next_to_lanes(kv_heads: int, kv_dtype: str) -> None:
    spec = laid_out(with_kv(LLAMA, kv_heads, kv_dtype), "separate")
    assert layout.kv_cache_shape(spec) == (1024, 2, kv_heads, 128, 128)


@pytest.mark.parametrize("kv_layout", KV_LAYOUTS)
@pytest.mark.parametrize("head_dim, lanes", [(64, 128), (128, 128), (192, 256), (256, 256)])
def test_head_dim_is_padded_to_whole_lanes(head_dim: int, lanes: int, kv_layout: str) -> None:
    spec = laid_out(with_kv(LLAMA, 8, "bfloat16", head_dim), kv_layout)
    assert layout.kv_cache_shape(spec)[-1] == lanes


@pytest.mark.parametrize(
    "kv_layout, kv_heads, kv_dtype, page",
    [
        ("interleaved", 8, "bfloat16", (128, 4, 2, 128)),  # of RPA v3's kernel for head_dim 64
        ("interleaved", 3, "bfloat16", (128, 2, 2, 128)),
        ("interleaved", 3, "float32", (128, 3, 1, 128)),
        ("interleaved", 8, "float8_e5m2", (128, 2, 4, 128)),
        ("separate", 8, "bfloat16", (1, 8, 128, 128)),
    ],
)
def test_k_and_v_of_head_dim_64_share_rows(kv_layout: str, kv_heads: int, kv_dtype: str, page: tuple[int, ...]) -> None:
    assert layout.kv_page_shape(laid_out(with_kv(LLAMA, kv_heads, kv_dtype, 64), kv_layout)) == page


@pytest.mark.parametrize("kv_layout", KV_LAYOUTS)
def test_the_axis_of_the_tokens_has_those_of_a_page(kv_layout: str) -> None:
    spec = laid_out(replace(LLAMA, serving=replace(LLAMA.serving, page_size=32)), kv_layout)
    assert layout.kv_cache_shape(spec)[layout.TOKEN_AXES[kv_layout]] == 32


def test_every_layout_of_a_spec_has_its_shape_and_no_other() -> None:
    assert tuple(layout.TOKEN_AXES) == (*KV_LAYOUTS, "latent")
    assert len({layout.kv_page_shape(laid_out(LLAMA, kv_layout)) for kv_layout in KV_LAYOUTS}) == len(KV_LAYOUTS)


@pytest.mark.parametrize("kv_layout", KV_LAYOUTS)
@pytest.mark.parametrize("shipped", WITH_HEADS, ids=lambda spec: spec.name)
def test_a_page_holds_k_and_v_of_every_head_and_nothing_else(shipped: Spec, kv_layout: str) -> None:
    """But what fills words, where a token's rows do not. No shipped spec has rows that are no whole registers."""
    spec = laid_out(shipped, kv_layout)
    model, serving = spec.model, spec.serving
    words = layout.packing(model.kv_dtype) if kv_layout == "interleaved" else 1
    rows, lanes = (model.kv_heads, 128) if model.head_dim == 64 else (2 * model.kv_heads, model.head_dim)
    elements = serving.page_size * layout.align(rows, words) * lanes
    assert math.prod(layout.kv_page_shape(spec)) == elements
    assert layout.kv_cache_shape(spec) == (serving.num_pages, *layout.kv_page_shape(spec))


@pytest.mark.parametrize("spec", SHIPPED, ids=lambda spec: spec.name)
def test_metadata_has_the_same_shapes_with_and_without_a_spec(spec: Spec) -> None:
    assert layout.metadata_specs(Limits.of(spec)) == layout.metadata_specs(spec.serving)


@pytest.mark.parametrize("dtype", layout.BITS)
def test_bits_of_a_dtype_are_those_of_its_arrays(dtype: str) -> None:
    itemsize = np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
    assert layout.BITS[dtype] == 8 * itemsize
    assert layout.packing(dtype) * layout.BITS[dtype] == 32
    assert layout.ArrayDims("x", (3, 5), dtype).nbytes == layout.nbytes((3, 5), dtype) == 15 * itemsize


def test_arguments_have_the_names_and_order_of_the_oracle() -> None:
    names = [dims.name for dims in layout.arg_specs(LLAMA, 64)]
    parameters = inspect.signature(attention_with_lse).parameters.values()
    assert names == [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("value, by, quotient, multiple", [(0, 4, 0, 0), (1, 4, 1, 4), (4, 4, 1, 4), (5, 4, 2, 8)])
def test_rounding_up(value: int, by: int, quotient: int, multiple: int) -> None:
    assert layout.cdiv(value, by) == quotient
    assert layout.align(value, by) == multiple
