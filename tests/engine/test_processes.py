"""A mesh spread over several processes of jax.distributed: each warms, checks and serves with its own devices."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import rpac

SMALL = Path(__file__).with_name("small.yaml")
PROCESSES = 2

# Arguments: the bundle, the port, the process's number. Prints what it found.
SERVE = """
import json, sys
import jax, numpy as np, rpac
jax.config.update("jax_platforms", "cpu")
path, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
from rpac.check.deployment import serve_check
from rpac.oracle.attention import ragged_paged_attention
said = {"devices": [len(jax.devices()), len(jax.local_devices())]}
for name, options in (("default", {}), ("other", {"devices": [d for d in jax.devices() if d.process_index != index] * 2})):
    try:
        rpac.load(path, **options)
    except rpac.TargetError as error:
        said[name] = str(error)
engine = rpac.load(path, devices=jax.devices())
engine.warm(canary=True)
said["canaries"] = sorted(str(variant) for variant in engine.totals.canaries)

# A call, whose host arrays are whole and the same in both processes.
rng = np.random.default_rng(0)
limits, model = engine.limits, engine.model
batches = [rpac.Batch.build(limits, *lists) for lists in (([1, 5], [17, 3], [[0, 1], [2]]), ([4, 1], [9, 2], [[3], [4]]))]
metadata = [np.concatenate(arrays) for arrays in zip(*(batch.metadata for batch in batches))]
draw = lambda heads: rng.standard_normal((16, heads, model.head_dim)).astype(np.float32)
queries, keys, values = draw(4), draw(2), draw(2)
cache = engine.new_cache()
out, after = engine(queries, keys, values, cache, *metadata)
said["donated"] = cache.is_deleted() and not after.is_fully_addressable
wrong = []
for shard in out.addressable_shards:
    rows, heads = shard.index[0], shard.index[1]
    replica, head = rows.start // 8 if rows.start else 0, (heads.start or 0) // 2
    batch = batches[replica]
    empty = np.zeros((limits.num_pages, limits.page_size, 2, 1, model.head_dim), np.float32)
    part = slice(replica * 8, replica * 8 + 8)
    want, _ = ragged_paged_attention(
        queries[part, 2 * head : 2 * head + 2], keys[part, head : head + 1], values[part, head : head + 1], empty,
        *batch.metadata, sm_scale=model.sm_scale,
    )
    used = batch.num_tokens
    if not np.abs(np.asarray(shard.data)[:used] - want[:used]).max() < 1e-4:
        wrong.append(str(shard.index))
said["wrong"] = wrong
said["parts"] = len(out.addressable_shards)
there = jax.make_array_from_callback(metadata[0].shape, engine.sharding("kv_lens"), lambda index: metadata[0][index])
try:
    engine(queries, keys, values, after, there, *metadata[1:])
except rpac.BatchError as error:
    said["spread metadata"] = str(error)
report = serve_check(path, seed=5)
said["serve_check"] = [report.exit_code, [step.detail for step in report.steps if not step.ok]]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    text = SMALL.read_text().replace("q_heads: 2", "q_heads: 4").replace("kv_heads: 1", "kv_heads: 2")
    (folder / "small.yaml").write_text(text + "parallel: {tensor: 2, data: 2}\n")
    done = rpac("build", folder / "small.yaml", "-o", folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "small.rpac"


def in_each_process(bundle: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SERVE, str(bundle), str(port), str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for index in range(PROCESSES)
    ]
    found = []
    try:
        for process in running:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
            found.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in running:
            process.kill()
    return found


def test_two_processes_serve_one_mesh(bundle: Path) -> None:
    for index, said in enumerate(in_each_process(bundle)):
        assert said["devices"] == [4, 2]
        assert (
            "found 2 devices; the bundle's programs run on 4; pass devices=jax.devices() in each of the 2 processes"
            in (said["default"])
        )
        assert "each once" in said["other"]
        assert said["canaries"] == ["decode/8", "mixed/8", "prefill/8"]
        assert said["donated"]
        assert (said["wrong"], said["parts"]) == ([], 2), index
        assert "kv_lens lies on devices of several processes" in said["spread metadata"]
        assert said["serve_check"] == [0, []]
