"""`install` puts a bundle in the place of a server's attention and of its cache's shape, and takes it away again."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from fake import FakeEngine, arguments, engine_of
from fake_server import BATCHED, INTERFACE, LAYER, MANAGER, MLA, RPA_V3, module, serving
from signatures import TPU_INFERENCE_MLA, signature

from rpac.adapters import tpu_inference
from rpac.adapters.tpu_inference import worker
from rpac.errors import BatchError, SelectionError, TargetError


def snapshot() -> dict[str, dict[str, Any]]:
    """All that the stand-ins have by name."""
    names = [name for name in sys.modules if name.startswith("tpu_inference")]
    found = {name: {key: value for key, value in vars(module(name)).items() if key[0] != "_"} for name in names}
    manager = module(MANAGER).KVCacheManager
    return {**found, "manager": {key: value for key, value in vars(manager).items() if not key.startswith("__")}}


class LatentEngine(FakeEngine):
    """Returns its queries as the output."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        super().__call__(*args, **options)
        return args[0], args[4]


def latent_engine() -> FakeEngine:
    engine = LatentEngine(kv_layout="latent")
    engine.model = dataclasses.replace(engine.model, kv_heads=1, head_dim=512, rope_dim=64)
    return engine


@pytest.fixture(autouse=True)
def cleared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often JAX's caches were cleared, which is only noted here: other tests of the process need them."""
    calls: list[str] = []
    monkeypatch.setattr(jax, "clear_caches", lambda: calls.append("cleared"))
    return calls


@pytest.fixture
def server() -> Iterator[None]:
    with serving():
        yield


@pytest.mark.parametrize("kv_layout", ["interleaved", "separate"])
def test_every_name_of_the_kernel_becomes_the_bundle_and_is_the_servers_again(server: None, kv_layout: str) -> None:
    before = snapshot()
    engine = engine_of(kv_layout)
    with tpu_inference.install(engine) as installed:
        attention = module(INTERFACE).ragged_paged_attention
        assert attention is module(LAYER).ragged_paged_attention is module(RPA_V3).ragged_paged_attention
        attention(*arguments("tpu_inference", engine), sm_scale=engine.model.sm_scale)
        assert len(engine.calls) == 1
        assert f"{INTERFACE}.ragged_paged_attention" in installed.replaced
        assert module(INTERFACE).ragged_paged_attention_hd64 is before[INTERFACE]["ragged_paged_attention_hd64"]
        assert module(INTERFACE).mla_ragged_paged_attention is before[INTERFACE]["mla_ragged_paged_attention"]
    assert snapshot() == before
    assert installed.replaced == []
    installed.uninstall()  # again
    assert snapshot() == before


@pytest.mark.parametrize(
    ("kv_layout", "page"), [("interleaved", (16, 2, 2, 128)), ("separate", (2, 2, 16, 128))], ids=str
)
def test_the_server_makes_the_bundles_cache(server: None, kv_layout: str, page: tuple[int, ...]) -> None:
    with tpu_inference.install(engine_of(kv_layout)):
        for name in (RPA_V3, INTERFACE):
            assert module(name).get_kv_cache_shape(7, 16, 2, 128, jnp.bfloat16) == (7, *page)


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ((32, 2, 128, jnp.bfloat16), "serving:\n  page_size: 32"),
        ((16, 8, 128, jnp.bfloat16), "model:\n  kv_heads: 8"),
        ((16, 2, 256, jnp.bfloat16), "model:\n  head_dim: 256"),
        ((16, 2, 128, jnp.float8_e4m3fn), "model:\n  kv_dtype: float8_e4m3fn"),
        ((32, 8, 128, jnp.bfloat16), "model:\n  kv_heads: 8\nserving:\n  page_size: 32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cache_of_other_pages_is_refused_before_it_is_made(server: None, asked: Any, line: str) -> None:
    with tpu_inference.install(engine_of()), pytest.raises(SelectionError) as raised:
        module(RPA_V3).get_kv_cache_shape(7, *asked)
    assert str(raised.value).endswith(
        ", as in bundle tiny; start the server with the bundle's sizes, or build with these lines, where a spec allows them\n"
        + line
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int32, jnp.float8_e4m3b11fnuz])
def test_a_cache_of_a_dtype_that_no_spec_has_is_refused_without_lines(server: None, dtype: Any) -> None:
    name = jnp.dtype(dtype).name
    refusal = (
        f"^kv_dtype of the server's cache is {name}, must be bfloat16, as in bundle tiny; no line of a spec adds that dtype; "
        "start the server with the bundle's dtype$"
    )
    with tpu_inference.install(engine_of()), pytest.raises(SelectionError, match=refusal):
        module(RPA_V3).get_kv_cache_shape(7, 16, 2, 128, dtype)
    with tpu_inference.install(latent_engine()), pytest.raises(SelectionError, match=refusal):
        module(MLA).get_kv_cache_shape(7, 16, 576, dtype)


