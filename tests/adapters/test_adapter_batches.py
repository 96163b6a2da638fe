"""Whatever a peer passes, the engine gets a batch of the contract that says the same."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake import ADAPTERS, FakeEngine, arguments, cache_of, peer_arguments

import rpac
from rpac.adapters import sglang_jax
from rpac.batch import Batch, Limits, validate
from rpac.bundle import write_bundle
from rpac.errors import BatchError, SelectionError
from rpac.spec import Spec

SEED = random.SystemRandom().randrange(2**32)
# The others of tpu-inference's and tokamax's differ in their keyword arguments alone.
NAMES = sorted(set(ADAPTERS) - {"tokamax", "tpu_inference batched", "tpu_inference hd64"})
SGLANG = [name for name in NAMES if name.startswith("sglang_jax")]
OTHERS = [name for name in NAMES if not name.startswith("sglang_jax")]


def random_batches(limits: Limits, count: int) -> list[Batch]:
    """Ragged batches with pages in random order; the same for one SEED."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    batches = []
    for _ in range(count):
        rows = rng.randint(1, limits.max_num_seqs)
        q_lens = [rng.choice([1, 1, limits.prefill_chunk, rng.randint(2, 7)]) for _ in range(rows)]
        while sum(q_lens) > limits.token_buckets[-1]:
            q_lens.pop()
        contexts = [rng.randint(0, limits.max_kv_len - q_len) for q_len in q_lens]
        free = rng.sample(range(limits.num_pages), limits.num_pages)
        tables = [[free.pop() for _ in range(limits.pages_per_seq)] for _ in q_lens]
        batches.append(Batch.build(limits, q_lens, contexts, tables))
    return batches


def arrays(engine: Any, tokens: int) -> list[Any]:
    model = engine.model
    keys = jnp.zeros((tokens, model.kv_heads, model.head_dim), model.kv_dtype)
    return [jnp.zeros((tokens, model.q_heads, model.head_dim), model.q_dtype), keys, keys, cache_of(engine)]


def shortened(name: str, args: list[Any], rows: int) -> list[Any]:
    """The call with metadata of `rows` rows: those that it had past them are gone."""
    width = len(args[5]) // len(args[4])
    cut = {"kv_lens": rows, "page_indices": rows * width, "cu_q_lens": rows + 1, "cu_kv_lens": rows + 1}
    if name.startswith("sglang_jax"):
        del cut["page_indices"]
    names = ["kv_lens", "page_indices", "cu_q_lens", "cu_kv_lens" if name.startswith("sglang_jax") else ""]
    metadata = [array[: cut.get(key, len(array))] for key, array in zip(names, args[4:8], strict=True)]
    return [*args[:4], *metadata, *args[8:]]


def got(name: str, engine: FakeEngine, args: list[Any], traced: bool) -> list[Any]:
    """The metadata that the engine is called with."""
    attention = ADAPTERS[name].make(engine)

    def run(*given: Any) -> Any:
        return attention(*given, **{ADAPTERS[name].scale: engine.model.sm_scale})[0]

    return [np.asarray(array) for array in (jax.jit(run) if traced else run)(*args)]


@pytest.mark.parametrize("traced", [False, True], ids=["host", "traced"])
@pytest.mark.parametrize("name", NAMES)
def test_the_engine_gets_the_batch_that_the_peer_described(name: str, traced: bool) -> None:
    engine = FakeEngine()
    for batch in random_batches(engine.limits, 8 if traced else 40):
        args = peer_arguments(name, batch, arrays(engine, batch.tokens))
        for rows in {len(batch), engine.limits.max_num_seqs}:
            metadata = got(name, engine, shortened(name, args, rows), traced)
            validate(engine.limits, batch.tokens, *metadata)
            seen = Batch.of_arrays(engine.limits, batch.tokens, *metadata)
            assert [row._replace(kind="mixed") for row in seen] == [row._replace(kind="mixed") for row in batch]
            i, _, k = batch.distribution
            assert seen.distribution.tolist() == [i, i, k]


