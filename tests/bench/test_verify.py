"""Which rows of a batch are held against the oracle, and that a difference in any of these is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpac.batch import Limits
from rpac.bench import verify as module
from rpac.bench.batches import Case, cases_of_programs
from rpac.bench.inputs import Calls, make_cache, make_inputs
from rpac.bench.verify import rows_to_look_at, verify
from rpac.engine import Engine, load
from rpac.engine.probe import filled_cache
from rpac.errors import CheckError
from rpac.predict import Workload


@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "rows"),
    [
        ([1], [5], [0]),
        ([1] * 64, [5] * 64, [0, 21, 42, 63]),
        ([1] * 3, [20000, 20000, 100], [0, 2]),
        ([1] * 2, [50000, 40000], [1]),  # more than is looked at, but one row at least
        ([1, 2000, 2000, 2000], [100, 5000, 5000, 5000], [0, 1]),
        ([2000], [20000], [0]),
    ],
)
def test_rows_from_the_first_to_the_last_are_looked_at(q_lens: list[int], kv_lens: list[int], rows: list[int]) -> None:
    limits = Limits(
        page_size=128, pages_per_seq=512, max_num_seqs=64, num_pages=2048, prefill_chunk=512, token_buckets=(8192,)
    )
    batch = Workload("", tuple(q_lens), tuple(kv_lens)).batch(limits)
    assert rows_to_look_at(batch) == rows


@pytest.fixture(scope="module")
def engine(small: Path) -> Engine:
    return load(small, target="cpu")


def cases(engine: Engine) -> list[Case]:
    return cases_of_programs("", engine.programs, engine.limits, (32,))


def test_every_kind_of_program_is_right(engine: Engine) -> None:
    assert {case.variant.kind for case in cases(engine)} == {"decode", "prefill", "mixed"}
    for case in cases(engine):
        inputs = make_inputs(engine, case, 3)
        found = verify(engine, case, inputs)
        assert found.error <= found.tolerance
        assert found.rows == tuple(rows_to_look_at(inputs.batch))


def test_another_seed_is_another_call(engine: Engine) -> None:
    case = cases(engine)[0]
    one, same, other = (make_inputs(engine, case, seed) for seed in (1, 1, 2))
    for name in ("held", "pages"):
        assert np.array_equal(getattr(one, name), getattr(same, name))
    assert not np.array_equal(one.held, other.held)
    assert not np.array_equal(one.by_token["queries"], other.by_token["queries"])


def test_a_cache_that_is_made_on_the_host_is_the_one_that_a_device_makes(engine: Engine) -> None:
    case = cases(engine)[0]
    inputs = make_inputs(engine, case, 3)
    dims = next(dims for dims in engine.programs[case.variant].args if dims.name == "kv_cache")
    of_device = filled_cache(engine.placement, dims, inputs.pages, inputs.held, inputs.places)
    assert np.array_equal(make_cache(engine.placement, dims, inputs), of_device)


class Off(Calls):
    """Calls whose last row, or whose cache, is another than the program's."""

    what = ""

    def __call__(self) -> Any:
        out, *more = super().__call__()
        if self.what == "cache":
            self.kv_cache = self.kv_cache * 2
        return (out.at[3].multiply(1.5) if self.what == "out" else out, *more)


@pytest.mark.parametrize(("what", "said"), [("out", "row 3, position"), ("cache", "cache differs in ")])
def test_a_difference_is_found(engine: Engine, monkeypatch: pytest.MonkeyPatch, what: str, said: str) -> None:
    monkeypatch.setattr(module, "Calls", Off)
    monkeypatch.setattr(Off, "what", what)
    case = cases(engine)[0]
    with pytest.raises(CheckError, match=said):
        verify(engine, case, make_inputs(engine, case, 3))


def test_calls_run_on_with_the_cache_of_the_last(engine: Engine) -> None:
    case = cases(engine)[0]
    calls = Calls(engine, case, make_inputs(engine, case, 3))
    first = [np.asarray(array) for array in calls()]
    before = calls.kv_cache
    for _ in range(3):
        last = [np.asarray(array) for array in calls()]
    calls.wait()
    assert before.is_deleted()
    assert all(np.array_equal(*pair) for pair in zip(first, last, strict=True))