def test_a_cache_of_latent_attention_has_no_8_bits_in_a_spec(server: None) -> None:
    with (
        tpu_inference.install(latent_engine()),
        pytest.raises(SelectionError, match=r"int8, .* no line of a spec adds that"),
    ):
        module(MLA).get_kv_cache_shape(7, 16, 576, jnp.int8)


@pytest.mark.parametrize(
    ("kv_layout", "page"), [("interleaved", (16, 1, 2, 128)), ("separate", (1, 2, 16, 128))], ids=str
)
def test_head_dim_64_replaces_the_kernel_that_the_server_has_for_it(
    server: None, kv_layout: str, page: tuple[int, ...]
) -> None:
    before = snapshot()
    engine = engine_of(kv_layout, head_dim=64, sinks=True)
    with tpu_inference.install(engine):
        assert module(INTERFACE).ragged_paged_attention is before[INTERFACE]["ragged_paged_attention"]
        assert module(INTERFACE).get_kv_cache_shape_hd64(3, 16, 2, 64, jnp.bfloat16) == (3, *page)
        sinks = jnp.zeros(4, jnp.float32)
        module(INTERFACE).ragged_paged_attention_hd64(
            *arguments("tpu_inference hd64", engine), sinks, sm_scale=engine.model.sm_scale
        )
        assert engine.extra[0]["sinks"] is sinks
    assert snapshot() == before


def test_batched_rpa_is_replaced_where_the_server_runs_it() -> None:
    engine = engine_of("separate")
    engine.limits = dataclasses.replace(engine.limits, decode_len=3)
    with serving(batched=True), tpu_inference.install(engine):
        attention = module(INTERFACE).ragged_paged_attention
        assert attention is module(BATCHED).ragged_paged_attention is not module(RPA_V3).ragged_paged_attention
        args = arguments("tpu_inference batched", engine, [3, 3])
        attention(*args, sm_scale=engine.model.sm_scale, decode_query_size=3)
        assert engine.calls[0][-1].tolist() == [2, 2, 2]
        with pytest.raises(SelectionError, match=r"decode_query_size is 5; must be 3, .*\nserving:\n  decode_len: 5$"):
            attention(*args, sm_scale=engine.model.sm_scale, decode_query_size=5)
        assert module(BATCHED).get_kv_cache_shape(7, 16, 2, 128, jnp.bfloat16) == (7, 2, 2, 16, 128)
        with pytest.raises(SelectionError, match=r"kv_layout is 'seq_along_lane'; must be None"):
            module(BATCHED).get_kv_cache_shape(7, 16, 2, 128, jnp.bfloat16, "seq_along_lane")


