"""Any spec: what the rules accept is planned and rendered for every target, runs on cpu and compiles; a refusal has a reason.

Specs are drawn from the features of `rpac.spec.support` and from sizes. In the ordinary run few are drawn, always the same; many
and fresh ones with `RPAC_SPECS=200 pytest -m slow tests/check/test_any_spec.py`, which prints what it tried.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpac.check import batches_of, check_source
from rpac.devices.chip import TPU_TARGETS, is_tpu
from rpac.errors import PlanError, SpecError
from rpac.kernels import render
from rpac.lower import Cache, lower_all, tasks_of
from rpac.plan import KernelPlan, plan_spec
from rpac.spec import Spec, parse_spec
from rpac.spec.support import FEATURES, text_of

COUNT = int(os.environ.get("RPAC_SPECS", "8"))

SIZES = {
    "model": {
        "head_dim": st.sampled_from([64, 80, 96, 112, 128, 192, 256]),
        "soft_cap": st.sampled_from([0.5, 30.0]),
        "sliding_window": st.integers(1, 300),
        "attention_chunk": st.sampled_from([32, 64, 128, 256]),
    },
    "serving": {
        "page_size": st.sampled_from([8, 16, 32, 64, 128, 256]),
        "prefill_chunk": st.sampled_from([16, 32, 64]),
        "max_num_seqs": st.integers(1, 8),
        "context_lens": st.sampled_from(["[1]", "[100]", "[17, 512]"]),
        "decode_len": st.integers(1, 8),
    },
}
SMALL = {
    "serving": {
        "max_model_len": 512,
        "max_num_tokens": 64,
        "token_buckets": "[16, 64]",
        "max_num_seqs": 8,
        "prefill_chunk": 32,
    }
}


@st.composite
def texts(draw: st.DrawFn) -> str:
    """A spec as YAML: some features, then some sizes of its own."""
    heads = draw(st.tuples(st.integers(1, 5), st.integers(1, 16)).filter(lambda pair: pair[0] * pair[1] <= 24))
    features = draw(st.lists(st.sampled_from(sorted(FEATURES)), max_size=4, unique=True))
    sizes: dict[str, dict[str, Any]] = {"model": {}, "serving": {}}
    for section, keys in SIZES.items():
        for key in draw(st.lists(st.sampled_from(sorted(keys)), max_size=2, unique=True)):
            sizes[section][key] = draw(keys[key])
    given_heads = {"model": {"q_heads": heads[0] * heads[1], "kv_heads": heads[0]}}
    return text_of(SMALL, given_heads, *(FEATURES[name] for name in features), sizes)


def accepted(text: str) -> tuple[Spec, ...]:
    """The parts of a spec; none where it is refused, for a reason."""
    try:
        return parse_spec(text, "any.yaml").parts
    except SpecError as error:
        for line in str(error).splitlines():
            assert "; must " in line and line.count(";") >= 2, line
        return ()


def planned(spec: Spec, target: str) -> tuple[KernelPlan, ...]:
    try:
        return plan_spec(spec, target)
    except PlanError as error:
        assert "must" in str(error) or "lower" in str(error) or "write" in str(error)
        return ()


quick = settings(max_examples=150, derandomize=True, database=None, deadline=None)
long = settings(
    max_examples=COUNT, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)


@quick
@given(texts())
def test_what_is_accepted_is_rendered_for_every_target(text: str) -> None:
    for spec in accepted(text):
        for target in spec.targets:
            for plan in planned(spec, target):
                source = render(spec, plan)
                compile(source.text, source.path, "exec")
                if is_tpu(target):
                    assert plan.vmem_need < plan.vmem_limit <= plan.vmem_bytes


@pytest.mark.slow
@long
@given(texts(), st.integers(0, 2**32 - 1))
def test_what_is_accepted_runs_on_cpu(text: str, seed: int) -> None:
    print(text, "seed", seed)
    for spec in accepted(text):
        for plan in plan_spec(spec, "cpu"):
            batches = batches_of(spec, plan, np.random.default_rng(seed), 1)
            found = list(check_source(spec, plan, render(spec, plan), batches=batches[-3:], seed=seed))
            assert [result for result in found if not result.ok] == []


@pytest.mark.slow
@pytest.mark.compile
@long
@given(texts(), st.sampled_from(TPU_TARGETS), st.integers(0, 2))
def test_what_is_accepted_compiles(text: str, target: str, which: int) -> None:
    print(text, target, which)
    for spec in accepted(text)[:1]:
        plans = planned(spec, target)
        for plan in plans[which : which + 1]:
            lower_all(tasks_of(spec, [(plan, render(spec, plan))])[:1], Cache(None), 1)
