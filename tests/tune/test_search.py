"""The search: what it finds follows from its jobs' results, wherever and whenever they come."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from command import ROOT, TINY
from standin import Here, rule_of, slowly, timed

from rpac.errors import TargetError
from rpac.files.store import Store
from rpac.spec import load_spec
from rpac.tune import Check, Job, Measure, Outcome, Result
from rpac.tune.candidates import AXES, variants
from rpac.tune.search import MARGIN, Climb, search

SPEC = load_spec(ROOT / "specs" / "llama3-8b.yaml")
RULE = rule_of(SPEC, "mixed")
Evaluate = Callable[[Job], Result]
NOWHERE = Store(None)


def found(evaluate: Evaluate = timed, pool: Here | None = None, store: Store = NOWHERE, **options: object) -> Outcome:
    climb = Climb(SPEC, RULE, 0)
    (outcome,) = search([climb], pool or Here(), store, evaluate=evaluate, **options)  # type: ignore[arg-type]
    return outcome


def of(label: str, seconds: float, other: Evaluate = timed) -> Evaluate:
    """An evaluation that gives one candidate a time of its own."""
    return lambda job: (
        Result((seconds,) * len(job.batches)) if isinstance(job, Measure) and job.label == label else other(job)
    )


def flat(job: Job) -> Result:
    return Result() if isinstance(job, Check) else Result((1e-6,) * len(job.batches))


def first_label() -> str:
    return next(label for axis in AXES for label, _ in variants(SPEC, RULE, RULE, axis))


def test_the_fastest_of_what_was_tried_is_chosen_and_scored_against_the_rule() -> None:
    outcome = found()
    assert outcome.chosen is not None
    assert outcome.chosen.mean * (1 - MARGIN) <= outcome.tried[0].mean
    assert outcome.tried[0].mean <= outcome.tried[1].mean <= outcome.tried[-1].mean
    assert len(outcome.tried) > 20
    rule = next(one for one in outcome.tried if one.label == "rule")
    ratios = [a / b for a, b in zip(outcome.chosen.seconds, rule.seconds, strict=True)]
    assert outcome.score(outcome.chosen) == pytest.approx(math.prod(ratios) ** (1 / len(ratios)))
    assert outcome.score(rule) == 1.0
    assert (outcome.complete, outcome.rejected) == (True, {})


def test_no_neighbour_of_the_choice_is_faster() -> None:
    """The search ends at the foot of the hill."""
    outcome = found()
    assert outcome.chosen is not None
    times = {one.plan: one.mean for one in outcome.tried}
    for axis in AXES:
        for _, other in variants(SPEC, RULE, outcome.chosen.plan, axis):
            assert times.get(other, math.inf) >= outcome.chosen.mean * (1 - MARGIN)


def test_far_fewer_candidates_are_tried_than_there_are() -> None:
    there_are = math.prod(1 + len(list(variants(SPEC, RULE, RULE, axis))) for axis in AXES)
    assert len(found().tried) < 80 < there_are


@pytest.mark.parametrize("width", [1, pytest.param(2, marks=pytest.mark.slow), 7])
def test_the_outcome_is_the_same_however_many_run_at_once_and_whenever_they_end(width: int) -> None:
    assert found(slowly, Here(width)) == found()


def test_several_cases_are_searched_side_by_side_with_the_outcomes_of_each_alone() -> None:
    climbs = [Climb(SPEC, rule_of(SPEC, kind), 0) for kind in ("decode", "prefill", "mixed")]
    alone = [search([climb], Here(), NOWHERE, evaluate=timed)[0] for climb in climbs]
    again = [Climb(SPEC, climb.rule, 0) for climb in climbs]
    assert search(again, Here(3), NOWHERE, evaluate=slowly) == alone


def test_a_gain_too_small_to_tell_changes_nothing() -> None:
    label = first_label()
    assert found(of(label, 1e-6 * (1 - MARGIN / 2), flat)).chosen.label == "rule"  # type: ignore[union-attr]
    assert found(of(label, 1e-6 * (1 - MARGIN * 2), flat)).chosen.label == label  # type: ignore[union-attr]


def test_what_is_rejected_is_listed_with_its_reason_and_the_search_goes_on() -> None:
    best = found().chosen
    assert best is not None
    fastest = best.label

    def refusing(job: Job) -> Result:
        return Result(reason="no room") if isinstance(job, Measure) and job.label == fastest else timed(job)

    outcome = found(refusing)
    assert outcome.rejected == {fastest: "no room"}
    assert outcome.chosen is not None
    assert fastest not in [one.label for one in outcome.tried]


def test_a_winner_that_fails_the_oracle_gives_way_to_the_next_best() -> None:
    plain = found()
    first = plain.chosen
    second, third, *_ = (one for one in plain.tried if one != first)
    assert first is not None
    wrong = {first.label, second.label}

    def judged(job: Job) -> Result:
        return Result(reason="differs") if isinstance(job, Check) and job.label in wrong else timed(job)

    pool = Here()
    outcome = found(judged, pool)
    assert outcome.chosen == third
    assert outcome.rejected == dict.fromkeys(sorted(wrong), "differs")
    assert [job.label for job in pool.ran if isinstance(job, Check)] == [first.label, second.label, third.label]


def test_where_nothing_passes_nothing_is_chosen() -> None:
    outcome = found(lambda job: Result(reason="differs") if isinstance(job, Check) else flat(job))
    assert (outcome.chosen, outcome.tried) == (None, ())
    assert set(outcome.rejected.values()) == {"differs"}


def test_a_rule_that_cannot_be_timed_is_improved_on_without_a_score() -> None:
    outcome = found(
        lambda job: Result(reason="hangs") if isinstance(job, Measure) and job.label == "rule" else timed(job)
    )
    assert outcome.rejected == {"rule": "hangs"}
    assert outcome.chosen is not None
    assert outcome.score(outcome.chosen) is None


@pytest.mark.parametrize("allowed", [0, 1, 5])
def test_out_of_time_no_candidate_is_started_and_the_best_so_far_still_meets_the_oracle(allowed: int) -> None:
    pool = Here(2)
    outcome = found(pool=pool, out_of_time=lambda: len(pool.ran) >= allowed)
    assert len([job for job in pool.ran if isinstance(job, Measure)]) == len(outcome.tried) == allowed
    assert not outcome.complete
    checked = [job.label for job in pool.ran if isinstance(job, Check)]
    assert checked == ([outcome.chosen.label] if outcome.chosen else [])
    assert (outcome.chosen is None) == (allowed == 0)


def test_a_second_search_runs_nothing_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, pool = found(store=store), Here()
    said: list[bool] = []
    again = found(
        pool=pool, store=store, out_of_time=lambda: True, progress=lambda job, result, stored: said.append(stored)
    )
    assert again == first
    assert pool.ran == []
    assert said == [True] * len(said) != []


def test_what_was_finished_before_an_interruption_is_kept(tmp_path: Path) -> None:
    whole, store = Here(), Store(tmp_path)
    expected = found(pool=whole)
    for lasts in (3, 9):
        pool = Here(2)

        def interrupt(job: Job, result: Result, stored: bool, pool: Here = pool, lasts: int = lasts) -> None:
            if len(pool.ran) >= lasts:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            found(pool=pool, store=store, progress=interrupt)
    rest = Here()
    assert found(pool=rest, store=store) == expected
    assert len(rest.ran) <= len(whole.ran) - 3 - 9 + 2 * 2


def test_what_may_go_better_next_time_is_not_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def dying(job: Job) -> Result:
        if isinstance(job, Measure) and job.label == first_label():
            raise ChildProcessError
        return timed(job)

    first = found(dying, store=store)
    assert "died; it may have run out of memory" in first.rejected[first_label()]
    pool = Here()
    assert found(pool=pool, store=store).rejected == {}
    assert first_label() in [job.label for job in pool.ran]


def test_an_error_of_a_job_ends_the_search() -> None:
    def elsewhere(job: Job) -> Result:
        raise TargetError("the worker has libtpu 1")

    with pytest.raises(TargetError, match="the worker has libtpu 1"):
        found(elsewhere)


def job_of(label: str = "rule", **changes: object) -> Measure:
    pool = Here()
    found(pool=pool, out_of_time=lambda: bool(pool.ran))
    job = pool.ran[0]
    assert isinstance(job, Measure)
    return replace(job, label=label, **changes)  # type: ignore[arg-type]


def test_a_result_is_kept_by_all_that_decides_it_and_by_nothing_else() -> None:
    job = job_of()
    other = replace(job.task, source=replace(job.task.source, text=job.task.source.text + "\n"))
    keys = [
        job.key(),
        job_of(task=other).key(),
        job_of(task=replace(job.task, plan={**job.task.plan, "vmem_limit": 1})).key(),
        job_of(batches=job.batches[1:]).key(),
        job_of(toolchain={**job.toolchain, "libtpu_files": "other"}).key(),
    ]
    assert len(set(keys)) == len(keys)
    assert job_of("another name", case="another case").key() == job.key()


def test_a_check_is_kept_by_all_that_decides_it() -> None:
    pool = Here()
    found(pool=pool)
    job = pool.ran[-1]
    assert isinstance(job, Check)
    keys = [
        job.key(),
        replace(job, seed=1).key(),
        replace(job, plan=RULE).key(),
        replace(job, spec=load_spec(TINY)).key(),
        replace(job, source_sha256="other").key(),
        replace(job, toolchain={}).key(),
    ]
    assert len(set(keys)) == len(keys)