def test_a_bundle_of_latent_attention_replaces_mla_alone(server: None) -> None:
    before = snapshot()
    engine = latent_engine()
    with tpu_inference.install(engine):
        assert module(INTERFACE).ragged_paged_attention is before[INTERFACE]["ragged_paged_attention"]
        assert module(MLA).get_kv_cache_shape(5, 16, 576, jnp.bfloat16, 32) == (5, 16, 640)
        queries = jnp.zeros((4, 8, 512), jnp.bfloat16)  # heads first
        rope, new = jnp.zeros((8, 4, 64), jnp.bfloat16), jnp.zeros((8, 512), jnp.bfloat16)
        metadata = arguments("tpu_inference", engine_of())[4:]
        for cache in (jnp.zeros((32, 16, 640), jnp.bfloat16), jnp.zeros((32, 8, 2, 640), jnp.bfloat16)):
            out, after = module(INTERFACE).mla_ragged_paged_attention(
                queries, rope, new, new[:, :64], cache, *metadata, sm_scale=engine.model.sm_scale
            )
            assert out.shape == queries.shape
            assert after.shape == cache.shape
        assert [args[0].shape for args in engine.calls] == [(8, 4, 512)] * 2
        with pytest.raises(SelectionError, match="has 300 numbers a token; must have 512"):
            module(MLA).get_kv_cache_shape(5, 16, 300, jnp.bfloat16)
        with pytest.raises(SelectionError, match=r"\nserving:\n  page_size: 64$"):
            module(MLA).get_kv_cache_shape(5, 64, 576, jnp.bfloat16)
    assert snapshot() == before


def test_each_kind_of_layers_goes_to_its_own_engine(server: None) -> None:
    full, sliding = engine_of("separate"), engine_of("separate", sliding_window=64)
    for given in ({"full": full, "sliding": sliding}, [sliding, full]):
        with tpu_inference.install(given):
            attention = module(INTERFACE).ragged_paged_attention
            args, scale = arguments("tpu_inference", full), full.model.sm_scale
            attention(*args, sm_scale=scale, sliding_window=64)
            attention(*args, sm_scale=scale)
            with pytest.raises(SelectionError, match="sliding_window is 32; must be"):
                attention(*args, sm_scale=scale, sliding_window=32)
    assert [len(full.calls), len(sliding.calls)] == [2, 2]


@pytest.mark.parametrize("kinds", [1, 2])
def test_what_is_put_in_place_has_the_name_docs_and_signature_of_what_it_replaces(server: None, kinds: int) -> None:
    @jax.jit
    def ragged_paged_attention(queries: Any, *, sm_scale: float = 1.0) -> Any:
        """RPA v3."""
        return queries * sm_scale

    for name in (RPA_V3, INTERFACE, LAYER):
        module(name).ragged_paged_attention = ragged_paged_attention
    with tpu_inference.install([engine_of(), engine_of(sliding_window=64)][:kinds]):
        attention = module(LAYER).ragged_paged_attention
        assert attention is not ragged_paged_attention
        assert (attention.__name__, attention.__doc__) == ("ragged_paged_attention", "RPA v3.")
        assert signature(attention) == signature(ragged_paged_attention) == "(queries, *, sm_scale=1.0)"
        assert not hasattr(attention, "lower")  # that of the server's kernel
    assert module(LAYER).ragged_paged_attention is ragged_paged_attention


def test_what_cuts_pages_by_the_servers_shape_is_refused_unless_the_layout_is_its_own(server: None) -> None:
    manager = module(MANAGER).KVCacheManager
    moves = ("get_kv_cache_for_block_ids", "transfer_kv_cache", "insert_request_with_kv_cache")
    with tpu_inference.install(engine_of()):
        assert [getattr(manager(), name)(None) for name in moves] == ["moved"] * 3
        assert manager("TPUConnector").initialize_kv_cache(1) == "made of 1"
    for engine, fix in (
        (engine_of("separate"), "\nserving:\n  kv_layout: interleaved"),
        (latent_engine(), "one server"),
    ):
        with tpu_inference.install(engine):
            for name in moves:
                with pytest.raises(SelectionError, match=f"{name}, which moves pages .* kv_layout {engine.kv_layout}"):
                    getattr(manager(), name)(None)
            with pytest.raises(
                SelectionError, match="kv_connector is TPUConnector; must be none with kv_lay"
            ) as raised:
                manager("TPUConnector").initialize_kv_cache(1)
            assert str(raised.value).endswith(fix)
            assert manager().initialize_kv_cache(1) == "made of 1"
    assert manager("TPUConnector").transfer_kv_cache(None) == "moved"


