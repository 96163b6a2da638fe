"""What a wrong spec with `attention: latent` is told: place, value, rule and fix."""

# A case a line, however long its message is.
# ruff: noqa: E501

from __future__ import annotations

import pytest

from rpac.errors import SpecError
from rpac.spec import parse_spec

GOOD = """\
name: latent
model:
  attention: latent
  q_heads: 16
  kv_lora_rank: 512
  rope_dim: 64
  q_dtype: bfloat16
  kv_dtype: bfloat16
  sm_scale: 0.07
serving:
  page_size: 16
  max_model_len: 128
  max_num_tokens: 32
  token_buckets: [8, 32]
  max_num_seqs: 4
  prefill_chunk: 16
  context_lens: [40, 100]
targets: [tpu7x, cpu]
"""


def report(text: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "x.yaml")
    return str(caught.value).splitlines()


def test_the_good_spec_of_these_tests_is_good() -> None:
    spec = parse_spec(GOOD, "x.yaml")
    assert (spec.model.head_dim, spec.model.rope_dim, spec.serving.kv_layout) == (512, 64, "latent")


# fmt: off
CASES = {
    "kv_heads": ("  sm_scale", "  kv_heads: 1\n  sm_scale",
        "x.yaml:9:13: model.kv_heads: found 1; must be left out with attention latent: all query heads share one latent vector; remove it"),
    "head_dim": ("  sm_scale", "  head_dim: 128\n  sm_scale",
        "x.yaml:9:13: model.head_dim: found 128; must be left out with attention latent: a key is kv_lora_rank + rope_dim long, a value kv_lora_rank; remove it"),
    "soft cap": ("  sm_scale", "  soft_cap: 2\n  sm_scale",
        "x.yaml:9:13: model.soft_cap: found 2; must be left out with attention latent: no known model caps the scores of latent attention, so its kernels do not; remove it"),
    "window": ("  sm_scale", "  sliding_window: 64\n  sm_scale",
        "x.yaml:9:19: model.sliding_window: found 64; must be left out with attention latent: no known model has windows with latent attention, so its kernels fetch all tokens; remove it"),
    "update_cache": ("  sm_scale", "  update_cache: false\n  sm_scale",
        "x.yaml:9:17: model.update_cache: found false (a bool); must be left out with attention latent: no known model with latent attention shares a cache between layers, so its kernels always write it; remove it"),
    "chunks": ("  sm_scale", "  attention_chunk: 64\n  sm_scale",
        "x.yaml:9:20: model.attention_chunk: found 64; must be left out with attention latent: no known model has chunks with latent attention, so its kernels fetch all tokens; remove it"),
    "sinks": ("  sm_scale", "  sinks: true\n  sm_scale",
        "x.yaml:9:10: model.sinks: found true (a bool); must be left out with attention latent: no known model has sinks with latent attention, so its kernels add none; remove it"),
    "kv_scale": ("  sm_scale", "  kv_scale: head\n  sm_scale",
        "x.yaml:9:13: model.kv_scale: found head; must be left out with attention latent: its cache stores values unchanged; remove it"),
    "quantize": ("  sm_scale", "  quantize: caller\n  sm_scale",
        "x.yaml:9:13: model.quantize: found caller; must be left out with attention latent: its cache stores values unchanged; remove it"),
    "kv_layout": ("targets", "  kv_layout: separate\ntargets",
        "x.yaml:18:14: serving.kv_layout: found separate; must be left out with attention latent: keys and values share one vector, so there is only one layout; remove it"),
    "8 bits": ("kv_dtype: bfloat16", "kv_dtype: int8",
        "x.yaml:8:13: model.kv_dtype: found int8; must be one of bfloat16, float32; write bfloat16: a latent cache is stored as it is"),
    "another dtype": ("kv_dtype: bfloat16", "kv_dtype: float32",
        "x.yaml:8:13: model.kv_dtype: found float32; must equal q_dtype (bfloat16) with attention latent; write bfloat16"),
    "no scale": ("  sm_scale: 0.07\n", "",
        "x.yaml:3:3: model.sm_scale: found no such key; must be given with attention latent: it does not follow from kv_lora_rank and rope_dim; add it: (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 of the model"),
    "rank": ("kv_lora_rank: 512", "kv_lora_rank: 500",
        "x.yaml:5:17: model.kv_lora_rank: found 500; must be one of 128, 256, 384, 512; write 512, and pad that part of queries and keys with zeros"),
    "long rank": ("kv_lora_rank: 512", "kv_lora_rank: 576",
        "x.yaml:5:17: model.kv_lora_rank: found 576; must be one of 128, 256, 384, 512; serve this model without rpac, which has no kernels for longer ones"),
    "short rope": ("rope_dim: 64", "rope_dim: 32",
        "x.yaml:6:13: model.rope_dim: found 32; must be one of 64, 128; write 64, and pad that part of queries and keys with zeros"),
    "rope": ("rope_dim: 64", "rope_dim: 96",
        "x.yaml:6:13: model.rope_dim: found 96; must be one of 64, 128; write 128, and pad that part of queries and keys with zeros"),
    "heads": ("q_heads: 16", "q_heads: 24",
        "x.yaml:4:12: model.q_heads: found 24 on each device; must be a multiple of 16 query heads, 128 at most, with attention latent; change it, or parallel.tensor"),
    "heads of a device": ("targets", "parallel: {tensor: 2}\ntargets",
        "x.yaml:4:12: model.q_heads: found 8 on each device; must be a multiple of 16 query heads, 128 at most, with attention latent; change it, or parallel.tensor"),
    "small pages": ("page_size: 16", "page_size: 8",
        "x.yaml:11:14: serving.page_size: found 8; must be at least 16 with attention latent and kv_dtype bfloat16: that many tokens share a register; write 16"),
    "unknown attention": ("attention: latent", "attention: linear",
        "x.yaml:3:14: model.attention: found linear; must be one of grouped, latent; write one of them"),
}
# fmt: on


@pytest.mark.parametrize(("old", "new", "line"), CASES.values(), ids=CASES)
def test_it_is_refused_with_the_reason(old: str, new: str, line: str) -> None:
    assert old in GOOD
    assert report(GOOD.replace(old, new, 1)) == [line]


@pytest.mark.parametrize("key", ["kv_lora_rank: 512", "rope_dim: 64"])
def test_its_keys_are_of_no_other_attention(key: str) -> None:
    text = GOOD.replace("attention: latent", "attention: grouped").replace("kv_lora_rank: 512", "kv_heads: 2")
    text = text.replace("rope_dim: 64", f"head_dim: 64\n  {key}")
    name, _, value = key.partition(": ")
    assert report(text) == [
        f"x.yaml:7:{len(name) + 5}: model.{name}: found {value}; must be left out without attention latent; "
        "remove it, or write `attention: latent`"
    ]


def test_the_default_attention_may_be_written() -> None:
    text = GOOD.replace("attention: latent", "attention: grouped").replace("kv_lora_rank: 512", "kv_heads: 2")
    text = text.replace("rope_dim: 64", "head_dim: 64")
    assert parse_spec(text, "x.yaml").hash == parse_spec(text.replace("  attention: grouped\n", ""), "x.yaml").hash


def test_query_heads_are_cut_over_devices_and_the_cache_is_not() -> None:
    text = GOOD.replace("q_heads: 16", "q_heads: 128").replace("targets", "parallel: {tensor: 8}\ntargets")
    spec = parse_spec(text, "x.yaml")
    assert (spec.model.q_heads, spec.mesh.copy, spec.mesh.splits_queries) == (16, 8, True)
