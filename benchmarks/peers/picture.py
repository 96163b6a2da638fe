"""The comparison as one picture: decode by MBU against context, the other batches as bars."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from peers.document import MEASURE, Section, score


def draw(sections: Sequence[Section], path: Path) -> None:
    """A row of two panels for each target and page size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(sections), 2, figsize=(15, 4.0 * len(sections)), squeeze=False)
    for (left, right), section in zip(axes, sections, strict=True):
        colors = {name: f"C{index}" for index, name in enumerate(section.contenders)}
        _decode(left, section, colors)
        _others(right, section, colors)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _decode(ax, section: Section, colors: dict[str, str]) -> None:
    even = [case for case in section.cases if case.kind == "decode" and len(set(case.workload.kv_lens)) == 1]
    for name in section.contenders:
        ran = [(case, section.results[name, case.label]) for case in even]
        points = [(case.longest, score(case, result)) for case, result in ran if not result.error]
        if points:
            width = 2.5 if name.startswith("rpac") else 1.2
            ax.plot(*zip(*points, strict=True), marker="o", color=colors[name], linewidth=width, label=name)
    ticks = [case.longest for case in even]
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set(xlabel="context, tokens", ylabel="MBU, whole call", ylim=(0, 1), title=f"decode of 64, {section.title}")
    ax.grid(alpha=0.3)
    if ax.lines:
        ax.legend(fontsize=8)


def _others(ax, section: Section, colors: dict[str, str]) -> None:
    cases = [case for case in section.cases if case.kind != "decode" or len(set(case.workload.kv_lens)) > 1]
    width = 0.8 / len(section.contenders)
    for place, name in enumerate(section.contenders):
        results = [section.results[name, case.label] for case in cases]
        heights = [0.0 if result.error else score(case, result) for case, result in zip(cases, results, strict=True)]
        if any(heights):
            ax.bar([x + place * width for x in range(len(cases))], heights, width, color=colors[name], label=name)
    names = [textwrap.fill(f"{case.label} ({MEASURE[case.kind]})", 18) for case in cases]
    ax.set_xticks([x + 0.4 - width / 2 for x in range(len(cases))], names, fontsize=7)
    ax.set(ylabel="share of the peak, whole call", title=section.title)
    ax.grid(alpha=0.3, axis="y")
