"""What a server gives a step is held against what was compiled, before the caches are donated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import llama_step
import numpy as np
import pytest
from made import random_params

import rpac
from rpac.errors import BatchError, BundleError

IDS = np.zeros(16, np.int32)
ONE = np.float32(1)


@pytest.fixture(scope="module")
def engine(path: Path) -> rpac.StepEngine:
    return rpac.load_steps(path, target="cpu")


@pytest.fixture(scope="module")
def params(engine: rpac.StepEngine) -> Any:
    return engine.put(random_params(llama_step.step_arrays("decode", 16, None)["params"]))


@pytest.fixture
def batch(engine: rpac.StepEngine) -> rpac.Batch:
    return rpac.Batch.build(engine.limits, [1], [0], [[1]])


def changed(params: Any, **layer: Any) -> Any:
    return {**params, "layers": [{**params["layers"][0], **layer}, *params["layers"][1:]]}


def without(params: Any) -> Any:
    return {name: value for name, value in params.items() if name != "head"}


PARAMS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "shape": (
        lambda params: changed(params, up=jnp.zeros((128, 255))),
        r"params\['layers'\]\[0\]\['up'\] is float32\[128, 255\]; must be float32\[128, 256\], as the step was built; give that",
    ),
    "dtype": (
        lambda params: changed(params, up=jnp.zeros((128, 256), jnp.bfloat16)),
        r"params\['layers'\]\[0\]\['up'\] is bfloat16\[128, 256\]; must be float32\[128, 256\]",
    ),
    "missing": (
        without,
        r"params have no params\['head'\]; must have the 14 leaves that the step was built with, by name",
    ),
    "unknown": (
        lambda params: {**params, "norm": ONE, "bias": ONE},
        r"params have an unknown params\['bias'\], params\['norm'\]; must have the 14 leaves",
    ),
    "host": (
        lambda params: jax.tree.map(np.asarray, params),
        r"params\['embedding'\] is a ndarray; must be a jax array on cpu:0; place the parameters with `put`",
    ),
    "deleted": (
        lambda params: changed(params, up=deleted((128, 256))),
        r"params\['layers'\]\[0\]\['up'\] was deleted or donated",
    ),
}


def deleted(shape: tuple[int, ...]) -> jax.Array:
    array = jnp.zeros(shape)
    array.delete()
    return array


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_of_another_model_are_refused_once_and_by_name(
    engine: rpac.StepEngine, params: Any, name: str
) -> None:
    change, text = PARAMS[name]
    with pytest.raises(BatchError, match=text):
        engine.bind(change(params))


def test_a_call_refuses_what_the_step_does_not_take(engine: rpac.StepEngine, params: Any, batch: rpac.Batch) -> None:
    model, caches = engine.bind(params), engine.new_caches()
    before = dict(engine.totals.refused)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: model(caches[:1], IDS, IDS, batch, ONE), r"caches have no caches\[1\]; must have the 2 leaves"),
        (lambda: model([caches[0]] * 2, IDS, IDS, batch, ONE), "one kv_cache is given twice"),
        (lambda: model([np.asarray(one) for one in caches], IDS, IDS, batch, ONE), r"caches\[0\] is a ndarray; .*new_caches"),
        (lambda: model(caches, IDS[:9], IDS, batch, ONE), "the token buckets built are 16"),
        (lambda: model(caches, 3, IDS, batch, ONE), "token_ids are a int; must be int32"),
        (lambda: model(caches, IDS, IDS.astype(np.int64), batch, ONE), r"positions is int64\[16\]; must be int32\[16\]"),
        (lambda: model(caches, IDS, IDS, batch.metadata[:3], ONE), "batch is 3 arrays; must be kv_lens, page_indices"),
        (lambda: model(caches, IDS, IDS, batch), r"extra have no extra\[0\]; must have the 1 leaves"),
        (lambda: model(caches, IDS, IDS, batch, 1.0), r"extra\[0\] is a float; must be float32\[\]"),
        (lambda: model(caches, IDS, IDS, batch, ONE, ONE), r"extra have an unknown extra\[1\]"),
        (lambda: model.step("decode", 16)(caches, IDS, IDS[:8], batch, ONE), r"positions is int32\[8\]; must be int32\[16\]"),
        (lambda: jax.jit(lambda ids: model(caches, ids, ids, batch, ONE))(IDS), "token_ids is traced; .* inside jit"),
    ]  # fmt: skip
    for call, text in calls:
        with pytest.raises(rpac.RpacError, match=text):
            call()
    assert sum(engine.totals.refused.values()) - sum(before.values()) == len(calls)
    _, new = model(caches, IDS, IDS, batch, ONE)  # the caches were not touched
    with pytest.raises(BatchError, match=r"caches\[0\] was deleted or donated; must hold values"):
        model(caches, IDS, IDS, batch, ONE)
    model(new, IDS, IDS, batch, ONE)


def test_a_bundle_without_steps(bundle: Path) -> None:
    with pytest.raises(
        BundleError, match="has no steps; must have those of cpu; build it with `rpac build SPEC --step"
    ):
        rpac.load_steps(bundle, target="cpu")
