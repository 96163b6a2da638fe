"""Page tables are in SMEM where they fit, and else in HBM: any that a spec can ask for has a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from drawn_specs import SPECS, TINY
from hypothesis import given
from hypothesis import strategies as st

from rpac.devices.chip import TPU_TARGETS, chip
from rpac.kernels import render
from rpac.plan import plan_spec
from rpac.plan.families import Override, override_of
from rpac.plan.page_table import entries_of, options, padded_entries, smem_usable, window_entries
from rpac.plan.planner import with_tiles
from rpac.plan.tuned import TunedTiles
from rpac.plan.words import decisions
from rpac.spec import Spec

LLAMA = {name: next(spec for spec in SPECS if spec.name == name) for name in ("llama3-8b", "llama3-8b-separate")}
LONG: dict[str, dict[str, int]] = {
    "256 x 128K": {"max_num_seqs": 256, "max_model_len": 1 << 17, "page_size": 128},
    "1024 x 1M": {"max_num_seqs": 1024, "max_model_len": 1 << 20, "page_size": 16},
}


def long_spec(spec: Spec, **changes: Any) -> Spec:
    """The spec with longer or more sequences, in a cache of a few of them."""
    serving = replace(spec.serving, **changes)
    tokens = max(serving.max_num_tokens, serving.max_num_seqs)
    more = {"num_pages": 2 * serving.pages_per_seq, "max_num_tokens": tokens, "token_buckets": (tokens,)}
    return replace(spec, serving=replace(serving, **more))


@pytest.mark.parametrize("target", TPU_TARGETS)
@pytest.mark.parametrize("size", LONG)
@pytest.mark.parametrize("spec", LLAMA.values(), ids=lambda spec: spec.name)
def test_page_tables_that_smem_cannot_hold_are_in_hbm(spec: Spec, size: str, target: str) -> None:
    spec = long_spec(spec, **LONG[size])
    plans = plan_spec(spec, target, tuned=TunedTiles())
    assert {plan.kind for plan in plans} == {"decode", "prefill", "mixed"}
    for plan in plans:
        assert plan.recipe.page_table == "hbm"
        assert plan.smem_need < 4 * entries_of(spec) // 2
        assert plan.smem_need <= smem_usable(chip(target))
        assert any("in HBM" in one.choice for one in decisions(plan.recipe, plan.kind) if one.name == "page tables")
        text = render(spec, plan).text
        assert f"TABLE_ENTRIES = {entries_of(spec)} " in text
        assert "jnp.pad(page_indices" not in text, "XLA would copy the tables"


@pytest.mark.parametrize("target", TPU_TARGETS)
def test_one_sequence_more_than_smem_holds_moves_the_tables_to_hbm(target: str) -> None:
    def tables(seqs: int) -> set[str]:
        spec = long_spec(TINY, max_model_len=1 << 15, max_num_seqs=seqs)
        return {plan.recipe.page_table for plan in plan_spec(spec, target, tuned=TunedTiles())}

    most = next(seqs for seqs in range(256, 0, -1) if tables(seqs) == {"smem"})
    assert 100 < most < 256
    assert tables(most + 1) == {"hbm"}


def test_page_tables_that_fit_smem_may_be_in_hbm_too_and_others_may_not_be_in_smem() -> None:
    (plan, *_) = plan_spec(TINY, "v6e")
    in_hbm = with_tiles(TINY, plan, plan.decode, plan.block, Override(program={"page_table": "hbm"}))  # type: ignore[arg-type]
    assert in_hbm is not None
    assert in_hbm.recipe.page_table == "hbm"
    assert override_of(TINY, in_hbm) == Override(program={"page_table": "hbm"})
    assert not override_of(TINY, plan)
    large = long_spec(TINY, **LONG["1024 x 1M"])
    assert options(large, chip("v6e")) == ("hbm",)
    with pytest.raises(ValueError, match="page_table: found 'smem'; with these tiles it must be 'hbm'"):
        with_tiles(large, plan, plan.decode, plan.block, Override(program={"page_table": "smem"}))  # type: ignore[arg-type]


def test_cpu_has_no_smem_to_run_out_of() -> None:
    assert all(plan.recipe.page_table == "smem" for plan in plan_spec(long_spec(TINY, **LONG["1024 x 1M"]), "cpu"))


@given(
    st.integers(1, 300), st.integers(1, 64), st.integers(0, 6), st.sampled_from([None, 3, 200]), st.integers(0, 10**6)
)
def test_a_window_has_the_pages_of_any_block_that_it_is_fetched_for(
    pages: int, seqs: int, bits: int, sliding: int | None, draw: int
) -> None:
    """As kernels find it: it begins at the row of a block's first entry, or so that it ends with the tables."""
    serving = replace(TINY.serving, max_model_len=pages * TINY.serving.page_size, max_num_seqs=seqs)
    spec = replace(TINY, model=replace(TINY.model, sliding_window=sliding), serving=serving)
    block = 1 << bits
    window, padded = window_entries(spec, block), padded_entries(spec)
    assert window % 128 == padded % 128 == 0
    assert window <= padded
    seq, first = draw % seqs, draw // seqs % pages
    if sliding is None:
        first -= first % block
    entry = seq * pages + first
    begin = min(entry - entry % 128, padded - window)
    last = seq * pages + min(first + block, pages)
    assert 0 <= begin <= entry
    assert last <= begin + window
