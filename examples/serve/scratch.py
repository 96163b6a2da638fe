"""What a server without a bundle does: it generates the kernels, and compiles them with the model at its start.

`first_token` compares this with a bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import rpac
from rpac.batch import Limits
from rpac.build import all_tasks
from rpac.contract.arrays import index_of
from rpac.contract.mesh import ONE_DEVICE
from rpac.devices.placement import Placement
from rpac.lower import Task
from rpac.lower.worker import load_program
from rpac.spec import Spec, load_spec
from serve.checkpoint import load_params
from serve.config import read_config
from serve.steps import JitSteps


class ScratchEngine:
    """As much of an `rpac.Engine` as `JitSteps` needs, for one kind of layers on one device."""

    def __init__(self, part: Spec) -> None:
        tasks = all_tasks(part, ["cpu"])
        self.limits = Limits.of(part)
        self.programs: dict[rpac.Variant, Task] = {rpac.Variant(task.kind, task.tokens): task for task in tasks}
        self.placement = Placement(ONE_DEVICE, jax.devices()[:1])
        self._args = tasks[0].args

    def program(self, *variant: Any) -> Callable[..., Any]:
        return load_program(self.programs[rpac.Variant(*variant)].source)

    def new_cache(self) -> jax.Array:
        cache = self._args[index_of(self._args, "kv_cache")]
        return jnp.zeros(cache.shape, cache.dtype)

    def sharding(self, name: str) -> jax.sharding.Sharding:
        return self.placement.sharding(self._args[index_of(self._args, name)])


def make_scratch(folder: Path, spec_path: str) -> JitSteps:
    """The steps of a checkpoint, of which nothing is compiled yet."""
    spec = load_spec(spec_path)
    config = read_config(folder, spec.model.q_dtype)
    engines: Any = {part.layer: ScratchEngine(part) for part in spec.parts}
    return JitSteps(engines, config, load_params(folder, config))
