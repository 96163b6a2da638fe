"""The reshapes between a server's cache and a bundle's, as XLA compiles them for a TPU: none copies."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Shapes of a server's cache in bfloat16, and the bundle's with the same bytes.
VIEWS = {
    "sglang-jax, separate": ((64 * 128, 16, 128), (64, 2, 8, 128, 128)),
    "sglang-jax, separate, one KV head": ((64 * 128, 2, 128), (64, 2, 1, 128, 128)),
    "sglang-jax, interleaved": ((64 * 128, 16, 128), (64, 128, 8, 2, 128)),
    "tpu-inference, latent, 32 tokens packed": ((64, 4, 32, 640), (64, 128, 640)),
}

SCRIPT = """
import json, re, sys
from rpac.devices.toolchain import prepare
prepare()
import jax
import jax.numpy as jnp
from jax.experimental import topologies

one = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(sys.argv[1], "tpu").devices[0])
found = []
for given, wanted in json.loads(sys.argv[2]):
    cache = jax.ShapeDtypeStruct(given, jnp.bfloat16, sharding=one)
    compiled = jax.jit(lambda cache: cache.reshape(wanted), donate_argnums=0).lower(cache).compile()
    found.append(re.findall(r"ROOT .* ([a-z-]+)[(]", compiled.as_text()))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v6e:2x2", "v5e:2x2"])
def test_a_servers_cache_becomes_a_bundles_without_a_copy(topology: str) -> None:
    command = [sys.executable, "-c", SCRIPT, topology, json.dumps(list(VIEWS.values()))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert dict(zip(VIEWS, json.loads(done.stdout.splitlines()[-1]), strict=True)) == {
        name: ["bitcast"] for name in VIEWS
    }
