"""Shapes are those of the contract, for every shipped spec and for the dtypes that a spec may name."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rpac import layout
from rpac.batch import Limits
from rpac.reference import ragged_paged_attention
from rpac.spec import Spec, load_spec

SPECS = Path(__file__).parents[2] / "specs"
SHIPPED = [load_spec(path) for path in sorted(SPECS.glob("*.yaml"))]
LLAMA = load_spec(SPECS / "llama3-8b.yaml")


def with_kv(spec: Spec, kv_heads: int, kv_dtype: str, head_dim: int = 128) -> Spec:
    return replace(spec, model=replace(spec.model, kv_heads=kv_heads, kv_dtype=kv_dtype, head_dim=head_dim))


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
    ],
)
def test_k_and_v_of_a_token_fill_whole_words(kv_heads: int, kv_dtype: str, row: tuple[int, ...]) -> None:
    assert layout.kv_row_shape(with_kv(LLAMA, kv_heads, kv_dtype).model) == row


@pytest.mark.parametrize("head_dim, lanes", [(64, 128), (128, 128), (192, 256), (256, 256)])
def test_head_dim_is_padded_to_whole_lanes(head_dim: int, lanes: int) -> None:
    assert layout.kv_row_shape(with_kv(LLAMA, 8, "bfloat16", head_dim).model)[-1] == lanes


@pytest.mark.parametrize("spec", SHIPPED, ids=lambda spec: spec.name)
def test_a_page_holds_k_and_v_of_every_head_and_nothing_else(spec: Spec) -> None:
    """True as long as no shipped spec needs padding."""
    model, serving = spec.model, spec.serving
    elements = serving.page_size * 2 * model.kv_heads * model.head_dim
    assert math.prod(layout.kv_page_shape(spec)) == elements
    assert layout.kv_cache_shape(spec) == (serving.num_pages, *layout.kv_page_shape(spec))


@pytest.mark.parametrize("spec", SHIPPED, ids=lambda spec: spec.name)
def test_metadata_has_the_same_shapes_with_and_without_a_spec(spec: Spec) -> None:
    assert layout.metadata_specs(Limits.of(spec)) == layout.metadata_specs(spec.serving)


@pytest.mark.parametrize("dtype", layout.BITS)
def test_bits_of_a_dtype_are_those_of_its_arrays(dtype: str) -> None:
    itemsize = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).itemsize
    assert layout.BITS[dtype] == 8 * itemsize
    assert layout.packing(dtype) * layout.BITS[dtype] == 32
    assert layout.ArrayDims("x", (3, 5), dtype).nbytes == layout.nbytes((3, 5), dtype) == 15 * itemsize


def test_arguments_have_the_names_and_order_of_the_oracle() -> None:
    names = [dims.name for dims in layout.arg_specs(LLAMA, 64)]
    parameters = inspect.signature(ragged_paged_attention).parameters.values()
    assert names == [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("value, by, quotient, multiple", [(0, 4, 0, 0), (1, 4, 1, 4), (4, 4, 1, 4), (5, 4, 2, 8)])
def test_rounding_up(value: int, by: int, quotient: int, multiple: int) -> None:
    assert layout.cdiv(value, by) == quotient
    assert layout.align(value, by) == multiple
