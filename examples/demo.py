"""Serves ragged batches from a bundle on this machine's CPU, and compares every step with the float32 oracle.

    python examples/demo.py build/llama3-8b.rpac
    python examples/demo.py build/llama3-8b.rpac build/demo.json    # also writes how long it took, for `rpac sign --demo`

`RPAC_DEMO_START`, seconds since 1970, is when it began, where something was done before; `make demo` builds the bundle first.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

START = time.perf_counter()
BEGAN = float(os.environ.get("RPAC_DEMO_START") or time.time())
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is installed to compile, and would look for a TPU

import jax  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402

import rpac  # noqa: E402
from rpac.bundle import describe  # noqa: E402
from rpac.oracle.attention import ragged_paged_attention as oracle  # noqa: E402

PROMPTS = [600, 512, 37, 1024]  # tokens
DECODE_STEPS = 3


def main(path: str, record: str = "") -> None:
    engine = rpac.load(path, target="cpu")
    model, limits = engine.model, engine.limits
    print(f"{path}: loaded {time.perf_counter() - START:.2f} s after the start, imports included")
    rng = np.random.default_rng(0)
    pages = iter(rng.permutation(limits.num_pages))
    per_prompt = -(-(max(PROMPTS) + DECODE_STEPS) // limits.page_size)
    tables = [[int(next(pages)) for _ in range(per_prompt)] for _ in PROMPTS]
    cached = [0] * len(PROMPTS)
    kv_cache = engine.new_cache()

    print(f"{'batch':34} {'program':14} {'new tokens':>10} {'ms':>8} {'error':>8}")
    while min(c - p for c, p in zip(cached, PROMPTS, strict=True)) < DECODE_STEPS:
        new = [next_tokens(c, p, limits.prefill_chunk) for c, p in zip(cached, PROMPTS, strict=True)]
        batch = rpac.Batch.build(limits, new, cached, tables)
        queries, keys, values = (
            rng.standard_normal((batch.tokens, heads, model.head_dim)).astype(ml_dtypes.bfloat16)
            for heads in (model.q_heads, model.kv_heads, model.kv_heads)
        )
        metadata = batch.metadata
        wanted, _ = oracle(
            queries, keys, values, np.asarray(kv_cache), *metadata, sm_scale=model.sm_scale, kv_layout=engine.kv_layout
        )
        start = time.perf_counter()
        out, kv_cache = engine(queries, keys, values, kv_cache, *metadata)
        out = np.asarray(jax.block_until_ready(out), np.float32)[: batch.num_tokens]
        elapsed = time.perf_counter() - start
        wanted = wanted[: batch.num_tokens]
        error = np.linalg.norm(out - wanted) / np.linalg.norm(wanted)
        program = engine.select(batch.tokens, batch.distribution)
        print(f"{new!s:34} {program!s:14} {batch.num_tokens:10} {1e3 * elapsed:8.1f} {error:8.4f}")
        if error > 0.01:
            sys.exit("the output does not match the oracle")
        cached = [c + n for c, n in zip(cached, new, strict=True)]
    print("every output matches the oracle; the first use of a program includes its XLA compile")
    for program, count in engine.counts.items():
        print(f"  {program}: {count}")
    seconds = round(time.time() - BEGAN, 1)
    print(f"{seconds} s from the start" + ", the build included" * ("RPAC_DEMO_START" in os.environ))
    if record:
        bundle = {"name": engine.name, "digest": describe(path)["digest"]}
        began = "build" if "RPAC_DEMO_START" in os.environ else "load"
        data = {
            "format": "rpac demo",
            "schema": 1,
            "bundle": bundle,
            "seconds": seconds,
            "from": began,
            "cpus": os.cpu_count(),
        }
        Path(record).write_text(json.dumps(data, indent=1) + "\n")


def next_tokens(cached: int, prompt: int, chunk: int) -> int:
    """A chunk of the prompt while any is left, then one token at a time."""
    return min(chunk, prompt - cached) if cached < prompt else 1


if __name__ == "__main__":
    main(*sys.argv[1:])
