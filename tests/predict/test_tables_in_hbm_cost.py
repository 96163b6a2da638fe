"""Programs with page tables in HBM: their schedules read the tables there, and take little longer than those with SMEM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import TINY

from rpac.batch import Limits
from rpac.contract.program import Variant
from rpac.devices.chip import TPU_TARGETS
from rpac.files.store import Store
from rpac.kernels import render
from rpac.lower import tasks_of
from rpac.plan import plan_spec
from rpac.plan.families import Override
from rpac.plan.planner import with_tiles
from rpac.plan.tuned import TunedTiles
from rpac.predict import Prediction, Programs, parse_decode, parse_prefill, predict
from rpac.spec import Spec, load_spec

SLOW = pytest.mark.slow
LLAMA = load_spec(Path(__file__).parents[2] / "specs" / "llama3-8b-separate.yaml")


def programs_with(spec: Spec, target: str, kind: str, table: str, dumps: Path) -> Programs:
    """The program of one kind for the largest bucket, with its page tables where `table` says."""
    plan = next(plan for plan in reversed(plan_spec(spec, target, tuned=TunedTiles())) if plan.kind == kind)
    override = Override(program={"page_table": table})
    found = with_tiles(spec, plan, plan.decode, plan.block, override)  # type: ignore[arg-type]
    assert found is not None
    tasks = {Variant(task.kind, task.tokens): task for task in tasks_of(spec, [(found, render(spec, found))])}  # type: ignore[arg-type]
    return Programs(
        spec.name,
        target,
        spec.model,
        Limits.of(spec),
        spec.serving.context_lens,
        tasks,
        Store(dumps),
        lambda line: None,
    )


def served(spec: Spec, **changes: Any) -> Spec:
    return replace(spec, serving=replace(spec.serving, **changes))


def times(spec: Spec, target: str, kind: str, batch: str, dumps: Path) -> list[Prediction]:
    work = parse_prefill(batch) if kind == "prefill" else parse_decode(batch)
    return [predict(programs_with(spec, target, kind, table, dumps), work) for table in ("smem", "hbm")]


@pytest.mark.parametrize("target", ["tpu7x", *(pytest.param(one, marks=SLOW) for one in TPU_TARGETS if one != "tpu7x")])
def test_a_walk_reads_page_tables_in_hbm(target: str, dumps: Path) -> None:
    """It fetches the pages of every token, wherever their entries are: the same bytes as with the tables in SMEM."""
    spec = served(load_spec(TINY), max_model_len=1 << 12, token_buckets=(32,))
    for kind, batch in (("decode", "4x4000"), ("prefill", "2x16/3000")):
        in_smem, in_hbm = (one.report.kernels[0] for one in times(spec, target, kind, batch, dumps))
        assert in_hbm.dmas > in_smem.dmas
        assert in_hbm.written_bytes == in_smem.written_bytes
        assert 0 < in_hbm.read_bytes - in_smem.read_bytes < 64 * 1024


@SLOW
@pytest.mark.parametrize("target", TPU_TARGETS)
def test_the_largest_page_tables_compile_and_are_walked(target: str, dumps: Path) -> None:
    sizes = {"max_num_seqs": 1024, "max_model_len": 1 << 20, "page_size": 16, "num_pages": 1 << 17}
    spec = served(load_spec(TINY), **sizes, max_num_tokens=1024, token_buckets=(1024,))
    for kind, batch in (("decode", "1024x1000"), ("prefill", "4x16/100000")):
        programs = programs_with(spec, target, kind, "hbm", dumps)
        work = parse_prefill(batch) if kind == "prefill" else parse_decode(batch)
        assert predict(programs, work).report.seconds > 0


@SLOW
@pytest.mark.parametrize(("kind", "batch"), [("decode", "64x1024"), ("decode", "64x4096"), ("prefill", "4x512/4096")])
def test_page_tables_in_hbm_cost_no_more_than_3_percent(kind: str, batch: str, dumps: Path) -> None:
    in_smem, in_hbm = (one.report.seconds for one in times(LLAMA, "tpu7x", kind, batch, dumps))
    assert in_smem < in_hbm < 1.03 * in_smem
