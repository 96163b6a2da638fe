"""The batches of a search: of the plan's kind, as full as its largest bucket allows, at the lengths that a spec expects."""

from __future__ import annotations

from dataclasses import replace

import pytest
from command import ROOT, TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpac.contract.attention import Serving
from rpac.plan import plan_spec
from rpac.plan.tuned import TunedTiles
from rpac.spec import Spec, load_spec
from rpac.tune.batches import batches_of, limits_of

SPECS = [part for path in sorted((ROOT / "specs").glob("*.yaml")) for part in load_spec(path).parts]
TINY_SPEC = load_spec(TINY)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    page = 16 << draw(st.integers(0, 3))
    max_len = page * draw(st.integers(8, 64))
    buckets = tuple(sorted(draw(st.sets(st.integers(1, 512), min_size=1, max_size=4))))
    chunk = draw(st.sampled_from([16, 48, 128]))
    lengths = draw(st.lists(st.integers(1, max_len), min_size=1, max_size=3))
    seqs = draw(st.integers(1, 40))
    serving = Serving(page, max_len, buckets[-1], buckets, seqs, chunk, tuple(sorted(lengths)), 4096)
    return replace(TINY_SPEC, serving=serving)


@settings(derandomize=True, database=None, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(specs(), st.integers(0, 99))
def test_batches_are_of_the_plans_kind_and_inside_the_contract(spec: Spec, seed: int) -> None:
    for plan in plan_spec(spec, "tpu7x", tuned=TunedTiles()):
        batches = batches_of(spec, plan, seed)
        assert batches == batches_of(spec, plan, seed)
        assert len({one.kv_lens for one in batches}) == len(batches)
        for one in batches:
            batch = one.batch(limits_of(spec, plan))
            assert (batch.kind, batch.tokens) == (plan.kind, plan.tokens[-1])
        if plan.kind != "mixed" or plan.tokens[-1] > 1:
            assert batches


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.name}{spec.layer and '-'}{spec.layer}")
def test_each_expected_length_has_a_batch_and_one_is_ragged(spec: Spec) -> None:
    lengths = spec.serving.context_lens
    for plan in plan_spec(spec, "tpu7x", tuned=TunedTiles()):
        *uniform, ragged = batches_of(spec, plan, 0)
        assert [max(one.kv_lens) for one in uniform] == [max(length, *uniform[0].q_lens) for length in lengths]
        assert len(set(ragged.kv_lens)) > 1
        assert min(lengths) <= min(ragged.kv_lens) <= max(ragged.kv_lens) <= max(lengths)
        assert batches_of(spec, plan, 1)[:-1] == tuple(uniform)
        assert batches_of(spec, plan, 1)[-1] != ragged


def test_a_mixed_batch_has_decoding_sequences_beside_chunks() -> None:
    spec = next(spec for spec in SPECS if spec.name == "llama3-8b")
    small, large = (plan for plan in plan_spec(spec, "tpu7x", tuned=TunedTiles()) if plan.kind == "mixed")
    assert batches_of(spec, large, 0)[0].q_lens == (1,) * 62 + (512,) * 2
    assert batches_of(spec, small, 0)[0].q_lens == (1,) * 32 + (32,)


def test_a_bucket_of_one_token_holds_no_mixed_batch() -> None:
    serving = replace(TINY_SPEC.serving, token_buckets=(1,), max_num_tokens=1)
    spec = replace(TINY_SPEC, serving=serving)
    (plan,) = (plan for plan in plan_spec(spec, "tpu7x", tuned=TunedTiles()) if plan.kind == "mixed")
    assert batches_of(spec, plan, 0) == ()
