"""One long sequence prefilled in chunks from the paged cache: predicted times, and what a full MXU would make of them.

    python benchmarks/chunks.py --target tpu7x

Of each chunk the whole call, and the same were the MXU full all through every loop that uses it, with nothing waited for
there: what no schedule of these loops can be below. TFLOP/s count all pairs at 4 flops a pair, head and lane, by half, for
attention is causal (2 * tokens ** 2 * q_heads * head_dim), as the published figures do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate

from rpac.devices.chip import TPU_TARGETS
from rpac.files.store import Store, default_cache_dir
from rpac.predict import parse_prefill, predict, programs_of
from rpac.schedule.call_report import KernelReport
from rpac.spec import load_spec

SPEC = Path(__file__).with_name("d256.yaml")
USES_MXU = 0.3  # of a loop's instructions, at least: below, the MXU is not what it is about


def idle_seconds(kernel: KernelReport) -> float:
    """What the loops that use the MXU spend without it."""
    idle = 0.0
    for loop in kernel.loops:
        full = (loop.utilization or {}).get("MXU", 0.0)
        if loop.iterations and full > USES_MXU:
            idle += loop.compute_seconds * (1 - full) + loop.stall_seconds
    return idle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TPU_TARGETS, default="tpu7x")
    options = parser.parse_args()

    spec = load_spec(SPEC)
    chunk = spec.serving.prefill_chunk
    programs = programs_of(SPEC, options.target, Store(default_cache_dir()))
    rows, whole, full = [], 0.0, 0.0
    for end in range(chunk, spec.serving.max_model_len + 1, chunk):
        report = predict(programs, parse_prefill(f"1x{chunk}/{end}")).report
        bound = report.seconds - sum(map(idle_seconds, report.kernels))
        whole, full = whole + report.seconds, full + bound
        flops = 2 * end**2 * spec.model.q_heads * spec.model.head_dim
        rows.append((end, report.seconds * 1e6, bound * 1e6, whole * 1e3, flops / whole / 1e12, flops / full / 1e12))
    headers = ("up to", "chunk us", "full MXU us", "all ms", "TFLOP/s", "full MXU")
    print(f"{options.target}, predicted, one TensorCore")
    print(tabulate(rows, headers=headers, floatfmt=("", ".1f", ".1f", ".3f", ".0f", ".0f")))


if __name__ == "__main__":
    main()
