"""Candidates: the rules' plan changed along one axis, legal, and within the budget of VMEM."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from command import ROOT

from rpac.devices.chip import chip
from rpac.kernels import render
from rpac.plan import BlockTiles, DecodeBlocks, DecodeWaves, KernelPlan, plan_spec
from rpac.plan.decode_waves import MORE_TILES, most_tiles
from rpac.plan.families import OPTIONS, override_of, vmem_need
from rpac.plan.planner import VMEM_HEADROOM, with_tiles
from rpac.plan.prefill import most_steps
from rpac.plan.tuned import TunedTiles
from rpac.spec import Spec, load_spec
from rpac.tune.candidates import AXES, Axis, label_of, variants

PLANS = [
    pytest.param(spec, plan, id=f"{spec.name}-{plan.path}")
    for name in ("tiny", "llama3-8b", "llama3-8b-separate", "llama3-70b-tp8", "gpt-oss-120b", "qwen3-235b")
    for spec in load_spec(Path(ROOT, "specs", f"{name}.yaml")).parts[:1]
    for target in ("tpu7x", "v5e")
    for plan in plan_spec(spec, target, tuned=TunedTiles())
]
each_plan = pytest.mark.parametrize(("spec", "plan"), PLANS)


@pytest.mark.parametrize("axis", AXES, ids=lambda axis: f"{axis.part}.{axis.field}")
def test_an_axis_is_a_field_of_the_tiles_or_a_decision_and_has_values_to_choose_from(axis: Axis) -> None:
    kinds = {"decode": (DecodeBlocks, DecodeWaves), "block": (BlockTiles,)}[axis.part]
    names = [{field.name for field in fields(kind)} for kind in kinds]
    if axis.of_recipe:
        names = [set(OPTIONS[axis.part])]
    assert any({axis.field, axis.keeps or axis.field} <= of_one for of_one in names)
    assert len(set(axis.values)) == len(axis.values) > 1


def test_every_decision_that_tiles_leave_open_is_an_axis() -> None:
    assert [(axis.part, axis.field) for axis in AXES if axis.of_recipe] == [
        (part, name) for part, names in OPTIONS.items() for name in names
    ]


@each_plan
def test_every_candidate_is_another_plan_of_the_same_case(spec: Spec, plan: KernelPlan) -> None:
    found = [(label, other) for axis in AXES for label, other in variants(spec, plan, plan, axis)]
    assert found
    assert plan not in [other for _, other in found]
    for label, other in found:
        assert (other.target, other.kind, other.tokens, other.path) == (plan.target, plan.kind, plan.tokens, plan.path)
        assert (other.decode is None, other.block is None) == (plan.decode is None, plan.block is None)
        assert label == label_of(spec, plan, other) != "rule"
    assert len({label for label, _ in found}) == len({other for _, other in found})
    assert label_of(spec, plan, plan) == "rule"


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
def test_a_candidate_of_a_decision_has_another_recipe_and_says_so(spec: Spec, plan: KernelPlan) -> None:
    assert not override_of(spec, plan)
    for axis in AXES:
        for label, other in variants(spec, plan, plan, axis) if axis.of_recipe else ():
            override = override_of(spec, other)
            assert override.as_dict()[axis.part][axis.field] in axis.values
            assert getattr(getattr(other.recipe, axis.part), axis.field) in axis.values
            assert f"{axis.part}.{axis.field}=" in label
            found = with_tiles(spec, plan, other.decode, other.block, override)  # type: ignore[arg-type]
            assert found == other


def test_the_options_of_every_decision_are_among_the_candidates_of_some_spec() -> None:
    """Where the search starts from, or one step away; pacing and token pairs are options of few shapes."""
    starts = [(spec, plan) for spec, plan in (param.values for param in PLANS)]
    found = {
        axis.field for axis in AXES if axis.of_recipe for spec, plan in starts if list(variants(spec, plan, plan, axis))
    }
    assert {"scores", "mask", "pipelined"} <= found


def test_other_tiles_keep_decisions_as_far_as_they_allow_them() -> None:
    spec = load_spec(Path(ROOT, "specs", "llama3-8b-separate.yaml"))
    rule = next(plan for plan in plan_spec(spec, "tpu7x", tuned=TunedTiles()) if plan.kind == "prefill")
    axes = {(axis.part, axis.field): axis for axis in AXES}
    (start,) = (plan for _, plan in variants(spec, rule, rule, axes["block", "pipelined"]))
    for label, plan in variants(spec, rule, start, axes["block", "block"]):
        assert plan.recipe.block is not None
        assert not plan.recipe.block.pipelined
        assert label.endswith(" block.pipelined=false")
    back = [plan for _, plan in variants(spec, rule, start, axes["block", "pipelined"])]
    assert back == [rule]


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
            if isinstance(other.decode, DecodeWaves):
                most = max(most_tiles(spec, plan.kind, other.decode.tile), MORE_TILES * (plan.kind == "decode"))
                assert other.decode.tiles_per_wave <= most
