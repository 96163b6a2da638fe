"""Wrong numbers of a batch in the schedules that the compiler made for a TPU: no kernel hangs, and each copy is of a live row's
own pages."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from small import TINY

from rpac.check.arrays import Arguments, make_arguments
from rpac.check.bad_rows import draw_wrong, pages_of, rows_of, with_wrong
from rpac.check.batches import neighbors_of
from rpac.contract.arrays import BITS, index_of
from rpac.files.store import Store, default_cache_dir
from rpac.plan import KernelPlan, plan_spec
from rpac.plan.tuned import TunedTiles
from rpac.predict import Programs, programs_of
from rpac.schedule.memory import words_of
from rpac.spec import Spec

BATCHES = 300
LONG = {"bf16": "bfloat16", "f32": "float32"}


@cache
def programs(target: str) -> Programs:
    return programs_of(TINY.file, target, Store(default_cache_dir()), lambda line: None, tuned=TunedTiles.of)


def plan_of(kind: str, target: str) -> KernelPlan:
    return next(plan for plan in reversed(plan_spec(TINY, target)) if plan.kind == kind)


def own_pages(spec: Spec, args: Arguments, kind: str) -> set[int]:
    """The pages of the cache that are in the tables of live rows."""
    return {int(page) for row in range(rows_of(spec, kind, args).end) for page in pages_of(args, row)}


def copies_outside(kind: str, target: str, args: Arguments) -> list[str]:
    """The copies of a call that reach outside of an array, or to a page that no live row has."""
    found = programs(target)
    variant = next(one for one in found.tasks if one.kind == kind and one.tokens == len(args.queries))
    call, dims = found.call(variant), found.tasks[variant].args
    names = ("kv_lens", "page_indices", "cu_q_lens", "distribution")
    given = {index_of(dims, name): words_of(getattr(args, name)) for name in names}
    pages, outside = own_pages(TINY, args, kind), []
    page_bytes = args.kv_cache.nbytes // len(args.kv_cache)
    for name, operands in call.operands(given).items():
        walk = call.walk_kernel(name, operands, trace=True)
        arrays = {operand.index: operand for operand in walk.schedule.operands}
        for copy in walk.transfers:
            if copy.operand is None:
                continue
            array = arrays[copy.operand]
            if array.dtype == "s32":
                continue  # the compiler's own copies of scalars, of whole rows
            nbytes = math.prod(array.shape) * BITS[LONG[array.dtype]] // 8
            if not 0 <= copy.offset <= copy.offset + copy.size <= nbytes:
                outside.append(f"{name}: {copy} of {nbytes} bytes")
            elif (
                nbytes == args.kv_cache.nbytes
                and not {
                    copy.offset // page_bytes,
                    (copy.offset + copy.size - 1) // page_bytes,
                }
                <= pages
            ):
                outside.append(f"{name}: {copy} of page {copy.offset // page_bytes}")
    return outside


@pytest.mark.compile
@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("decode", "tpu7x"),
        *(pytest.param(kind, "tpu7x", marks=pytest.mark.slow) for kind in ("prefill", "mixed")),
        *(pytest.param(kind, "v6e", marks=pytest.mark.slow) for kind in ("decode", "prefill", "mixed")),
    ],
)
def test_no_copy_of_a_schedule_leaves_the_pages_of_live_rows(kind: str, target: str) -> None:
    plan = plan_of(kind, target)
    batch = neighbors_of(TINY, plan)
    assert batch is not None
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    rng = np.random.default_rng(seed)
    args = make_arguments(TINY, batch, plan.tokens[-1], TINY.serving.num_pages, rng)
    assert copies_outside(kind, target, args) == []
    for _ in range(BATCHES):
        wrong = draw_wrong(TINY, kind, args, rng)
        assert copies_outside(kind, target, with_wrong(args, wrong)) == [], ", ".join(map(str, wrong))
