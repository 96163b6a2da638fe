"""A model's step for every kind and token bucket of a bundle, ready to run.

`JitSteps` compiles the step here, around the bundle's portable programs. This is the one place that calls rpac's engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

import rpac
from rpac.contract.arrays import index_of
from rpac.serving import Step
from serve.config import Config, read_config
from serve.errors import CheckpointError
from serve.model import Caches, make_step
from serve.sampling import Sampling
from serve.weights import Params, Weight

TAKEN = ("queries", "keys", "values", "kv_cache", "kv_lens", "page_indices", "cu_q_lens", "distribution")


class Metadata(NamedTuple):
    """A batch as the step takes it."""

    kv_lens: Any
    page_indices: Any
    cu_q_lens: Any
    distribution: Any


class JitSteps:
    """Steps compiled here by jit. Safe to call from one thread at a time."""

    def __init__(self, engines: Mapping[str, rpac.Engine], config: Config, params: Params) -> None:
        self.engines = engines
        self.limits = rpac.Limits.joint([engine.limits for engine in engines.values()])
        self.vocabulary = config.vocabulary
        self._config = config
        self._params = params
        self._step, self._arrays = make_step(config)
        self._compiled: dict[rpac.Variant, Any] = {}

    @property
    def variants(self) -> tuple[rpac.Variant, ...]:
        return tuple(next(iter(self.engines.values())).programs)

    def warm(self) -> None:
        """Compiles every step, so that no request waits for a compile."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._ready, self.variants))

    def new_caches(self) -> Caches:
        """An empty cache for each layer."""
        return [self.engines[kind].new_cache() for kind in self._config.kinds]

    def __call__(self, step: Step, caches: Caches, sampling: Sampling) -> tuple[np.ndarray, Caches]:
        """The next token of each row of the batch, and the caches in place of those given, which are donated."""
        copies = np.full((self.limits.max_num_seqs, 2), -1, np.int32)
        copies[: len(step.copies)] = step.copies
        run = self._ready(rpac.Variant(step.batch.kind, step.batch.tokens))
        batch = Metadata(*step.batch.metadata)
        tokens, caches = run(self._params, caches, step.token_ids, step.positions, batch, sampling, copies)
        return np.asarray(tokens), caches

    def _ready(self, variant: rpac.Variant) -> Any:
        if variant not in self._compiled:
            programs = {kind: engine.program(*variant) for kind, engine in self.engines.items()}

            def run(
                params: Params, caches: Caches, token_ids: Any, positions: Any, batch: Metadata, *extra: Any
            ) -> Any:
                def attend(queries: Any, keys: Any, values: Any, kv_cache: Any, layer: str) -> Any:
                    return programs[layer](queries, keys, values, kv_cache, *batch)

                return self._step(attend, params, caches, token_ids, positions, batch, *extra)

            self._compiled[variant] = jax.jit(run, donate_argnums=1).lower(*self._shapes(variant)).compile()
        return self._compiled[variant]

    def _shapes(self, variant: rpac.Variant) -> tuple[Any, ...]:
        """The arguments of the step, as shapes."""
        arrays = self._arrays(*variant, self.limits)
        given = {kind: engine.programs[variant].args for kind, engine in self.engines.items()}
        caches = []
        for kind in self._config.kinds:
            dims = given[kind][index_of(given[kind], "kv_cache")]
            whole = self.engines[kind].placement.mesh.whole(dims)
            caches.append(
                jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=self.engines[kind].sharding("kv_cache"))
            )
        first = next(iter(given.values()))
        batch = Metadata(*(jax.ShapeDtypeStruct(one.shape, one.dtype) for one in first[-len(Metadata._fields) :]))
        tokens = jax.ShapeDtypeStruct((variant.tokens,), np.int32)
        return self._params, caches, tokens, tokens, batch, *arrays["extra"]


def open_bundle(path: str, folder: Path, target: str | None = None) -> tuple[dict[str, rpac.Engine], Config]:
    """An engine for each kind of layers of a bundle, and the model of a checkpoint folder in the bundle's dtype.

    Raises CheckpointError if the bundle is for another model, and what `rpac.load` raises.
    """
    engines = rpac.load_layers(path, target)
    config = read_config(folder, next(iter(engines.values())).model.q_dtype)
    kinds = dict(zip(config.kinds, config.windows, strict=True))
    if set(kinds) != set(engines):
        raise _misfit(path, "layers", _shown(engines), _shown(kinds))
    for kind, window in kinds.items():
        _check(path, config, engines[kind], window)
    return engines, config


def sharding_of(engines: Mapping[str, rpac.Engine]) -> Any:
    """Where each weight lies, for `load_params`: on the engine's device, or cut over its mesh."""
    engine = next(iter(engines.values()))
    queries = engine.sharding("queries")

    def place(weight: Weight) -> jax.sharding.Sharding:
        return NamedSharding(queries.mesh, weight.cut) if isinstance(queries, NamedSharding) else queries

    return place


def _check(path: str, config: Config, engine: rpac.Engine, window: int | None) -> None:
    args = next(iter(engine.programs.values())).args
    mesh = engine.placement.mesh
    whole = {dims.name: mesh.whole(dims).shape for dims in args}
    model, longest = engine.model, engine.limits.max_kv_len
    hidden = window is not None and window >= longest and model.sliding_window is None  # then it hides nothing
    # name of the key in the spec, what the bundle has, what the checkpoint needs
    facts = [
        ("arguments", tuple(dims.name for dims in args), TAKEN),
        ("parallel.data", mesh.data, 1),
        ("model.q_heads", whole["queries"][1], config.q_heads),
        ("model.kv_heads", whole["keys"][1], config.kv_heads),
        ("model.head_dim", whole["queries"][2], config.kernel_head_dim),
        ("model.sm_scale", round(model.sm_scale, 6), round(config.head_dim**-0.5, 6)),
        ("model.sliding_window", model.sliding_window, None if hidden else window),
        ("model.soft_cap", model.soft_cap, None),
        ("serving.decode_len", engine.limits.decode_len, 1),
    ]
    for key, found, wanted in facts:
        if found != wanted:
            raise _misfit(path, key, str(found), str(wanted))


def _misfit(path: str, key: str, found: str, wanted: str) -> CheckpointError:
    fix = "make the spec of this checkpoint with `rpac init`, and build it"
    return CheckpointError(path, key, found, f"must be {wanted}, by config.json", fix)


def _shown(kinds: Mapping[str, Any]) -> str:
    return ", ".join(kind or "one kind" for kind in kinds)
