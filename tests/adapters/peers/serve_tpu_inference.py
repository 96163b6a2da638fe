"""tpu-inference's own model and layer classes on a CPU, with a bundle installed and with the package's own reference.

Run by tests/adapters/test_real_packages.py as `serve_tpu_inference.py SEED BUNDLE...`. For each bundle: a small model or layer of
the package runs a prefill of some prompts and some steps of decode, first with its reference functions for kernels and the
cache of its own shape, then under jit with the bundle installed and the cache that the package makes then. Compared are
tokens, outputs and caches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Absent, TracedEngine, claim
from jax.sharding import Mesh
from serving import (
    HIDDEN,
    PROMPTS,
    TOLERANCE,
    TOLERANCE_OF_8_BITS,
    VOCABULARY,
    batches,
    require_close,
    require_tokens,
    spread,
)

import rpac
from rpac.adapters import tpu_inference

# What the package imports for a server, and nothing called here uses.
Absent("vllm", "torch", "torchax", "sympy", "requests", "google", "tpu_info", "tpu_inference.env_override")

SCALES = (0.5, 0.25)  # of stored K and V
Step = Callable[[Any, Any, Any], tuple[Any, Any]]
"""(caches, input, metadata) to (caches, result); both are of all tokens of a batch."""


class Eager:
    """jax, as a module of the package names it, without jit and shard_map: then the reference sees values, not tracers."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)

    @staticmethod
    def jit(function: Any = None, **options: Any) -> Any:
        return Eager.jit if function is None else function

    @staticmethod
    def shard_map(function: Any, **options: Any) -> Any:
        return function


@contextmanager
def reference() -> Iterator[None]:
    """The package's attention with its reference functions for kernels."""
    from tpu_inference.kernels.mla.v1 import kernel as mla
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel, kernel_hd64
    from tpu_inference.layers.common import attention_interface
    from tpu_inference.layers.jax.attention import attention, gpt_oss_attention

    def padded(function: Any) -> Any:
        """The reference returns live tokens alone, and knows no argument that tunes or that the cache is updated."""

        def call(queries: Any, *args: Any, update_kv_cache: bool = True, **options: Any) -> Any:
            live = int(args[5][int(args[6][2])])
            out, cache = function(queries, *args, **options)
            return jnp.zeros(queries.shape, out.dtype).at[:live].set(out[:live]), cache

        return call

    def heads_first(queries: Any, rope: Any, new: Any, new_rope: Any, cache: Any, *args: Any, **options: Any) -> Any:
        """The package's MLA v2 has no reference: that of v1 has its tokens first, and two of them to a row of the cache."""
        live = int(args[2][int(args[3][2])])
        tokens_first = [queries.swapaxes(0, 1), rope, new, new_rope, cache.reshape(len(cache), -1, 2, cache.shape[-1])]
        out, after = mla.ref_mla_ragged_paged_attention(*tokens_first, *args, sm_scale=options["sm_scale"])
        whole = jnp.zeros(tokens_first[0].shape, out.dtype).at[:live].set(out[:live])
        return whole.swapaxes(0, 1), after.reshape(cache.shape)

    wide, narrow = padded(kernel.ref_ragged_paged_attention), padded(kernel_hd64.ref_ragged_paged_attention_hd64)
    functions = {
        attention_interface: {
            "ragged_paged_attention": wide,
            "ragged_paged_attention_hd64": narrow,
            "mla_ragged_paged_attention": heads_first,
        },
        attention: {"ragged_paged_attention": wide},
        gpt_oss_attention: {"ragged_paged_attention_hd64": narrow},
    }
    kept = []
    for module, names in functions.items():
        for name, function in {**names, "jax": Eager()}.items():
            kept.append((module, name, getattr(module, name)))
            setattr(module, name, function)
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


def mesh(devices: int = 1) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]).reshape(1, devices), ("data", "model"))


def metadata(batch: rpac.Batch) -> Any:
    """The server's own metadata of a batch: no row is a prefill row for it."""
    from tpu_inference.layers.common.attention_metadata import AttentionMetadata

    positions = np.zeros(batch.tokens, np.int32)
    for row in batch:
        positions[row.queries.start : row.queries.stop] = np.arange(row.context_len, row.kv_len)
    i, _, k = batch.distribution
    return AttentionMetadata(
        input_positions=jnp.asarray(positions),
        block_tables=jnp.asarray(batch.page_indices),
        seq_lens=jnp.asarray(batch.kv_lens),
        query_start_loc=jnp.asarray(batch.cu_q_lens),
        request_distribution=jnp.asarray(np.array([i, i, k], np.int32)),
        use_causal_mask=True,
    )


