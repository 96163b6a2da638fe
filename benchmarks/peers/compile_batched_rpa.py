"""Compiles batched_rpa of the `tpu-inference` package for one target, or makes its schedule for a batch.

    python compile_batched_rpa.py '{"target": "tpu7x", "q_heads": 32, ..., "tokens": 64}'
    python compile_batched_rpa.py '{...}' METADATA.json OUT.json

A kernel of its own first writes to HBM, from the batch's lengths, what its attention kernels then do, once for all layers
of a model. A walk knows only arguments, so here that schedule is one: the first form compiles the call with it as further
arguments, the second computes it (kv_lens, cu_q_lens and distribution in, the arguments' values by number out).
"""

from __future__ import annotations

import json
import logging
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
from abstract_tpu import Device, bare_package
from jax.experimental.pallas import tpu as pltpu

FIRST_EXTRA = 8


def traced_schedules(wrapper, request: dict[str, object], device: Device) -> list[tuple]:
    """The (schedule shapes, its configuration) of each kernel, in the order the call makes them."""
    from tpu_inference.kernels.experimental.batched_rpa import schedule

    found = []

    def record(cu_q_lens, kv_lens, distribution, cfgs, update_kv_cache):
        shapes = schedule.RpaSchedule.create_shape_dtype(cfgs)
        found.append((shapes, cfgs))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    wrapper.schedule.generate_rpa_metadata = record
    with jax.sharding.use_abstract_mesh(device.mesh()):
        jax.eval_shape(call_of(wrapper, request), *arguments_of(request, device))
    return found


def call_of(wrapper, request: dict[str, object]):
    def call(*arguments):
        # Unwrapped: the function is compiled once for all values of what it closes over.
        return wrapper.ragged_paged_attention.__wrapped__(*arguments, sm_scale=request["head_dim"] ** -0.5)

    return call


def arguments_of(request: dict[str, object], device: Device) -> list[jax.ShapeDtypeStruct]:
    tokens, q_heads, kv_heads, head_dim = (request[k] for k in ("tokens", "q_heads", "kv_heads", "head_dim"))
    seqs, page = request["max_seqs"], request["page_size"]
    return [
        device.shape(tokens, q_heads, head_dim),
        device.shape(tokens, kv_heads, head_dim),
        device.shape(tokens, kv_heads, head_dim),
        device.shape(request["pages"], page, kv_heads, 2, head_dim),
        device.shape(seqs, dtype=jnp.int32),
        device.shape(seqs * (request["max_model_len"] // page), dtype=jnp.int32),
        device.shape(seqs + 1, dtype=jnp.int32),
        device.shape(3, dtype=jnp.int32),
    ]


def compile_call(wrapper, schedules: list[tuple], request: dict[str, object], device: Device) -> None:
    leaves = [leaf for shapes, _ in schedules for leaf in jax.tree.leaves(shapes)]
    extra = [device.shape(*leaf.shape, dtype=leaf.dtype) for leaf in leaves]

    def call(*arguments):
        given = iter(arguments[FIRST_EXTRA:])
        wrapper.schedule.generate_rpa_metadata = lambda *_, cfgs, update_kv_cache: jax.tree.map(
            lambda leaf: next(given), next(shapes for shapes, known in schedules if known.mode == cfgs.mode)
        )
        return call_of(wrapper, request)(*arguments[:FIRST_EXTRA])

    device.compile(call, [*arguments_of(request, device), *extra], donate=(0, 3))


class WholeCopy:
    """Stands in for a DMA of a length known at run time only, which the interpreter does not do: copies all there is."""

    def __init__(self, source, destination, semaphore) -> None:
        self._source, self._destination = source.ref, destination.ref

    def start(self) -> None:
        self._destination[...] = self._source[...]

    def wait(self) -> None:
        pass


def values(generate, schedules: list[tuple], metadata: dict[str, list[int]], device: Device) -> dict[int, list[int]]:
    """The schedules of a batch, by argument number. The kernel that makes them runs in the interpreter."""
    found: list[list[int]] = []
    pltpu.make_async_copy = WholeCopy
    scalars = [jnp.array(metadata[name], jnp.int32) for name in ("cu_q_lens", "kv_lens", "distribution")]
    for _, cfgs in schedules:
        with jax.sharding.use_abstract_mesh(device.mesh()):
            made = generate(*scalars, cfgs=cfgs, interpret=True)
        found += [leaf.tolist() for leaf in jax.tree.leaves(made)]
    return {FIRST_EXTRA + number: row for number, row in enumerate(found)}


def main(request: dict[str, object], files: list[str]) -> None:
    bare_package("tpu_inference")
    logger = types.ModuleType("tpu_inference.logger")  # the package's own wants vLLM
    logger.init_logger = logging.getLogger
    sys.modules["tpu_inference.logger"] = logger
    from tpu_inference.kernels.experimental.batched_rpa import schedule, wrapper

    generate = schedule.generate_rpa_metadata
    device = Device(request["target"])
    schedules = traced_schedules(wrapper, request, device)
    if files:
        metadata = json.loads(Path(files[0]).read_text())
        Path(files[1]).write_text(json.dumps(values(generate, schedules, metadata, device)))
    else:
        compile_call(wrapper, schedules, request, device)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
