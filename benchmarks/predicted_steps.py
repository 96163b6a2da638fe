"""Predicts whole steps of public models, beside what others have measured, and writes the tables of docs/steps-predicted.md.

    python benchmarks/predicted_steps.py [--only qwen3-8b]     # results are kept in benchmarks/steps/results.json

Of a model the first FIRST layers are compiled and walked, and its other layers take as long as the last of them do. `--whole`
compiles all layers instead, as `rpac predict --step` does: the page states how far the two are apart.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rpac.devices.chip import chip
from rpac.devices.toolchain import toolchain
from rpac.files.store import Store, default_cache_dir
from rpac.predict import parse_decode, parse_prefill
from rpac.predict.run import needed_work
from rpac.predict.steps import Steps, predict_step, steps_to_predict

HERE = Path(__file__).parent / "steps"
RESULTS = HERE / "results.json"
PAGE = Path(__file__).parents[1] / "docs" / "steps-predicted.md"
FIRST: Final = 4


@dataclass(frozen=True)
class Model:
    """A model's spec for some devices of a target, its function, and its layers."""

    name: str
    spec: str
    function: str
    layers: int
    targets: tuple[str, ...] = ("tpu7x", "v6e")


MODELS: Final = {
    model.name: model
    for model in (
        Model("llama3-8b", "llama3-8b", "llama:llama3_8b", 32),
        Model("llama3-70b", "llama3-70b", "llama:llama3_70b", 80),
        Model("qwen3-8b", "qwen3-8b", "llama:qwen3_8b", 36, ("v6e",)),
        Model("qwen3-32b", "qwen3-32b", "llama:qwen3_32b", 64),
        Model("gpt-oss-20b", "gpt-oss-20b-{target}", "gpt_oss:gpt_oss", 24),
    )
}
BATCHES: Final = ("decode 64x1024", "decode 256x1024", "prefill 1x2048/2048")


@dataclass(frozen=True)
class Measured:
    """A row of SGLang-JAX's benchmark: milliseconds from one output token to the next (decode), or to the first (prefill)."""

    model: str
    input_len: int
    rows: int
    between: float
    first: float


SGLANG: Final = "https://github.com/sgl-project/sglang-jax/blob/main/docs/cookbook/autoregressive/Qwen/Qwen3.md"
OUTPUT_LEN: Final = 1024
MEASURED: Final = (
    Measured("qwen3-8b", 1024, 8, 5.99, 117.55),
    Measured("qwen3-8b", 1024, 16, 6.62, 234.88),
    Measured("qwen3-8b", 1024, 32, 8.18, 469.26),
    Measured("qwen3-8b", 1024, 64, 11.11, 940.87),
    Measured("qwen3-8b", 1024, 128, 17.06, 1885.82),
    Measured("qwen3-8b", 1024, 256, 30.00, 3793.50),
    Measured("qwen3-8b", 4096, 8, 6.61, 523.78),
    Measured("qwen3-8b", 4096, 16, 9.00, 1057.61),
    Measured("qwen3-8b", 4096, 32, 13.48, 2139.54),
    Measured("qwen3-8b", 4096, 64, 21.13, 4108.43),
    Measured("qwen3-32b", 1024, 8, 18.29, 356.59),
    Measured("qwen3-32b", 1024, 16, 19.16, 715.11),
    Measured("qwen3-32b", 1024, 32, 22.17, 1429.91),
    Measured("qwen3-32b", 1024, 64, 29.48, 2864.06),
    Measured("qwen3-32b", 4096, 8, 19.88, 1557.02),
    Measured("qwen3-32b", 4096, 16, 22.45, 3145.14),
)
"""Qwen3 in bfloat16 on v6e-4, tensor parallel over 4; rows that the cache does not hold all at once are left out: there the time
between tokens no longer grows with the rows."""


def predicted(model: Model, target: str, batch: str, whole: bool) -> dict[str, Any]:
    """A prediction of all layers. Raises as `rpac predict --step`."""
    function = model.function if whole else f"{model.function}_l{FIRST}"
    spec = HERE / f"{model.spec.format(target=target)}.yaml"
    steps = steps_to_predict(spec, target, function, HERE, Store(default_cache_dir()), _say)
    kind, text = batch.split()
    workload = parse_decode(text) if kind == "decode" else parse_prefill(text)
    one = predict_step(steps, workload)
    report = one.report
    more = 0 if whole else model.layers - FIRST
    of_layer = sum(report.layer_seconds[-2:]) / 2
    size, flops = _layer(steps, one.variant, workload)
    seconds = report.seconds + more * of_layer
    facts = chip(target)
    chips = report.devices / facts.devices_per_chip
    return {
        "seconds": seconds,
        "layer_seconds": of_layer,
        "devices": report.devices,
        "tokens_per_second_per_chip": report.tokens / seconds / chips,
        "mbu": (report.needed_bytes + more * size) / facts.hbm_bandwidth / seconds,
        "mfu": (report.needed_flops + more * flops) / facts.peak_bf16_flops / seconds,
        "shares": {
            part.category: (part.seconds + more * _of(part, report, of_layer)) / seconds for part in report.parts
        },
        "by_bytes": report.by_bytes_seconds / report.seconds,
        "libtpu": report.compiler,
    }


def _of(part: Any, report: Any, of_layer: float) -> float:
    """What a category takes of a layer: its share of the first layers, but for the output projection, which is no layer's."""
    rest = report.seconds - FIRST * of_layer
    own = part.seconds - (rest if part.category == "matrix products" else 0.0)
    return float(own / (report.seconds - rest) * of_layer)


