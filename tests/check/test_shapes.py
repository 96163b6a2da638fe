"""Shapes that no shipped spec has: head counts, groups, head_dim and dtypes, in the interpreter, on cpu and compiled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rpac.check import check_source
from rpac.lower import Cache, lower_all, tasks_of
from rpac.plan import plan_spec
from rpac.render import render
from rpac.spec import Model, Spec, load_spec

TINY = load_spec(Path(__file__).parents[2] / "specs" / "tiny.yaml")
SEED = 0
SLOW = pytest.mark.slow


def shaped(q_heads: int, kv_heads: int, head_dim: int = 128, dtype: str = "bfloat16", **serving: object) -> Spec:
    """tiny with another model."""
    model = Model(q_heads, kv_heads, head_dim, dtype, dtype, head_dim**-0.5)
    name = f"{q_heads}-{kv_heads}-{head_dim}-{dtype}"
    return replace(TINY, name=name, model=model, serving=replace(TINY.serving, **serving))


FEW = [
    shaped(2, 2),  # group 1
    shaped(8, 1),  # group 8, and the fewest rows a token can have
    shaped(4, 2, head_dim=256),
    shaped(4, 2, dtype="float32"),
]
SHAPES = [
    *FEW,
    shaped(16, 1),  # the largest group
    shaped(9, 3),  # heads that fill no register, and no pair
    shaped(8, 8),
    shaped(1, 1, head_dim=256),
    shaped(3, 1, head_dim=256, dtype="float32"),
    shaped(4, 2, page_size=64, prefill_chunk=32),
    shaped(4, 2, page_size=256),
    shaped(4, 2, token_buckets=(1, 32)),
]
PORTABLE_FEW = [shaped(9, 3, kv_layout="separate")]
PORTABLE = [
    *PORTABLE_FEW,
    shaped(4, 2, head_dim=256, dtype="float32", page_size=64, kv_layout="separate"),
]


def named(spec: Spec) -> str:
    apart = "-apart" if spec.serving.kv_layout == "separate" else ""
    return f"{spec.name}-page{spec.serving.page_size}-bucket{spec.serving.token_buckets[0]}{apart}"


def params(specs: list[Spec], few: list[Spec]) -> list[object]:
    """Those that are not among the few run with the slow tests."""
    return [pytest.param(spec, marks=[] if spec in few else SLOW, id=named(spec)) for spec in specs]


each_shape = pytest.mark.parametrize("spec", params(SHAPES, FEW))
each_portable_shape = pytest.mark.parametrize("spec", params([*SHAPES, *PORTABLE], [*FEW, *PORTABLE_FEW]))


def check(spec: Spec, target: str, kind: str) -> None:
    for plan in plan_spec(spec, target):
        if plan.kind == kind:
            results = list(check_source(spec, plan, render(spec, plan), seed=SEED, random_batches=1))
            failed = [result for result in results if not result.ok]
            assert results
            assert not failed, f"seed {SEED}"


@pytest.mark.parametrize("kind", [pytest.param("decode", marks=SLOW), pytest.param("prefill", marks=SLOW), "mixed"])
@each_portable_shape
def test_portable_programs_agree_with_the_oracle(spec: Spec, kind: str) -> None:
    check(spec, "cpu", kind)


@pytest.mark.parametrize("kind", ["decode", "prefill", pytest.param("mixed", marks=SLOW)])
@each_shape
def test_kernels_agree_with_the_oracle_in_the_interpreter(spec: Spec, kind: str) -> None:
    """For the target with the widest MXU, on which decode pairs heads where it can."""
    check(spec, "tpu7x", kind)


@pytest.mark.parametrize("spec", [shaped(4, 2), pytest.param(shaped(9, 3), marks=SLOW)], ids=lambda spec: spec.name)
def test_decode_kernels_of_a_narrow_mxu_agree_with_the_oracle(spec: Spec) -> None:
    check(spec, "v5p", "decode")


@pytest.mark.compile
@pytest.mark.parametrize("target", ["tpu7x", "v5e", pytest.param("v6e", marks=SLOW), pytest.param("v5p", marks=SLOW)])
def test_kernels_of_odd_shapes_compile(target: str) -> None:
    compile_all([shaped(9, 3), shaped(4, 2, head_dim=256), shaped(3, 1, head_dim=256, dtype="float32")], target)


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("target", ["tpu7x", "v6e", "v5p", "v5e"])
def test_kernels_of_every_shape_compile(target: str) -> None:
    compile_all(SHAPES, target)


def compile_all(specs: list[Spec], target: str) -> None:
    """One program of each kind, for its largest token bucket."""
    tasks = []
    for spec in specs:
        largest = {plan.kind: plan for plan in plan_spec(spec, target)}
        tasks += tasks_of(
            spec, [(replace(plan, tokens=plan.tokens[-1:]), render(spec, plan)) for plan in largest.values()]
        )
    assert all(lowered.executable for lowered in lower_all(tasks, Cache(None), jobs=2))
