"""From the start of a process to its first token, once: with a bundle, or with attention generated and compiled here.

    PYTHONPATH=examples python -m serve.first_token bundle build/serve-demo.rpac [COMPILE_CACHE]
    PYTHONPATH=examples python -m serve.first_token scratch examples/serve/spec.yaml [COMPILE_CACHE]

Prints JSON, in seconds: `model`, the imports of Python and jax, and the weights, with jax's first compile of anything;
`attention`, until the program of the first step is ready, which is what a bundle is for; `all`, the same for every program,
which a server must wait for that no request shall wait; `first_token`, everything from the start, the compiles of the
model's own pieces included. `attention_cores` and `all_cores` are the time of all cores, which other work on the machine
moves less.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
SPAWNED = float(os.environ.get("SPAWNED", time.time()))  # wall clock, by the parent

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from serve import toy as model  # noqa: E402
from serve.compiled import keep_compiled  # noqa: E402
from serve.generate import Generator  # noqa: E402

PROMPT = list(range(32))  # one prefill chunk
FIRST = ("prefill", 64)


def from_bundle(path: str) -> Any:
    import rpac

    engine = rpac.load(path, target="cpu")
    engine.warm([rpac.Variant(*FIRST)])
    return engine


class Scratch:
    """The same kernels without a bundle: generated, traced and compiled here. It has as much of an engine as one step needs."""

    def __init__(self, path: str) -> None:
        from rpac.batch import Limits
        from rpac.build import sources_of
        from rpac.lower import tasks_of
        from rpac.spec import load_spec

        spec = load_spec(path)
        self.limits = Limits.of(spec)
        self.device = jax.devices()[0]
        self.programs = {(task.kind, task.tokens): task for task in tasks_of(spec, sources_of(spec, ["cpu"]))}
        self._compiled: dict[tuple[str, int], Any] = {}
        self._compile(FIRST)

    def warm(self) -> None:
        for variant in self.programs:
            self._compile(variant)

    def _compile(self, variant: tuple[str, int]) -> None:
        from rpac.lower.worker import load_program

        if variant not in self._compiled:
            task = self.programs[variant]
            shapes = [jax.ShapeDtypeStruct(one.shape, jnp.dtype(one.dtype)) for one in task.args]
            self._compiled[variant] = jax.jit(load_program(task.source), donate_argnums=3).lower(*shapes).compile()

    def __call__(self, *args: Any, validate: bool) -> Any:
        return self._compiled[FIRST](*args)


def now() -> np.ndarray:
    """Seconds of the wall clock, and seconds of all cores together."""
    return np.array([time.time(), time.process_time()])


def main(mode: str, path: str, cache: str | None = None) -> None:
    if cache is not None:
        keep_compiled(cache)
    config = model.Config()
    params = jax.block_until_ready(model.init(config, 0))
    made = now()
    engine = {"bundle": from_bundle, "scratch": Scratch}[mode](path)
    ready = now()
    generator = Generator(engine, config, params)
    generator.scheduler.add(PROMPT, 1)
    (token,) = generator.step()
    first = now()
    engine.warm()
    every = ready + now() - first
    found = {"model": made[0] - SPAWNED, "first_token": first[0] - SPAWNED}
    found["attention"], found["attention_cores"] = (ready - made).tolist()
    found["all"], found["all_cores"] = (every - made).tolist()
    print(json.dumps({**found, "token": token.token}))


if __name__ == "__main__":
    main(*sys.argv[1:])
