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
    "joined rows": {"head_dim": 64},
    "joined rows of one head": {"head_dim": 64, "q_heads": 8, "kv_heads": 1, "sinks": True},
    "joined rows of three heads": {"head_dim": 64, "q_heads": 9, "kv_heads": 3, "log_sum_exp": True},
}
FEATURES: dict[str, dict[str, Any]] = {
    "all": {**ALL, "sliding_window": 300},
    "chunks and all": CHUNKS_ALL,
    "read alone": READ,
    "ALiBi": {"alibi": True},
    "drafts": {"decode_len": 4, "sliding_window": 150},
    "drafts and chunks": {"decode_len": 2, "attention_chunk": 320},
    "a tree of drafts": {"decode_len": 4, "tree_mask": True, "log_sum_exp": True},
}
QUICK = ("joined rows of one head",)


def reading(**features: Any) -> Spec:
    """A spec whose decode kernel reads all heads at once."""
    return featured(INTERLEAVED, features, "all-heads")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "features",
    [
        pytest.param(features, id=name, marks=[] if name in QUICK else SLOW)
        for name, features in {**SHAPES, **FEATURES}.items()
    ],
)
def test_kernels_agree_with_the_oracle_in_the_interpreter(features: dict[str, Any]) -> None:
    spec = reading(**features)
    plan = small_plan(spec, "decode")
    assert plan.recipe.decode is not None
    assert plan.recipe.decode.read == "all_heads"
    assert failures(spec, plan, few=features in [SHAPES[name] for name in QUICK]) == []


@pytest.mark.compile
@pytest.mark.once
def test_a_kernel_compiles() -> None:
    spec = reading(**SHAPES["joined rows of one head"])
    compiled([(spec, plan_of(spec, "decode", "tpu7x"))])


@SLOW
@pytest.mark.compile
@pytest.mark.parametrize("target", TPU_TARGETS)
def test_kernels_of_every_shape_and_feature_compile(target: str) -> None:
    specs = [reading(**features) for features in (*SHAPES.values(), *FEATURES.values())]
    compiled([(spec, plan_of(spec, kind, target)) for spec in specs for kind in ("decode", "mixed")])
