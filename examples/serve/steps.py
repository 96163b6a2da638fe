"""A model's step for every kind and token bucket of a bundle, ready to run. This is the one place that calls rpac's engines.

`WholeSteps` runs the steps that a bundle holds, and compiles nothing. `JitSteps` compiles them here, around the portable
programs of a bundle without steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

import rpac
from rpac.contract.arrays import index_of
from rpac.serving import Step
from serve.config import Config
from serve.model import Caches, make_step
from serve.sampling import Sampling
from serve.weights import Params


class Steps(Protocol):
    """What a generator runs. One thread calls it."""

    limits: rpac.Limits
    vocabulary: int

    def warm(self) -> None:
        """Makes every step ready, so that no request waits for it."""

    def new_caches(self) -> Caches:
        """An empty cache for each layer."""

    def __call__(self, step: Step, caches: Caches, sampling: Sampling) -> tuple[np.ndarray, Caches]:
        """The next token of each row of the batch, and the caches in place of those given, which are donated."""


class WholeSteps:
    """The steps that a bundle holds."""

    def __init__(self, engine: rpac.StepEngine, config: Config, params: Params) -> None:
        """Raises BatchError if the steps were built for other weights."""
        self.limits = engine.limits
        self.vocabulary = config.vocabulary
        self.new_caches = engine.new_caches
        self._engine = engine
        self._run = engine.bind(params)

    def warm(self) -> None:
        self._engine.warm()

    def __call__(self, step: Step, caches: Caches, sampling: Sampling) -> tuple[np.ndarray, Caches]:
        more = (sampling, _copies(step, self.limits.max_num_seqs))
        # The scheduler has validated the batch.
        tokens, caches = self._run(caches, step.token_ids, step.positions, step.batch, *more, validate=False)
        return np.asarray(tokens), caches


class Metadata(NamedTuple):
    """A batch as the step takes it."""

    kv_lens: Any
    page_indices: Any
    cu_q_lens: Any
    distribution: Any


class JitSteps:
    """Steps that are compiled here."""

    def __init__(self, engines: Mapping[str, rpac.Engine], config: Config, params: Params) -> None:
        """`engines` has one for each kind of layers."""
        self.limits = rpac.Limits.joint([engine.limits for engine in engines.values()])
        self.vocabulary = config.vocabulary
        self._engines = engines
        self._kinds = config.kinds
        self._params = params
        self._step, self._arrays = make_step(config)
        self._compiled: dict[rpac.Variant, Any] = {}

    def warm(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._ready, next(iter(self._engines.values())).programs))

    def new_caches(self) -> Caches:
        return [self._engines[kind].new_cache() for kind in self._kinds]

    def __call__(self, step: Step, caches: Caches, sampling: Sampling) -> tuple[np.ndarray, Caches]:
        run = self._ready(rpac.Variant(step.batch.kind, step.batch.tokens))
        more = (Metadata(*step.batch.metadata), sampling, _copies(step, self.limits.max_num_seqs))
        tokens, caches = run(self._params, caches, step.token_ids, step.positions, *more)
        return np.asarray(tokens), caches

    def _ready(self, variant: rpac.Variant) -> Any:
        if variant not in self._compiled:
            programs = {kind: engine.program(*variant) for kind, engine in self._engines.items()}

            def run(params: Params, caches: Caches, ids: Any, positions: Any, batch: Metadata, *extra: Any) -> Any:
                def attend(*heads_and_cache: Any, layer: str) -> Any:
                    return programs[layer](*heads_and_cache, *batch)

                return self._step(attend, params, caches, ids, positions, batch, *extra)

            self._compiled[variant] = jax.jit(run, donate_argnums=1).lower(*self._shapes(variant)).compile()
        return self._compiled[variant]

    def _shapes(self, variant: rpac.Variant) -> tuple[Any, ...]:
        """What the step takes, as shapes."""
        args = {kind: engine.programs[variant].args for kind, engine in self._engines.items()}

        def cache_of(kind: str) -> jax.ShapeDtypeStruct:
            engine = self._engines[kind]
            whole = engine.placement.mesh.whole(args[kind][index_of(args[kind], "kv_cache")])
            return jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=engine.sharding("kv_cache"))

        caches = [cache_of(kind) for kind in self._kinds]
        tokens = jax.ShapeDtypeStruct((variant.tokens,), np.int32)
        first = args[self._kinds[0]]
        batch = Metadata(*(jax.ShapeDtypeStruct(one.shape, one.dtype) for one in first if one.name in Metadata._fields))
        return self._params, caches, tokens, tokens, batch, *self._arrays(*variant, self.limits)["extra"]


def _copies(step: Step, rows: int) -> np.ndarray:
    """The pages to copy, as the model's step takes them."""
    copies = np.full((rows, 2), -1, np.int32)
    copies[: len(step.copies)] = step.copies
    return copies
