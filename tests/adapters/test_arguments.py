"""An adapter takes exactly its peer's arguments: each is followed, refused by name, or said to tune the peer's kernel."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calling import NAMES, call
from fake import ADAPTERS, FakeEngine, arguments, engine_of
from signatures import signature

from rpac.adapters._arguments import DEFAULT_MASK_VALUE
from rpac.errors import BatchError, SelectionError

# Values of arguments that ask for what no program does.
REFUSED: dict[str, list[Any]] = {
    "custom_mask": [np.ones(8, np.int32)],
    "attention_scope": ["cache_only"],
    "cp_group_size": [2],
    "cp_rank": [np.zeros(1, np.int32)],
    "debug_mode": [True],
    "kv_layout": ["seq_along_lane"],
    "mask_aligned_to_cu_kv": [True],
    "mask_value": [-1e4, 0.0],
    "q_scale": [0.5, 1.0],
    "skip_kv_mask": [True],
    "softmax_dtype": [jnp.float32, jnp.bfloat16],
    "xai_temperature_len": [1024.0],
}

# Those that a bundle has built in, each with the key of a spec's model.
BUILT_IN: dict[str, list[Any]] = {
    "logits_soft_cap": ["soft_cap", 30.0],
    "sliding_window": ["sliding_window", 4096],
    "soft_cap": ["soft_cap", 30.0],
}
CAUSAL = ("causal", "use_causal_mask")
UPDATE = ("update_kv_cache",)
SINKS = ("attention_sink", "softmax_aux")
SCALES = ("k_scale", "v_scale")

# Those that ask for nothing beside the signature's defaults.
NEUTRAL: dict[str, list[Any]] = {
    "causal": [True],
    "kv_layout": ["head_along_sublane"],
    "k_scale": [1, 1.0, np.float32(1), jnp.float32(1)],
    "mask_value": [None, DEFAULT_MASK_VALUE],
    "out_dtype": [jnp.bfloat16, "bfloat16", np.dtype("bfloat16")],
    "skip_kv_mask": [np.False_],
    "use_causal_mask": [1, np.True_],
    "v_scale": [1.0],
}

# Those that choose or tune the peer's kernel.
TUNING: dict[str, Any] = {
    "cfg": None,
    "d_block_sizes": (1, 64, 1, 64),
    "decode_block_sizes": (1, 64),
    "prefill_block_sizes": (8, 64),
    "disable_bounds_checks": False,
    "disable_semaphore_checks": False,
    "m_block_sizes": (8, 64, 8, 64),
    "implementation": "reference",
    "num_kv_pages_per_block": 4,
    "num_queries_per_block": 8,
    "p_block_sizes": (8, 64, 8, 64),
    "platform": "pallas",
    "vmem_limit_bytes": 1 << 20,
}

FOLLOWED = {
    "return_lse", "skip_kv_update", "decode_query_size", "sm_scale", "softmax_scale", "chunk_prefill_size", "out_dtype",
    "mesh", "in_specs", "out_specs",
    "cu_kv_lens",
    "queries", "keys", "values", "kv_cache", "kv_cache_fused", "kv_lens", "page_indices", "block_tables", "cu_q_lens",
    "query_start_loc", "distribution",
}  # fmt: skip


def of(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Each adapter with each of its arguments that is among `values`."""
    taken = {name: inspect.signature(ADAPTERS[name].make(FakeEngine())).parameters for name in NAMES}
    return [(name, argument) for name in NAMES for argument in sorted(set(values) & set(taken[name]))]


@pytest.mark.parametrize("name", NAMES)
def test_the_signature_is_the_peers(name: str) -> None:
    assert signature(ADAPTERS[name].make(FakeEngine())) == ADAPTERS[name].signature


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_of_a_peer_is_followed_refused_or_tuning(name: str) -> None:
    taken = set(inspect.signature(ADAPTERS[name].make(FakeEngine())).parameters)
    assert taken <= FOLLOWED | set(REFUSED) | set(BUILT_IN) | set(CAUSAL) | set(UPDATE) | set(SINKS) | set(
        SCALES
    ) | set(TUNING)


