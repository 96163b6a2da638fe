"""Facts of the targets agree with JAX and with what libtpu says of each topology."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rpac.devices.chip import PLATFORMS, TPU_TARGETS, Chip, chip, is_tpu
from rpac.errors import TargetError
from rpac.spec import TARGETS

ROOT = Path(__file__).parents[2]


def test_every_target_of_a_spec_is_a_chip_or_a_platform() -> None:
    assert (*TPU_TARGETS, *PLATFORMS) == TARGETS
    assert [target for target in TARGETS if not is_tpu(target)] == list(PLATFORMS)


@pytest.mark.parametrize("target", ["cpu", "v4", ""])
def test_only_tpus_have_a_chip(target: str) -> None:
    with pytest.raises(TargetError) as caught:
        chip(target)
    assert str(caught.value) == f"target {target!r} has no chip; must be one of tpu7x, v6e, v5p, v5e"
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "target, terabytes_per_second, teraflops, vmem_mib, mxu_size",
    [
        ("tpu7x", 3.7, 1155, 64, 256),
        ("v6e", 1.64, 920, 128, 256),
        ("v5p", 2.46, 459, 64, 128),
        ("v5e", 0.82, 197, 128, 128),
    ],
)
def test_figures_are_the_published_ones_of_one_device(
    target: str, terabytes_per_second: float, teraflops: float, vmem_mib: int, mxu_size: int
) -> None:
    """Of one of the two TensorCores for tpu7x, and of both together for v5p."""
    facts = chip(target)
    assert facts.hbm_bandwidth == pytest.approx(terabytes_per_second * 1e12)
    assert facts.peak_bf16_flops == pytest.approx(teraflops * 1e12)
    assert facts.vmem_bytes == vmem_mib * 2**20
    assert facts.mxu_size == mxu_size
    assert (facts.lanes, facts.sublanes, facts.smem_bytes) == (128, 8, 2**20)


def libtpu_topologies() -> dict[str, dict[str, Any]]:
    """Kind and cores of each target's first device, asked in a process of its own: libtpu stays loaded where it is."""
    code = (
        "import json, sys\n"
        "from jax.experimental.topologies import get_topology_desc\n"
        "devices = {t: get_topology_desc(n, 'tpu').devices[0] for t, n in json.loads(sys.argv[1]).items()}\n"
        "print(json.dumps({t: {'kind': d.device_kind, 'cores': d.num_cores} for t, d in devices.items()}))"
    )
    environment = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5e-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    names = json.dumps({target: chip(target).topology for target in TPU_TARGETS})
    command = [sys.executable, "-c", code, names]
    answer = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, Any]] = json.loads(answer.stdout.splitlines()[-1])
    return found


def test_topologies_hold_devices_of_the_kind_and_cores_that_are_expected() -> None:
    expected = {target: {"kind": chip(target).device_kind, "cores": chip(target).cores} for target in TPU_TARGETS}
    assert libtpu_topologies() == expected


def test_importing_the_facts_does_not_import_jax() -> None:
    code = "import sys, rpac.devices.chip; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_facts_cannot_be_changed() -> None:
    facts = chip("v5e")
    assert facts == chip("v5e")
    assert isinstance(facts, Chip)
    with pytest.raises(AttributeError):
        facts.cores = 3  # type: ignore[misc]
