"""docs/benchmarks.md: the tables, what ran in each cell, and what could not run and why. Pure text from results."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peers.cases import Case, Heads, Measured
from peers.contenders import OURS
from peers.store import Result

OURS_NAMES = tuple(one.name for one in OURS)
EARLIER = " *"
MEASURE = {"decode": "MBU", "prefill": "MFU", "mixed": "MBU"}


@dataclass(frozen=True)
class Section:
    """One device's attention on one target and page size: a result for each (contender, case label)."""

    heads: Heads
    target: str
    page_size: int
    cases: tuple[Case, ...]
    contenders: tuple[str, ...]
    results: Mapping[tuple[str, str], Result] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.target}, pages of {self.page_size}"

    @property
    def full_title(self) -> str:
        return f"{self.heads.label} heads, {self.title}"

    def best_peer(self, case: Case) -> tuple[str, Result] | None:
        """The peer with the least time of the whole call."""
        ran = [
            (name, self.results[name, case.label])
            for name in self.contenders
            if name not in OURS_NAMES and not self.results[name, case.label].error
        ]
        return min(ran, key=lambda one: one[1].seconds) if ran else None


def score(case: Case, result: Result) -> float:
    """MBU or MFU of the whole call, whichever the batch is judged by."""
    return result.mfu if MEASURE[case.kind] == "MFU" else result.mbu


def cell(case: Case, result: Result) -> str:
    """Whole call / kernels alone, microseconds, and the share of the peak."""
    if result.error:
        return "-"
    mark = EARLIER if result.earlier else ""
    return f"{_us(result.seconds)} / {_us(result.kernel_seconds)}, {score(case, result):.2f}{mark}"


def summary(sections: Sequence[Section]) -> list[str]:
    """How many times faster than the fastest peer each of ours is, for each batch and section."""
    lines = [_row(["batch", *(section.title for section in sections)]), _row(["---", *["--:"] * len(sections)])]
    for case in sections[0].cases:
        cells = []
        for section in sections:
            best = section.best_peer(case)
            ratios = [_ratio(best, section.results[name, case.label]) for name in section.heads.ours]
            cells.append("-" if best is None else f"{' / '.join(ratios)} ({best[0]})")
        lines.append(_row([case.label, *cells]))
    return lines


def table(section: Section) -> list[str]:
    """A row a batch, a column a contender."""
    lines = [_row(["batch", *section.contenders]), _row(["---", *["--:"] * len(section.contenders)])]
    for case in section.cases:
        cells = [cell(case, section.results[name, case.label]) for name in section.contenders]
        lines.append(_row([f"{case.label} ({MEASURE[case.kind]})", *cells]))
    return lines


def choices(section: Section) -> list[str]:
    """What ran in each cell: programs of ours, tiles of the peers."""
    lines = [_row(["batch", *section.contenders]), _row(["---"] * (len(section.contenders) + 1))]
    for case in section.cases:
        results = [section.results[name, case.label] for name in section.contenders]
        lines.append(_row([case.label, *("-" if result.error else result.choice for result in results)]))
    return lines


def shards(sections: Sequence[Section], measured: Sequence[Measured]) -> list[str]:
    """For each attention of a shard: a row a batch and place, a column a contender, then what others measured there."""
    lines = []
    for label in dict.fromkeys(section.heads.label for section in sections):
        same = [section for section in sections if section.heads.label == label]
        lines += [f"### {label}: {same[0].heads.about}", ""]
        lines += [
            _row(["place", "batch", *same[0].contenders]),
            _row(["---", "---", *["--:"] * len(same[0].contenders)]),
        ]
        for section in same:
            for case in section.cases:
                cells = [cell(case, section.results[name, case.label]) for name in section.contenders]
                lines.append(_row([section.title, f"{case.label} ({MEASURE[case.kind]})", *cells]))
        lines += ["", *_measured(same, measured)]
    return lines


def _measured(sections: Sequence[Section], measured: Sequence[Measured]) -> list[str]:
    lines = []
    for one in measured:
        for section in sections:
            if one.heads == section.heads.label and one.place == (section.target, section.page_size):
                lines.append(
                    bullet(
                        f"Measured of **{one.peer}** on {section.title}, {one.case}: {_us(one.seconds)} us ({one.source})."
                    )
                )
    return [*lines, ""] if lines else []


def not_run(sections: Sequence[Section], reason: str) -> list[str]:
    """The cells without a figure because nobody has run them, a line for each attention and place."""
    lines = []
    for section in sections:
        missing = {
            name: labels
            for name in section.contenders
            if (labels := [case.label for case in section.cases if section.results[name, case.label].error == reason])
        }
        everything = sum(map(len, missing.values())) == len(section.contenders) * len(section.cases)
        parts = [
            name if len(labels) == len(section.cases) else f"{name} ({', '.join(labels)})"
            for name, labels in missing.items()
        ]
        if parts:
            lines.append(bullet(f"{section.full_title}: {'everything' if everything else '; '.join(parts)}"))
    return lines or ["Every cell was run."]


def refusals(sections: Sequence[Section], not_run_reason: str) -> list[str]:
    """What could not be run, each reason once: where, and why."""
    found: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for section in sections:
        for name in section.contenders:
            for case in section.cases:
                result = section.results[name, case.label]
                if result.error not in ("", not_run_reason):
                    found[name, result.error][section.full_title].append(case.label)
    lines = []
    for (name, why), places in found.items():
        where = []
        for title, labels in places.items():
            whole = next(section for section in sections if section.full_title == title)
            everything = len(labels) == len(whole.cases)
            where.append(f"{title}: {'every batch' if everything else ', '.join(labels)}")
        lines.append(bullet(f"**{name}** ({'; '.join(where)}): {why}"))
    return lines or ["Everything ran."]


def bullet(text: str) -> str:
    """An item of a list, in lines of the usual length."""
    return textwrap.fill(f"- {text}", 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"


def _ratio(best: tuple[str, Result] | None, ours: Result) -> str:
    return "-" if best is None or ours.error else f"{best[1].seconds / ours.seconds:.2f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
