"""Latent attention: its kernels in the interpreter and compiled, its portable programs, and bugs that the check catches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small import latent, plan_of, staged

from rpac.check import CheckBatch, batches_of, check_source
from rpac.devices.chip import TPU_TARGETS
from rpac.kernels import render
from rpac.lower import Cache, lower_all, tasks_of
from rpac.plan import KernelPlan, plan_spec
from rpac.spec import Spec

KINDS = ["decode", "prefill", "mixed"]
SLOW = pytest.mark.slow
SEED = 0


SPEC = latent()
# Heads that are no power of two, a rotary part without padding; float32; more heads than rows are computed at once allow.
SHAPES = {
    "48 heads": latent(48, 384, 128),
    "128 heads": latent(128, 512),
    "float32": latent(dtype="float32", page_size=8),
    "large pages": latent(page_size=128),
}
# Tiles that go through stages, of sequences of several waves; more sequences than a kernel has the queries of at first.
STAGED = staged()


def failures(spec: Spec, plan: KernelPlan, few: bool = False) -> list[Any]:
    """What fails of all batches in all modes; of a few batches in one, where so many take too long."""
    batches: tuple[CheckBatch, ...] = batches_of(spec, plan, np.random.default_rng(SEED), 1)
    modes = None
    if few:
        edges = [batch for batch in batches if batch.name.startswith(("lengths", "rows"))]
        batches, modes = (edges[0], edges[-1], batches[-1]), ["on_wait"]
    found = check_source(spec, plan, render(spec, plan), batches=batches, modes=modes, seed=SEED)
    return [result for result in found if not result.ok]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [SPEC, SHAPES["48 heads"], SHAPES["float32"]], ids=["tiny", "48 heads", "float32"])
def test_portable_programs_are_the_oracle(spec: Spec, kind: str) -> None:
    assert failures(spec, plan_of(spec, kind, "cpu")) == []


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW if kind == "mixed" else ()) for kind in KINDS])
def test_kernels_are_the_oracle(kind: str) -> None:
    assert failures(SPEC, plan_of(SPEC, kind), few=True) == []


@pytest.mark.interpreter
@pytest.mark.parametrize("few", [True, pytest.param(False, marks=SLOW)], ids=["few", "all"])
def test_tiles_in_stages_are_the_oracle(few: bool) -> None:
    plan = plan_of(STAGED, "decode")
    assert plan.recipe.decode is not None and plan.recipe.decode.read == "latent_staged"
    assert failures(STAGED, plan, few) == []


@pytest.mark.interpreter
@SLOW
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [SPEC, *SHAPES.values()], ids=["tiny", *SHAPES])
def test_kernels_are_the_oracle_in_every_shape(spec: Spec, kind: str) -> None:
    assert failures(spec, plan_of(spec, kind), few=spec is not SPEC) == []


@pytest.mark.compile
@pytest.mark.parametrize("target", ["tpu7x", *(pytest.param(one, marks=SLOW) for one in TPU_TARGETS if one != "tpu7x")])
@pytest.mark.parametrize(
    "spec", [SPEC, *(pytest.param(one, marks=SLOW) for one in SHAPES.values())], ids=["tiny", *SHAPES]
)
def test_every_program_compiles(spec: Spec, target: str) -> None:
    tasks = tasks_of(spec, [(plan, render(spec, plan)) for plan in plan_spec(spec, target)])
    assert all(one.executable for one in lower_all(tasks, Cache(None), 2))