@pytest.mark.parametrize("name", ["dcp_forward", "pcp_forward"])
def test_context_parallelism_is_refused_for_it_runs_a_kernel_of_its_own(server: None, name: str) -> None:
    with (
        tpu_inference.install(engine_of()),
        pytest.raises(SelectionError, match="context parallelism is used with bundle tiny"),
    ):
        getattr(module(INTERFACE), name)(None)


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0.dev1"])
def test_another_version_is_refused_unless_it_is_asked_for(version: str) -> None:
    with serving(version):
        with pytest.raises(TargetError, match=f"tpu-inference is {version}; must be 0.32.0, .*any_version=True"):
            tpu_inference.install(engine_of())
        with tpu_inference.install(engine_of(), any_version=True) as installed:
            assert installed.version == version


def test_a_missing_package_and_a_missing_function_are_told_apart() -> None:
    with serving(None), pytest.raises(TargetError, match=r"tpu-inference is not installed; must be 0\.32\.0"):
        tpu_inference.install(engine_of())
    with serving(without="dcp_forward"):
        before = snapshot()
        with pytest.raises(TargetError, match=f"{INTERFACE}.dcp_forward is not there; this version of the server"):
            tpu_inference.install(engine_of())
        assert snapshot() == before


def test_nothing_that_was_traced_before_is_kept_at_either_end(server: None, cleared: list[str]) -> None:
    installed = tpu_inference.install(engine_of())
    assert len(cleared) == 1
    installed.uninstall()
    assert len(cleared) == 2


def test_a_second_installation_is_refused_and_leaves_the_first(server: None) -> None:
    with tpu_inference.install(engine_of()):
        first = snapshot()
        with pytest.raises(TargetError, match=r"is rpac's already; must be the server's; uninstall the first"):
            tpu_inference.install(engine_of())
        assert snapshot() == first


def test_an_engine_that_a_server_cannot_use_is_refused(server: None) -> None:
    before = snapshot()
    several = engine_of()
    several.placement = SimpleNamespace(mesh=SimpleNamespace(devices=8))
    with pytest.raises(
        SelectionError,
        match=r"(?s)bundle tiny is for 8 devices; must be for one: .* without parallel, .*\n  kv_heads: 2\n.*num_pages: 32$",
    ):
        tpu_inference.install(several)
    with pytest.raises(SelectionError, match="bundle tiny has attention_chunk 32; must have none"):
        tpu_inference.install(engine_of(attention_chunk=32))
    with pytest.raises(
        SelectionError, match="the engines have kv_layout interleaved and separate; must all have the same"
    ):
        tpu_inference.install([engine_of(), engine_of("separate")])
    with pytest.raises(
        SelectionError,
        match=r"^found 2 engines of latent attention, bundles tiny and tiny; must be at most one: .*; install one",
    ):
        tpu_inference.install([latent_engine(), latent_engine()])
    for none in ([], {}, ()):
        with pytest.raises(SelectionError, match=r"^found no engine; must be at least one; give one of `rpac\.load`"):
            tpu_inference.install(none)
    assert snapshot() == before


def test_a_cache_that_was_made_before_is_refused_by_its_shape(server: None) -> None:
    engine = engine_of("separate")
    with tpu_inference.install(engine):
        args = arguments("tpu_inference", engine_of("interleaved"))
        with pytest.raises(
            BatchError, match=r"kv_cache is bfloat16\[32, 16, 2, 2, 128\]; must have pages of \[2, 2, 16, 128\]"
        ):
            module(INTERFACE).ragged_paged_attention(*args, sm_scale=engine.model.sm_scale)


