"""The check can fail: each of these bugs, put into a kernel by hand, is caught by it."""

from __future__ import annotations

from itertools import chain

import pytest
from bugs import all_suites
from mutation import SEED, Bug, BugSuite, check_bug

from rpac.check import check_source
from rpac.kernels import render

SUITES = all_suites()
WITHOUT_BUGS = (
    "decode, blocks",
    "prefill, interleaved",
)  # checked as they are in the ordinary run


def cases(suite: BugSuite) -> list[object]:
    return [
        pytest.param(suite, bug, id=f"{suite}: {bug}", marks=[] if bug.name in suite.ordinary else pytest.mark.slow)
        for bug in suite.bugs
    ]


@pytest.mark.parametrize("suite", SUITES, ids=str)
def test_every_bug_is_one_edit_of_its_kernel(suite: BugSuite) -> None:
    suite.apply_all()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "suite",
    [
        pytest.param(suite, id=suite.name, marks=[] if suite.name in WITHOUT_BUGS else pytest.mark.slow)
        for suite in SUITES
    ],
)
def test_without_a_bug_there_is_nothing_to_catch(suite: BugSuite) -> None:
    plan = suite.make_plan(suite.spec)
    failed = [one for one in check_source(suite.spec, plan, render(suite.spec, plan), seed=SEED) if not one.ok]
    assert not failed


@pytest.mark.interpreter
@pytest.mark.parametrize(("suite", "bug"), [*chain.from_iterable(map(cases, SUITES))])
def test_a_bug_is_caught(suite: BugSuite, bug: Bug) -> None:
    check_bug(suite.spec, suite.make_plan(suite.spec), bug)