def caches(engine: Any, layers: int, devices: int) -> list[Any]:
    """What the server makes for its layers, on so many devices that each have the heads of the bundle."""
    from tpu_inference.runner.kv_cache import create_kv_caches

    model, limits = engine.model, engine.limits
    latent = model.rope_dim is not None
    width = model.head_dim + model.rope_dim if latent else model.head_dim
    names = [f"layer.{layer}" for layer in range(layers)]
    dtype = jnp.dtype(model.kv_dtype)
    heads = model.kv_heads * devices
    return create_kv_caches(
        limits.num_pages, limits.page_size, heads, width, mesh(devices), names, dtype, use_mla=latent
    )


def servers_layout(engine: Any, cache: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A bundle's cache as the server's own shape has the same numbers."""
    found = np.asarray(cache)
    if engine.kv_layout == "separate":  # pages, K and V, heads, tokens, lanes
        found = found.transpose(0, 3, 2, 1, 4)
    return found.reshape(shape)


def compare(
    engine: Any,
    what: str,
    layers: int,
    step: Step,
    traced: Step,
    given: Callable[[rpac.Batch, Any], Any],
    devices: int = 1,
) -> Any:
    """Claims that results of live tokens and caches are those of the reference; yields the results of both, a pair a batch.

    `given` makes the input of a batch out of it and the result before, of the reference: both are fed the same.
    """
    what = f"{what}, bundle {engine.name}"
    tolerance = TOLERANCE_OF_8_BITS if engine.model.quantized else TOLERANCE
    own = caches(engine, layers, devices)  # before the bundle is installed
    wanted: list[Any] = []
    fed: list[Any] = []
    for batch in batches(engine):
        fed.append(given(batch, wanted[-1] if wanted else None))
        with reference(), jax.set_mesh(mesh(devices)):
            own, result = step(own, fed[-1], metadata(batch))
        wanted.append(np.asarray(result, np.float32)[: batch.num_tokens])

    got: list[Any] = []
    with tpu_inference.install(engine) as installed:
        ours = caches(engine, layers, devices)
        claim(
            f"{what}: {len(installed.replaced)} names replaced, the server's cache is {list(ours[0].shape)}",
            ours[0].sharding.shard_shape(ours[0].shape) == engine.new_cache().shape,
        )
        run = jax.jit(traced, donate_argnums=0)
        for batch, inputs, result in zip(batches(engine), fed, wanted, strict=True):
            with jax.set_mesh(mesh(devices)):
                ours, mine = run(ours, inputs, metadata(batch))
            got.append(np.asarray(mine, np.float32)[: batch.num_tokens])
            require_close(f"{what}: results of {batch.kind}", got[-1], result, tolerance)
    pages = sorted({page for row in batch for page in row.pages})
    for layer in range(layers):
        mine = servers_layout(engine, ours[layer], own[layer].shape)
        require_close(f"{what}: cache of layer {layer}", mine[pages], np.asarray(own[layer])[pages], tolerance)
    claim(f"{what}: engine.traced was called", engine.traces > 0)
    return wanted, got


def serve_llama(engine: Any, seed: int, devices: int) -> None:
    """The tokens of the package's Llama, of so many times the bundle's heads."""
    from flax import nnx
    from tpu_inference.layers.jax import pp_utils
    from tpu_inference.models.jax import llama3
    from transformers import LlamaConfig

    pp_utils.get_pp_indices = lambda layers, rank, size: (0, layers)
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True, rank_in_group=0, world_size=1)
    pp_utils.get_pp_group = llama3.get_pp_group = lambda: group
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=engine.model.q_heads * devices,
        num_key_value_heads=engine.model.kv_heads * devices,
        head_dim=engine.model.head_dim,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    settings = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=config, get_vocab_size=lambda: VOCABULARY, dtype=jnp.bfloat16),
        cache_config=SimpleNamespace(cache_dtype="fp8" if engine.model.quantized else "auto"),
        speculative_config=None,
    )
    with jax.set_mesh(mesh(devices)):
        model = spread(llama3.LlamaForCausalLM(settings, jax.random.key(0), mesh(devices)), seed)
    for layer in model.model.layers:  # as a checkpoint's; without an 8-bit cache they have no effect
        layer.self_attn._k_scale, layer.self_attn._v_scale = SCALES
    graph, state = nnx.split(model)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, VOCABULARY, prompt) for prompt in PROMPTS]

    def step(kv_caches: Any, ids: Any, metadata: Any, model: Any = model) -> Any:
        kv_caches, hidden, *_ = model(kv_caches, ids, metadata)
        return kv_caches, model.compute_logits(hidden)

    def given(batch: rpac.Batch, logits: Any) -> Any:
        if logits is None:
            return jnp.asarray(batch.pack([prompt.astype(np.int32) for prompt in prompts]))
        ends = np.cumsum(PROMPTS) - 1 if len(logits) == sum(PROMPTS) else np.arange(len(PROMPTS))
        return jnp.asarray(batch.pack([token[None].astype(np.int32) for token in logits[ends].argmax(axis=1)]))

    def traced(kv_caches: Any, ids: Any, metadata: Any) -> Any:
        return step(kv_caches, ids, metadata, nnx.merge(graph, state))

    what = f"Llama on {devices} devices"
    wanted, got = compare(engine, what, 2, step, traced, given, devices)
    if not engine.model.quantized:
        require_tokens(f"{what}, bundle {engine.name}", np.concatenate(got), np.concatenate(wanted))


def serve_layer(engine: Any, seed: int, name: str, layer: Any) -> None:
    """The outputs of one layer of the package that has its own call of the kernel."""
    from flax import nnx

    graph, state = nnx.split(spread(layer, seed))
    rng = np.random.default_rng(seed)

    def step(kv_caches: Any, inputs: Any, metadata: Any) -> Any:
        metadata.sliding_window = None  # gpt-oss sets it for each layer
        cache, out = nnx.merge(graph, state)(inputs, False, kv_caches[0], metadata)
        return [cache], out

    def given(batch: rpac.Batch, before: Any) -> Any:
        here = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec())
        return jax.device_put(rng.standard_normal((batch.tokens, HIDDEN)).astype(jnp.bfloat16), here)

    compare(engine, name, 1, step, step, given)


def layer_of(engine: Any, name: str) -> Any:
    from flax import nnx
    from tpu_inference.layers.jax.attention.attention import Attention
    from tpu_inference.layers.jax.attention.gpt_oss_attention import GptOssAttention

    kind = {"Attention": Attention, "GptOssAttention": GptOssAttention}[name]
    model = engine.model
    options = {"rope_scaling": None} if kind is Attention else {}
    with jax.set_mesh(mesh()):
        return kind(
            hidden_size=HIDDEN,
            num_attention_heads=model.q_heads,
            num_key_value_heads=model.kv_heads,
            head_dim=model.head_dim,
            rope_theta=1e4,
            dtype=jnp.bfloat16,
            mesh=mesh(),
            kv_cache_dtype="auto",
            random_init=True,
            rngs=nnx.Rngs(0),
            **options,
        )


def serve_latent(engine: Any, seed: int) -> None:
    """The outputs of the interface's function for latent attention, on random projections."""
    from tpu_inference.layers.common.attention_interface import mla_attention

    model, rng = engine.model, np.random.default_rng(seed)

    def step(kv_caches: Any, inputs: Any, metadata: Any) -> Any:
        cache, out = mla_attention(
            *inputs, kv_caches[0], metadata, mesh(), model.q_heads, model.head_dim, sm_scale=model.sm_scale
        )
        return [cache], out.swapaxes(0, 1)

    def given(batch: rpac.Batch, before: Any) -> Any:
        tokens, heads, rank, rope = batch.tokens, model.q_heads, model.head_dim, model.rope_dim
        shapes = ((heads, tokens, rank), (tokens, heads, rope), (tokens, rank), (tokens, rope))
        return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]

    compare(engine, "mla_attention", 1, step, step, given)


def start_worker(path: str) -> None:
    """What vLLM calls in its worker when it is told of rpac's extension."""
    from rpac.adapters.tpu_inference.worker import WorkerExtension

    class Worker(WorkerExtension):
        vllm_config = SimpleNamespace(additional_config={"rpac_bundle": path})

    worker = Worker()
    worker.init_worker_extension()
    claim(f"the worker's extension replaces {len(worker.rpac_installation.replaced)} names", True)
    worker.rpac_installation.uninstall()


def main(seed: int, *paths: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    for path in paths:
        start_worker(path)
        engine = TracedEngine(path)
        if engine.model.rope_dim is not None:
            serve_latent(engine, seed)
        elif engine.model.sinks:
            serve_layer(engine, seed, "GptOssAttention", layer_of(engine, "GptOssAttention"))
        else:
            serve_llama(engine, seed, devices=2)
            if not engine.model.quantized:
                serve_layer(engine, seed, "Attention", layer_of(engine, "Attention"))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
