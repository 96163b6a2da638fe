"""Facts of each TPU target: most are read from JAX's own tables. No tuning lives here.

A *device* is what JAX calls one: a TensorCore on tpu7x, v6e and v5e, both TensorCores of a chip on v5p (megacore).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rpac.errors import TargetError

GIB = 1 << 30


class _Entry(NamedTuple):
    device_kind: str
    topologies: tuple[str, ...]
    devices: int
    devices_per_chip: int
    chip_version: str
    cores: int
    hbm_gib: float
    usable_hbm_gib: float


# The smallest topologies of each generation that libtpu describes without a TPU, the first of so many devices, each next of
# twice as many. What the first makes for one device is for any slice.
#
# HBM of a device, in GiB: as https://cloud.google.com/tpu/docs publishes it for a chip (v5e 16, v5p 95, v6e 32, TPU7x 192, of
# which each TensorCore has half). Then what a program may use of it: XLA keeps the rest to itself. libtpu 0.0.42.1 refuses a
# larger program because it "exceeds available HBM (15.75G)", or 31.25G for v6e and 94.75G for TPU7x. For v5p it says 95.74G,
# which is more than is published.
_ENTRIES = {
    "tpu7x": _Entry("TPU7x", ("tpu7x:2x2x1", "tpu7x:2x2x2", "tpu7x:2x2x4"), 8, 2, "7x", 1, 96, 94.75),
    "v6e": _Entry("TPU v6 lite", ("v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8"), 4, 1, "v6e", 1, 32, 31.25),
    "v5p": _Entry("TPU v5", ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4"), 4, 1, "v5p", 2, 95, 95),
    "v5e": _Entry("TPU v5 lite", ("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8"), 4, 1, "v5e", 1, 16, 15.75),
}

TPU_TARGETS = tuple(_ENTRIES)


@dataclass(frozen=True)
class Chip:
    """One device of a target. Memory in bytes, bandwidth in bytes/s, peak in flop/s (a multiply-add is two).

    VMEM, SMEM and the MXUs are counted in one core; HBM and the peak in the whole device. `usable_hbm_bytes`: of HBM, what a
    program may use. `devices_per_chip`: of what is rented.
    """

    target: str
    device_kind: str
    topology: str
    generation: int
    devices_per_chip: int
    cores: int
    lanes: int
    sublanes: int
    mxu_size: int
    mxus: int
    vmem_bytes: int
    smem_bytes: int
    hbm_bytes: int
    usable_hbm_bytes: int
    hbm_bandwidth: int
    peak_bf16_flops: int


# Targets of portable programs, which run on any device of a platform: JAX's names of it, where it lowers and where it runs.
PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}


def is_tpu(target: str) -> bool:
    """Whether a target has a chip; `cpu` and `gpu` have none."""
    return target in _ENTRIES


def topology_of(target: str, devices: int) -> str:
    """The smallest topology of a TPU target that has so many devices. Raises TargetError where we know none."""
    entry = _ENTRIES[target]
    for doublings, topology in enumerate(entry.topologies):
        if devices <= entry.devices << doublings:
            return topology
    most = entry.devices << (len(entry.topologies) - 1)
    raise TargetError(
        f"target {target} for {devices} devices; must be at most {most}; lower parallel.tensor or parallel.data"
    )


def chip(target: str) -> Chip:
    """The facts of one TPU target; imports JAX. Raises TargetError where `target` is no TPU."""
    if not is_tpu(target):
        raise TargetError(f"target {target!r} has no chip; must be one of {', '.join(TPU_TARGETS)}")
    from jax.experimental.pallas import tpu as pltpu

    entry = _ENTRIES[target]
    core = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(entry.chip_version), entry.cores)
    return Chip(
        target=target,
        device_kind=entry.device_kind,
        topology=entry.topologies[0],
        generation=core.generation,
        devices_per_chip=entry.devices_per_chip,
        cores=core.num_cores,
        lanes=core.num_lanes,
        sublanes=core.num_sublanes,
        mxu_size=core.mxu_column_size,
        mxus=core.num_mxus,
        vmem_bytes=core.vmem_capacity_bytes,
        smem_bytes=core.smem_capacity_bytes,
        hbm_bytes=int(entry.hbm_gib * GIB),
        usable_hbm_bytes=int(entry.usable_hbm_gib * GIB),
        hbm_bandwidth=core.num_cores * core.mem_bw_bytes_per_second,
        peak_bf16_flops=core.num_cores * core.bf16_ops_per_second,
    )
