"""A user's step around a spec's programs: what it is lowered to, and what that computes."""

from __future__ import annotations

from collections.abc import Callable

from rpac.step import StepTask
from rpac.step.checks import check_compiled
from rpac.step.worker import checked_functions, compile_step, memory_of, step_of

TASK = Callable[..., StepTask]


def test_the_one_cache_of_scanned_layers_is_updated_in_place(task: TASK) -> None:
    step = step_of(task("llama_step:scanned"))
    assert step is not None
    compiled = compile_step(step)
    check_compiled(step, compiled, memory_of(compiled))
    assert memory_of(compiled)["alias_bytes"] == sum(cache.nbytes for cache in step.caches)


def test_a_step_that_the_model_does_not_want_is_left_out(task: TASK) -> None:
    assert checked_functions([task(), task()]) == [True, True]
    assert step_of(task("llama_step:only_mixed")) is None
