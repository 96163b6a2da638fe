"""Programs inside a model's jit: the right one, on the cache where it lies, and nothing undefined for a bad value."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import steps
from calls import arrays, batch_of, metadata, python
from command import environment

from rpac.batch import Batch
from rpac.bundle import write_bundle
from rpac.contract.kind import select_kind
from rpac.contract.program import Variant
from rpac.engine import Engine, load
from rpac.errors import BatchError, SelectionError
from rpac.spec import Spec

LAYERS = 2


@pytest.fixture(scope="module")
def compiled_steps(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What steps.py says of a target; in a process of its own, because it prepares JAX for a TPU that is not there."""

    @cache
    def run(target: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(target)
        done = subprocess.run(
            [sys.executable, steps.__file__, target, str(folder)],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment(folder / "cache"),
        )
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run


TARGETS = ["cpu", pytest.param("tpu7x", marks=pytest.mark.compile)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", ["listed program", "listed traced", "scanned traced"])
def test_a_compiled_step_updates_its_caches_in_place(compiled_steps: Any, target: str, form: str) -> None:
    found = compiled_steps(target)[form]
    caches = found["cache"] // found["layer"]
    assert found["aliases"] == [[str(number + 1), str(number + 1)] for number in range(caches)]
    assert found["aliased"] == found["cache"]
    assert found["copies"] == 0
    assert found["temp"] < found["layer"] / 10


@pytest.mark.parametrize("target", TARGETS)
def test_a_stacked_cache_is_copied_layer_by_layer(compiled_steps: Any, target: str) -> None:
    """Why docs/serving.md says not to; and the tests above would see a copy."""
    found = compiled_steps(target)["stacked program"]
    assert found["temp"] > found["layer"]


def small_batch(engine: Engine, q_lens: Sequence[int]) -> Batch:
    """Rows with 20 tokens of context."""
    return Batch.build(engine.limits, q_lens, [20] * len(q_lens), [[0, 3, 6], [9, 1, 4]][: len(q_lens)])


def random_arrays(engine: Engine, rng: np.random.Generator) -> list[np.ndarray[Any, Any]]:
    """Queries, keys, values and a cache."""
    dims = engine.programs[Variant("mixed", 8)].args
    return [rng.standard_normal(one.shape).astype(one.dtype) for one in dims[:4]]


def caches_of(first: np.ndarray[Any, Any]) -> list[jax.Array]:
    """One for each layer; in memory of JAX's own, because that of a numpy array cannot be donated."""
    return [jnp.array(first + layer) for layer in range(LAYERS)]


def test_layers_in_one_jit_compute_what_the_calls_do(small: Path) -> None:
    engine = load(small, target="cpu")

    def step(call: Any, queries: Any, keys: Any, values: Any, caches: Any, rest: Any, live: Any) -> Any:
        outs, after = [], []
        for one in caches:
            out, one = call(queries, keys, values, one, *rest)
            queries = jnp.where(live, out, 0)
            outs.append(queries)
            after.append(one)
        return outs, after

    traced = jax.jit(partial(step, engine.traced), donate_argnums=3)
    for seed, q_lens in enumerate([[1, 1], [4, 4], [1, 3], []]):
        batch = small_batch(engine, q_lens)
        live = (np.arange(8) < batch.num_tokens)[:, None, None]
        queries, keys, values, first = random_arrays(engine, np.random.default_rng(seed))
        outs, caches = step(engine, queries, keys, values, caches_of(first), metadata(batch), live)
        picked = [jax.jit(partial(step, engine.program("mixed", 8)), donate_argnums=3)] * (batch.kind == "mixed")
        for jitted in (traced, *picked):
            donated = caches_of(first)
            addresses = [one.unsafe_buffer_pointer() for one in donated]
            found, after = jitted(queries, keys, values, donated, metadata(batch), live)
            np.testing.assert_allclose(found, outs, rtol=1e-5, atol=1e-6)
            assert np.array_equal(after, caches)
            assert [one.unsafe_buffer_pointer() for one in after] == addresses


def test_traced_picks_what_select_picks_for_every_distribution(bundle: Path) -> None:
    """Of the stand-ins, that add a code of their kind; over all distributions of up to 5 rows, of which 4 are allowed."""
    engine = load(bundle, target="cpu")
    made = arrays(engine, 32)
    rest = metadata(batch_of([1]))[:3]
    traced = jax.jit(lambda distribution: engine.traced(*made, *rest, distribution)[0])
    codes = {"decode": 3.0, "prefill": 4.0, "mixed": 5.0}
    for distribution in itertools.product(range(-1, 6), repeat=3):
        i, j, k = distribution
        out = np.asarray(traced(np.array(distribution, np.int32)), np.float32)
        if 0 <= i <= j <= k <= 4:
            assert np.all(out == codes[select_kind(distribution)]), distribution
        else:
            assert np.isnan(out).all(), distribution


def test_a_bad_distribution_inside_jit_leaves_the_cache_and_gives_nan(small: Path) -> None:
    engine = load(small, target="cpu")
    rest = metadata(small_batch(engine, [1, 3]))[:3]
    traced = jax.jit(engine.traced, donate_argnums=3)
    for bad in [(3, 2, 2), (-1, 0, 1), (0, 0, 9)]:
        queries, keys, values, before = random_arrays(engine, np.random.default_rng(5))
        out, after = traced(queries, keys, values, jnp.array(before), *rest, np.array(bad, np.int32))
        assert np.isnan(out).all()
        assert np.array_equal(after, before)


def test_a_distribution_whose_program_was_not_built_gives_nan(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    write_bundle(tmp_path / "some.rpac", tiny, [one for one in programs if (one.kind, one.tokens) != ("mixed", 32)])
    engine = load(tmp_path / "some.rpac", target="cpu")
    rest = metadata(batch_of([1, 5]))
    out, _ = engine.traced(*arrays(engine, 8), *rest)
    assert not np.isnan(np.asarray(out, np.float32)).any()
    made = [jnp.zeros(one.shape, one.dtype) for one in engine.programs[Variant("decode", 32)].args[:4]]
    out, _ = engine.traced(*made, *rest)
    assert np.isnan(np.asarray(out, np.float32)).all()


def test_what_is_known_when_it_is_traced_is_refused_then(bundle: Path) -> None:
    engine = load(bundle, target="cpu")
    queries, *others = arrays(engine, 8)
    rest = metadata(batch_of([1]))
    with pytest.raises(SelectionError, match=r"the batch has 9 query rows; the token buckets built are 8, 32"):
        jax.jit(engine.traced)(jnp.zeros((9, 4, 128), jnp.bfloat16), *others, *rest)
    with pytest.raises(SelectionError, match="prefill in 8 query rows; one prefill chunk has 16"):
        engine.program("prefill", 8)
    for call in (engine.traced, engine.program("decode", 8)):
        with pytest.raises(BatchError, match=r"keys is bfloat16\[8, 3, 128\]; must be bfloat16\[8, 2, 128\]"):
            jax.jit(call)(queries, jnp.zeros((8, 3, 128), jnp.bfloat16), *others[1:], *rest)


def test_a_program_can_be_called_outside_jit_too(bundle: Path) -> None:
    engine = load(bundle, target="cpu")
    made = arrays(engine, 8)
    rest = metadata(batch_of([1]))
    out, kv_cache = engine.program("decode", 8)(*made, *rest)
    assert not made[3].is_deleted()  # only a jit around it can donate
    for found, wanted in zip((out, kv_cache), engine(*made, *rest), strict=True):
        assert np.array_equal(found, wanted)


def test_all_layers_share_one_copy_of_a_program(bundle: Path) -> None:
    engine = load(bundle, target="cpu")
    made = arrays(engine, 8)
    rest = metadata(batch_of([1]))

    def step(queries: Any, caches: Any) -> Any:
        program = engine.program("decode", 8)
        return [program(queries, *made[1:3], one, *rest) for one in caches]

    text = jax.jit(step).lower(made[0], [made[3]] * 4).as_text()
    assert text.count('"stablehlo.scatter"(') == 1


@pytest.mark.parametrize("form", ["program", "traced"])
def test_each_device_serves_its_own_batch_and_cache_under_shard_map(bundle: Path, form: str) -> None:
    code = """
import json, sys, jax, jax.numpy as jnp, numpy as np, rpac
from jax.sharding import Mesh, NamedSharding, PartitionSpec
engine = rpac.load(sys.argv[1], target="cpu")
mesh = Mesh(np.array(jax.devices()), ("replica",))
spec = PartitionSpec("replica")
dims = engine.programs[rpac.Variant("decode", 8)].args
batches = [rpac.Batch.build(engine.limits, [1], [length], [[page]]) for length, page in ((2, 5), (3, 7))]
of = lambda make: jax.device_put(jnp.concatenate(list(map(make, (0, 1)))), NamedSharding(mesh, spec))
made = [of(lambda replica: jnp.full(a.shape, replica, a.dtype)) for a in dims[:4]]
rest = [of(lambda replica: getattr(batches[replica], a.name)) for a in dims[4:]]
attend = engine.traced if sys.argv[2] == "traced" else engine.program("decode", 8)
replicas = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
step = jax.jit(replicas, donate_argnums=3)
before = [shard.data.unsafe_buffer_pointer() for shard in made[3].addressable_shards]
out, cache = step(*made, *rest)
after = [shard.data.unsafe_buffer_pointer() for shard in cache.addressable_shards]
pages = np.asarray(cache, np.float32).reshape(2, engine.limits.num_pages, -1)
print(json.dumps([before == after, np.asarray(out, np.float32)[::8, 0, 0].tolist(), pages[0, 5, 0].item(),
                  pages[0, 7, 0].item(), pages[1, 5, 0].item(), pages[1, 7, 0].item()]))
"""
    flags = "--xla_force_host_platform_device_count=2"
    assert python(code, str(bundle), form, XLA_FLAGS=flags) == [True, [1.0, 3.0], 3.0, 0.0, 1.0, 4.0]
