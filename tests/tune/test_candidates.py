"""Candidates: the rules' plan changed along one axis, legal, and within the budget of VMEM."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from command import ROOT

from rpac.devices.chip import chip
from rpac.kernels import render
from rpac.plan import BlockTiles, DecodeTiles, GroupTiles, KernelPlan, plan_spec
from rpac.plan.decode_waves import MORE_TILES, MOST_TILES
from rpac.plan.families import vmem_need
from rpac.plan.planner import VMEM_HEADROOM
from rpac.plan.prefill import most_steps
from rpac.plan.tuned import TunedTiles
from rpac.spec import Spec, load_spec
from rpac.tune.candidates import AXES, label_of, variants

PLANS = [
    pytest.param(spec, plan, id=f"{spec.name}-{plan.path}")
    for name in ("tiny", "llama3-8b", "llama3-8b-separate", "llama3-70b-tp8", "gpt-oss-120b", "qwen3-235b")
    for spec in load_spec(Path(ROOT, "specs", f"{name}.yaml")).parts[:1]
    for target in ("tpu7x", "v5e")
    for plan in plan_spec(spec, target, tuned=TunedTiles())
]
each_plan = pytest.mark.parametrize(("spec", "plan"), PLANS)


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: f"{axis.part}.{axis.field}")
def test_an_axis_is_a_field_of_the_tiles_and_has_values_to_choose_from(axis: object) -> None:
    kinds = {"decode": (DecodeTiles, GroupTiles), "block": (BlockTiles,)}[axis.part]  # type: ignore[attr-defined]
    names = [{field.name for field in fields(kind)} for kind in kinds]
    assert any({axis.field, axis.keeps or axis.field} <= of_one for of_one in names)  # type: ignore[attr-defined]
    assert len(set(axis.values)) == len(axis.values) > 1  # type: ignore[attr-defined]


@each_plan
def test_every_candidate_is_another_plan_of_the_same_case(spec: Spec, plan: KernelPlan) -> None:
    found = [(label, other) for axis in AXES for label, other in variants(spec, plan, plan, axis)]
    assert found
    assert plan not in [other for _, other in found]
    for label, other in found:
        assert (other.target, other.kind, other.tokens, other.path) == (plan.target, plan.kind, plan.tokens, plan.path)
        assert (other.decode is None, other.block is None) == (plan.decode is None, plan.block is None)
        assert label == label_of(plan, other) != "rule"
    assert len({label for label, _ in found}) == len({other for _, other in found})
    assert label_of(plan, plan) == "rule"


@each_plan
def test_every_candidate_fits_vmem_with_the_budget_that_it_says(spec: Spec, plan: KernelPlan) -> None:
    room = chip(plan.target).vmem_bytes
    for axis in AXES:
        for _, other in variants(spec, plan, plan, axis):
            tiles = [tiles for tiles in (other.decode, other.block) if tiles is not None]
            assert other.vmem_need == max(vmem_need(spec, one, other.recipe) for one in tiles)  # type: ignore[type-var]
            assert other.vmem_need + VMEM_HEADROOM <= room
            assert other.vmem_need < other.vmem_limit <= room


@each_plan
def test_every_candidate_is_rendered(spec: Spec, plan: KernelPlan) -> None:
    """With nothing in it that divides badly, and each to another source."""
    sources = {render(spec, other).body for axis in AXES for _, other in variants(spec, plan, plan, axis)}
    assert render(spec, plan).body not in sources
    for text in sources:
        compile(text, "candidate", "exec")


@each_plan
def test_a_prefill_candidate_leaves_no_part_of_a_chunk(spec: Spec, plan: KernelPlan) -> None:
    if plan.kind == "prefill":
        for axis in AXES:
            for _, other in variants(spec, plan, plan, axis):
                assert isinstance(other.block, BlockTiles)
                assert spec.serving.prefill_chunk % other.block.q_block == 0


@each_plan
def test_no_candidate_has_longer_pieces_of_code_than_the_rules_make(spec: Spec, plan: KernelPlan) -> None:
    """Each takes compile time, and executable bytes that a bundle has a limit for."""
    device = chip(plan.target)
    for axis in AXES:
        for _, other in variants(spec, plan, plan, axis):
            if other.block is not None and axis.part == "block":
                assert isinstance(other.block, BlockTiles)
                steps = spec.model.group * other.block.q_block // other.block.step_rows
                recipe = other.recipe.block
                assert recipe is not None
                most, most_diagonal = most_steps(device, plan.kind, recipe.read, recipe.scores)
                assert other.block.heads * steps <= most or other.block.heads == 1
                assert other.block.diagonal_heads * steps <= most_diagonal or other.block.diagonal_heads == 1
            if isinstance(other.decode, GroupTiles):
                assert other.decode.step <= (MORE_TILES if plan.kind == "decode" else MOST_TILES[plan.kind])
