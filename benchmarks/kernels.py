"""Predicts kernels of the jax package with rpac.schedule, and writes the table of docs/schedule.md.

    python benchmarks/kernels.py [--target tpu7x] [--only splash]

Results are kept in kernels.json by kernel, target and compiler. Run it with another jax to add that compiler's column.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is installed to compile, and would look for a TPU

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention
from jax.experimental.pallas.ops.tpu.matmul import matmul
from jax.experimental.pallas.ops.tpu.megablox import gmm
from jax.experimental.pallas.ops.tpu.paged_attention.paged_attention_kernel import paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import ragged_paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from rpac.devices.chip import TPU_TARGETS, chip
from rpac.errors import ScheduleError
from rpac.schedule import CallReport, Work, attention_work, compile_function

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("kernels.json")
PAGE = ROOT / "docs" / "schedule.md"
START, END = "<!-- table of benchmarks/kernels.py -->\n", "<!-- end of the table -->\n"
SHAPE = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
INTEGERS = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
BUSY = 0.9  # of the time: what is used so much is the bound


@dataclass(frozen=True)
class Kernel:
    """A call of a kernel: the function, its arguments, the scalars among them by number, and the work it cannot avoid."""

    name: str
    shapes_text: str
    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    work: Work
    scalars: dict[int, Any]


def _matmul(m: int = 4096, k: int = 4096, n: int = 4096) -> Kernel:
    def make() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return functools.partial(matmul, block_shape=(512, 1024), block_k=1024), (SHAPE((m, k)), SHAPE((k, n)))

    return Kernel("matmul", f"{m} x {k} x {n}", make, Work(2 * (m * k + k * n + m * n), 2 * m * k * n), {})


def _flash(heads: int = 16, tokens: int = 4096) -> Kernel:
    def make() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        sizes = BlockSizes(block_q=512, block_k_major=1024, block_k=512, block_b=1)
        function = functools.partial(flash_attention, causal=True, sm_scale=128**-0.5, block_sizes=sizes)
        return function, (SHAPE((1, heads, tokens, 128)),) * 3

    return Kernel("flash attention", f"{heads} heads, {tokens} tokens, causal", make, _dense(heads, tokens), {})


def _splash(heads: int = 16, tokens: int = 4096, window: int | None = None) -> Kernel:
    def make() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        shape = (tokens, tokens)
        mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
        sizes = splash.BlockSizes(block_q=512, block_kv=1024, block_kv_compute=512)
        kernel = splash.make_splash_mha_single_device(masks.MultiHeadMask([mask] * heads), block_sizes=sizes)
        return lambda q, k, v: kernel(q, k, v), (SHAPE((heads, tokens, 128)),) * 3

    kind = "causal" if window is None else f"window {window}"
    return Kernel(
        "splash attention", f"{heads} heads, {tokens} tokens, {kind}", make, _dense(heads, tokens, window), {}
    )


def _dense(heads: int, tokens: int, window: int | None = None) -> Work:
    """Q, K and V read once, the output written once."""
    pairs = attention_work([tokens], [tokens], heads, heads, 128, 2, 2, window).flops
    return Work(4 * heads * tokens * 128 * 2, pairs)


def _gmm(tokens: int = 8192, k: int = 4096, n: int = 2048, experts: int = 8) -> Kernel:
    def make() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        function = functools.partial(gmm, preferred_element_type=jnp.bfloat16, tiling=(512, 1024, 1024))
        return function, (SHAPE((tokens, k)), SHAPE((experts, k, n)), INTEGERS((experts,)))

    work = Work(2 * (tokens * k + experts * k * n + tokens * n), 2 * tokens * k * n)
    sizes = np.full(experts, tokens // experts)
    return Kernel("megablox gmm", f"{tokens} x {k} x {n}, {experts} equal groups", make, work, {2: sizes})


def _paged(seqs: int = 32, length: int = 4096, page: int = 32) -> Kernel:
    def make() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        function = functools.partial(paged_attention, pages_per_compute_block=16)
        cache = SHAPE((8, 8192, page, 128))
        return function, (SHAPE((seqs, 32, 128)), cache, cache, INTEGERS((seqs,)), INTEGERS((seqs, length // page)))

    tables = np.arange(seqs * length // page).reshape(seqs, -1) % 8192
    work = _decode(seqs, length)
    text = f"decode {seqs} x {length}, 32/8 heads, pages of {page}"
    return Kernel("paged attention", text, make, work, {3: np.full(seqs, length), 4: tables})


def _ragged(seqs: int = 64, length: int = 4096, page: int = 128) -> Kernel:
    def make() -> tuple[Callable[..., Any], tuple[Any, ...]]:
        function = functools.partial(
            ragged_paged_attention,
            sm_scale=128**-0.5,
            num_kv_pages_per_block=8,
            num_queries_per_block=8,
            vmem_limit_bytes=48 << 20,
        )
        integers = (INTEGERS((seqs,)), INTEGERS((seqs, length // page)), INTEGERS((seqs + 1,)), INTEGERS((1,)))
        return function, (SHAPE((seqs, 32, 128)), SHAPE((2048, page, 16, 128)), *integers)

    tables = np.arange(seqs * length // page).reshape(seqs, -1) % 2048
    scalars = {2: np.full(seqs, length), 3: tables, 4: np.arange(seqs + 1), 5: [seqs]}
    text = f"decode {seqs} x {length}, 32/8 heads, pages of {page}"
    return Kernel("ragged paged attention (v2)", text, make, _decode(seqs, length), scalars)


def _decode(seqs: int, length: int) -> Work:
    return attention_work([length] * seqs, [1] * seqs, 32, 8, 128, 2, 2, update_cache=False)


KERNELS = (_matmul(), _flash(), _splash(), _splash(window=1024), _gmm(), _paged(), _ragged())


def measure(kernel: Kernel, target: str) -> dict[str, Any]:
    """One cell of the table, or the reason that there is none."""
    try:
        function, shapes = kernel.make()
        report = compile_function(function, *shapes, target=target, any_compiler=True).predict(
            kernel.scalars, kernel.work
        )
    except ScheduleError as error:
        return {"error": str(error).split("\n")[0]}
    facts = chip(target)
    at_best = max(kernel.work.bytes / facts.hbm_bandwidth, kernel.work.flops / facts.peak_bf16_flops)
    by = "HBM" if at_best == kernel.work.bytes / facts.hbm_bandwidth else "MXU"
    return {
        "seconds": report.seconds,
        "kernel_seconds": report.kernel_seconds,
        "share": at_best / report.seconds,
        "roof": by,
        "bound": bound(report),
        "compiler": report.compiler,
    }


def bound(report: CallReport) -> str:
    """What the longest kernel of a call spends its time on."""
    kernel = max(report.kernels, key=lambda one: one.seconds)
    if kernel.dma_seconds > BUSY * kernel.seconds:
        return f"HBM, busy {kernel.dma_seconds / kernel.seconds:.2f} of the time"
    loop = max(kernel.loops, key=lambda one: one.compute_seconds + one.stall_seconds)
    slot, used = max((loop.utilization or {"slots unknown": 0.0}).items(), key=lambda item: item[1])
    stalls = f"stalls {kernel.stall_seconds / kernel.seconds:.2f}"
    return f"instructions: {slot} {used:.2f}; {stalls}"


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| kernel | shapes | target | libtpu | call, us | kernel, us | share of the bound | what takes the time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    failed = []
    for key, found in results.items():
        name, shapes, target, compiler = key.split(" | ")
        if "error" in found:
            failed.append(f"- **{name}**, {shapes}, on {target} with libtpu {compiler}: {found['error']}")
            continue
        times = f"{found['seconds'] * 1e6:,.1f} | {found['kernel_seconds'] * 1e6:,.1f}"
        lines.append(
            f"| {name} | {shapes} | {target} | {compiler} | {times} | {found['share']:.2f} ({found['roof']}) | {found['bound']} |"
        )
    if failed:
        lines += ["", "These could not be predicted:", "", *failed]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=TPU_TARGETS, help="only this target")
    parser.add_argument("--only", action="append", help="only kernels with this in their name")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    compiler = importlib.metadata.version("libtpu")
    for kernel in KERNELS:
        for target in options.target or ("tpu7x", "v6e"):
            if options.only and not any(part in kernel.name for part in options.only):
                continue
            start = time.monotonic()
            found = measure(kernel, target)
            results[f"{kernel.name} | {kernel.shapes_text} | {target} | {compiler}"] = found
            print(
                f"{time.monotonic() - start:6.1f} s  {kernel.name}, {kernel.shapes_text}, {target}: {found}", flush=True
            )
            order = [one.name + " | " + one.shapes_text for one in KERNELS]
            kept = sorted(
                results.items(), key=lambda item: (order.index(" | ".join(item[0].split(" | ")[:2])), item[0])
            )
            results = dict(kept)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    page = PAGE.read_text()
    before, _, rest = page.partition(START)
    PAGE.write_text(f"{before}{START}{table(results)}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