@pytest.mark.parametrize(("name", "argument"), of(REFUSED))
def test_what_no_program_does_is_refused_by_name(name: str, argument: str) -> None:
    for value in REFUSED[argument]:
        engine = FakeEngine()
        shown = re.escape(f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value))
        with pytest.raises(SelectionError, match=f"^{argument} is {shown}; must be .*; no line of a spec adds it: run"):
            call(name, engine, **{argument: value})
        assert engine.calls == []


@pytest.mark.parametrize(("name", "argument"), of(BUILT_IN))
def test_what_the_bundle_has_built_in_is_asked_for_exactly(name: str, argument: str) -> None:
    key, value = BUILT_IN[argument]
    plain, built = FakeEngine(), engine_of(**{key: value})
    message = f"^{argument} is {value}; must be None, the {key} of bundle tiny; .*\nmodel:\n  {key}: {value}$"
    with pytest.raises(SelectionError, match=message):
        call(name, plain, **{argument: value})
    with pytest.raises(
        SelectionError, match=f"^{argument} is None; must be {value}, .*, or build without model.{key}$"
    ):
        call(name, built)
    with pytest.raises(SelectionError, match=f"^{argument} is {value + 1}; must be {value}"):
        call(name, built, **{argument: value + 1})
    assert plain.calls == built.calls == []
    call(name, built, **{argument: value})
    assert len(built.calls) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_is_as_causal_as_it_is_asked_for(name: str) -> None:
    causal, other = FakeEngine(), engine_of(causal=False)
    with pytest.raises(
        SelectionError, match=r"^(use_causal_mask|causal) is (True|1); must be False, the causal of bundle tiny"
    ):
        call(name, other)
    for argument in set(CAUSAL) & set(inspect.signature(ADAPTERS[name].make(causal)).parameters):
        with pytest.raises(SelectionError, match=f"^{argument} is False; must be True, .*\nmodel:\n  causal: false$"):
            call(name, causal, **{argument: False})
        call(name, other, **{argument: False})
        assert len(other.calls) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_updates_the_cache_as_it_is_asked_to(name: str) -> None:
    updating, reading = FakeEngine(), engine_of(update_cache=False)
    with pytest.raises(
        SelectionError,
        match=r"^(update_kv_cache is True; must be False|skip_kv_update is False; must be True), the update_cache of bundle tiny",
    ):
        call(name, reading)
    for argument in set(UPDATE) & set(inspect.signature(ADAPTERS[name].make(updating)).parameters):
        with pytest.raises(
            SelectionError, match=f"^{argument} is False; must be True, .*\nmodel:\n  update_cache: false$"
        ):
            call(name, updating, **{argument: False})
        args = arguments(name, reading)
        call(name, reading, *args, **{argument: False})
        (taken,) = reading.calls
        assert taken[:2] == (args[0], args[3])
        assert len(taken) == 6
    assert updating.calls == []


def test_tokamaxs_skip_of_the_update_and_its_lse_are_followed() -> None:
    engine, reading = FakeEngine(), engine_of(update_cache=False)
    with pytest.raises(
        SelectionError, match=r"skip_kv_update is True; must be False, .*\nmodel:\n  update_cache: false$"
    ):
        call("tokamax", engine, skip_kv_update=True)
    call("tokamax", reading, skip_kv_update=True)
    assert len(reading.calls[0]) == 6
    with pytest.raises(SelectionError, match=r"return_lse is True; must be False: .*\nserving:\n  log_sum_exp: true$"):
        call("tokamax", engine, return_lse=True)
    with pytest.raises(SelectionError, match=r"decode_query_size is 3; must be 1, .*\nserving:\n  decode_len: 3$"):
        call("tokamax", engine, decode_query_size=3)
    assert engine.calls == []


def test_tokamax_takes_the_cache_of_its_kernel_and_of_its_reference() -> None:
    engine = FakeEngine()
    args = arguments("tokamax", engine)
    for shape in (args[3].shape, (32, 16, 4, 128)):
        args[3] = np.zeros(shape, args[3].dtype)
        assert call("tokamax", engine, *args)[1].shape == shape
    assert [taken[3].shape for taken in engine.calls] == [(32, 16, 2, 2, 128)] * 2


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_of_chunks_is_refused_for_nobody_can_ask_for_them(name: str) -> None:
    with pytest.raises(SelectionError, match=r"^bundle tiny has attention_chunk 32; must have none, "):
        ADAPTERS[name].make(engine_of(attention_chunk=32))


