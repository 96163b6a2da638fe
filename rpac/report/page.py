"""The report as one HTML file, which loads nothing: tables, charts as SVG, and the data itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import jinja2
from markupsafe import Markup, escape

from rpac._version import __version__
from rpac.contract.units import size, traffic
from rpac.errors import OutputError
from rpac.report.charts import Line, chart, check_charts, swatch
from rpac.report.facts import MEANINGS, Layer, Option, Report, Timing
from rpac.trust.issue import EVIDENCE_HEADER, FIELDS_HEADER, evidence_rows, field_rows

MARK: Final = '<meta name="generator" content="rpac report">'
_MARK_WITHIN: Final = 512  # bytes from the start of a page


@dataclass(frozen=True)
class Row:
    """A batch on one kind of layer of an option, and the name of these two."""

    option: Option
    layer: Layer
    timing: Timing
    name: str


@dataclass(frozen=True)
class Summary:
    """A batch on an option, for the first table; `best` names the columns in which it is the best of those that fit."""

    name: str
    option: Option
    timings: tuple[tuple[str, Timing], ...]
    all_layers_seconds: float | None
    tokens_per_second: float | None
    dollars: float | None
    best: frozenset[str]


@dataclass(frozen=True)
class Section:
    """All batches of one kind: `measure` is the share that they are judged by."""

    title: str
    measure: Literal["MBU", "MFU"]
    about: str
    batches: tuple[tuple[str, tuple[Row, ...]], ...]
    charts: tuple[tuple[str, str], ...]
    legend: tuple[tuple[str, str], ...]


def check_page(path: Path) -> None:
    """Raises OutputError where no page could be made, before anything is compiled for it."""
    check_charts()
    if path.suffix not in (".html", ".htm"):
        raise OutputError(f"{path}: cannot be a page; its name must end in .html")


def is_page(path: Path) -> bool:
    """Whether a file is a page that `page` made."""
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(_MARK_WITHIN)
    except OSError:
        return False


def page(report: Report) -> str:
    """The HTML. The same report makes the same bytes with the same matplotlib."""
    rows = list(_rows(report))
    sections = [
        section
        for kind, title, measure, about in (
            ("decode", "Decode", "MBU", "Every sequence gets its next token. Memory bandwidth is what counts."),
            ("prefill", "Prefill", "MFU", "Chunks of prompts, each up to the given length. Arithmetic is what counts."),
            ("mixed", "Mixed batches", "MBU", "Batches of several kinds of rows."),
        )
        if (section := _section(report, rows, kind, title, measure, about)) is not None  # type: ignore[arg-type]
    ]
    headlines = [(batch, tuple(_summaries(report, batch))) for batch in _headline_batches(report, rows)]
    text = _environment().get_template("page.html.jinja").render(
        report=report,
        mark=MARK,
        rpac_version=__version__,
        title=_title(report),
        headlines=headlines,
        sections=sections,
        rows=rows,
        decisions=list(_decisions(report)),
        name_of=functools.partial(_name, report),
        data=report.to_json(),
        evidence_header=EVIDENCE_HEADER,
        evidence_rows=evidence_rows,
        fields_header=FIELDS_HEADER,
        field_rows=field_rows,
        meanings=MEANINGS,
    )  # fmt: skip
    return text.rstrip("\n") + "\n"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rpac.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "micros": lambda seconds: f"{1e6 * seconds:,.1f}",
        "millis": lambda seconds: f"{1e3 * seconds:,.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}",
        "share": lambda value: f"{value:.2f}",
        "size": size,
        "traffic": traffic,
        "count": lambda value: f"{value:,.0f}",
        "dollars": _dollars,
        "code": _code,
    }
    environment.filters.update(filters)
    return environment


def _dollars(value: float) -> str:
    """Three digits that count, and cents at least."""
    return f"${value:,.{max(2, 2 - math.floor(math.log10(value)))}f}"


def _code(text: str) -> Markup:
    """Text whose backticks mark code."""
    parts = [
        Markup("<code>{}</code>").format(one) if odd % 2 else escape(one) for odd, one in enumerate(text.split("`"))
    ]
    return Markup("").join(parts)


def _title(report: Report) -> str:
    names = list(dict.fromkeys(option.name for option in report.options))
    targets = list(dict.fromkeys(option.target for option in report.options))
    return f"{', '.join(names)} on {', '.join(targets)}"


def _headline_batches(report: Report, rows: Sequence[Row]) -> Iterator[str]:
    """Decode batches and prefill batches that stand for all: of each spec, that of the longest sequences."""
    found = [
        max(timings, key=lambda one: (one.context, one.new_tokens)).batch
        for kind in ("decode", "prefill")
        for name in dict.fromkeys(option.name for option in report.options)
        if (timings := [row.timing for row in rows if row.timing.kind == kind and row.option.name == name])
    ]
    yield from dict.fromkeys(found)


def _summaries(report: Report, batch: str) -> Iterator[Summary]:
    options = [option for option in report.options if option.step(batch)]
    least: dict[str, float] = {}
    figures = []
    for option in options:
        step = option.step(batch)
        assert step is not None
        timings = tuple(
            (layer.name, timing) for layer in option.layers for timing in layer.timings if timing.batch == batch
        )
        costs = {"all": step.all_layers_seconds, "dollars": step.dollars_per_million_tokens}
        if len(timings) == 1:
            costs["layer"] = timings[0][1].seconds
        for name, value in costs.items():
            if value is not None and (option.caches_of_hbm or 0) <= 1:
                least[name] = min(value, least.get(name, value))
        figures.append((option, step, timings, costs))
    for option, step, timings, costs in figures:
        best = frozenset(name for name, value in costs.items() if len(options) > 1 and value == least.get(name))
        yield Summary(
            _name(report, option),
            option,
            timings,
            step.all_layers_seconds,
            step.tokens_per_second,
            step.dollars_per_million_tokens,
            best,
        )


def _rows(report: Report) -> Iterator[Row]:
    for option in report.options:
        for layer in option.layers:
            for timing in layer.timings:
                yield Row(option, layer, timing, _name(report, option, layer))


def _decisions(report: Report) -> Iterator[tuple[list[str], tuple[str, ...]]]:
    """The decisions of all kernels, each set once, with the kernels that are made by them."""
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for option in report.options:
        what = f"{option.name}: " if len(report.subjects) > 1 else ""
        for kernel in (kernel for layer in option.layers for kernel in layer.kernels):
            found.setdefault(kernel.decisions, {})[f"{what}{kernel.source}"] = None
    for reasons, kernels in found.items():
        yield list(kernels), reasons


def _name(report: Report, option: Option, layer: Layer | None = None) -> str:
    """What is compared: the chip, and what else there are several of."""
    what = option.target if len(report.subjects) == 1 else option.label
    return f"{what}, {layer.name}" if layer is not None and layer.name else what


def _section(
    report: Report, rows: Sequence[Row], kind: str, title: str, measure: Literal["MBU", "MFU"], about: str
) -> Section | None:
    found = [row for row in rows if row.timing.kind == kind]
    if not found:
        return None
    batches = [(batch, tuple(row for row in found if row.timing.batch == batch)) for batch in report.batches]
    drawn = _lines(report, found) if kind != "mixed" else []
    charts = []
    if drawn:
        times = [_line(name, members, look, lambda one: 1e6 * one.seconds) for name, members, look in drawn]
        shares = [
            _line(name, members, look, lambda one: one.mbu if measure == "MBU" else one.mfu)
            for name, members, look in drawn
        ]
        charts = [
            ("Time of one layer", chart(f"{title}: time of one layer", "microseconds", times, "log")),
            (f"{measure} of the whole call", chart(f"{title}: {measure}", measure, shares, "share")),
        ]
    legend = tuple((swatch(*look), name) for name, _, look in drawn)
    return Section(title, measure, about, tuple(pair for pair in batches if pair[1]), tuple(charts), legend)


Drawn = list[tuple[str, list[Timing], tuple[int, int]]]


def _lines(report: Report, rows: Sequence[Row]) -> Drawn:
    """The batches that one line connects: those that differ in their context alone. A chip has a color of its own."""
    targets = list(dict.fromkeys(option.target for option in report.options))
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        batch = f"{row.timing.sequences} x {row.timing.new_tokens // row.timing.sequences} new"
        found.setdefault((row.name, batch), []).append(row)
    batches = list(dict.fromkeys(batch for _, batch in found))
    styles: dict[str, int] = {}
    drawn: Drawn = []
    for (what, batch), members in found.items():
        first = members[0]
        without_chip = f"{first.option.name} {first.layer.name} {batch}"
        style = styles.setdefault(without_chip, len(styles))
        name = f"{what}, {batch}" if len(batches) > 1 else what
        drawn.append((name, [row.timing for row in members], (targets.index(first.option.target), style)))
    return drawn


def _line(name: str, members: Sequence[Timing], look: tuple[int, int], value: Callable[[Timing], float]) -> Line:
    ordered = sorted(members, key=lambda one: one.context)
    return Line(name, tuple((one.context, value(one)) for one in ordered), *look)
