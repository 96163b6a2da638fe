"""The walk of a generated kernel's schedule moves, byte for byte, what the interpreter's run of that kernel moves.

Kernels are compiled here: committed schedules would not be those of today's templates.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from command import TINY

from rpac.check.arrays import Arguments, make_arguments
from rpac.check.batches import CheckBatch, batches_of
from rpac.check.execute import DMA_MODES, prepare_run
from rpac.contract.program import Variant
from rpac.files.store import Store
from rpac.kernels import render
from rpac.plan import KernelPlan, plan_spec
from rpac.predict import Programs, programs_of
from rpac.schedule import Call
from rpac.spec import Spec, load_spec

from .recorder import Extent, recorded

pytestmark = pytest.mark.compile

RANDOM_BATCHES = 3
FEW_EDGES = 2

Built = Callable[[str], Programs]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    store = Store(tmp_path_factory.mktemp("dumps"))
    # Of any compiler: these tests are what verifies one.
    return cache(lambda target: programs_of(TINY, target, store, any_compiler=True))


def plan_of(spec: Spec, target: str, kind: str) -> KernelPlan:
    """The plan of a kind's largest buckets, which take every batch."""
    return max((plan for plan in plan_spec(spec, target) if plan.kind == kind), key=lambda plan: plan.tokens)


Side = tuple[tuple[int, ...], bool]  # the shape of arrays, and whether they are results


def walked(call: Call, args: Arguments) -> tuple[Counter[Extent], set[Side], int]:
    """What the call's kernels move between HBM and the core, by the walk: extents, the sides of the kernels that the
    compiler keeps in VMEM, and how many bytes of scalars they read beside."""
    first = len(args.of_batch) - 4
    scalars = {first + i: values.tolist() for i, values in enumerate(args.of_batch[first:])}
    found: Counter[Extent] = Counter()
    in_vmem: set[Side] = set()
    total = 0
    for name, operands in call.operands(scalars).items():
        done = call.walk_kernel(name, operands, trace=True)
        total += done.read_bytes + done.written_bytes
        by_index = {operand.index: operand for operand in done.schedule.operands}
        in_vmem |= {(op.shape, op.kind == "output") for op in by_index.values() if op.space == "vmem"}
        for transfer in done.transfers:
            if transfer.operand is not None and by_index[transfer.operand].dtype != "s32":
                shape = by_index[transfer.operand].shape
                found[Extent(shape, transfer.to_hbm, transfer.offset, transfer.size)] += 1
    return found, in_vmem, total - sum(count * extent.size for extent, count in found.items())


def compare(
    built: Built, target: str, kind: str, batches: Callable[[Sequence[CheckBatch]], Sequence[CheckBatch]]
) -> None:
    seed = secrets.randbits(32)
    rng = np.random.default_rng(seed)
    spec = load_spec(TINY)
    plan = plan_of(spec, target, kind)
    tokens = plan.tokens[-1]
    call = built(target).call(Variant(kind, tokens))  # type: ignore[arg-type]
    run = prepare_run(plan, render(spec, plan))
    for number, batch in enumerate(batches(batches_of(spec, plan, rng, RANDOM_BATCHES))):
        what = f"{target} {kind} {batch.name!r}, {seed=}"
        args = make_arguments(spec, batch, tokens, spec.serving.num_pages, rng)
        with recorded() as interpreted:
            outcome = run(args, DMA_MODES[number % len(DMA_MODES)])
        assert not outcome.notes, f"{what}: {outcome.notes}"
        found, in_vmem, scalars = walked(call, args)
        assert found.keys() - interpreted.keys() == set(), f"{what}: only in the walk"
        # XLA moves small queries, keys and values into VMEM before the kernel; the cache and the output it leaves.
        expected = Counter({e: count for e, count in interpreted.items() if (e.shape, e.written) not in in_vmem})
        assert expected.keys() - found.keys() == set(), f"{what}: not in the walk"
        assert expected == Counter({e: count for e, count in found.items() if e in expected}), what
        assert 0 <= scalars <= 4096, what  # lengths and tables, where they were not moved first
        assert pages_of(found, args, written=False) >= pages_named(args, spec, new=False), what
        assert pages_of(found, args, written=True) == pages_named(args, spec, new=True), what


def pages_of(found: Counter[Extent], args: Arguments, written: bool) -> set[int]:
    """Pages of the cache that were read or written."""
    pages, rows = args.kv_cache.shape[0], args.kv_cache.nbytes // args.kv_cache.shape[0]
    return {e.offset // rows for e in found if e.written == written and len(e.shape) == 3 and e.shape[0] == pages}


def pages_named(args: Arguments, spec: Spec, new: bool) -> set[int]:
    """By the contract: the pages that hold a sequence's new tokens, or those that hold its old ones."""
    size, found = spec.serving.page_size, set()
    for row in range(args.distribution[2]):
        end = int(args.kv_lens[row])
        start = end - int(args.cu_q_lens[row + 1] - args.cu_q_lens[row])
        tokens = range(start, end) if new else range(start)
        table = args.page_indices[row * spec.serving.pages_per_seq :]
        found |= {int(table[token // size]) for token in tokens}
    return found


def few(batches: Sequence[CheckBatch]) -> list[CheckBatch]:
    """The first edges and the random ones."""
    return [*batches[:FEW_EDGES], *batches[-RANDOM_BATCHES:]]


def test_a_decode_kernel_moves_the_bytes_that_the_interpreter_moves(built: Built) -> None:
    compare(built, "tpu7x", "decode", few)


@pytest.mark.parametrize("kind", ["prefill", pytest.param("mixed", marks=pytest.mark.slow)])
def test_a_kernel_of_query_blocks_does_too(built: Built, kind: str) -> None:
    compare(built, "tpu7x", kind, few)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decode", "prefill", "mixed"])
@pytest.mark.parametrize("target", ["tpu7x", "v6e", "v5p", "v5e"])
def test_on_every_generation_and_at_every_edge_of_the_plan(built: Built, target: str, kind: str) -> None:
    compare(built, target, kind, list)