def _layer(steps: Steps, variant: Any, workload: Any) -> tuple[int, int]:
    """Bytes and flops that one device needs for one layer: its weights, the matrix products with them, and its attention."""
    found = steps.schedules(variant)
    weights = [
        shape for name, shape, _ in found.arguments[: found.parameters] if re.match(r"params\['layers'\]\[0\]", name)
    ]
    elements = sum(_count(shape) for shape in weights)
    works = [needed_work(model, workload) for model in steps.models.values()]
    attention = sum(work.bytes for work in works) // len(works), sum(work.flops for work in works) // len(works)
    return 2 * elements + attention[0], 2 * variant.tokens * elements + attention[1]


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def wanted() -> Iterator[tuple[str, str, str]]:
    """(model, target, batch) of all tables."""
    for model in MODELS.values():
        for target in model.targets:
            if model.name != "qwen3-8b":
                yield from ((model.name, target, batch) for batch in BATCHES)
    for one in MEASURED:
        yield one.model, "v6e", f"decode {one.rows}x{one.input_len + OUTPUT_LEN // 2}"
    for name in dict.fromkeys(one.model for one in MEASURED):
        for end in (2048, 4096):
            yield name, "v6e", f"prefill 1x2048/{end}"


def tables(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The page's tables by name."""
    return {
        "predicted": _predicted_table(results),
        "whole": _whole_table(results),
        "decode": _decode_table(results),
        "prefill": _prefill_table(results),
    }


def _predicted_table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| model | target, devices | batch | ms | tokens/s a chip | MBU | MFU | attention | matrix products | collectives | "
        "copies |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, target, batch in dict.fromkeys(wanted()):
        one = results.get(f"{name} {target} {batch}")
        if one is None or batch not in BATCHES or name == "qwen3-8b":
            continue
        shares = [
            f"{one['shares'].get(part, 0.0):.0%}" for part in ("attention", "matrix products", "collectives", "copies")
        ]
        figures = [
            f"{1e3 * one['seconds']:.2f}",
            f"{one['tokens_per_second_per_chip']:,.0f}",
            f"{one['mbu']:.2f}",
            f"{one['mfu']:.2f}",
        ]
        cells = [name, f"{target}, {one['devices']}", batch, *figures, *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _whole_table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| model | target | batch | whole, ms | from four layers, ms | difference |", "|---|---|---|--:|--:|--:|"]
    for name, target, batch in dict.fromkeys(wanted()):
        whole, first = (results.get(f"{name} {target} {batch}{what}") for what in (" whole", ""))
        if whole and first:
            share = f"{first['seconds'] / whole['seconds'] - 1:+.2%}"
            ms = (f"{1e3 * one['seconds']:.3f}" for one in (whole, first))
            lines.append(f"| {' | '.join([name, target, batch, *ms, share])} |")
    return "\n".join(lines) + "\n"


def _decode_table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| model | input tokens | rows | measured, ms | predicted, ms | error |", "|---|--:|--:|--:|--:|--:|"]
    for one in MEASURED:
        found = results.get(f"{one.model} v6e decode {one.rows}x{one.input_len + OUTPUT_LEN // 2}")
        if found is not None:
            ms = 1e3 * found["seconds"]
            lines.append(
                f"| {one.model} | {one.input_len:,} | {one.rows} | {one.between:.2f} | {ms:.2f} | {ms / one.between - 1:+.0%} |"
            )
    return "\n".join(lines) + "\n"


def _prefill_table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| model | input tokens | rows | measured, ms | predicted, ms | error |", "|---|--:|--:|--:|--:|--:|"]
    for one in MEASURED:
        ends = [2048] if one.input_len <= 2048 else [2048, 4096]
        found = [results.get(f"{one.model} v6e prefill 1x2048/{end}") for end in ends]
        if all(found):
            # As many requests wait as there are rows, so each waits for that many prompts (Little's law).
            measured = one.first / one.rows * 2048 / one.input_len
            ms = 1e3 * sum(chunk["seconds"] for chunk in found if chunk) / len(found)
            lines.append(
                f"| {one.model} | {one.input_len:,} | {one.rows} | {measured:.1f} | {ms:.1f} | {ms / measured - 1:+.0%} |"
            )
    return "\n".join(lines) + "\n"


def write_page(results: dict[str, dict[str, Any]]) -> None:
    text = PAGE.read_text()
    for name, table in tables(results).items():
        start, end = f"<!-- table {name} of benchmarks/predicted_steps.py -->\n", f"<!-- end of table {name} -->\n"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{table}{end}{rest.partition(end)[2]}"
    PAGE.write_text(text)


def _kept() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part of `model target batch`")
    parser.add_argument("--whole", action="store_true", help="compile all layers")
    parser.add_argument("--page", action="store_true", help="write the page from the kept results alone")
    given = parser.parse_args()
    os.environ["RPAC_TUNED"] = "none"
    results = _kept()
    for name, target, batch in () if given.page else dict.fromkeys(wanted()):
        key = f"{name} {target} {batch}" + (" whole" if given.whole else "")
        if given.only in key and results.get(key, {}).get("libtpu") != toolchain()["libtpu"]:
            found = predicted(MODELS[name], target, batch, given.whole)
            print(f"{key}: {1e3 * found['seconds']:.3f} ms", flush=True)
            results = {**_kept(), key: found}  # another process may have kept some meanwhile
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    write_page(results)


if __name__ == "__main__":
    main()
