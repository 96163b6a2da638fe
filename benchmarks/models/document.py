"""docs/models.md: a table for each target, and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from models.cases import Case, Place

ENOUGH: Final = 0.75
"""A row with a smaller fraction of its bound says what limits it."""

NOT_RUN: Final = "not run yet"
COLORS: Final = {"decode": "C0", "prefill": "C1", "mixed": "C2"}


@dataclass(frozen=True)
class Result:
    """A batch on the program that it selects. Times in seconds. `error`: why there are none. bound: HBM, MXU or fixed cost.
    limited_by: what the time follows from, in words.

    earlier: of an earlier kernel, compiler or walker.
    """

    program: str = ""
    seconds: float = 0.0
    bound: str = ""
    bound_seconds: float = 0.0
    limited_by: str = ""
    error: str = ""
    earlier: bool = False

    @property
    def fraction(self) -> float:
        return self.bound_seconds / self.seconds


Row = tuple[Place, Case]
HEADS: Final = ("model", "layout", "batch", "us", "bound", "bound, us", "fraction")


def document(template: str, results: Mapping[Row, Result]) -> str:
    """The page, of what has run and what has not."""
    parts = []
    for target in dict.fromkeys(place.target for place, _ in results):
        rows = {row: result for row, result in results.items() if row[0].target == target}
        parts += [f"## {target}", "", *_table(rows), "", *_below(rows)]
    return template.replace("{tables}", "\n".join(parts).rstrip()).replace("{summary}", "\n".join(_summary(results)))


def _summary(results: Mapping[Row, Result]) -> list[str]:
    lines = [f"| target | rows | at least {ENOUGH} | lowest fraction | not run |", "|---|--:|--:|---|--:|"]
    for target in dict.fromkeys(place.target for place, _ in results):
        rows = {row: result for row, result in results.items() if row[0].target == target}
        ran = {row: result for row, result in rows.items() if not result.error}
        enough = sum(result.fraction >= ENOUGH for result in ran.values())
        worst = min(ran.items(), key=lambda item: item[1].fraction, default=None)
        lowest = "-" if worst is None else f"{worst[1].fraction:.2f}: {worst[0][0].title}, {worst[0][1].workload.label}"
        lines.append(f"| {target} | {len(rows)} | {enough} | {lowest} | {len(rows) - len(ran)} |")
    return lines


def _table(rows: Mapping[Row, Result]) -> list[str]:
    lines = [f"| {' | '.join(HEADS)} |", "|---|---|---|--:|---|--:|--:|"]
    for (place, case), result in rows.items():
        if result.error:
            cells = ["-", "-", "-", "-"]
        else:
            mark = "\\*" if result.earlier else ""
            cells = [
                f"{result.seconds * 1e6:,.1f}{mark}",
                result.bound,
                f"{result.bound_seconds * 1e6:,.1f}",
                f"{result.fraction:.2f}",
            ]
        lines.append(f"| {' | '.join([place.title, place.layout, case.workload.label, *cells])} |")
    return lines


def _below(rows: Mapping[Row, Result]) -> list[str]:
    """A sentence for each row that is far from its bound, and the reason for each that could not run."""
    low = [(row, result) for row, result in rows.items() if not result.error and result.fraction < ENOUGH]
    failed = [(row, result) for row, result in rows.items() if result.error not in ("", NOT_RUN)]
    lines = [
        f"- {place.title}, {place.layout}, {case.workload.label} ({result.fraction:.2f}): {result.limited_by}."
        for (place, case), result in low
    ]
    lines += [f"- {place.title}, {place.layout}, {case.workload.label}: {one.error}" for (place, case), one in failed]
    return [f"Rows below {ENOUGH}, and what limits them:", "", *lines, ""] if lines else []


def draw(results: Mapping[Row, Result], path: Path) -> None:
    """The fraction of the bound of every row that ran: a panel a target, a line a model and layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ran = {row: result for row, result in results.items() if not result.error}
    targets = list(dict.fromkeys(place.target for place, _ in ran))
    names = sorted({_name(place) for place, _ in ran}, reverse=True)
    if not ran:
        return
    figure, axes = plt.subplots(
        1, len(targets), figsize=(3.4 * len(targets) + 2.5, 0.28 * len(names) + 1.6), squeeze=False, sharey=True
    )
    for axis, target in zip(axes[0], targets, strict=True):
        _panel(axis, target, names, [(row, result) for row, result in ran.items() if row[0].target == target])
    axes[0][0].set_yticks(range(len(names)), names, fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _panel(axis, target: str, names: Sequence[str], found: Sequence[tuple[Row, Result]]) -> None:
    for kind, color in COLORS.items():
        points = [(one.fraction, names.index(_name(row[0]))) for row, one in found if row[1].kind == kind]
        axis.scatter([x for x, _ in points], [y for _, y in points], color=color, s=22, alpha=0.8, label=kind)
    axis.axvline(ENOUGH, color="0.6", linewidth=1, linestyle="--")
    axis.set(title=target, xlabel="fraction of the bound", xlim=(0, 1.02), ylim=(-0.6, len(names) - 0.4))
    axis.grid(alpha=0.3)


def _name(place: Place) -> str:
    return f"{place.title}, {place.layout}"
