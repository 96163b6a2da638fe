"""NaN or an infinity in one row stays in it: every other row is, bit for bit, what it is without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small import ALL_FEATURES, INTERLEAVED, SPECS, featured, latent, pairing, pairs_plan, small_plan
from test_features import CHUNKS_ALL, KINDS, LAYOUTS, READ, SLOW

from rpac.check import check_neighbors
from rpac.check.arrays import make_arguments
from rpac.check.batches import CheckBatch, neighbors_of
from rpac.check.execute import prepare_run
from rpac.check.poison import OLD_PARTS, Poisons, poisoned, poisons_alone, poisons_at_once, reach
from rpac.contract.program import Source
from rpac.kernels import render
from rpac.plan import KernelPlan, plan_spec
from rpac.spec import Spec

SEED = 0
MANY = {"max_num_seqs": 6, "max_num_tokens": 64, "token_buckets": (16, 64)}
QUANTIZED = {"kv_dtype": "int8", "kv_scale": "tensor", "quantize": "kernel"}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": ALL_FEATURES,
    "chunks and all": CHUNKS_ALL,
    "not causal": {"causal": False, "log_sum_exp": True},
    "read alone": READ,
    "head_dim 64": {"head_dim": 64},
    "head_dim 80": {"head_dim": 80},
    "head_dim 256": {"head_dim": 256},
    "float32": {"q_dtype": "float32", "kv_dtype": "float32"},
    "float8": {"kv_dtype": "float8_e4m3fn", "kv_scale": "head", "quantize": "kernel"},
    "float8 with infinities": {"kv_dtype": "float8_e5m2"},
    "int8": QUANTIZED,
    "drafts": {"decode_len": 4, "log_sum_exp": True},
    "a tree of drafts": {"decode_len": 4, "tree_mask": True},
}
LATENT = latent(**MANY)
EVERY: dict[str, Spec] = {
    f"{layout}, {name}": featured(replace(spec, serving=replace(spec.serving, **MANY)), features)
    for layout, spec in SPECS.items()
    for name, features in FEATURES.items()
} | {"latent": LATENT, "latent, float32": latent(dtype="float32", **MANY)}
# Programs of mixed batches have the functions of the others.
QUICK = {"interleaved, plain", "separate, all", "latent", "interleaved, drafts"}
EVERY_KIND = [
    pytest.param(spec, kind, id=f"{name}, {kind}", marks=[] if kind == "mixed" and name in QUICK else SLOW)
    for name, spec in EVERY.items()
    for kind in KINDS
]


def plan_of(spec: Spec, kind: str, target: str = "cpu") -> KernelPlan:
    return next(plan for plan in plan_spec(spec, target) if plan.kind == kind)


def failures(spec: Spec, plan: KernelPlan, source: Source | None = None, alone: bool = True) -> list[Any]:
    """What fails of all poisons, each alone, or of some at once."""
    batch = neighbors_of(spec, plan)
    assert batch is not None
    runs = poisons_alone(spec, batch) if alone else [poisons_at_once(spec, batch, np.random.default_rng(SEED))]
    results = list(check_neighbors(spec, plan, source or render(spec, plan), poisons=runs, seed=SEED))
    assert len(results) == len(runs) + 1
    return [result for result in results if not result.ok]


@pytest.mark.parametrize(("spec", "kind"), EVERY_KIND)
def test_other_rows_of_a_portable_program_do_not_change(spec: Spec, kind: str) -> None:
    assert failures(spec, plan_of(spec, kind)) == []


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_rows_of_a_kernel_do_not_change(layout: str) -> None:
    spec = EVERY[f"{layout}, plain"]
    assert failures(spec, small_plan(spec, "decode"), alone=False) == []


@pytest.mark.interpreter
@SLOW
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", EVERY.values(), ids=EVERY)
def test_other_rows_of_every_kernel_do_not_change(spec: Spec, kind: str) -> None:
    plan = plan_of(spec, kind, "tpu7x") if spec.model.rope_dim else small_plan(spec, kind)
    assert failures(spec, plan) == []


@pytest.mark.interpreter
@SLOW
def test_other_rows_of_a_kernel_of_token_pairs_do_not_change() -> None:
    spec = pairing(q_heads=12, kv_heads=3)
    assert failures(spec, pairs_plan(spec)) == []


SELECTED = "new_acc += jnp.where(of_row[:, item, ..., None], share, 0)"
MULTIPLIED = "new_acc += of_row[:, item, ..., None] * share"


@pytest.mark.parametrize(
    ("spec", "kind", "alone"),
    [
        pytest.param(EVERY["interleaved, plain"], "decode", True, id="decode"),
        pytest.param(EVERY["interleaved, plain"], "decode", False, id="decode, at once"),
        pytest.param(EVERY["interleaved, plain"], "mixed", True, id="mixed", marks=SLOW),
        pytest.param(EVERY["interleaved, plain"], "mixed", False, id="mixed, at once", marks=SLOW),
        pytest.param(LATENT, "decode", True, id="latent, decode", marks=SLOW),
        pytest.param(LATENT, "mixed", True, id="latent, mixed"),
    ],
)
def test_a_product_with_zero_in_place_of_a_selection_is_caught(spec: Spec, kind: str, alone: bool) -> None:
    plan = plan_of(spec, kind)
    source = render(spec, plan)
    assert SELECTED in source.text
    bug = Source(source.path, source.text.replace(SELECTED, MULTIPLIED))
    failed = failures(spec, plan, bug, alone)
    parts = {"queries", *OLD_PARTS["latent" if spec.model.rope_dim else "grouped"]} if alone else set()
    for part in parts:
        assert any(f"NaN in {part} of row" in result.batch for result in failed), part
    assert failed
    assert all("attention of" in note for result in failed for note in result.notes)
    assert all(result.error == np.inf for result in failed)


def test_only_what_a_dtype_can_hold_is_poison() -> None:
    def held(**features: Any) -> set[str]:
        spec = featured(INTERLEAVED, features)
        batch = neighbors_of(spec, plan_of(spec, "decode"))
        assert batch is not None
        return {f"{one.value} {one.part}" for poisons in poisons_alone(spec, batch) for one in poisons}

    def each(*parts: str) -> set[str]:
        return {f"{value} {part}" for value in ("NaN", "+Inf", "-Inf") for part in parts}

    new, old = ("keys", "values"), OLD_PARTS["grouped"]
    assert held() == each("queries", *new, *old)
    assert held(update_cache=False) == each("queries", *old)
    assert held(kv_dtype="int8") == each("queries")
    assert held(**QUANTIZED) == each("queries", *new)
    assert held(kv_dtype="float8_e5m2") == each("queries", *new, *old)
    assert held(kv_dtype="float8_e4m3fn") == each("queries") | {f"NaN {part}" for part in (*new, *old)}


@pytest.mark.parametrize("name", EVERY)
def test_poison_is_in_one_lane_of_every_head_of_the_row_and_nowhere_else(name: str) -> None:
    spec = EVERY[name]
    batch = neighbors_of(spec, plan_of(spec, "mixed"))
    assert batch is not None
    args = make_arguments(
        spec, batch, spec.serving.token_buckets[-1], batch.pages(16) + 64, np.random.default_rng(SEED)
    )
    for (poison,) in poisons_alone(spec, batch):
        dirty = poisoned(spec, args, [poison])
        q_len, kv_len = batch.q_lens[poison.row], batch.kv_lens[poison.row]
        arrays = {**args.by_token, "cache": args.kv_cache}
        changed = {
            part: int((bits != array.view(bits.dtype)).sum())
            for part, array in arrays.items()
            for bits in [({**dirty.by_token, "cache": dirty.kv_cache}[part]).view(f"u{array.itemsize}")]
        }
        found = {part: count for part, count in changed.items() if count}
        heads = 1 if spec.model.rope_dim else spec.model.kv_heads
        context = kv_len - q_len if spec.model.update_cache else kv_len
        seen = context - spec.model.first_seen(kv_len - q_len)
        if poison.part in args.by_token:
            per_token = args.by_token[poison.part][0, ..., 0].size
            assert found == {poison.part: q_len * per_token}
        else:
            assert found == {"cache": seen * heads} and seen > 0


def test_poison_in_shared_pages_reaches_all_that_read_them_and_no_others() -> None:
    spec = EVERY["interleaved, plain"]
    plan = plan_of(spec, "decode")
    batch = CheckBatch("three rows", (1, 1, 1), (40, 50, 45), decodes=3)
    args = make_arguments(spec, batch, plan.tokens[0], batch.pages(16), np.random.default_rng(SEED))
    table = args.page_indices.reshape(spec.serving.max_num_seqs, -1)  # a view
    table[1, 0] = table[0, 0]  # a shared prefix
    run = prepare_run(plan, render(spec, plan))
    clean = run(args, "compiled")
    poisons: Poisons = next(
        poisons for poisons in poisons_alone(spec, batch) if (poisons[0].part, poisons[0].value) == ("old V", "NaN")
    )
    dirty = poisoned(spec, args, [replace(poisons[0], row=0)])
    found = run(dirty, "compiled")
    assert found.out is not None
    reached = np.isnan(found.out[:3].astype(np.float32)).any(axis=(1, 2))
    assert reached.tolist() == [True, True, False]
    assert reach(spec, args, clean, dirty, [0, 1], found).notes == ()
    (note,) = reach(spec, args, clean, dirty, [0], found).notes
    assert note == "attention of 1 tokens changes, first row 1, position 49"


def test_a_cache_that_poison_changes_elsewhere_is_caught() -> None:
    spec = EVERY["separate, plain"]
    plan = plan_of(spec, "decode")
    batch = CheckBatch("two rows", (1, 1), (40, 50), decodes=2)
    args = make_arguments(spec, batch, plan.tokens[0], batch.pages(spec.serving.page_size), np.random.default_rng(SEED))
    clean = prepare_run(plan, render(spec, plan))(args, "compiled")
    assert clean.kv_cache is not None
    page = int(args.page_indices[0])
    for slot, row, notes in [
        (39, 0, ()),  # new, of the row with poison
        (39, 1, (f"cache changes in 1 tokens, first at page {page}, slot 39: row 0, position 39 (new)",)),
        (38, 0, (f"cache changes in 1 tokens, first at page {page}, slot 38: row 0, position 38 (old)",)),
    ]:
        cache = clean.kv_cache.copy()
        cache.view(np.uint16)[page, 1, 0, slot, 5] ^= 1
        found = reach(spec, args, clean, args, [row], replace(clean, kv_cache=cache))
        assert found.notes == notes
        assert found.ok == (not notes)
