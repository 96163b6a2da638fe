"""An engine that only notes its calls, and each adapter with a sound call of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import signatures

from rpac.adapters import ejkernel, sglang_jax, tokamax, tpu_inference
from rpac.batch import Batch, Limits
from rpac.contract import arrays as layout
from rpac.contract.attention import Attention
from rpac.contract.program import Variant
from rpac.spec import Spec


@dataclass
class FakeEngine:
    """Returns the metadata it was called with as its output, and the cache as it came."""

    name: str = "tiny"
    model: Attention = field(default_factory=lambda: Attention(4, 2, 128, "bfloat16", "bfloat16", 128**-0.5))
    kv_layout: str = "interleaved"
    limits: Limits = field(default_factory=lambda: Limits(16, 8, 4, 32, 16, (8, 32)))
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    traces: list[tuple[Any, ...]] = field(default_factory=list)
    validated: list[bool] = field(default_factory=list)
    extra: list[dict[str, Any]] = field(default_factory=list)
    placement: Any = field(default_factory=lambda: SimpleNamespace(mesh=SimpleNamespace(devices=1)))

    @property
    def programs(self) -> dict[Any, Any]:
        """One, of which only the cache is known."""
        kv_cache = layout.ArrayDims("kv_cache", cache_shape(self), self.model.kv_dtype)
        return {Variant("mixed", 8): SimpleNamespace(args=(kv_cache,), results=())}

    @classmethod
    def of(cls, spec: Spec) -> FakeEngine:
        return cls(spec.name, spec.model, spec.serving.kv_layout, Limits.of(spec))

    def __call__(self, *args: Any, validate: bool = True, **extra: Any) -> Any:
        self.calls.append(args)
        self.extra.append(extra)
        self.validated.append(validate)
        return args[-4:], args[-5]

    def traced(self, *args: Any, **extra: Any) -> Any:
        self.traces.append(args)
        self.extra.append(extra)
        return args[4:], args[3]


def engine_of(kv_layout: str = "interleaved", **model: Any) -> FakeEngine:
    """A stand-in of a cache's layout, with some fields of its model replaced."""
    engine = FakeEngine(kv_layout=kv_layout)
    engine.model = replace(engine.model, **model)
    return engine


@dataclass(frozen=True)
class Peer:
    """What a test needs of one adapter."""

    make: Callable[..., Callable[..., Any]]
    signature: str
    scale: str


ADAPTERS = {
    "tpu_inference": Peer(tpu_inference.ragged_paged_attention, signatures.TPU_INFERENCE, "sm_scale"),
    "tpu_inference hd64": Peer(tpu_inference.ragged_paged_attention_hd64, signatures.TPU_INFERENCE_HD64, "sm_scale"),
    "tpu_inference batched": Peer(
        tpu_inference.batched_ragged_paged_attention, signatures.TPU_INFERENCE_BATCHED, "sm_scale"
    ),
    "tokamax": Peer(tokamax.ragged_paged_attention, signatures.TOKAMAX, "sm_scale"),
    "sglang_jax": Peer(sglang_jax.ragged_paged_attention, signatures.SGLANG_JAX, "sm_scale"),
    "sglang_jax main": Peer(sglang_jax.ragged_paged_attention_v3, signatures.SGLANG_JAX_V3, "sm_scale"),
    "ejkernel operation": Peer(ejkernel.ragged_page_attention_v3, signatures.EJKERNEL, "softmax_scale"),
    "ejkernel kernel": Peer(ejkernel.ragged_page_attention_v3_kernel, signatures.EJKERNEL_KERNEL, "softmax_scale"),
}


def cache_shape(engine: Any) -> tuple[int, ...]:
    """The cache of an engine, as the contract lays it out."""
    serving = SimpleNamespace(
        page_size=engine.limits.page_size, num_pages=engine.limits.num_pages, kv_layout=engine.kv_layout
    )
    return layout.kv_cache_shape(SimpleNamespace(model=engine.model, serving=serving))


def cache_of(engine: Any) -> Any:
    """A cache of zeros."""
    return jnp.zeros(cache_shape(engine), engine.model.kv_dtype)


def arguments(name: str, engine: Any, q_lens: Sequence[int] = (1, 1)) -> list[Any]:
    """The positional arguments of a sound call: sequences with 2 tokens of context each."""
    limits = engine.limits
    tables = [[2 * row, 2 * row + 1] for row in range(len(q_lens))]
    batch = Batch.build(limits, q_lens, [2] * len(q_lens), tables)
    model = engine.model
    queries = jnp.zeros((batch.tokens, model.q_heads, model.head_dim), model.q_dtype)
    keys = jnp.zeros((batch.tokens, model.kv_heads, model.head_dim), model.kv_dtype)
    return peer_arguments(name, batch, [queries, keys, keys, cache_of(engine)])


def peer_arguments(name: str, batch: Batch, arrays: Sequence[Any]) -> list[Any]:
    """A batch as the peer passes it."""
    *tokens, kv_cache = arrays
    if not name.startswith("sglang_jax"):
        return [*tokens, kv_cache, batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution]
    pages = [page for row in batch for page in row.pages]
    used = [len(row.pages) for row in batch]
    rows = len(batch.kv_lens)
    cu_kv_lens = np.zeros(rows + 1, np.int32)
    cu_kv_lens[1 : len(used) + 1] = np.cumsum(used) * batch.limits.page_size
    cu_kv_lens[len(used) + 1 :] = cu_kv_lens[len(used)]
    listed = np.array([*pages, 0], np.int32)
    k = len(batch)
    whole = np.array([k, k, k] if batch.kind == "decode" else [0, k, k], np.int32)
    metadata = [batch.kv_lens, listed, batch.cu_q_lens, cu_kv_lens, whole]
    if name == "sglang_jax main":
        return [*tokens, kv_cache, *metadata, None]
    return [*tokens, kv_cache.reshape(*kv_cache.shape[:2], -1, kv_cache.shape[-1]), *metadata]
