"""A call runs the one program that its batch needs, on the cache that it is given, and counts it."""

from __future__ import annotations

import dataclasses
import re
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from calls import BATCHES, LIMITS, arrays, batch_of, call, metadata

from rpac.batch import Batch
from rpac.bundle import write_bundle
from rpac.contract.program import Variant
from rpac.engine import Count, Engine, load
from rpac.errors import BatchError
from rpac.spec import Spec


@pytest.mark.parametrize(("q_lens", "variant", "code"), BATCHES, ids=str)
def test_each_batch_runs_the_program_that_it_needs(
    engine: Engine, q_lens: list[int], variant: Variant, code: int
) -> None:
    out, kv_cache = call(engine, q_lens)
    assert out.shape == (variant.tokens, 4, 128)
    assert np.all(np.asarray(out, np.float32) == 2 + code)
    page = batch_of(q_lens).page_indices[0]
    assert np.all(np.asarray(kv_cache[page], np.float32) == batch_of(q_lens).kv_lens[0])
    assert list(engine.counts) == [variant]


def test_the_cache_is_donated_and_goes_through_many_calls(engine: Engine) -> None:
    queries, keys, values, cache = arrays(engine, 8)
    for length in range(1, 5):
        batch = Batch.build(LIMITS, [1], [length], [[length]])
        donated = cache
        _, cache = engine(queries, keys, values, donated, *metadata(batch))
        assert donated.is_deleted()
    assert not queries.is_deleted()
    assert [int(cache[page, 0, 0, 0, 0]) for page in range(6)] == [0, 2, 3, 4, 5, 0]


def test_the_donated_cache_is_not_copied(engine: Engine) -> None:
    queries, keys, values, cache = arrays(engine, 8)
    address = cache.unsafe_buffer_pointer()
    _, cache = engine(queries, keys, values, cache, *metadata(batch_of([1])))
    assert cache.unsafe_buffer_pointer() == address


def test_a_cache_in_another_layout_is_refused_by_the_name_of_the_layout(
    tmp_path: Path, tiny: Spec, programs: list[Any], bundle: Path
) -> None:
    separate = dataclasses.replace(tiny, serving=dataclasses.replace(tiny.serving, kv_layout="separate"))
    write_bundle(tmp_path / "separate.rpac", separate, programs)
    engine, other = load(tmp_path / "separate.rpac", target="cpu"), load(bundle, target="cpu")
    assert (engine.kv_layout, other.kv_layout) == ("separate", "interleaved")
    message = re.escape(
        "kv_cache is bfloat16[32, 16, 2, 2, 128]; must be bfloat16[32, 2, 2, 16, 128], kv_layout separate; "
    )
    with pytest.raises(BatchError, match=message):
        engine(*arrays(other, 8), *metadata(batch_of([1])))


def test_counts_add_up(engine: Engine) -> None:
    assert engine.counts == {}
    for q_lens in ([1, 1, 1], [1], [1, 5], [16, 16]):
        call(engine, q_lens)
    assert engine.counts == {
        Variant("decode", 8): Count(calls=2, rows=4, tokens=4, padding=12),
        Variant("mixed", 8): Count(calls=1, rows=2, tokens=6, padding=2),
        Variant("prefill", 32): Count(calls=1, rows=2, tokens=32, padding=0),
    }


def test_calls_from_many_threads_are_all_counted(engine: Engine) -> None:
    def work() -> None:
        for _ in range(10):
            call(engine, [1, 1])

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.counts == {Variant("decode", 8): Count(calls=60, rows=120, tokens=120, padding=360)}


@pytest.mark.parametrize("where", ["device", "host"])
def test_arguments_may_lie_on_the_host_or_the_device(engine: Engine, where: str) -> None:
    queries, keys, values, cache = arrays(engine, 8)
    put = jnp.asarray if where == "device" else np.asarray
    rest = [put(array) for array in metadata(batch_of([1]))]
    out, _ = engine(put(queries), put(keys), put(values), cache, *rest)
    assert np.all(np.asarray(out, np.float32) == 3)


def test_validation_of_values_can_be_left_to_the_caller(engine: Engine) -> None:
    batch = batch_of([1, 1])
    wrong = batch.kv_lens * 1000
    with pytest.raises(BatchError, match="kv_lens"):
        engine(*arrays(engine, 8), wrong, *metadata(batch)[1:])
    engine(*arrays(engine, 8), wrong, *metadata(batch)[1:], validate=False)


def test_a_caller_may_pad_to_a_larger_bucket(engine: Engine) -> None:
    out, _ = engine(*arrays(engine, 32), *metadata(batch_of([1])))
    assert out.shape[0] == 32
    assert engine.counts == {Variant("decode", 32): Count(calls=1, rows=1, tokens=1, padding=31)}
