"""What one layer's cache takes of HBM is counted, and refused with the pages to write where it does not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rpac.contract.arrays import kv_cache_shape
from rpac.devices.chip import TPU_TARGETS, chip
from rpac.errors import PlanError
from rpac.plan import plan_spec
from rpac.plan.cache_memory import CacheMemory, padding_reason
from rpac.plan.tuned import TunedTiles
from rpac.spec import Spec, parse_spec


def spec_of(model: str, more: str = "", **serving: Any) -> Spec:
    lines = {"page_size": 64, "max_model_len": 4096, "max_num_tokens": 512, "max_num_seqs": 16, "prefill_chunk": 256}
    text = f"name: a\nmodel: {{{model}}}\nserving:\n  context_lens: [1024]\n"
    text += "".join(f"  {key}: {value}\n" for key, value in (lines | serving).items())
    return parse_spec(f"{text}{more}targets: [tpu7x, v6e, v5p, v5e, cpu]\n", "a.yaml")


def grouped(q_heads: int, kv_heads: int, head_dim: int, kv_dtype: str = "bfloat16", q_dtype: str = "bfloat16") -> str:
    return f"q_heads: {q_heads}, kv_heads: {kv_heads}, head_dim: {head_dim}, q_dtype: {q_dtype}, kv_dtype: {kv_dtype}"


LATENT = "attention: latent, q_heads: 16, kv_lora_rank: 512, rope_dim: 64, q_dtype: bfloat16, kv_dtype: bfloat16, sm_scale: 0.1"
WIDE = grouped(32, 8, 128)
ONE_HEAD = grouped(8, 1, 128, "float8_e4m3fn")


@pytest.mark.parametrize(
    ("model", "serving", "padding"),
    [
        (WIDE, {}, 0),
        (ONE_HEAD, {}, 1 / 2),  # two rows of a byte an element fill a word of four
        (ONE_HEAD, {"kv_layout": "separate"}, 0),
        (grouped(6, 3, 64), {}, 1 / 4),
        (grouped(4, 2, 64), {}, 0),  # K and V share a row
        (grouped(8, 8, 80), {}, 48 / 128),
        (grouped(8, 8, 192, q_dtype="float32", kv_dtype="float32"), {"kv_layout": "separate"}, 1 / 4),
        (LATENT, {}, 64 / 640),
    ],
)
def test_the_padding_of_a_page_is_counted_and_explained(model: str, serving: dict[str, Any], padding: float) -> None:
    spec = spec_of(model, **serving)
    found = CacheMemory.of(spec, "v5e")
    assert found.padding_bytes / found.page_bytes == pytest.approx(padding)
    assert found.cache_bytes == kv_cache_shape(spec)[0] * found.page_bytes
    assert bool(padding) == bool(padding_reason(spec))


def test_what_doubles_a_cache_is_said_with_the_way_out() -> None:
    assert padding_reason(spec_of(ONE_HEAD)) == (
        "a token's rows (2 of float8_e4m3fn) fill whole words of 4: `kv_layout: separate` takes 16,384 bytes less a page"
    )


@pytest.mark.parametrize("target", TPU_TARGETS)
def test_a_cache_larger_than_hbm_is_refused_with_the_pages_that_fit(target: str) -> None:
    with pytest.raises(PlanError) as raised:
        plan_spec(spec_of(WIDE, num_pages=1_000_000), target, tuned=TunedTiles())
    message = str(raised.value)
    assert message.startswith(
        "a.yaml: serving.num_pages: found 1000000, so that one layer's cache takes 262,144,000,000 bytes (262,144 a page); "
        f"a device of {target} has {chip(target).hbm_bytes:,} bytes of HBM, {chip(target).usable_hbm_bytes:,} of them for "
    )
    assert message.endswith("Every layer of a model has such a cache, and its weights need room too")
    most = int(re.search(r"; write `num_pages: (\d+)` or less\.", message)[1])  # type: ignore[index]
    assert 0.95 < most * 262_144 / chip(target).usable_hbm_bytes < 1
    assert plan_spec(spec_of(WIDE, num_pages=most), target, tuned=TunedTiles())
    with pytest.raises(PlanError, match=r"serving\.num_pages: found"):
        plan_spec(spec_of(WIDE, num_pages=most + 1), target, tuned=TunedTiles())


def test_a_platform_has_no_hbm_that_is_known() -> None:
    spec = spec_of(WIDE, num_pages=1_000_000)
    assert plan_spec(spec, "cpu")
    assert CacheMemory.of(spec, "cpu").usable_hbm_bytes is None


def test_where_not_one_sequence_fits_num_pages_is_no_way_out() -> None:
    spec = spec_of(grouped(32, 32, 128), max_model_len=1 << 20, max_num_seqs=1)
    with pytest.raises(
        PlanError, match=r"lower max_model_len \(now 1048576, 16384 pages\), or share the heads among more"
    ):
        plan_spec(spec, "v5e", tuned=TunedTiles())


def test_devices_that_share_the_heads_share_the_cache() -> None:
    spec = spec_of(WIDE, more="parallel: {tensor: 8}\n", num_pages=400_000)
    assert (CacheMemory.of(spec, "v5e").kv_heads, CacheMemory.of(spec, "v5e").page_bytes) == (1, 32_768)
    assert plan_spec(spec, "v5e", tuned=TunedTiles())


def test_the_layer_that_is_too_large_is_named() -> None:
    spec = spec_of(
        grouped(8, 1, 128), more="layers: {small: {}, large: {q_heads: 32, kv_heads: 8}}\n", num_pages=100_000
    )
    small, large = spec.parts
    assert plan_spec(small, "v5e", tuned=TunedTiles())
    with pytest.raises(PlanError, match=r"^a\.yaml: layers\.large: serving\.num_pages: found 100000,"):
        plan_spec(large, "v5e", tuned=TunedTiles())
