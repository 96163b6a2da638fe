"""Decode kernels that take interleaved K and V of all heads as they lie."""

from __future__ import annotations

from typing import Any

import pytest
from small import ALL_FEATURES as ALL
from small import INTERLEAVED, featured, plan_of, small_plan
from test_features import CHUNKS_ALL, READ, SLOW, failures
from test_token_pairs import compiled

from rpac.devices.chip import TPU_TARGETS
from rpac.spec import Spec

SHAPES: dict[str, dict[str, Any]] = {
    "one head": {"q_heads": 8, "kv_heads": 1},
    "ten heads": {"q_heads": 20, "kv_heads": 10},
    "rows that are no query's": {"q_heads": 10, "kv_heads": 1, "head_dim": 80},
    "rows of one set of heads in two": {"q_heads": 16, "kv_heads": 4, "log_sum_exp": True},
    "rows of one head in two": {"q_heads": 24, "kv_heads": 2, "sinks": True},
    "rows of two registers": {"head_dim": 256, "log_sum_exp": True, "sinks": True},
    "rows of two registers, one head": {"head_dim": 192, "q_heads": 10, "kv_heads": 1},
    "rows of two registers, four heads": {"head_dim": 256, "q_heads": 32, "kv_heads": 4, "alibi": True},
    "joined rows": {"head_dim": 64},
    "joined rows of one head": {"head_dim": 64, "q_heads": 8, "kv_heads": 1, "sinks": True},
    "joined rows of three heads": {"head_dim": 64, "q_heads": 9, "kv_heads": 3, "log_sum_exp": True},
}
SCALED = {"kv_scale": "head", "quantize": "kernel"}
EIGHT_BITS: dict[str, dict[str, Any]] = {
    "8 bits": {"kv_dtype": "float8_e4m3fn", **SCALED},
    "8 bits of one head": {"q_heads": 8, "kv_heads": 1, "kv_dtype": "float8_e5m2", **SCALED},
    "8 bits of three heads": {"q_heads": 15, "kv_heads": 3, "kv_dtype": "int8", **SCALED},
    "8 bits of eight heads": {"q_heads": 32, "kv_heads": 8, "kv_dtype": "int8", "kv_scale": "tensor"},
    "8 bits, joined rows": {"q_heads": 8, "kv_heads": 4, "head_dim": 64, "kv_dtype": "float8_e4m3fn", **SCALED},
    "8 bits, joined rows of one head": {"q_heads": 8, "kv_heads": 1, "head_dim": 64, "kv_dtype": "int8", **SCALED},
    "8 bits and all": {**ALL, "sliding_window": 300, "q_heads": 16, "kv_heads": 4, "kv_dtype": "float8_e4m3fn"},
    "drafts of 8 bits": {"decode_len": 2, "q_heads": 16, "kv_heads": 4, "kv_dtype": "int8", "kv_scale": "head"},
}
FEATURES: dict[str, dict[str, Any]] = {
    "all": {**ALL, "sliding_window": 300},
    "chunks and all": CHUNKS_ALL,
    "read alone": READ,
    "ALiBi": {"alibi": True},
    "ALiBi, rows of one set of heads in two": {"alibi": True, "q_heads": 16, "kv_heads": 4},
    "drafts": {"decode_len": 4, "sliding_window": 150},
    "drafts and chunks": {"decode_len": 2, "attention_chunk": 320},
    "drafts and chunks, rows of one head in four": {
        "decode_len": 2,
        "attention_chunk": 320,
        "q_heads": 16,
        "kv_heads": 4,
    },
    "drafts, rows of two registers": {"decode_len": 2, "head_dim": 256, "sinks": True, "log_sum_exp": True},
    "a tree of drafts": {"decode_len": 4, "tree_mask": True, "log_sum_exp": True},
}
QUICK = ("joined rows of one head", "8 bits of eight heads", "rows of two registers")


def reading(**features: Any) -> Spec:
    """A spec whose decode kernel reads all heads at once."""
    return featured(INTERLEAVED, features, "all-heads")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "features",
    [
        pytest.param(features, id=name, marks=[] if name in QUICK else SLOW)
        for name, features in {**SHAPES, **EIGHT_BITS, **FEATURES}.items()
    ],
)
def test_kernels_agree_with_the_oracle_in_the_interpreter(features: dict[str, Any]) -> None:
    spec = reading(**features)
    plan = small_plan(spec, "decode")
    assert plan.recipe.decode is not None
    assert plan.recipe.decode.read == "all_heads"
    assert failures(spec, plan, few=features in [{**SHAPES, **EIGHT_BITS}[name] for name in QUICK]) == []


@pytest.mark.compile
@pytest.mark.once
def test_a_kernel_compiles() -> None:
    spec = reading(**SHAPES["joined rows of one head"])
    compiled([(spec, plan_of(spec, "decode", "tpu7x"))])


@SLOW
@pytest.mark.compile
@pytest.mark.parametrize("target", TPU_TARGETS)
def test_kernels_of_every_shape_and_feature_compile(target: str) -> None:
    specs = [reading(**features) for features in (*SHAPES.values(), *EIGHT_BITS.values(), *FEATURES.values())]
    compiled([(spec, plan_of(spec, kind, target)) for spec in specs for kind in ("decode", "mixed")])
