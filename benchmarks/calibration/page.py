"""docs/calibration.md: its tables, from results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from peers import environment
from published import Point
from witnesses import WITNESSES

from calibration import tokamax
from calibration.bench import Measured
from calibration.fit import Fit
from calibration.results import TargetResults, tiles_of
from calibration.walks import Row
from rpac.schedule import Model, model_of

TEMPLATE = Path(__file__).parents[1] / "calibration.md.in"
_HEADS = ["| point | measured, us | predicted, us | error | tiles | in the fit |", "|---|--:|--:|--:|---|---|"]


def table(rows: Iterable[Row]) -> list[str]:
    lines = list(_HEADS)
    for row in rows:
        tiles = tiles_of(row.point, row.config)
        shown = "default" if tiles is None else ", ".join(map(str, tiles))
        if not row.point.tiles_known:
            tried = len(row.point.configs)
            shown += " (inferred)" if row.point.source.startswith("sglang") else f" (best of {tried})"
        cells = [
            row.point.label,
            f"{row.point.seconds * 1e6:,.0f}",
            f"{row.seconds * 1e6:,.0f}",
            f"{row.error:+.1%}",
            shown,
            "yes" if row.point.fit else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def bench_table(measured: Iterable[Measured]) -> list[str]:
    """The entries of `bench.json` files, in the columns of `table` as far as they have them; none is in the fit."""
    lines = ["| point | measured, us | predicted, us | error | by | in the fit |", "|---|--:|--:|--:|---|---|"]
    for one in measured:
        error = one.error
        cells = [
            f"{one.device}, {one.bundle}, {one.label}",
            f"{one.measured * 1e6:,.1f}",
            "-" if one.predicted is None else f"{one.predicted * 1e6:,.1f}",
            "-" if error is None else f"{error:+.1%}",
            one.method + (f"; {one.note}" if one.note else ""),
            "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def witness_lines(results: Mapping[str, TargetResults]) -> list[str]:
    lines = []
    for witness in WITNESSES:
        times = results[witness.target].witnesses[witness.title]
        lines += ["", f"### {witness.title}", "", witness.text, ""]
        lines += ["| tiles | measured, served | " + " | ".join(f"predicted, {n}" for n in witness.contexts) + " |"]
        lines += ["|---|--:|" + "--:|" * len(witness.contexts)]
        for (config, measured), row in zip(witness.choices, times, strict=True):
            shown = [f"{t * 1e6:,.0f} us ({first / t - 1:+.0%})" for t, first in zip(row, times[0], strict=True)]
            tiles = config.decode_tiles
            name = "default" if tiles is None else f"fetch {tiles[1]}, compute {tiles[3]}"
            lines.append(f"| {name} | {measured} | {' | '.join(shown)} |")
    return lines


def document(points: Sequence[Point], results: Mapping[str, TargetResults]) -> str:
    """docs/calibration.md. Raises StaleError where a result is missing."""
    rows = [results[point.target].row(point) for point in points]

    def of(source: str, case: str, target: str) -> list[Row]:
        return [r for r in rows if (r.point.source, r.point.case, r.point.target) == (source, case, target)]

    def worst(chosen: Iterable[Row]) -> str:
        return f"{max((abs(row.error) for row in chosen), default=0):.1%}"

    def within(chosen: Sequence[Row], limit: float) -> str:
        return f"{sum(abs(row.error) <= limit for row in chosen)} of {len(chosen)}"

    known = [row for row in rows if row.point.tiles_known]
    v6e = of("sglang", "decode", "v6e")
    unknown = [r for source in ("flywheel", "paper") for r in of(source, "decode", "tpu7x")]
    fields = {
        "compiler": " ".join(environment.COMPILER),
        "package": environment.PEERS[0],
        "early": environment.EARLY[0],
        **_constants("tpu7x", model_of("tpu7x")),
        **_constants("v6e", model_of("v6e")),
        "tpu7x_fit": _fit(results["tpu7x"].fits[0]),
        "v6e_fit": _fit(results["v6e"].fits[0]),
        "v6e_fit_free": _fit(results["v6e"].fits[1]),
        "v6e_held_out": f"{results['v6e'].fits[0].held_out:.1%}",
        "v6e_held_out_free": f"{results['v6e'].fits[1].held_out:.1%}",
        "worst_known": worst(known),
        "worst_held_known": worst(row for row in known if not row.point.fit),
        "worst_decode_unknown": worst(unknown),
        "worst_prefill_unknown": worst(of("paper", "mixed", "tpu7x")),
        "worst_held_decode": worst(of("flywheel", "decode", "tpu7x")),
        "v6e_held_out_count": str(sum(not row.point.fit for row in v6e)),
        "v6e_within_5": within(v6e, 0.05),
        "v6e_worst": worst(v6e),
        "v6e_early_within_12": within(of("sglang-early", "decode", "v6e"), 0.12),
        "tpu7x_early_within_12": within(of("sglang-early", "decode", "tpu7x"), 0.12),
        "flywheel_prefill": "\n".join(table(of("flywheel", "mixed", "tpu7x"))),
        "flywheel_decode": "\n".join(table(of("flywheel", "decode", "tpu7x"))),
        "paper_decode": "\n".join(table(of("paper", "decode", "tpu7x"))),
        "paper_prefill": "\n".join(table(of("paper", "mixed", "tpu7x"))),
        "v6e_decode": "\n".join(table(v6e)),
        "v6e_prefill": "\n".join(table(of("sglang", "mixed", "v6e"))),
        "v6e_early": "\n".join(table(of("sglang-early", "decode", "v6e"))),
        "tpu7x_early": "\n".join(table(of("sglang-early", "decode", "tpu7x"))),
        "tokamax": "\n".join(tokamax.table(tokamax.kept(results["tpu7x"].calls))),
        "witnesses": "\n".join(witness_lines(results)),
    }
    return TEMPLATE.read_text().format(**fields)


def _constants(target: str, model: Model) -> dict[str, str]:
    return {
        f"{target}_clock": f"{model.clock_hz / 1e9:.3g}",
        f"{target}_latency": f"{model.latency_s * 1e6:.3g}",
        f"{target}_setup": f"{model.setup_s * 1e9:.3g}",
        f"{target}_bandwidth": f"{model.hbm_bytes_per_s / 1e12:.3g}",
    }


def _fit(found: Fit) -> str:
    cost = f" and {found.setup_s * 1e9:.3g} ns a DMA" if found.setup_s else ""
    return f"{found.clock_hz / 1e9:.4g} GHz, {found.latency_s * 1e6:.3g} us{cost}, root mean squared error {found.error:.1%}"
