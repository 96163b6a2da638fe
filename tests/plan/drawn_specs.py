"""Specs that tests of plans draw, and the plans of those that fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import strategies as st

from rpac.contract.attention import Attention, Serving
from rpac.devices.chip import TPU_TARGETS
from rpac.errors import PlanError
from rpac.plan import (
    KernelPlan,
    plan_spec,
)
from rpac.spec import Spec, load_spec

SPECS = [
    part for path in sorted((Path(__file__).parents[2] / "specs").glob("*.yaml")) for part in load_spec(path).parts
]
TINY = next(spec for spec in SPECS if spec.name == "tiny")


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any spec that the parser takes and a TPU kernel can have a chunk of."""
    group, kv_heads = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    dtype = draw(st.sampled_from(["bfloat16", "float32"]))
    model = Attention(group * kv_heads, kv_heads, draw(st.sampled_from([128, 256])), dtype, dtype, 0.1)
    page = 1 << draw(st.integers(4, 8))
    max_len = page * draw(st.integers(1, 64))
    new = draw(st.sampled_from([1, 1, 2, 4, 8]))
    buckets = tuple(sorted(draw(st.sets(st.integers(new, 2048), min_size=1, max_size=5)) | {256}))
    chunk = draw(st.sampled_from([size for size in (16, 48, 64, 256) if size <= max_len]))
    lengths = draw(st.lists(st.integers(1, max_len), min_size=1, max_size=3))
    layout = draw(st.sampled_from(["interleaved", "separate"]))
    seqs, lens = draw(st.integers(1, min(64, buckets[-1] // new))), tuple(sorted(lengths))
    tree = new > 1 and draw(st.booleans())
    serving = Serving(
        page, max_len, buckets[-1], buckets, seqs, chunk, lens, 512, layout, decode_len=new, tree_mask=tree
    )
    return Spec("any", model, serving, (*TPU_TARGETS, "cpu"), source="", file="any.yaml")


def plans_of(spec: Spec, target: str) -> tuple[KernelPlan, ...]:
    """The plans, or none where the spec is too large for the target."""
    try:
        return plan_spec(spec, target)
    except PlanError:
        return ()


def sequences(spec: Spec, plan: KernelPlan) -> set[int]:
    """How many decode rows each bucket of a plan holds."""
    return {min(tokens // spec.serving.decode_len, spec.serving.max_num_seqs) for tokens in plan.tokens}


targets = st.sampled_from([*TPU_TARGETS, "cpu"])
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name} {spec.layer}".strip())
