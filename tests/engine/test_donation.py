"""A cache is one call's alone: of threads that share one, one runs and the others are refused; a forked process is told."""

from __future__ import annotations

import threading
from pathlib import Path

import jax
import pytest
from calls import LIMITS, arrays, batch_of, call, metadata, python

from rpac.engine import Engine, load
from rpac.engine.donation import donating
from rpac.errors import BatchError

THREADS, ROUNDS = 16, 40


def test_of_threads_that_share_a_donated_cache_one_runs_and_the_others_are_refused(engine: Engine) -> None:
    engine.warm()
    queries, keys, values, cache = arrays(engine, 8)
    batch = batch_of([1])
    wrong: list[str] = []
    for _ in range(ROUNDS):
        results: list[jax.Array] = []
        start = threading.Barrier(THREADS)

        def work(
            cache: jax.Array = cache, results: list[jax.Array] = results, start: threading.Barrier = start
        ) -> None:
            start.wait()
            try:
                results.append(engine(queries, keys, values, cache, *metadata(batch))[1])
            except BatchError as error:
                if "kv_cache was deleted or donated" not in str(error) and "donated to another call" not in str(error):
                    wrong.append(str(error))
            except BaseException as error:
                wrong.append(repr(error))

        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 1
        (cache,) = results
    assert wrong == []
    assert engine.totals.refused == {"BatchError": (THREADS - 1) * ROUNDS}
    assert sum(count.calls for count in engine.counts.values()) == ROUNDS


def test_a_cache_that_another_call_takes_is_not_waited_for(engine: Engine) -> None:
    queries, keys, values, cache = arrays(engine, 8)
    with (
        donating(cache),
        pytest.raises(BatchError, match="kv_cache is being donated to another call, in another thread"),
    ):
        engine(queries, keys, values, cache, *metadata(batch_of([1])))
    engine(queries, keys, values, cache, *metadata(batch_of([1])))
    assert engine.limits == LIMITS


FORK = """
import json, os, sys, warnings
import numpy as np
warnings.simplefilter("ignore")
import rpac
from multiprocessing import get_context
path = sys.argv[1]
engine = rpac.load(path, target="cpu")
cache = engine.new_cache()

def inside(queue):
    said = []
    batch = rpac.Batch.build(engine.limits, [1], [2], [[5]])
    zeros = lambda dims: np.zeros(dims.shape, dims.dtype)
    new = [zeros(dims) for dims in engine.programs[rpac.Variant("decode", 8)].args[:3]]
    for call in (
        lambda: engine(*new, cache, *batch.metadata), engine.warm, engine.new_cache, lambda: engine.program("decode", 8),
        lambda: rpac.load(path, target="cpu"),
    ):
        try:
            call()
        except rpac.TargetError as error:
            said.append(str(error))
    queue.put([engine.select(8, (1, 1, 1)).tokens, said])

context = get_context("fork")
queue = context.Queue()
process = context.Process(target=inside, args=(queue,))
process.start()
found = queue.get(timeout=60)
process.join()
print(json.dumps([found, os.getpid()]))
"""


def test_a_forked_process_is_told_to_start_afresh(bundle: Path) -> None:
    (tokens, said), parent = python(FORK, str(bundle))
    assert tokens == 8  # what needs no runtime works
    assert len(said) == 5
    for message in said:
        assert f"was forked from process {parent}, which had loaded an engine" in message
        assert "start it with the multiprocessing context 'spawn'" in message


def test_an_engine_in_a_process_that_forks_goes_on(bundle: Path) -> None:
    assert call(load(bundle, target="cpu"), [1])
