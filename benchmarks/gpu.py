"""Portable programs on the device at hand: checked against the oracle, and their share of its memory bandwidth.

    rpac build benchmarks/gpu.yaml --target gpu
    python benchmarks/gpu.py build/gpu.rpac

The device is the process's first: a GPU with a CUDA build of jax, else the CPU (then the bundle's target is `cpu`). The
bandwidth is that of a copy of the KV cache, measured beside the calls, so that the share is of what this device does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import rpac
from rpac.check.deployment import serve_check
from rpac.contract.arrays import BITS, cdiv
from rpac.schedule.report import attention_work

WARM_CALLS = 3


def seconds(call: Callable[[], Any], calls: int) -> float:
    """The median time of a call, after some that are not counted."""
    times = []
    for _ in range(WARM_CALLS + calls):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_CALLS:])


def decode(engine: rpac.Engine, sequences: int, context: int, calls: int) -> tuple[float, float]:
    """Seconds of a decode call and of a copy of the cache."""
    limits = engine.limits
    pages = cdiv(context, limits.page_size)
    tables = [[(row * pages + page) % limits.num_pages for page in range(pages)] for row in range(sequences)]
    batch = rpac.Batch.build(limits, [1] * sequences, [context - 1] * sequences, tables)
    program = engine.programs[engine.select(batch.tokens, batch.distribution)]
    key = jax.random.key(0)
    arrays = {
        dims.name: jax.random.normal(key, dims.shape, jnp.float32).astype(dims.dtype)
        for dims in program.args
        if dims.dtype != "int32"
    }
    metadata = {name: getattr(batch, name) for name in ("kv_lens", "page_indices", "cu_q_lens", "distribution")}

    def call() -> Any:
        out, arrays["kv_cache"], *_ = engine(**arrays, **metadata)
        return out

    took = seconds(call, calls)
    copy = jax.jit(lambda cache: cache + jnp.ones((), cache.dtype))
    return took, seconds(lambda: copy(arrays["kv_cache"]), calls)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--calls", type=int, default=20)
    options = parser.parse_args()

    report = serve_check(
        options.bundle, seed=1, allow_compile=True, progress=lambda step: print(step.name, step.detail, file=sys.stderr)
    )
    if report.exit_code:
        return report.exit_code
    engine = rpac.load(options.bundle, allow_compile=True)
    took, copied = decode(engine, options.sequences, options.context, options.calls)
    model = engine.model
    work = attention_work(
        [options.context] * options.sequences,
        [1] * options.sequences,
        model.q_heads,
        model.kv_heads,
        model.head_dim,
        BITS[model.q_dtype] // 8,
        BITS[model.kv_dtype] // 8,
    )
    cache = next(dims for dims in next(iter(engine.programs.values())).args if dims.name == "kv_cache")
    bandwidth = 2 * cache.nbytes / copied  # read and written
    print(f"{engine.device.device_kind}: every program's answers are the oracle's")
    print(f"a copy of the cache, {cache.nbytes / 1e6:.0f} MB: {copied * 1e3:.3f} ms, {bandwidth / 1e9:.0f} GB/s")
    print(f"decode {options.sequences}x{options.context}: {took * 1e3:.3f} ms, median of {options.calls}")
    print(f"needs {work.bytes / 1e6:.0f} MB: {work.bytes / took / bandwidth:.2f} of that bandwidth")
    return 0


if __name__ == "__main__":
    sys.exit(main())
