"""A user's step around a spec's programs: what it is lowered to, and what that computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rpac.step import StepTask
from rpac.step.worker import checked_functions, compile_step, step_of

TASK = Callable[..., StepTask]


@pytest.mark.parametrize(("function", "caches"), [("step", 2), ("scanned", 1)])
def test_every_cache_is_updated_in_place(task: TASK, function: str, caches: int) -> None:
    step = step_of(task(f"llama_step:{function}"))
    assert step is not None
    memory = compile_step(step).memory_analysis()
    assert len(step.caches) == caches
    assert memory.alias_size_in_bytes == sum(cache.nbytes for cache in step.caches)


def test_a_step_that_the_model_does_not_want_is_left_out(task: TASK) -> None:
    assert checked_functions([task(), task()]) == [True, True]
    assert step_of(task("llama_step:only_mixed")) is None
