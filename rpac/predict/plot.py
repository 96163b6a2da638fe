"""MBU and MFU against context length, with the roofline: how far a kernel is from what the chip could do at best."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rpac.devices.chip import chip
from rpac.errors import OutputError
from rpac.predict.run import Prediction
from rpac.schedule import CallReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Measure = Literal["MBU", "MFU"]
MAX_TICKS = 12
FORMATS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Series:
    """What one line connects: batches that differ in their context alone; of a trace, points that nothing connects."""

    name: str
    target: str
    batches: str
    connected: bool

    @classmethod
    def of(cls, one: Prediction) -> Series:
        batch = one.workload
        if batch.uniform:
            return cls(one.name, one.report.target, f"{one.variant.kind} {len(batch.q_lens)} x {batch.q_lens[0]}", True)
        return cls(one.name, one.report.target, batch.label.rpartition(":")[0] or batch.label, False)


def check_plot(path: Path) -> None:
    """Raises OutputError where no picture could be drawn into `path`, before anything is compiled for it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError("matplotlib is not installed; install rpac[plot]")
    if path.suffix not in FORMATS:
        raise OutputError(f"{path}: cannot be drawn; its name must end in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: cannot be written ({path.parent} is no folder)")


def draw(predictions: Sequence[Prediction], path: Path) -> None:
    """Draws batches that memory bounds by MBU, and those that arithmetic bounds by MFU. Raises OutputError."""
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by_series: dict[Series, list[Prediction]] = defaultdict(list)
    for one in predictions:
        by_series[Series.of(one)].append(one)
    panels: dict[Measure, list[Series]] = {"MBU": [], "MFU": []}
    for series, members in by_series.items():
        panels[_measure(members)].append(series)
    shown = [measure for measure in panels if panels[measure]]
    figure, axes = plt.subplots(1, len(shown), figsize=(7 * len(shown), 4.6), squeeze=False)
    for ax, measure in zip(axes[0], shown, strict=True):
        _panel(ax, measure, {series: by_series[series] for series in panels[measure]})
    figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format=path.suffix[1:])
    plt.close(figure)
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()  # half a picture
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error


def _panel(ax: Axes, measure: Measure, by_series: dict[Series, list[Prediction]]) -> None:
    lengths: set[float] = set()
    targets = list(dict.fromkeys(series.target for series in by_series))
    for series, members in by_series.items():
        ordered = sorted(members, key=lambda one: one.workload.context)
        contexts = [one.workload.context for one in ordered]
        lengths.update(contexts)
        reached = [(one.report.mbu if measure == "MBU" else one.report.mfu) or 0.0 for one in ordered]
        line = "-" if series.connected else ""
        name = f"{series.name} on {series.target}" if len(targets) > 1 else series.name
        ax.plot(contexts, reached, marker="o", linestyle=line, label=f"{name}, {series.batches}")
        roofs = [_roof(one.report, measure) for one in ordered]
        # A roof over points that nothing connects is a bar over each.
        style = {"linestyle": "--"} if series.connected and len(roofs) > 1 else {"linestyle": "", "marker": "_"}
        ax.plot(contexts, roofs, color="black", linewidth=1, markersize=14, **style)  # type: ignore[arg-type]
    ax.plot([], [], color="black", linestyle="--", linewidth=1, label="roofline (nominal peaks)")
    ax.set_xscale("log", base=2)
    ticks = sorted(lengths)
    if len(ticks) <= MAX_TICKS and all(low * 1.2 < high for low, high in itertools.pairwise(ticks)):
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    else:
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()
    what = {"MBU": "needed bytes over peak bandwidth", "MFU": "needed flops over peak rate"}[measure]
    ax.set(xlabel="context length (mean of a batch), tokens", ylabel=f"{measure}: {what}", ylim=(0, 1.05))
    ax.set_title(f"{measure} of the whole call, predicted for {', '.join(targets)}")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


def _bounds(report: CallReport) -> tuple[float, float]:
    """Seconds that the chip's peak bandwidth and its peak rate allow at best."""
    facts = chip(report.target)
    return (report.needed_bytes or 0) / facts.hbm_bandwidth, (report.needed_flops or 0) / facts.peak_bf16_flops


def _roof(report: CallReport, measure: Measure) -> float:
    by_bytes, by_flops = _bounds(report)
    return (by_bytes if measure == "MBU" else by_flops) / max(by_bytes, by_flops)


def _measure(members: Sequence[Prediction]) -> Measure:
    by_bytes, by_flops = (sum(part) for part in zip(*(_bounds(one.report) for one in members), strict=True))
    return "MBU" if by_bytes >= by_flops else "MFU"