@pytest.mark.parametrize("name", OTHERS)
def test_prefill_rows_stay_prefill_where_their_chunk_is_named(name: str) -> None:
    engine = FakeEngine()
    args = arguments(name, engine, [16, 16])
    assert args[7].tolist() == [0, 2, 2]
    options: dict[str, Any] = {"chunk_prefill_size": 16}
    if name == "ejkernel operation":
        options = {"cfg": type("Config", (), options)()}
    for given in ({}, options):
        ADAPTERS[name].make(engine)(*args, **{ADAPTERS[name].scale: engine.model.sm_scale}, **given)
    assert [call[7].tolist() for call in engine.calls] == [[0, 0, 2], [0, 2, 2]]


@pytest.mark.parametrize("name", SGLANG)
def test_sglangs_rows_of_one_token_are_decode_up_to_the_first_longer_one(name: str) -> None:
    engine = FakeEngine()
    args = arguments(name, engine, [1, 1, 5])
    for q_lens, marked, wanted in (
        ([1, 1, 5], [0, 3, 3], [2, 2, 3]),
        ([1, 5, 1], [0, 3, 3], [1, 1, 3]),
        ([5, 1, 1], [0, 0, 3], [0, 0, 3]),
        ([1, 1, 1], [0, 0, 3], [3, 3, 3]),
        ([1, 1, 1], [3, 3, 3], [3, 3, 3]),
        ([1, 1, 1], [2, 2, 2], [2, 2, 2]),  # a dead row may have any length
    ):
        args[4] = np.array([7, 7, 7, 0], np.int32)
        args[6] = np.array([0, *np.cumsum(q_lens), sum(q_lens) + 1], np.int32)
        args[8] = np.array(marked, np.int32)
        for traced in (False, True):
            assert got(name, engine, args, traced)[3].tolist() == wanted


@pytest.mark.parametrize("name", SGLANG)
def test_sglangs_prefill_rows_stay_prefill_where_their_chunk_is_named(name: str) -> None:
    engine = FakeEngine()
    args = arguments(name, engine, [16, 16])
    ADAPTERS[name].make(engine)(*args, sm_scale=engine.model.sm_scale, chunk_prefill_size=16)
    assert engine.calls[0][7].tolist() == [0, 2, 2]


@pytest.mark.parametrize("name", NAMES)
def test_more_rows_than_the_bundle_has_are_refused(name: str) -> None:
    larger = FakeEngine(limits=Limits(16, 8, 6, 32, 16, (8, 32)))
    engine = FakeEngine()
    args = arguments(name, larger, [1] * 6)
    with pytest.raises(SelectionError, match=r"(?s)max_num_seqs of kv_lens is 6, must be 4.*\n  max_num_seqs: 6$"):
        got(name, engine, args, traced=False)


@pytest.mark.parametrize("name", SGLANG)
def test_pages_that_sglangs_list_does_not_have_are_refused(name: str) -> None:
    engine = FakeEngine()
    for at, change, message in (
        (5, lambda pages: pages[:1], "row 1: its pages are entries 1 to 2 of page_indices, which has 1"),
        (7, lambda ends: ends - 16, "row 0: its pages are entries -1 to 0"),
        (7, lambda ends: ends + 2000, "row 0: its pages are entries 125 to 126"),
    ):
        args = arguments(name, engine)
        args[at] = change(args[at])
        with pytest.raises(BatchError, match=message):
            got(name, engine, args, traced=False)
    assert engine.calls == []


@pytest.mark.parametrize("name", NAMES)
def test_metadata_of_other_sizes_is_refused(name: str) -> None:
    sizes = {6: "cu_q_lens"} | ({7: "cu_kv_lens", 8: "distribution"} if name in SGLANG else {7: "distribution"})
    for at, argument in sizes.items():
        for traced in (False, True):
            engine = FakeEngine()
            args = arguments(name, engine)
            args[at] = args[at][:-1]
            with pytest.raises(BatchError, match=rf"^{argument} is int32\[\d\]; must be int32\[\d\]"):
                got(name, engine, args, traced)


