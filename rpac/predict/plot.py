"""MBU and MFU against context length, with the roofline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rpac.chip import chip
from rpac.errors import OutputError
from rpac.predict.run import Prediction


def draw(predictions: Sequence[Prediction], path: Path) -> None:
    """Draws decode batches by MBU and the others by MFU into `path`. Raises OutputError."""
    try:
        import matplotlib
    except ImportError as error:
        raise OutputError("matplotlib is not installed; install rpac[plot]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [one for one in (_decode(predictions), _prefill(predictions)) if one[1]]
    figure, axes = plt.subplots(1, len(shown), figsize=(6.5 * len(shown), 4.2), squeeze=False)
    facts = chip(predictions[0].report.target)
    for ax, (measure, chosen) in zip(axes[0], shown, strict=True):
        roofs: dict[int, float] = {}
        lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for one in chosen:
            report = one.report
            by_bytes = (report.needed_bytes or 0) / facts.hbm_bandwidth
            by_flops = (report.needed_flops or 0) / facts.peak_bf16_flops
            reached = report.mbu if measure == "MBU" else report.mfu
            length = one.workload.longest
            lines[f"{one.name} {one.variant}"].append((length, reached or 0.0))
            roofs[length] = (by_bytes if measure == "MBU" else by_flops) / max(by_bytes, by_flops)
        for label, points in sorted(lines.items()):
            ax.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
        ax.plot(*zip(*sorted(roofs.items()), strict=True), color="black", linestyle="--", linewidth=1, label="roofline")
        ax.set_xscale("log", base=2)
        ticks = sorted(roofs)
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.set(xlabel="context length, tokens", ylabel=measure, ylim=(0, 1.05))
        ax.set_title(f"{measure}, whole call, predicted for {predictions[0].report.target}")
        ax.grid(alpha=0.3)
        ax.legend()
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be written ({error})") from error
    finally:
        plt.close(figure)


def _decode(predictions: Sequence[Prediction]) -> tuple[str, list[Prediction]]:
    return "MBU", [one for one in predictions if one.variant.kind == "decode"]


def _prefill(predictions: Sequence[Prediction]) -> tuple[str, list[Prediction]]:
    return "MFU", [one for one in predictions if one.variant.kind != "decode"]
