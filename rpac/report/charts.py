"""Charts as SVG for a page: drawn by matplotlib, with colors that the page's style sheet gives."""

from __future__ import annotations

import html
import importlib.util
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rpac.errors import OutputError

WIDTH, HEIGHT = 4.6, 3.3  # inches; a page as wide as a telephone shows this at about its own size
COLORS: Final = 8
MARKERS: Final = "osD^vP"
DASHES: Final = ("-", "--", ":", "-.")

# Stand-ins that no chart has otherwise; each becomes a variable of the style sheet.
_INK, _GRID = "#a000f0", "#a000f1"
_SERIES = tuple(f"#a0000{index}" for index in range(COLORS))
_VARIABLES: Final = {_INK: "--ink", _GRID: "--grid"} | {color: f"--series-{i + 1}" for i, color in enumerate(_SERIES)}


@dataclass(frozen=True)
class Line:
    """One line of a chart. `color` counts from 0, and `style` chooses marker and dashes: those of one color differ by it."""

    name: str
    points: tuple[tuple[float, float], ...]
    color: int
    style: int


def check_charts() -> None:
    """Raises OutputError where no chart can be drawn, before anything is compiled for it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError("matplotlib is not installed; install rpac[plot], or give --json alone")


def chart(name: str, ylabel: str, lines: Sequence[Line], scale: Literal["log", "share"]) -> str:
    """An `<svg>` element of lines against context length. `scale` of the values: logarithmic, or a share from 0 to 1.

    The same lines make the same bytes. `name` is what a screen reader says.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # two charts of a page must not share the names of their parts
        "font.family": "sans-serif",
        "font.size": 10.5,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _GRID,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
    }
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            xs, ys = zip(*line.points, strict=True)
            axes.plot(
                xs,
                ys,
                color=_SERIES[line.color % COLORS],
                linestyle=DASHES[line.style % len(DASHES)],
                marker=MARKERS[line.style % len(MARKERS)],
                markersize=4.5,
                linewidth=1.8,
                label=line.name,
            )
        axes.set_xscale("log", base=2)
        ticks = sorted({x for line in lines for x, _ in line.points})
        axes.set_xticks(_apart(ticks), [_short(tick) for tick in _apart(ticks)])
        if scale == "share":
            axes.set_ylim(0, 1.04)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.minorticks_off()
        axes.set(xlabel="context length, tokens", ylabel=ylabel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        drawn = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    return _inline(drawn.getvalue(), name)


def swatch(color: int, style: int) -> str:
    """A piece of a line of this look, for a legend."""
    dash = {"-": "", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}[DASHES[style % len(DASHES)]]
    return (
        f'<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true"><line x1="1" y1="5" x2="27" y2="5" stroke-width="2.5" '
        f'stroke-dasharray="{dash}" style="stroke: var(--series-{color % COLORS + 1})"/></svg>'
    )


def _inline(svg: str, name: str) -> str:
    """The element alone: no declaration, no style for the whole page, no names that two charts share."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>',
        rf'<svg class="chart" role="img" aria-label="{html.escape(name)}" \1>',
        svg,
    )
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg


def _apart(ticks: Iterable[float]) -> list[float]:
    """Those that are far enough from each other for their labels."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick >= 1.3 * kept[-1]:
            kept.append(tick)
    return kept


def _short(tokens: float) -> str:
    """A length as people write it: 4096 is 4K."""
    return f"{tokens / 1024:g}K" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:g}"
