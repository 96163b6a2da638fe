"""`rpac tune`, with the real compiler, walker and oracle."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from command import TINY, rpac, start
from standin import Here, rule_of

from rpac.errors import OutputError, TargetError
from rpac.files.store import Store
from rpac.plan import plan_spec
from rpac.plan.tuned import TunedTiles
from rpac.predict import predict, programs_of
from rpac.spec import load_spec
from rpac.tune import Check, Job, Measure, Result, local_processes, tune
from rpac.tune.batches import batches_of
from rpac.tune.candidates import AXES, Axis, variants
from rpac.tune.results import entry_of, merge
from rpac.tune.search import Climb, search

SPEC = load_spec(TINY)
TUNE = ("tune", TINY, "--target", "tpu7x", "--kind", "decode")


def one_other() -> Axis:
    """An axis with one candidate beside the rule's."""
    rule = rule_of(SPEC, "decode")
    axes = (replace(axis, values=(value,)) for axis in AXES for value in axis.values)
    return next(axis for axis in axes if len(list(variants(SPEC, rule, rule, axis))) == 1)


def never(job: Job) -> Result:
    raise AssertionError(f"{job.label} was run again")


@pytest.mark.compile
@pytest.mark.once
def test_two_candidates_are_compiled_walked_and_checked_and_the_better_is_what_a_build_uses(tmp_path: Path) -> None:
    rule, store = rule_of(SPEC, "decode"), Store(tmp_path / "cache")
    climb = Climb(SPEC, rule, 0, axes=(one_other(),))
    with local_processes(1) as pool:
        (outcome,) = search([climb], pool, store)
    assert (len(outcome.tried), outcome.rejected, outcome.complete) == (2, {}, True)
    assert outcome.chosen is not None

    # The time of the rule's plan is what `rpac predict` says of it.
    (timed,) = (one for one in outcome.tried if one.label == "rule")
    largest = replace(SPEC, serving=replace(SPEC.serving, token_buckets=rule.tokens[-1:]))
    assert timed.plan == rule
    programs = programs_of(TINY, "tpu7x", store)
    predicted = [predict(programs, batch).report.seconds for batch in batches_of(largest, rule, 0)]
    assert timed.seconds == pytest.approx(predicted, rel=0.02)  # those are of the smaller bucket

    again = Climb(SPEC, rule, 0, axes=(one_other(),))
    assert search([again], Here(), store, evaluate=never) == [outcome]
    merge(tmp_path / "tuned", "tpu7x", [entry_of(outcome)])
    plans = plan_spec(SPEC, "tpu7x", tuned=TunedTiles.of("tpu7x", tmp_path / "tuned"))
    plan = next(plan for plan in plans if plan.kind == "decode")
    assert plan == replace(outcome.chosen.plan, origin=plan.origin)
    assert plan.origin.startswith("tuned: ")


def job_of(kind: type[Measure] | type[Check]) -> Job:
    """The first job of a kind in a search of the rule's plan alone."""
    pool = Here()
    search([Climb(SPEC, rule_of(SPEC, "decode"), 0, axes=())], pool, Store(None), evaluate=passing)
    return next(job for job in pool.ran if isinstance(job, kind))


@pytest.mark.compile
@pytest.mark.once
def test_a_candidate_that_does_not_compile_has_the_compilers_reason() -> None:
    job = job_of(Measure)
    assert isinstance(job, Measure)
    text = job.task.source.text.replace("vmem_limit_bytes=VMEM_LIMIT", "vmem_limit_bytes=65536")
    assert text != job.task.source.text
    result = replace(job, task=replace(job.task, source=replace(job.task.source, text=text))).run()
    assert result.seconds == ()
    assert result.final
    assert "VMEM" in result.reason or "vmem" in result.reason
    assert "\n" not in result.reason


