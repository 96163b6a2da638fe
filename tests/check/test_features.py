"""Features of attention, alone and together: in the interpreter at the edges of the window, on cpu, and compiled."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from small import ALL_FEATURES as ALL
from small import INTERLEAVED, ITERATED, SPECS, featured, iterated_plan, small_plan

from rpac.check import CheckBatch, batches_of, check_source
from rpac.devices.chip import TPU_TARGETS
from rpac.kernels import render
from rpac.lower import Cache, lower_all, tasks_of
from rpac.plan import KernelPlan, plan_spec
from rpac.spec import Spec

SEED = 0
SLOW = pytest.mark.slow
KINDS = ["decode", "prefill", "mixed"]
LAYOUTS = ["interleaved", "separate"]

ALONE: dict[str, dict[str, Any]] = {
    "soft cap": {"soft_cap": 2.0},
    "window": {"sliding_window": 150},
    "sinks": {"sinks": True},
    "lse": {"log_sum_exp": True},
}
TOGETHER = {
    " and ".join(names): {key: value for name in names for key, value in ALONE[name].items()}
    for count in (2, 3, 4)
    for names in itertools.combinations(ALONE, count)
}
assert TOGETHER["soft cap and window and sinks and lse"] == ALL
NARROW = {**ALL, "sliding_window": 3}
AHEAD: dict[str, Any] = {"causal": False, "soft_cap": 2.0, "sinks": True, "log_sum_exp": True}
BOTH_WAYS = {"not causal": {"causal": False}, "not causal and all": AHEAD}
# Of one tile and a half; and of more than a block.
CHUNKS = {"attention_chunk": 192}
CHUNKS_ALL = {"attention_chunk": 320, "soft_cap": 2.0, "sinks": True, "log_sum_exp": True}
IN_CHUNKS = {"chunks": CHUNKS, "chunks and all": CHUNKS_ALL}
# Of a layer that reads another's cache: causal, or as attention across to an encoder's tokens.
READ = {"update_cache": False}
READS = {"read alone": READ, "read alone and all": {**READ, **ALL}, "read alone and not causal": {**READ, **AHEAD}}
EVERY = {
    **READS,
    **ALONE,
    **TOGETHER,
    **BOTH_WAYS,
    **IN_CHUNKS,
    "narrow window": {"sliding_window": 3},
    "narrow window and all": NARROW,
}


def failures(spec: Spec, plan: KernelPlan, few: bool = False) -> list[Any]:
    """What fails of all batches in all modes; of a few batches in one, where so many take too long."""
    batches: tuple[CheckBatch, ...] = batches_of(spec, plan, np.random.default_rng(SEED), 1)
    modes = None
    if few:
        edges = [batch for batch in batches if batch.name.startswith(("lengths", "rows"))]
        batches, modes = (edges[-1], batches[-1]), ["on_wait"]
    found = check_source(spec, plan, render(spec, plan), batches=batches, modes=modes, seed=SEED)
    return [result for result in found if not result.ok]


def is_quick(features: dict[str, Any], kind: str) -> bool:
    """Everything at once; of what that cannot be with, mixed batches, which have rows of every kind."""
    return features == ALL or (kind == "mixed" and features in (NARROW, AHEAD, CHUNKS, READ))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("features", "kind"),
    [
        pytest.param(EVERY[one], kind, id=f"{one}, {kind}", marks=[] if is_quick(EVERY[one], kind) else SLOW)
        for one in EVERY
        for kind in KINDS
    ],
)
def test_portable_programs_have_them(features: dict[str, Any], layout: str, kind: str) -> None:
    spec = featured(SPECS[layout], features)
    plan = next(plan for plan in reversed(plan_spec(spec, "cpu")) if plan.kind == kind)
    assert failures(spec, plan) == []


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_kernels_have_them_all_at_once(layout: str, kind: str) -> None:
    spec = featured(SPECS[layout], ALL)
    assert failures(spec, small_plan(spec, kind), few=True) == []


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("features", "layout", "kind"),
    [
        pytest.param(CHUNKS, "separate", "prefill", id="chunks"),
        pytest.param(READ, "interleaved", "decode", id="read alone"),
    ],
)
def test_kernels_see_their_own_chunk_and_leave_the_cache_alone(
    features: dict[str, Any], layout: str, kind: str
) -> None:
    spec = featured(SPECS[layout], features)
    assert failures(spec, small_plan(spec, kind), few=True) == []


@pytest.mark.interpreter
def test_a_kernel_that_is_not_causal_sees_ahead() -> None:
    spec = featured(INTERLEAVED, {"causal": False})
    assert failures(spec, small_plan(spec, "prefill"), few=True) == []


@pytest.mark.interpreter
@SLOW
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("features", EVERY.values(), ids=EVERY)
def test_kernels_have_them(features: dict[str, Any], layout: str, kind: str) -> None:
    spec = featured(SPECS[layout], features)
    assert failures(spec, small_plan(spec, kind)) == []


@pytest.mark.interpreter
@SLOW
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernels_of_several_iterations_that_are_not_causal(layout: str) -> None:
    spec = featured(ITERATED[layout], {"causal": False, "sinks": True})
    plan = iterated_plan(spec, "prefill")
    assert plan.recipe.block.mask == "lengths"
    assert failures(spec, plan) == []


@pytest.mark.interpreter
@SLOW
@pytest.mark.parametrize("kind", ["prefill", "mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sight", [{"sliding_window": 300}, {"sliding_window": 7}, {"attention_chunk": 640}], ids=str)
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_kernels_of_several_iterations_have_them(
    soft_cap: float | None, sight: dict[str, int], layout: str, kind: str
) -> None:
    """With a soft cap the MXU cannot mask, for what comes after it would undo the mask."""
    spec = featured(ITERATED[layout], {"soft_cap": soft_cap, **sight, "sinks": True, "log_sum_exp": True})
    plan = iterated_plan(spec, kind)
    assert (plan.recipe.block.mask == "matmul") == (soft_cap is None)
    assert failures(spec, plan) == []


def compiled(spec: Spec, target: str, kinds: tuple[str, ...]) -> None:
    planned = [(plan, render(spec, plan)) for plan in plan_spec(spec, target) if plan.kind in kinds]
    tasks = [task for task in tasks_of(spec, planned) if task.tokens == spec.serving.token_buckets[-1]]
    for result in lower_all(tasks, Cache(None), 1):
        assert result.executable


@pytest.mark.compile
@pytest.mark.parametrize(
    ("target", "layout"),
    list(zip(TPU_TARGETS, itertools.cycle(LAYOUTS), strict=False)),
)
def test_a_mixed_program_with_all_compiles(target: str, layout: str) -> None:
    compiled(featured(SPECS[layout], ALL), target, ("mixed",))


@SLOW
@pytest.mark.compile
@pytest.mark.parametrize("target", TPU_TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("features", EVERY.values(), ids=EVERY)
def test_every_program_compiles(features: dict[str, Any], layout: str, target: str) -> None:
    for spec in (SPECS[layout], ITERATED[layout]):
        compiled(featured(spec, features), target, tuple(KINDS))


@pytest.mark.parametrize("target", ["tpu7x", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_hold_the_edges_of_the_window(kind: str, target: str) -> None:
    window, page = 150, 16
    spec = featured(INTERLEAVED, {"sliding_window": window})
    plan = next(plan for plan in reversed(plan_spec(spec, target)) if plan.kind == kind)
    rows = {
        row
        for batch in batches_of(spec, plan, np.random.default_rng(SEED), 0)
        for row in zip(batch.q_lens, batch.kv_lens, strict=True)
    }
    q_len = {"decode": 1, "prefill": spec.serving.prefill_chunk, "mixed": 2}[kind]
    for start in (0, page):  # of the window of the first new token
        assert {(q_len, window + q_len - 1 + start + off) for off in (-1, 0, 1)} <= rows


def test_a_kernel_holds_no_trace_of_a_feature_that_it_does_not_use() -> None:
    words = {
        "soft_cap": ("capped", "CAP"),
        "sliding_window": ("window", "WINDOW"),
        "attention_chunk": ("chunk of", "ATTENTION_CHUNK", "chunk_end"),
        "sinks": ("sink", "LOG2_E"),
        "log_sum_exp": (", lse", "LN_2"),
    }
    for target, layout, kind in itertools.product(("tpu7x", "cpu"), LAYOUTS, KINDS):
        for name, features in {**ALONE, "chunks": CHUNKS, "read alone": READ}.items():
            spec = featured(SPECS[layout], features, "spec")
            plan = next(plan for plan in plan_spec(spec, target) if plan.kind == kind)
            text = render(spec, plan).body
            for key, traces in words.items():
                assert any(trace in text for trace in traces) == (key in features), (target, layout, kind, name, key)
            writes = any(
                trace in text
                for trace in (
                    "update_cache(",
                    "update_rows(",
                    "update_pages(",
                    "new_keys",
                    "pack_token",
                    "keys, values",
                    "new_rows",
                )
            )
            assert writes == (name != "read alone"), (target, layout, kind, name)
            assert not target.startswith("tpu") or ("first_token(" in text) == (name in ("window", "chunks"))
