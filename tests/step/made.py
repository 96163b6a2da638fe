"""Bundles of steps, made in this process: a build's own processes would take longer than what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import llama_step
import numpy as np

from rpac.build import all_tasks
from rpac.bundle import write_bundle
from rpac.devices.toolchain import toolchain
from rpac.files.store import Store
from rpac.lower.worker import lower
from rpac.spec import Spec
from rpac.step import steps_of
from rpac.step.worker import lower_step

HERE = Path(__file__).parent
SCALE = 0.1


def bundle_of(path: Path, spec: Spec, function: str, kinds: Sequence[str] = ("decode",), native: bool = False) -> Path:
    """The bundle of a spec's cpu target with the steps of a function for some kinds; `native` with executables for this CPU."""
    tasks = [one for one in all_tasks(spec, ["cpu"]) if one.kind in kinds]
    programs = [lower(task, toolchain()) for task in tasks]
    steps = [
        lower_step(task, toolchain(), Store(None), native)[0] for task in steps_of(spec, tasks, function, str(HERE))
    ]
    # Of the same toolchain as the steps, as programs of a build are.
    write_bundle(path, spec, [replace(one, toolchain=steps[0].toolchain) for one in programs], steps=steps)
    return path


def random_params(described: Any, seed: int = 1) -> Any:
    """Arrays of the host for a tree of shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda one: (rng.standard_normal(one.shape, np.float32) * SCALE).astype(one.dtype), described)


def dense(params: Any, token_ids: Any, windows: Sequence[int | None] = (None,) * llama_step.LAYERS) -> Any:
    """The last layer's output of the last tokens, `[sequences, width]`, with no cache. `windows` are those of the layers."""
    length, params = token_ids.shape[1], jax.tree.map(jnp.asarray, params)
    ahead = np.arange(length)[:, None] - np.arange(length)

    def one(tokens: Any) -> Any:
        x = params["embedding"][tokens]
        for layer, window in zip(params["layers"], windows, strict=True):
            q, k, v = llama_step.qkv(layer, x, jnp.arange(length))
            scores = jnp.einsum("qhgd,khd->hgqk", q.reshape(length, k.shape[1], -1, q.shape[-1]), k)
            seen = (ahead >= 0) & (ahead < (window or length))
            p = jax.nn.softmax(jnp.where(seen, scores * llama_step.HEAD_DIM**-0.5, -jnp.inf))
            x = llama_step.rest(layer, x, jnp.einsum("hgqk,khd->qhgd", p, v).reshape(q.shape))
        return x[-1]

    return jax.lax.map(one, token_ids)
