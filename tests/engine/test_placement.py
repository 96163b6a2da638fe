"""Arguments are taken where they lie, if that is the engine's device in the engine's order, and refused elsewhere."""

from __future__ import annotations

from pathlib import Path

from calls import python

TWO = "--xla_force_host_platform_device_count=2"

CODE = """
import json, sys, jax, jax.numpy as jnp, numpy as np, rpac
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from rpac.engine.arguments import Arguments
from rpac.contract.mesh import Mesh as Mesh_of
from rpac.devices.placement import Placement
engine = rpac.load(sys.argv[1], device=jax.devices()[1])
batch = rpac.Batch.build(engine.limits, [1], [2], [[5]])
dims = engine.programs[rpac.Variant("decode", 8)].args[:4]
def call(*shardings):
    made = [jax.device_put(jnp.ones(a.shape, a.dtype), s) for a, s in zip(dims, shardings * 4)]
    address = None
    if len(made[3].devices()) == 1:
        address = made[3].unsafe_buffer_pointer()
    try:
        out, cache = engine(*made, batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    except rpac.BatchError as error:
        return [str(error).replace("TFRT_CPU_", "cpu:"), made[3].is_deleted()]
    return [cache.unsafe_buffer_pointer() == address, made[3].is_deleted(), [d.id for d in out.devices()]]
first, second = jax.devices()
of = lambda *devices: NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec("x"))
everywhere = NamedSharding(Mesh(np.array([second, first]), ("x",)), PartitionSpec())
def ordered(*devices):
    "Whether an artifact for two devices takes arguments on these."
    replicated = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())
    made = [jax.device_put(jnp.ones(a.shape, a.dtype), replicated) for a in program.args]
    try:
        Arguments(program, engine.kv_layout, Placement(Mesh_of(copy=2), (second, first))).check(made)
    except rpac.BatchError as error:
        return str(error).replace("TFRT_CPU_", "cpu:")
program = engine.programs[rpac.Variant("decode", 8)]
print(json.dumps([call(SingleDeviceSharding(second)), call(of(second)), call(of(first)), call(of(second, first)),
                  call(everywhere), ordered(second, first), ordered(first, second)]))
"""


def test_one_device_by_any_name_is_accepted_without_a_copy_and_nothing_else_is(
    bundle: Path, native_bundle: Path
) -> None:
    for path in (bundle, native_bundle):
        single, named, other, split, replicated, same_order, other_order = python(CODE, str(path), XLA_FLAGS=TWO)
        assert single == named == [True, True, [1]]
        move = "move it with jax.device_put"
        assert other == [f"queries is on cpu:0; must be on cpu:1; {move}", False]
        both = "cpu:1, cpu:0 in this device order"
        assert split == replicated == [f"queries is on {both}; must be on cpu:1; {move}", False]
        assert same_order is None
        swapped = "cpu:0, cpu:1 in this device order; must be on cpu:1, cpu:0 in this device order"
        assert other_order == f"queries is on {swapped}; {move}"