@pytest.mark.compile
@pytest.mark.once
def test_a_kernel_that_is_wrong_fails_the_oracle() -> None:
    """Room for one sequence's queries, where there are several."""
    job = job_of(Check)
    assert isinstance(job, Check)
    broken = replace(job.plan, decode=replace(job.plan.decode, max_rows=1))  # type: ignore[type-var]
    result = replace(job, plan=broken).run()
    assert result.reason.startswith("oracle, batch ")


def test_the_time_runs_out_before_anything_is_timed(tmp_path: Path) -> None:
    done = rpac(*TUNE, "--budget", 0, "--json", "-o", tmp_path / "tuned", cache=tmp_path / "cache")
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads(done.stdout)
    (case,) = data["cases"]
    assert (case["target"], case["kind"], case["chosen"], case["tried"]) == ("tpu7x", "decode", None, {})
    assert (case["complete"], data["files"]) == (False, [])
    assert not (tmp_path / "tuned").exists()


@pytest.mark.slow
@pytest.mark.compile
def test_an_interrupted_search_ends_at_once_leaves_nothing_behind_and_goes_on_from_there(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    env, cache = {"TMPDIR": str(temporary)}, tmp_path / "cache"
    process = start(*TUNE, "--jobs", 2, "-o", tmp_path / "tuned", cache=cache, env=env, interrupts="SIG_DFL")
    assert process.stderr is not None
    first = process.stderr.readline()
    assert "tpu7x/decode rule: " in first
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert [path.name for path in temporary.iterdir() if path.name.startswith("rpac-")] == []
    assert not (tmp_path / "tuned").exists()

    done = rpac(*TUNE, "--budget", 0, "-o", tmp_path / "tuned", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "tpu7x/decode rule: " in done.stderr.splitlines()[0]
    assert done.stderr.splitlines()[0].endswith("us, cached")
    assert "cut short" in done.stdout
    assert "search cut short" in (next(iter(TunedTiles.of("tpu7x", tmp_path / "tuned").entries.values())).origin)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Missing argument"),
        (("absent.yaml", "-o", "new"), 2, "absent.yaml"),
        ((TINY, "--target", "cpu", "-o", "new"), 3, "no TPU among the targets cpu"),
        ((TINY, "--jobs", 1, "--scheduler", "tcp://127.0.0.1:1"), 2, "give one of them"),
        ((TINY, "--budget", -1), 2, "--budget"),
        ((TINY,), 2, "give -o"),
        ((TINY, "-o", "damaged", "--target", "tpu7x"), 2, "damaged/tpu7x.json: "),
    ],
)
def test_what_cannot_be_tuned_says_why(arguments: tuple[object, ...], code: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tpu7x.json").write_text("{}")
    done = rpac("tune", *arguments, cache=tmp_path / "cache", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_spec_without_a_tpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"no TPU among the targets cpu; only their kernels are tuned"):
        tune(SPEC, ["cpu"], Here(), Store(None), folder=tmp_path)


def passing(job: Job) -> Result:
    return Result() if isinstance(job, Check) else Result((1.0,) * len(job.batches))


def test_every_case_of_every_target_is_searched_and_a_file_written_for_each(tmp_path: Path) -> None:
    def stand_in(job: Job) -> Result:
        wrong = isinstance(job, Check) and job.plan.target == "v6e"
        return Result(reason="differs") if wrong else passing(job)

    options = {"kinds": ["decode", "prefill"], "folder": tmp_path / "tuned", "evaluate": stand_in}
    report = tune(SPEC, SPEC.targets, Here(2), Store(None), **options)  # type: ignore[arg-type]
    assert [path.name for path in report.files] == ["tpu7x.json", "v5p.json", "v5e.json"]
    assert {one.rule.target for one in report.failed} == {"v6e"}
    for path in report.files:
        entries = TunedTiles.of(path.stem, path.parent).entries.values()
        assert sorted(entry.key["kind"] for entry in entries) == ["decode", "prefill"]


def test_a_folder_that_is_not_of_a_search_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(OutputError, match="that this command did not make"):
        tune(SPEC, ["tpu7x"], Here(), Store(None), kinds=["decode"], folder=tmp_path, evaluate=passing)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