@pytest.mark.parametrize(("name", "argument"), of(dict.fromkeys(SINKS)))
def test_sinks_reach_a_bundle_that_takes_them(name: str, argument: str) -> None:
    sinks = np.zeros(4, np.float32)
    plain, taking = FakeEngine(), engine_of(sinks=True)
    with pytest.raises(
        SelectionError, match=rf"^{argument} is float32\[4\], and bundle tiny has no sinks; .*\nmodel:\n  sinks: true$"
    ):
        call(name, plain, **{argument: sinks})
    with pytest.raises(
        SelectionError, match=rf"^{argument} is None, and bundle tiny takes sinks; .*\nmodel:\n  sinks: false$"
    ):
        call(name, taking)
    call(name, taking, **{argument: sinks})
    jax.jit(lambda value: call(name, taking, **{argument: value})[1])(sinks)
    assert taking.extra[0]["sinks"] is sinks
    assert isinstance(taking.extra[1]["sinks"], jax.core.Tracer)


@pytest.mark.parametrize(("name", "argument"), of(dict.fromkeys(SCALES)))
def test_scales_that_a_bundle_has_none_of_are_refused_with_what_to_do(name: str, argument: str) -> None:
    plain, quantized = FakeEngine(), engine_of(kv_dtype="int8")
    instead = {"k_scale": "multiply sm_scale by it", "v_scale": "multiply the output by it"}[argument]
    with pytest.raises(
        SelectionError, match=f"^{argument} is 0.5; must be None or 1: bundle tiny has no .*; {instead}"
    ):
        call(name, plain, **{argument: 0.5})
    with pytest.raises(
        SelectionError, match=f"(?s)^{argument} is 0.5; must .*; build with\nmodel:\n  kv_scale: tensor$"
    ):
        call(name, quantized, **{argument: 0.5})
    with pytest.raises(SelectionError, match=f"^{argument} is traced; must be None or 1"):
        jax.jit(lambda scale: call(name, plain, **{argument: scale}))(1.0)


@pytest.mark.parametrize("name", NAMES)
def test_scales_reach_a_bundle_that_takes_them(name: str) -> None:
    by_tensor, by_head = (engine_of(kv_dtype="int8", kv_scale=kv_scale) for kv_scale in ("tensor", "head"))
    call(name, by_tensor, k_scale=0.5, v_scale=np.float32(2))
    call(name, by_tensor)  # none is 1, as the peers have it
    call(name, by_head, k_scale=0.5)
    call(name, by_head, v_scale=np.array([2, 3], np.float32))
    found = [extra["kv_scales"] for extra in by_tensor.extra + by_head.extra]
    assert [array.dtype for array in found] == [np.float32] * 4
    assert [array.tolist() for array in found] == [[0.5, 2], [1, 1], [[0.5, 0.5], [1, 1]], [[1, 1], [2, 3]]]
    jax.jit(lambda scale: call(name, by_tensor, k_scale=scale)[1])(0.5)
    assert isinstance(by_tensor.extra[-1]["kv_scales"], jax.core.Tracer)
    with pytest.raises(BatchError, match=r"v_scale is float32\[3\]; must be a number or float32\[2\], as bundle tiny"):
        call(name, by_head, v_scale=np.zeros(3, np.float32))


@pytest.mark.parametrize(("name", "argument"), of(NEUTRAL))
def test_what_asks_for_nothing_is_taken(name: str, argument: str) -> None:
    for value in NEUTRAL[argument]:
        engine = FakeEngine()
        call(name, engine, **{argument: value})
        assert len(engine.calls) == 1