def test_the_function_for_latent_attention_has_the_peers_signature_and_refuses_what_no_program_does() -> None:
    engine = latent_engine()
    attention = tpu_inference.mla_ragged_paged_attention(engine)
    assert signature(attention) == TPU_INFERENCE_MLA
    zeros = [jnp.zeros(shape, jnp.bfloat16) for shape in ((4, 8, 512), (8, 4, 64), (8, 512), (8, 64), (32, 16, 640))]
    args, scale = [*zeros, *arguments("tpu_inference", engine_of())[4:]], engine.model.sm_scale
    for options, words in (
        ({"sm_scale": 1.0}, "sm_scale is 1.0; must be"),
        ({"transpose_kv_cache": True}, "transpose_kv_cache is True; must be False: programs keep the tokens"),
        ({"k_scale": 0.5}, "k_scale is 0.5; must be None or 1"),
        ({"q_scale": 0.5}, "q_scale is 0.5; must be None"),
        ({"sliding_window": 64}, "sliding_window is 64; must be None"),
    ):
        with pytest.raises(SelectionError, match=f"^{words}"):
            attention(*args, **{"sm_scale": scale, **options})
    for at, wrong, line in (
        (0, jnp.zeros((8, 8, 512), jnp.bfloat16), "q_heads: 8"),
        (0, jnp.zeros((4, 8, 256), jnp.bfloat16), "kv_lora_rank: 256"),
        (1, jnp.zeros((8, 4, 128), jnp.bfloat16), "rope_dim: 128"),
    ):
        given = [*args[:at], wrong, *args[at + 1 :]]
        with pytest.raises(SelectionError, match=f"\nmodel:\n  {line}$"):
            attention(*given, sm_scale=scale)
    assert engine.calls == []
    with pytest.raises(
        SelectionError, match=r"(?s)has grouped attention; must have latent attention, .*\n  attention: latent$"
    ):
        tpu_inference.mla_ragged_paged_attention(engine_of())


def worker_of(config: Any) -> Any:
    """A worker with rpac's extension among its bases, where vLLM puts it."""

    class Worker(worker.WorkerExtension):
        vllm_config = SimpleNamespace(additional_config=config)

    return Worker()


def test_a_worker_of_vllm_installs_the_bundle_that_its_config_names(
    server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, sliding = engine_of("separate"), engine_of("separate", sliding_window=64)
    loaded: list[Any] = []

    def load_layers(path: str, **options: Any) -> dict[str, FakeEngine]:
        loaded.append((path, options))
        return {"full": full, "sliding": sliding}

    monkeypatch.setattr(worker, "load_layers", load_layers)
    config = {"rpac_bundle": "build/tiny.rpac", "rpac_allow_compile": True, "other": 1}
    one = worker_of(config)
    worker.WorkerExtension.init_worker_extension(one)  # as vLLM calls it
    assert loaded == [("build/tiny.rpac", {"allow_compile": True})]
    module(INTERFACE).ragged_paged_attention(
        *arguments("tpu_inference", full), sm_scale=full.model.sm_scale, sliding_window=64
    )
    assert len(sliding.calls) == 1
    one.rpac_installation.uninstall()
    one.init_worker_extension()  # as a method
    one.rpac_installation.uninstall()
    assert len(loaded) == 2
    for missing in ({}, None, {"rpac_bundle": ""}):
        one.vllm_config.additional_config = missing
        with pytest.raises(TargetError, match="additional_config has no rpac_bundle; must name a bundle; start vLLM"):
            one.init_worker_extension()


def test_an_extension_adds_nothing_else_to_a_worker_of_vllm() -> None:
    """vLLM refuses an extension that has an attribute of its worker class."""
    assert [name for name in vars(worker.WorkerExtension) if name[0] != "_"] == ["init_worker_extension"]
