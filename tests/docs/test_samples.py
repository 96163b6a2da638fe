"""Each sample in the README and in docs/ is what its command prints, or what its file says."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import PAGES, ROOT, Sample, excerpt, found, samples


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of builds for all pages, which build the same small spec."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("page", [page for page in PAGES if samples(page)], ids=lambda page: page.name)
def test_samples_are_what_their_sources_say(page: Path, tmp_path: Path, cache: Path) -> None:
    for sample, now in zip(samples(page), found(samples(page), tmp_path, cache), strict=True):
        assert sample.holds(now), (
            f"{page.relative_to(ROOT)} shows of {sample.source}:\n{sample.text}\nnow it is:\n{now}\nrun `make samples`"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_mark_is_above_a_block(page: Path) -> None:
    text = page.read_text()
    marks = text.count("<!-- sample: ") + text.count("<!-- sample, numbers vary: ") + text.count("<!-- excerpt: ")
    assert len(samples(page)) == marks


@pytest.mark.parametrize(
    ("kind", "shown", "now"),
    [
        ("sample", "a 1.5\n", "a 1.5\n"),
        ("sample", "a\n...\nd\n", "a\nb\nc\nd\n"),
        ("sample", "a\n...\nd\n", "a\nd\n"),
        ("sample", "on ... here\n", "on cpu:0 here\n"),
        ("sample, numbers vary", "a  1.55 s  20 KiB\n-  ---\n", "a  12.1 s    9 KiB\n-  ------\n"),
    ],
)
def test_a_block_holds(kind: str, shown: str, now: str) -> None:
    assert Sample(kind, "", shown, 0, 0).holds(now)


@pytest.mark.parametrize(
    ("kind", "shown", "now"),
    [
        ("sample", "a 1.5\n", "a 1.6\n"),
        ("sample", "a\n", "a\nb\n"),
        ("sample", "a\n...\nd\n", "a\nd\ne\n"),
        ("sample", "a.c\n", "abc\n"),
        ("sample, numbers vary", "a 1.5 s\n", "b 1.5 s\n"),
        ("sample, numbers vary", "5 programs\n", "6 programs\n"),
    ],
)
def test_a_block_that_says_something_else_does_not_hold(kind: str, shown: str, now: str) -> None:
    assert not Sample(kind, "", shown, 0, 0).holds(now)


def test_an_excerpt_of_a_function_ends_with_it() -> None:
    lines = excerpt("tests/docs/samples.py excerpt").splitlines()
    assert lines[0].startswith("def excerpt(")
    assert lines[-1].startswith("    raise AssertionError(")
