"""The adapters beside the packages that they stand in for, each in its own environment (tests/adapters/environments.py).

What is compared, by the scripts in tests/adapters/peers: signatures; outputs and caches with the package's own reference
function, on random batches of every program; and a layer's call through the package's own attention interface, under jit
and shard_map, with the adapter in the kernel's place.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import environments
import pytest
from command import TINY, rpac

SEED = random.SystemRandom().randrange(2**32)
PEERS = Path(__file__).parent / "peers"


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    done = rpac("build", TINY, "--target", "cpu", "-o", folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "tiny.rpac"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "in_server"),
    [
        ("tpu_inference", "attention interface in jit, device 1 of 2"),
        ("sglang_jax", "attention backend in jit"),
        ("ejkernel", "its operation in jit"),
    ],
)
def test_the_adapter_does_what_the_package_does(name: str, in_server: str, tiny_bundle: Path, tmp_path: Path) -> None:
    try:
        python = environments.ensure(name)
    except SystemExit as reason:  # no interpreter of the version that the packages need
        pytest.skip(str(reason))
    print(f"seed {SEED}")
    # ejkernel keeps what it tuned in the home folder.
    env = {**os.environ, "PYTHONPATH": str(environments.ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    command = [python, PEERS / f"check_{name}.py", tiny_bundle, str(SEED)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    claims = done.stdout.splitlines()
    assert sum(claim.startswith(in_server) and claim.endswith("caches equal") for claim in claims) == 7
