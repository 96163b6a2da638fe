"""Under load and bad input: each fault is a clear error, and the process and the cache are as good as before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from calls import compiles

from rpac.batch import Batch
from rpac.engine import Engine, load
from rpac.errors import BatchError, RpacError, SelectionError
from rpac.oracle.attention import ragged_paged_attention
from rpac.oracle.tolerance import TOLERANCE, attention_error

SEQUENCES = 4
PAGES = 3  # of each
FAULT_RATE = 0.25


class Server:
    """Serves random steps of a few sequences, with the oracle's cache beside the engine's."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.rng = np.random.default_rng(seed)
        dims = next(iter(engine.programs.values())).args
        self.oracle = self.rng.standard_normal(dims[3].shape).astype(dims[3].dtype)
        self.kv_cache = jnp.array(self.oracle)
        self.donated = jnp.array(self.oracle)
        self.donated.delete()
        self.too_small = jnp.array(self.oracle[:5])
        self.lens = [0] * SEQUENCES
        self.tables = self.rng.permutation(engine.limits.num_pages).reshape(SEQUENCES, PAGES).tolist()
        self.faults: dict[str, int] = {}

    def step(self) -> None:
        """One batch, after a fault now and then."""
        q_lens = self._new_tokens()
        batch = Batch.build(
            self.engine.limits,
            list(q_lens.values()),
            [self.lens[one] for one in q_lens],
            [self.tables[one] for one in q_lens],
        )
        arrays = [
            self.rng.standard_normal((batch.tokens, heads, 128), np.float32)
            for heads in (self.engine.model.q_heads, self.engine.model.kv_heads, self.engine.model.kv_heads)
        ]
        metadata = [batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution]
        if self.rng.random() < FAULT_RATE:
            self._fault(arrays, metadata)
        wanted, self.oracle = ragged_paged_attention(
            *arrays, self.oracle, *metadata, sm_scale=self.engine.model.sm_scale
        )
        self.donated = self.kv_cache
        out, self.kv_cache = self.engine(*arrays, self.kv_cache, *metadata)
        live = batch.num_tokens
        error, _ = attention_error(np.asarray(out)[:live], wanted[:live])
        assert error <= TOLERANCE["float32"]
        for one, new in q_lens.items():
            self.lens[one] += new

    def _new_tokens(self) -> dict[int, int]:
        """How many each sequence of the next batch gets; those with a full table begin anew."""
        limits = self.engine.limits
        q_lens: dict[int, int] = {}
        room = limits.token_buckets[-1]
        for one in self.rng.permutation(SEQUENCES)[: self.rng.integers(0, SEQUENCES + 1)].tolist():
            new = int(self.rng.choice([1, 1, limits.prefill_chunk, self.rng.integers(1, 8)]))
            if self.lens[one] + new > limits.max_kv_len:
                self.lens[one] = 0
            if new <= room:
                q_lens[one] = new
                room -= new
        return q_lens

    def _fault(self, arrays: list[Any], metadata: list[Any]) -> None:
        """A wrong call that must be refused, with the cache as it was."""
        name = str(self.rng.choice(list(FAULTS)))
        expected, change = FAULTS[name]
        args = [*(one.copy() for one in arrays), self.kv_cache, *(one.copy() for one in metadata)]
        change(args, self)
        with pytest.raises(expected) as raised:
            self.engine(*args)
        assert "must" in str(raised.value) or "build with" in str(raised.value)
        assert not self.kv_cache.is_deleted()
        self.faults[name] = self.faults.get(name, 0) + 1


def put(index: int, value: Any) -> Callable[[list[Any], Server], None]:
    """Replaces the first element of an argument."""

    def change(args: list[Any], _: Server) -> None:
        args[index][0] = value

    return change


def replace(index: int, make: Callable[[Any, Server], Any]) -> Callable[[list[Any], Server], None]:
    """Replaces a whole argument."""

    def change(args: list[Any], server: Server) -> None:
        args[index] = make(args[index], server)

    return change


FAULTS: dict[str, tuple[type[RpacError], Callable[[list[Any], Server], None]]] = {
    "a distribution out of order": (BatchError, put(7, 9)),
    "cu_q_lens not from 0": (BatchError, put(6, 3)),
    "metadata of another dtype": (BatchError, replace(4, lambda array, _: array.astype(np.int64))),
    "metadata that is missing": (BatchError, replace(5, lambda *_: None)),
    "queries of another dtype": (BatchError, replace(0, lambda array, _: array.astype(np.float16))),
    "values of another shape": (BatchError, replace(2, lambda array, _: array[:, :, :64])),
    "tokens of no bucket": (SelectionError, replace(0, lambda array, _: array[:5])),
    "a donated cache": (BatchError, replace(3, lambda _, server: server.donated)),
    # Not a view of the cache itself: JAX copies, and does not donate, memory that numpy looks into.
    "a cache on the host": (BatchError, replace(3, lambda _, server: server.oracle)),
    "a cache of another shape": (BatchError, replace(3, lambda _, server: server.too_small)),
}


def soak(bundle: Path, seed: int, steps: int) -> Server:
    print(f"seed {seed}")
    engine = load(bundle, target="cpu")
    engine.warm()
    server = Server(engine, seed)
    with compiles() as seen:
        for step in range(steps):
            if step == steps // 2:
                shutil.rmtree(bundle)
            server.step()
    assert seen == []
    assert np.array_equal(np.asarray(server.kv_cache).view(np.uint32), server.oracle.view(np.uint32))
    assert sum(count.calls for count in engine.counts.values()) == steps
    assert set(server.faults) == set(FAULTS)
    assert set(engine.counts) == set(engine.programs)
    return server


@pytest.fixture
def own(small: Path, tmp_path: Path) -> Path:
    """A copy of the small bundle that the test may take away."""
    return Path(shutil.copytree(small, tmp_path / "small.rpac"))


def test_hundreds_of_steps_with_faults_end_with_the_oracle_s_cache(own: Path) -> None:
    soak(own, seed=1, steps=400)


@pytest.mark.slow
def test_ten_thousand_steps_with_faults_end_with_the_oracle_s_cache(own: Path) -> None:
    soak(own, seed=int(np.random.SeedSequence().generate_state(1)[0]), steps=10_000)


def test_a_bundle_replaced_under_a_running_process_changes_nothing_in_it(own: Path, bundle: Path) -> None:
    """Programs that were not ready yet come from the bytes that were hashed when the engine was loaded."""
    engine = load(own, target="cpu")
    shutil.rmtree(own)
    shutil.copytree(bundle, own)
    server = Server(engine, seed=2)
    for _ in range(20):
        server.step()
    assert np.array_equal(server.kv_cache, server.oracle)
    assert load(own, target="cpu").name == "tiny"
