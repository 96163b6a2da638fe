"""Bundles for several devices: heads cut by tensor parallelism, batches by data parallelism, held against the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
from calls import python
from command import rpac

from rpac.bundle import verify_bundle
from rpac.contract.mesh import Mesh
from rpac.spec import load_spec

SMALL = Path(__file__).with_name("small.yaml")
EIGHT = "--xla_force_host_platform_device_count=8"

# heads of queries and of KV, tensor, data -> the mesh
SHARDS = {
    "KV heads cut": (8, 4, 4, 1, Mesh(1, 4, 1)),
    "copies share the queries, two replicas": (8, 2, 4, 2, Mesh(2, 2, 2, True)),
    "heads that do not divide": (6, 3, 2, 1, Mesh(1, 1, 2)),
}

# Argument 1: the bundle; 2: the whole model's heads of queries and of KV, as JSON. Prints what is wrong.
SERVE = """
import json, sys
import jax, numpy as np, rpac
from rpac.oracle.attention import ragged_paged_attention
path, heads = sys.argv[1], json.loads(sys.argv[2])
devices = jax.devices()[::-1]  # not the order in which JAX numbers them
count = int(sys.argv[3])
engine = rpac.load(path, devices=devices[:count])
engine.warm(canary=True)
q_heads, kv_heads = heads
replicas = int(sys.argv[4])
rng = np.random.default_rng(0)
limits, dim = engine.limits, engine.model.head_dim
wrong = []
rows = {
    "decode": [([1, 1], [20, 0]), ([1], [7])],
    "prefill": [([4, 4], [9, 0]), ([4], [11])],
    "mixed": [([1, 5], [17, 3]), ([1], [5])],
    "mixed (replicas differ)": [([1, 1], [20, 0]), ([4], [11])],
    "decode (one is idle)": [([1, 1], [20, 0]), ([], [])],
}
for kind, each in rows.items():
    batches = []
    for q_lens, context in each[:replicas]:
        pages = iter(rng.permutation(limits.num_pages).tolist())
        tables = [[next(pages) for _ in range(-(-(q + c) // limits.page_size))] for q, c in zip(q_lens, context)]
        batches.append(rpac.Batch.build(limits, q_lens, context, tables))
    def draw(*shape):
        return rng.standard_normal((replicas, *shape)).astype(np.float32)
    queries, keys, values = draw(8, q_heads, dim), draw(8, kv_heads, dim), draw(8, kv_heads, dim)
    cache = draw(limits.num_pages, limits.page_size, 2 * kv_heads, 1, dim)
    whole = lambda array: array.reshape(-1, *array.shape[2:])
    names = ("kv_lens", "page_indices", "cu_q_lens", "distribution")
    metadata = [np.concatenate([getattr(batch, name) for batch in batches]) for name in names]
    # A copy: what device_put makes on cpu may share numpy's memory, which cannot be donated.
    there = jax.jit(lambda array: array + 0)(jax.device_put(whole(cache), engine.sharding("kv_cache")))
    before = {shard.data.unsafe_buffer_pointer() for shard in there.addressable_shards}
    queries_there = jax.device_put(whole(queries), engine.sharding("queries"))
    out, after = engine(queries_there, whole(keys), whole(values), there, *metadata)
    if {shard.data.unsafe_buffer_pointer() for shard in after.addressable_shards} != before:
        wrong.append(f"{kind}: the cache was copied")
    if after.sharding != engine.sharding("kv_cache") and not after.sharding.is_equivalent_to(engine.sharding("kv_cache"), 5):
        wrong.append(f"{kind}: the cache lies elsewhere")
    outs, caches = np.asarray(out).reshape(queries.shape), np.asarray(after).reshape(cache.shape)
    for index, batch in enumerate(batches):
        want, kept = ragged_paged_attention(
            queries[index], keys[index], values[index], cache[index],
            batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution, sm_scale=engine.model.sm_scale,
        )
        used = batch.num_tokens
        if used and not np.abs(outs[index][:used] - want[:used]).max() < 1e-4:
            wrong.append(f"{kind}: attention of replica {index}")
        if not np.array_equal(caches[index], kept):
            wrong.append(f"{kind}: cache of replica {index}")
ran = sorted(str(variant) for variant in engine.counts)
swapped = rpac.load(path, devices=devices[1::-1] + devices[2:count])
refused = []
for array, one in ((queries_there, swapped), (jax.device_put(whole(queries), devices[0]), engine)):
    try:
        one(array, whole(keys), whole(values), jax.device_put(whole(cache), one.sharding("kv_cache")), *metadata)
    except rpac.BatchError as error:
        refused.append(str(error))
try:
    rpac.load(path, devices=devices[:1])
except rpac.TargetError as error:
    refused.append(str(error))
print(json.dumps([wrong, ran, refused]))
"""


# In the ordinary run the one in which heads, copies and replicas are all there.
QUICK = "copies share the queries, two replicas"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in SHARDS]
)
def test_a_bundle_for_a_mesh_serves_sharded_arrays_as_the_whole_model_says(name: str, tmp_path: Path) -> None:
    q_heads, kv_heads, tensor, data, mesh = SHARDS[name]
    heads = (("q_heads: 2", f"q_heads: {q_heads}"), ("kv_heads: 1", f"kv_heads: {kv_heads}"))
    text = SMALL.read_text()
    for old, new in heads:
        text = text.replace(old, new)
    spec = tmp_path / "small.yaml"
    spec.write_text(text + f"parallel: {{tensor: {tensor}, data: {data}}}\n")
    assert load_spec(spec).mesh == mesh
    done = rpac("build", spec, "-o", tmp_path, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert verify_bundle(tmp_path / "small.rpac").mesh == mesh
    count = str(mesh.devices)
    bundle = str(tmp_path / "small.rpac")
    wrong, ran, refused = python(SERVE, bundle, f"[{q_heads}, {kv_heads}]", count, str(data), XLA_FLAGS=EIGHT)
    assert wrong == []
    assert ran == ["decode/8", "mixed/8", "prefill/8"]
    order, cut, few = refused
    assert "in this device order; must be on" in order
    assert cut.startswith("queries is on") and "move it with jax.device_put" in cut
    assert f"found 1 devices; the bundle's programs run on {count}; give as many" in few
