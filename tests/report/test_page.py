"""The page shows the numbers of its report, is sound HTML, and loads nothing."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from command import TINY, rpac

from rpac.cli import main
from rpac.errors import OutputError
from rpac.report import Report, check_page, is_page, page

Gathered = Callable[..., Report]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Parsed(HTMLParser):
    """The cells of all tables, the data, and every attribute; each element must be closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str]] = []
        self.data = ""
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_the_tables_show_the_numbers_of_the_data(usual: Report) -> None:
    found = Parsed(page(usual))
    shown = {cell for row in found.rows for cell in row}
    for option in usual.options:
        for layer in option.layers:
            for timing in layer.timings:
                assert {timing.batch, timing.program, f"{1e6 * timing.seconds:,.1f}", timing.bound.words} <= shown
            for kernel in layer.kernels:
                assert {kernel.source, kernel.origin} <= shown
    step = usual.options[0].step("decode 4x100")
    assert step is not None and step.dollars_per_million_tokens is not None and step.tokens_per_second is not None
    assert {f"${step.dollars_per_million_tokens:.5f}", f"{step.tokens_per_second:,.0f}"} <= shown
    assert "not known" in shown, "the chip without a price"
    assert json.loads(found.data) == json.loads(json.dumps(usual.to_json()))


def test_kernels_that_share_their_decisions_share_a_list(usual: Report) -> None:
    text = html.unescape(page(usual))
    for kernel in usual.options[0].layers[0].kernels:
        assert f"<li>{kernel.decisions[0]}</li>\n<li>{kernel.decisions[1]}</li>" in text.replace("<code>", "`").replace(
            "</code>", "`"
        )
    assert "<h3>tpu7x/decode.py, v6e/decode.py</h3>" in text


def test_a_chip_that_cannot_hold_the_caches_is_not_the_best(usual: Report) -> None:
    assert [option.caches_of_hbm is not None and 0 < option.caches_of_hbm < 1 for option in usual.options] == [
        True,
        True,
    ]
    first, second = usual.options
    full = dataclasses.replace(first, all_caches_bytes=2 * first.layers[0].memory.usable_hbm_bytes)
    text = page(dataclasses.replace(usual, options=(full, second)))
    assert text.count("200%, too large") == 2, "in the tables of decode and of prefill"
    bests = [Parsed(one).rows[0][0] for one in re.findall(r"<tr>.*?</tr>", text, re.DOTALL) if 'class="best"' in one]
    assert bests == ["v6e", "v6e"]


def test_nothing_is_loaded_and_no_two_elements_share_a_name(usual: Report) -> None:
    text = page(usual)
    found = Parsed(text)
    links = [value for name, value in found.attributes if name.split(":")[-1] in ("src", "href", "srcset", "data")]
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert len(found.ids) == len(set(found.ids))


def test_the_same_report_is_the_same_page(usual: Report) -> None:
    assert page(usual) == page(usual)


def test_text_from_outside_is_text(usual: Report) -> None:
    odd = dataclasses.replace(usual, command="rpac report '</script><b>x</b>'", missing=("<i>`a<b>`",))
    text = page(odd)
    assert "<b>x</b>" not in text
    assert "&lt;i&gt;<code>a&lt;b&gt;</code>" in text
    assert json.loads(Parsed(text).data)["command"] == odd.command


def test_charts_have_colors_of_the_style_sheet_alone(usual: Report) -> None:
    charts = re.findall(r'<svg class="chart".*?</svg>', page(usual), re.DOTALL)
    assert len(charts) == 4, "time and share, of decode and of prefill"
    for one in charts:
        assert {"var(--series-1)", "var(--series-2)", "var(--ink)", "var(--grid)"} <= set(
            re.findall(r"var\([^)]*\)", one)
        )
        assert set(re.findall(r"#[0-9a-f]{6}\b", one)) <= {"#000000", "#ffffff"}


def run(*options: str) -> Result:
    return CliRunner().invoke(main, ["report", str(TINY), *options])


def test_only_a_page_of_its_own_is_replaced(tmp_path: Path, usual: Report) -> None:
    path = tmp_path / "out.html"
    path.write_text(page(usual))
    assert is_page(path)
    path.write_text("<!doctype html>\n<title>mine</title>")
    done = run("-o", str(path))
    assert done.exit_code == 5
    assert "found a file that this command did not make" in done.stderr
    assert path.read_text().endswith("<title>mine</title>")


def test_what_prevents_a_page_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"report\.pdf: cannot be a page; its name must end in \.html"):
        check_page(tmp_path / "report.pdf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OutputError, match=r"install rpac\[plot\], or give --json alone"):
        check_page(tmp_path / "report.html")


@pytest.mark.parametrize(
    "options, words",
    [
        ((), "give -o FILE for a page, --json for its data, or both"),
        (("--json", "--quick", "--decode", "4x40"), "--quick chooses the batches"),
        (("--json", "--layers", "0"), "--layers: found '0'; must be [SPEC:][KIND=]N"),
        (("--json", "--layers", "a:b:3"), "--layers: found 'a:b:3'"),
        (("--json", "--layers", "3", "--layers", "4"), "a number is given twice"),
        (("--json", "--price", "v6e=free"), "--price: found 'v6e=free'; must be TARGET=DOLLARS"),
        (("--json", "--price", "v6e=inf"), "must be TARGET=DOLLARS, above 0"),
        (("--json", "--price", "v9=1"), "with TARGET one of tpu7x"),
    ],
)
def test_bad_usage(options: tuple[str, ...], words: str) -> None:
    done = run(*options)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
    assert done.stdout == ""


@pytest.mark.compile
def test_the_command_writes_a_page_and_the_same_data(tmp_path: Path, dumps: Path) -> None:
    path = tmp_path / "new" / "report.html"
    options = ("--target", "tpu7x", "--quick", "--layers", "2", "-o", path, "--json")
    done = rpac("report", TINY, *options, cache=dumps)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data == json.loads(Parsed(path.read_text()).data)
    assert data["command"].startswith("rpac report ")
    timings = data["options"][0]["layers"][0]["timings"]
    assert [one["batch"] for one in timings] == ["decode 4x40", "decode 4x100"]
    assert all(0 < one["seconds"] < 1e-3 for one in timings)
    assert "[  2/2]" in done.stderr
    assert sorted(one.name for one in path.parent.iterdir()) == ["report.html"]