def test_sglangs_metadata_of_another_dtype_is_refused() -> None:
    engine = FakeEngine()
    for at in range(4, 9):
        args = arguments("sglang_jax main", engine)
        args[at] = args[at].astype(np.int64)
        with pytest.raises(BatchError, match=r"is int64\[\d+\]; must be int32"):
            got("sglang_jax main", engine, args, traced=False)


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_behind_an_adapter_runs_the_program_of_the_batch(name: str, bundle: Path) -> None:
    """The stand-in programs return 2 * queries and their code: 1 for decode, 2 for prefill, 3 for mixed."""
    engine = rpac.load(bundle, target="cpu")
    attention = ADAPTERS[name].make(engine)
    for q_lens, code in (([1, 1], 1), ([1, 5], 3), ([16], 3)):
        args = arguments(name, engine, q_lens)
        out, kv_cache = attention(*args, **{ADAPTERS[name].scale: engine.model.sm_scale})
        assert np.all(np.asarray(out, np.float32) == code)
        shape = args[3].shape
        assert kv_cache.shape == ((shape[0] * shape[1], *shape[2:]) if name == "sglang_jax" else shape)
        assert args[3].is_deleted() == (name != "sglang_jax")


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_call_leaves_the_cache_to_the_caller(name: str, bundle: Path) -> None:
    engine = rpac.load(bundle, target="cpu")
    attention = ADAPTERS[name].make(engine)
    args = arguments(name, engine)
    args[4] = args[4] * 1000
    with pytest.raises(BatchError, match=r"kv_lens|its pages"):
        attention(*args, **{ADAPTERS[name].scale: engine.model.sm_scale})
    assert not args[3].is_deleted()


def test_sglangs_older_cache_has_its_heads_in_the_contracts_order() -> None:
    engine = FakeEngine()
    args = arguments("sglang_jax", engine)
    args[3] = jnp.arange(args[3].size, dtype=jnp.float32).reshape(args[3].shape).astype(jnp.bfloat16)
    _, returned = sglang_jax.ragged_paged_attention(engine)(*args, sm_scale=engine.model.sm_scale)
    assert np.array_equal(engine.calls[0][3][:, :, 1, 0], args[3][:, :, 2])  # K of the second KV head
    assert np.array_equal(engine.calls[0][3][:, :, 0, 1], args[3][:, :, 1])  # V of the first
    assert np.array_equal(returned, args[3].reshape(-1, *args[3].shape[2:]))


def test_sglangs_older_cache_of_half_a_word_is_refused() -> None:
    engine = FakeEngine()
    args = arguments("sglang_jax", engine)
    args[3] = args[3][:, :, :3]
    with pytest.raises(BatchError, match="kv_cache_fused has 3 heads; must be a multiple of 2"):
        got("sglang_jax", engine, args, traced=False)


def test_ejkernels_mesh_wraps_the_call_in_shard_map_where_its_specs_are_given() -> None:
    engine = FakeEngine()
    attention = ADAPTERS["ejkernel operation"].make(engine)
    args = arguments("ejkernel operation", engine)
    mesh, here = jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec()
    given: dict[str, Any] = {"mesh": mesh, "in_specs": (here,) * 9, "out_specs": ((here,) * 4, here)}
    (kv_lens, *_), kv_cache = attention(*args, softmax_scale=engine.model.sm_scale, **given)
    assert (len(engine.traces), len(engine.calls)) == (1, 0)
    assert np.array_equal(kv_lens, args[4])
    assert kv_cache.shape == args[3].shape
    attention(*args, softmax_scale=engine.model.sm_scale, mesh=mesh)  # as the peer, which needs all three
    assert (len(engine.traces), len(engine.calls)) == (1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_pages_before_a_window_may_be_a_servers_null_page(
    name: str, tmp_path: Path, tiny: Spec, programs: list[Any]
) -> None:
    spec = replace(tiny, model=replace(tiny.model, sliding_window=20))
    write_bundle(tmp_path / "tiny.rpac", spec, programs)
    engine = rpac.load(tmp_path / "tiny.rpac", target="cpu")
    # Tokens 31 and 50 see from 12 and 31 on: entry 0 of the second sequence is not read, and page 3 is the first's by now.
    for null in (0, -1, 3):
        batch = Batch.build(engine.limits, [1, 1], [31, 50], [[3, 4], [null, 6, 7, 8]])
        args = peer_arguments(name, batch, arrays(engine, batch.tokens))
        options = {ADAPTERS[name].scale: engine.model.sm_scale, "sliding_window": 20}
        ADAPTERS[name].make(engine)(*args, **options)
        args = peer_arguments(name, batch, arrays(engine, batch.tokens))
        jax.jit(lambda *given, options=options: ADAPTERS[name].make(engine)(*given, **options))(*args)
    assert engine.counts[rpac.Variant("decode", 8)].calls == 3
