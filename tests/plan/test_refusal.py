"""What is too large for a target's VMEM is refused with what to write, and that then plans."""

from __future__ import annotations

import re

import pytest

from rpac.devices.chip import TPU_TARGETS
from rpac.errors import PlanError
from rpac.plan import BlockTiles, plan_spec
from rpac.plan.buffers import UPDATE_LOOKAHEAD
from rpac.plan.tuned import TunedTiles
from rpac.spec import Spec, parse_spec


def text_of(
    heads: str, page_size: int, kv_layout: str = "interleaved", dtype: str = "bfloat16", more: str = "", **serving: int
) -> str:
    """A spec of `heads`: query heads / KV heads x head_dim."""
    q_heads, kv_heads, head_dim = re.fullmatch(r"(\d+)/(\d+)x(\d+)", heads).groups()  # type: ignore[union-attr]
    lines = {"page_size": page_size, "max_model_len": 4096, "max_num_tokens": 2048, "max_num_seqs": 64, **serving}
    return (
        f"name: large\nmodel: {{q_heads: {q_heads}, kv_heads: {kv_heads}, head_dim: {head_dim}, "
        f"q_dtype: {dtype}, kv_dtype: {dtype}}}\nserving:\n  token_buckets: [64, 2048]\n  prefill_chunk: 256\n"
        f"  context_lens: [1024]\n  kv_layout: {kv_layout}\n"
        + "".join(f"  {key}: {value}\n" for key, value in lines.items())
        + f"{more}targets: [tpu7x, v6e, v5p, v5e, cpu]\n"
    )


def spec_of(text: str) -> Spec:
    return parse_spec(text, "large.yaml")


def refusal(text: str, target: str) -> str:
    with pytest.raises(PlanError) as raised:
        plan_spec(spec_of(text), target, tuned=TunedTiles())
    return str(raised.value)


@pytest.mark.parametrize("kv_layout", ["interleaved", "separate"])
@pytest.mark.parametrize("target", TPU_TARGETS)
@pytest.mark.parametrize(
    "heads", ["32/32x128", "40/40x128", "32/32x96", "64/64x64", "16/16x256", "64/64x128", "128/16x128"]
)
def test_heads_of_real_models_plan_with_pages_of_128_tokens(heads: str, target: str, kv_layout: str) -> None:
    plans = plan_spec(spec_of(text_of(heads, 128, kv_layout)), target, tuned=TunedTiles())
    assert {plan.kind for plan in plans} == {"decode", "prefill", "mixed"}


def test_an_update_looks_as_far_ahead_as_ever_where_that_fits() -> None:
    for heads, page_size in (("32/8x128", 128), ("32/32x128", 64), ("8/1x256", 256)):
        for plan in plan_spec(spec_of(text_of(heads, page_size)), "tpu7x", tuned=TunedTiles()):
            assert not isinstance(plan.block, BlockTiles) or plan.block.update_lookahead == UPDATE_LOOKAHEAD


def test_an_update_looks_less_far_ahead_rather_than_making_blocks_of_queries_shorter() -> None:
    """A block of 256 queries fetches K and V half as often as one of 128; the copies of the update take as long either way."""
    (prefill,) = (
        plan
        for plan in plan_spec(spec_of(text_of("32/32x128", 128)), "tpu7x", tuned=TunedTiles())
        if plan.kind == "prefill"
    )
    assert isinstance(prefill.block, BlockTiles)
    assert (prefill.block.q_block, prefill.block.update_lookahead) == (256, 1)


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        (text_of("32/32x128", 512), "page_size: 256"),
        (text_of("32/32x128", 512, num_pages=100), "page_size: 256` and `num_pages: 200"),
        (text_of("64/64x256", 256, "separate", max_num_seqs=8), "page_size: 32"),
        (text_of("128/128x256", 8, max_num_seqs=8), "parallel: {tensor: 2}"),
        (
            text_of("64/64x256", 8, dtype="float32", more="parallel: {tensor: 1, data: 2}\n", num_pages=1024),
            "tensor: 2, data: 2}",
        ),
        (text_of("128/8x256", 64, "separate", max_num_seqs=512), "max_num_seqs: 256"),
    ],
)
def test_the_message_says_what_to_write_and_that_plans(text: str, fix: str) -> None:
    message = refusal(text, "tpu7x")
    assert re.match(
        r"large\.yaml: no (decode|prefill|mixed) kernel fits tpu7x: on each device it needs [\d,]+ bytes of VMEM or more, "
        r"and [\d,]+ are usable; found \d+ query heads over \d+ KV heads, page_size \d+ \(a page of [\d,]+ bytes\) and "
        r"max_num_seqs \d+; write `",
        message,
    )
    written = message.rpartition("; write ")[2]
    assert fix in written
    for line in re.findall(r"`([^`]+)`", written):
        key, _, value = line.partition(": ")
        text = re.sub(rf"(?m)^( *){key}: .*", rf"\g<1>{key}: {value}", text)
        if f"{key}: {value}" not in text:
            text += f"{key}: {value}\n"
    spec = spec_of(text)
    for target in TPU_TARGETS:
        assert plan_spec(spec, target, tuned=TunedTiles())


def test_a_layer_that_is_too_large_is_named() -> None:
    text = text_of("8/8x128", 512, more="layers: {small: {}, large: {q_heads: 32, kv_heads: 32}}\n")
    small, large = spec_of(text).parts
    assert plan_spec(small, "tpu7x", tuned=TunedTiles())
    with pytest.raises(
        PlanError, match=r"^large\.yaml: layers\.large: no prefill kernel fits tpu7x: .*`page_size: 256`$"
    ):
        plan_spec(large, "tpu7x", tuned=TunedTiles())
