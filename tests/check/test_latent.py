"""Latent attention: its kernels in the interpreter and compiled, its portable programs, and bugs that the check catches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutation import Mutation, check_bug, dropped

from rpac.check import CheckBatch, batches_of, check_source
from rpac.contract.attention import Attention
from rpac.devices.chip import TPU_TARGETS
from rpac.kernels import render
from rpac.lower import Cache, lower_all, tasks_of
from rpac.plan import KernelPlan, plan_spec
from rpac.spec import Spec, load_spec

SPECS = Path(__file__).parents[2] / "specs"
TINY = load_spec(SPECS / "tiny.yaml")
KINDS = ["decode", "prefill", "mixed"]
SLOW = pytest.mark.slow
SEED = 0


def latent(q_heads: int = 16, rank: int = 128, rope_dim: int = 64, dtype: str = "bfloat16", **serving: Any) -> Spec:
    model = Attention(q_heads, 1, rank, dtype, dtype, 0.1, rope_dim=rope_dim)
    return replace(TINY, name="latent", model=model, serving=replace(TINY.serving, kv_layout="latent", **serving))


SPEC = latent()
# Heads that are no power of two, a rotary part without padding; float32; more heads than rows are computed at once allow.
SHAPES = {
    "48 heads": latent(48, 384, 128),
    "128 heads": latent(128, 512),
    "float32": latent(dtype="float32", page_size=8),
    "large pages": latent(page_size=128),
}


def plan_of(spec: Spec, kind: str, target: str = "tpu7x") -> KernelPlan:
    return next(plan for plan in plan_spec(spec, target) if plan.kind == kind)


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


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_the_oracle(kind: str) -> None:
    assert failures(SPEC, plan_of(SPEC, kind), few=True) == []


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


# More sequences than a kernel has buffers for new tokens on their way.
MUTATED = latent(page_size=64, max_num_seqs=12, max_num_tokens=64, token_buckets=(16, 64))
BUGS = {
    "decode": [
        Mutation("values are keys", r"(self\.slot\(wave, i\), :, :,) :RANK\]", r"\1 64 : 64 + RANK]"),
        Mutation("no rotary part", r", self\.q_rope_in\[seq\]\]", ", 0 * self.q_rope_in[seq]]"),
        dropped("clear_tail removed", r"self\.clear_tail\(self\.slot\(wave, i\), left\)"),
        dropped("update not attended to", r"self\.kv\[slot, page, tokens\] = rows"),
        dropped(
            "no wait for a cache write before its buffer is used again",
            r"self\.wait_for_writes\(seq - WRITE_BUFFERS\)",
        ),
    ],
    "prefill": [
        Mutation("sees the next token", r"token <= query", "token <= query + 1"),
        Mutation("the query of another head", r"row // Q_HEADS", "row // (Q_HEADS * 2)"),
        Mutation("a block on the diagonal taken for whole", r"first_query >= KV_BLOCK - 1\)", "first_query >= KV_BLOCK - 2)"),
        Mutation("state not rescaled", r"= broadcast_lanes\(alpha, RANK\) \* self\.acc\[rows\]", "= self.acc[rows]"),
        Mutation("new tokens a row late", r"(new_in\[new_buffer, PAGE_SIZE \+ start \+ i)\]", r"\1 - 1]"),
        dropped("clear_tail removed", r"self\.clear_tail\(buffer, end - block \* KV_BLOCK\)"),
        dropped("state not cleared", r"self\.clear_rows\(rows\)"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "mutation"),
    [
        pytest.param(kind, bug, id=f"{kind}: {bug.bug}", marks=[] if bug is BUGS[kind][0] else SLOW)
        for kind in BUGS
        for bug in BUGS[kind]
    ],
)
def test_each_bug_is_caught(kind: str, mutation: Mutation) -> None:
    check_bug(MUTATED, plan_of(MUTATED, kind), mutation)