@pytest.mark.parametrize(("name", "argument"), of(TUNING))
def test_what_tunes_the_peers_kernel_changes_nothing(name: str, argument: str) -> None:
    plain, tuned = FakeEngine(), FakeEngine()
    call(name, plain)
    call(name, tuned, **{argument: TUNING[argument]})
    for one, other in zip(plain.calls[0], tuned.calls[0], strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_the_scale_must_be_the_bundles(name: str) -> None:
    engine = FakeEngine()
    argument, built = ADAPTERS[name].scale, engine.model.sm_scale
    for same in (built, np.float32(built), jnp.float32(built)):
        call(name, engine, **{argument: same})
    assert len(engine.calls) == 3
    for other in (1.0, built * 1.001, 0.0, float("nan")):
        with pytest.raises(SelectionError, match=f"^{argument} is {other}; must be {built}.*\nmodel:\n  sm_scale: "):
            call(name, engine, **{argument: other})
    assert len(engine.calls) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_left_out_is_the_peers_default_of_1(name: str) -> None:
    engine = FakeEngine()
    with pytest.raises(SelectionError, match=f"{ADAPTERS[name].scale} is 1.0; must be {engine.model.sm_scale}"):
        ADAPTERS[name].make(engine)(*arguments(name, engine))


@pytest.mark.parametrize("name", NAMES)
def test_a_traced_scale_is_refused(name: str) -> None:
    engine = FakeEngine()
    with pytest.raises(BatchError, match="is traced; must be a number"):
        jax.jit(lambda scale: call(name, engine, **{ADAPTERS[name].scale: scale}))(0.5)


def test_ejkernel_takes_none_for_the_scale_of_head_dim() -> None:
    engine = FakeEngine()
    call("ejkernel operation", engine, softmax_scale=None)
    with pytest.raises(SelectionError, match=r"softmax_scale is 0\.0883"):
        call("ejkernel operation", engine_of(sm_scale=0.5), softmax_scale=None)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ejkernel operation"])
def test_a_prefill_chunk_must_be_the_bundles(name: str) -> None:
    engine = FakeEngine()
    call(name, engine, chunk_prefill_size=16)
    with pytest.raises(
        SelectionError, match=r"(?s)^chunk_prefill_size is 32; must be None or 16.*\n  prefill_chunk: 32$"
    ):
        call(name, engine, chunk_prefill_size=32)


def test_the_prefill_chunk_of_an_ejkernel_config_counts() -> None:
    class Config:
        chunk_prefill_size = 32

    with pytest.raises(SelectionError, match="chunk_prefill_size is 32"):
        call("ejkernel operation", FakeEngine(), cfg=Config())


@pytest.mark.parametrize("name", ["tpu_inference", "tpu_inference batched", "sglang_jax main", "tokamax"])
def test_another_dtype_of_the_output_is_refused(name: str) -> None:
    with pytest.raises(SelectionError, match="out_dtype is float32; must be None or bfloat16"):
        call(name, FakeEngine(), out_dtype=jnp.float32)


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_that_keeps_k_and_v_apart_is_refused_at_once(name: str) -> None:
    with pytest.raises(
        SelectionError, match=r"(?s)kv_layout separate; must be interleaved.*\n  kv_layout: interleaved$"
    ):
        ADAPTERS[name].make(engine_of("separate"))


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_of_latent_attention_is_not_told_to_change_its_layout(name: str) -> None:
    latent = engine_of("latent", kv_heads=1, rope_dim=64)
    with pytest.raises(
        SelectionError, match=r"^bundle tiny has latent attention; must have grouped .*; call the engine itself"
    ):
        ADAPTERS[name].make(latent)


def test_importing_the_adapters_imports_no_peer_and_the_package_alone_nothing() -> None:
    code = """
import json, sys
import rpac.adapters
early = sorted(sys.modules)
from rpac.adapters import ejkernel, sglang_jax, tokamax, tpu_inference
print(json.dumps([early, sorted(sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    early, late = json.loads(done.stdout)
    assert not {"jax", "numpy", "yaml"} & set(early)
    peers = {"tpu_inference", "sgl_jax", "ejkernel", "tokamax"}
    assert not peers & {name.split(".")[0] for name in late}
    assert not {"yaml", "jinja2", "click", "libtpu"} & set(late)
