"""Compiles forward passes of two layers around an engine's programs, and says which of them copy the KV cache.

python steps.py TARGET FOLDER: builds a small spec whose cache is larger than a core's VMEM, loads it on TARGET (for a
TPU, on a device of a topology that is not there), and prints for each form of a step what the compiled module does.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rpac.devices.toolchain import prepare, toolchain

if __name__ == "__main__":
    prepare()  # before JAX is imported

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import rpac
from rpac.build import sources_of
from rpac.bundle import write_bundle
from rpac.devices.chip import chip, is_tpu
from rpac.lower import tasks_of
from rpac.lower.worker import lower
from rpac.spec import parse_spec

LAYERS = 2
SPEC = """
name: step
model: {q_heads: 4, kv_heads: 2, head_dim: 128, q_dtype: bfloat16, kv_dtype: bfloat16}
serving:
  {page_size: 16, max_model_len: 128, max_num_tokens: 16, token_buckets: [16], max_num_seqs: 4, prefill_chunk: 16,
   context_lens: [40], num_pages: 8192}
targets: [tpu7x, cpu]
"""

Layer = Callable[..., tuple[Any, Any]]


def listed(call: Layer) -> Layer:
    """A cache for each layer, the layers one after the other."""

    def step(x: Any, caches: Any, *metadata: Any) -> Any:
        after = []
        for cache in caches:
            x, cache = layer(call, x, cache, metadata)
            after.append(cache)
        return x, after

    return step


def scanned(call: Layer) -> Layer:
    """One cache with the pages of every layer; each layer's page table is moved on to its own."""

    def step(x: Any, cache: Any, kv_lens: Any, page_indices: Any, *rest: Any) -> Any:
        pages = cache.shape[0] // LAYERS

        def body(carry: Any, index: Any) -> Any:
            return layer(call, *carry, (kv_lens, page_indices + index * pages, *rest)), None

        return jax.lax.scan(body, (x, cache), jnp.arange(LAYERS, dtype=jnp.int32))[0]

    return step


def stacked(call: Layer) -> Layer:
    """A cache `[layers, ...]`, of which each layer takes its own and puts it back."""

    def step(x: Any, caches: Any, *metadata: Any) -> Any:
        for index in range(LAYERS):
            x, cache = layer(call, x, caches[index], metadata)
            caches = caches.at[index].set(cache)
        return x, caches

    return step


def layer(call: Layer, x: Any, cache: Any, metadata: Any) -> Any:
    out, cache = call(x, x[:, :2], x[:, 2:], cache, *metadata)
    return jnp.tanh(out), cache


def load(target: str, folder: Path) -> rpac.Engine:
    spec = parse_spec(SPEC, "step.yaml")
    write_bundle(
        folder / "step.rpac", spec, [lower(task, toolchain()) for task in tasks_of(spec, sources_of(spec, [target]))]
    )
    if not is_tpu(target):
        return rpac.load(folder / "step.rpac", target)
    return rpac.load(folder / "step.rpac", device=topologies.get_topology_desc(chip(target).topology, "tpu").devices[0])


def facts(engine: rpac.Engine, step: Layer, layers: tuple[int, ...], count: int) -> dict[str, Any]:
    """What the compiled step does with its caches: `count` arrays, each of `layers` x the contract's shape."""
    sharding = jax.sharding.SingleDeviceSharding(engine.device)
    x, _, _, one, *metadata = (
        jax.ShapeDtypeStruct(dims.shape, dims.dtype, sharding=sharding)
        for dims in engine.programs[rpac.Variant("decode", 16)].args
    )
    shape = (*layers, *one.shape)
    cache = jax.ShapeDtypeStruct(shape, one.dtype, sharding=sharding)
    jitted = jax.jit(step, donate_argnums=1)
    lowered = jitted.trace(x, [cache] * count if count > 1 else cache, *metadata).lower(
        lowering_platforms=(engine.device.platform,)
    )
    compiled = lowered.compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    shapes = "|".join(",".join(map(str, dims)) for dims in (one.shape, shape))
    alias = re.search(r"input_output_alias=\{(.*?)\}, entry", text)
    return {
        "aliases": sorted(set(re.findall(r"\{(\d+)\}: \((\d+),", alias[1]))) if alias else [],
        "copies": len(re.findall(rf"= \(?\w+\[(?:{shapes})\].* (?:copy|copy-start)\(", text)),
        "temp": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "cache": one.dtype.itemsize * math.prod(shape) * count,
        "layer": one.dtype.itemsize * math.prod(one.shape),
    }


if __name__ == "__main__":
    engine = load(sys.argv[1], Path(sys.argv[2]))
    mixed = engine.program("mixed", 16)
    found = {
        "listed program": facts(engine, listed(mixed), (), LAYERS),
        "listed traced": facts(engine, listed(engine.traced), (), LAYERS),
        "scanned traced": facts(engine, scanned(engine.traced), (), 1),
        "stacked program": facts(engine, stacked(mixed), (LAYERS,), 1),
    }
    print(json.dumps(found))
