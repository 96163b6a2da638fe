"""The example's greedy tokens are those of dense attention, however its requests are interleaved."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serve.bundle import open_bundle
from serve.checkpoint import load_params
from serve.config import read_config
from serve.dense import dense_logits
from serve.generate import Generator, Request, StepError
from serve.load import Request as Asked
from serve.load import compare, requests
from serve.model import make_step
from serve.rope import Rope, angles, rotate
from serve.steps import Metadata
from served import NUM_PAGES, spec_of, write_small_bundle

EXAMPLES = Path(__file__).parents[2] / "examples"
SEED = 1
LENGTH = 128


def served(generator: Generator, load: list[Asked], rng: np.random.Generator) -> dict[int, Asked]:
    """Runs all requests to their ends; some come in at the start, the others one by one between steps."""
    scheduler = generator.scheduler
    left, names = list(load), {}
    while left or scheduler.running or scheduler.waiting:
        while left and (len(names) < 8 or rng.random() < 0.5):
            one = left.pop(0)
            names[generator.add(Request(one.prompt, one.max_new_tokens))] = one
        for token in generator.step():
            names[token.request].tokens.append(token.token)
    return names


def some(count: int, generator: Generator, seed: int) -> list[Asked]:
    print(f"seed {seed}")
    return requests(count, generator.steps.vocabulary, np.random.default_rng(seed), rate=1)


@pytest.mark.parametrize("count", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_tokens_of_interleaved_requests_are_those_of_dense_attention(
    generator: Generator, count: int, llama: Any
) -> None:
    """Each is the dense model's most likely one, or within `load.TIE` of it, which at most one in a thousand may be."""
    load = some(count, generator, SEED)
    served(generator, load, np.random.default_rng(SEED))
    verdict = compare(*llama, load, LENGTH)
    assert verdict.wrong == ()
    assert verdict.tokens == sum(one.max_new_tokens for one in load)
    assert verdict.ties <= verdict.tokens / 1000
    assert generator.totals.preemptions > 0
    assert generator.totals.shared_tokens > 0
    assert generator.totals.copied_pages > 0
    assert generator.scheduler.tables.num_free == NUM_PAGES


def test_a_token_that_dense_attention_would_not_choose_is_found(generator: Generator, llama: Any) -> None:
    load = some(3, generator, SEED + 1)
    served(generator, load, np.random.default_rng(0))
    load[1].tokens[-1] = (load[1].tokens[-1] + 1) % generator.steps.vocabulary
    (wrong,) = compare(*llama, load, LENGTH).wrong
    assert wrong.startswith(f"request 1, token {len(load[1].tokens) - 1}: ")
    load[1].tokens.pop()
    assert compare(*llama, load, LENGTH).wrong == (
        f"request 1: {load[1].max_new_tokens - 1} tokens of {load[1].max_new_tokens}",
    )


class FailsOnce:
    """Steps of which the third fails, after its caches were donated."""

    def __init__(self, steps: Any) -> None:
        self._steps = steps
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._steps, name)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        result = self._steps(*args)
        if self.calls == 3:
            raise RuntimeError("the device is gone")
        return result


def test_after_a_step_that_failed_every_request_can_be_served_from_the_start(steps: Any, llama: Any) -> None:
    generator = Generator(FailsOnce(steps))  # type: ignore[arg-type]
    load = some(6, generator, SEED + 2)
    names = {generator.add(Request(one.prompt, one.max_new_tokens)): one for one in load}
    failures = 0
    while generator.scheduler.running or generator.scheduler.waiting:
        try:
            for token in generator.step():
                names[token.request].tokens.append(token.token)
        except StepError as error:
            failures += 1
            assert set(error.requests) <= set(names)
            assert generator.scheduler.running == ()
    assert failures == 1
    assert compare(*llama, load, LENGTH).wrong == ()


@pytest.mark.slow
def test_tokens_in_bfloat16_are_within_its_rounding_of_the_best(checkpoint: Path, tmp_path: Path) -> None:
    """The reference has the same rounded weights and computes in float32. Logits have a standard deviation of 1."""
    bundle = tmp_path / "model.rpac"
    write_small_bundle(bundle, spec_of(checkpoint, dtype="bfloat16"))
    generator = Generator(open_bundle(str(bundle), checkpoint, "cpu"))
    load = some(40, generator, SEED + 3)
    served(generator, load, np.random.default_rng(SEED))
    config = read_config(checkpoint, "bfloat16")
    params = jax.tree.map(lambda one: one.astype(jnp.float32), load_params(checkpoint, config))
    verdict = compare(dataclasses.replace(config, dtype="float32"), params, load, LENGTH, tie=0.1)
    assert verdict.wrong == ()
    assert verdict.ties < 0.05 * verdict.tokens  # not the best in float32, because of rounding


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_devices_that_share_the_heads_give_the_same_tokens(devices: int, tmp_path: Path) -> None:
    """Of 2 KV heads, four devices hold two copies each."""
    script = Path(__file__).with_name("on_devices.py")
    paths = os.pathsep.join([str(EXAMPLES), str(script.parent), *sys.path])
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, script, str(devices), tmp_path / "model"],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d{3} tokens, 0 ties\n", done.stdout)


def test_rotary_positions_leave_products_dependent_on_distance_alone() -> None:
    rng = np.random.default_rng(SEED)
    queries, keys = (jnp.asarray(rng.standard_normal((1, 1, 128), np.float32)) for _ in range(2))

    def product(at: int, other: int) -> float:
        turned = (rotate(x, *angles(Rope(), 128, jnp.array([p]), x.dtype)) for x, p in ((queries, at), (keys, other)))
        return float(jnp.vdot(*turned))

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-3)
    assert product(9, 4) != pytest.approx(product(9, 3), abs=1e-1)


@pytest.mark.parametrize(("tokens", "sampled"), [(8, 8), (64, 16)])
def test_a_step_samples_for_no_more_rows_than_it_has_tokens(llama: Any, tokens: int, sampled: int) -> None:
    config, params = llama
    step, arrays = make_step(config)
    described = arrays("decode", tokens, SimpleNamespace(max_num_seqs=16))

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32)

    batch = Metadata(ints(16), ints(128), ints(17), ints(3))
    caches = [jnp.zeros((1, 1))] * config.layers
    dense = partial(step, lambda queries, keys, values, cache, layer: (queries, cache))
    found, _ = jax.eval_shape(dense, params, caches, ints(tokens), ints(tokens), batch, *described["extra"])
    assert (found.shape, found.dtype) == ((sampled,), np.int32)


def test_a_dense_token_depends_on_none_that_follow(llama: Any) -> None:
    config, params = llama
    tokens = np.random.default_rng(SEED).integers(0, config.vocabulary, (1, 20)).astype(np.int32)
    changed = tokens.copy()
    changed[0, 12:] = 0
    first, second = (np.asarray(dense_logits(config, params, jax.device_put(one))) for one in (tokens, changed))
    assert np.array_equal(first[0, :12], second[0, :12])
    assert not np.array_equal(first[0, 12:], second[0, 12:])
