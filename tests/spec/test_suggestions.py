"""What an error tells to write is right: applied to the text, the same place is not refused again."""

from __future__ import annotations

import re

import pytest
from test_spec_errors import GOOD, ONE_EDIT

from rpac.errors import Problem, SpecError
from rpac.spec import parse_spec

VALUE = r"[^,}\]\n#]*|\[[^\]]*\]"


def problems_of(text: str) -> tuple[Problem, ...]:
    try:
        parse_spec(text, "x.yaml")
    except SpecError as error:
        return error.problems
    return ()


def applied(text: str, problem: Problem) -> str | None:
    """The text with the first way out that a problem names, or None where it names none that can be typed in."""
    lines = text.splitlines(keepends=True)
    if problem.line is None or problem.column is None or problem.line > len(lines):
        return None
    index, column = problem.line - 1, problem.column - 1
    key = problem.where.rpartition(".")[2]
    fix = problem.fix
    indent = " " * (column if "no such key" in problem.found else len(lines[index]) - len(lines[index].lstrip()))
    if found := re.match(r"add `([^`]*: [^`]*)`", fix):
        return "".join([*lines[:index], f"{indent}{found[1]}\n", *lines[index:]])
    if fix.startswith("remove it") and f"{key}:" in lines[index]:
        return "".join([*lines[:index], *lines[index + 1 :]])
    found = re.match(
        r"write (?:`(?P<whole>[^`]+: [^`]+)`|(?P<value>\[[^\]]*\]|[\w.-]+))(?: and `(?P<more>[^`]+)`)?", fix
    )
    if found is None or found["value"] in ("a", "it", "one", "them", "another", "in"):
        return None
    more = f"{indent}{found['more']}\n" if found["more"] else ""
    if found["whole"]:  # a line of its own, at the place of the section or of the key
        own = re.match(rf"\s*{found['whole'].partition(':')[0]}:", lines[index])
        return "".join([*lines[:index], f"{indent}{found['whole']}\n", *lines[index + bool(own) :]])
    start, rest = lines[index][:column], lines[index][column:]
    return "".join([*lines[:index], start + re.sub(VALUE, found["value"], rest, count=1), more, *lines[index + 1 :]])


TEXTS = {name: GOOD.replace(old, new) for name, (old, new, _) in ONE_EDIT.items()}
TYPED = {name: mended for name, text in TEXTS.items() if (mended := applied(text, problems_of(text)[0])) is not None}


@pytest.mark.parametrize("name", TYPED)
def test_a_suggestion_is_accepted_where_it_is_typed_in(name: str) -> None:
    (problem,) = problems_of(TEXTS[name])
    again = {(one.where, one.allowed) for one in problems_of(TYPED[name])}
    assert (problem.where, problem.allowed) not in again, TYPED[name]


def test_most_suggestions_can_be_typed_in() -> None:
    assert len(TYPED) > 0.4 * len(TEXTS)
