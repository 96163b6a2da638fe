"""`sglang_jax.install` puts a bundle in the place of SGLang-JAX's kernel, on a pool of pages that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake import arguments, engine_of
from fake_server import SGLANG_BACKEND, SGLANG_KERNEL, SGLANG_POOL, module, serving_sglang

from rpac.adapters import sglang_jax
from rpac.errors import BatchError, SelectionError, TargetError

BY_TOKEN = (
    "clear_cache", "get_cpu_copy", "get_kv_buffer", "get_kv_data", "load_cpu_copy", "move_kv_cache", "set_kv_buffer",
    "set_kv_buffer_legacy",
)  # fmt: skip


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests of the process need them
    with serving_sglang():
        yield


@pytest.mark.parametrize(("kv_layout", "page"), [("interleaved", (16, 2, 2, 128)), ("separate", (2, 2, 16, 128))])
def test_the_backend_runs_the_bundle_on_the_servers_pool(kv_layout: str, page: tuple[int, ...]) -> None:
    engine = engine_of(kv_layout)
    theirs = module(SGLANG_BACKEND).ragged_paged_attention
    args = arguments("sglang_jax", engine_of())
    with sglang_jax.install(engine) as installed:
        assert installed.replaced[0] == f"{SGLANG_KERNEL}.ragged_paged_attention"
        ours = module(SGLANG_BACKEND).ragged_paged_attention
        assert ours is module(SGLANG_KERNEL).ragged_paged_attention
        _, pool = ours(*args, sm_scale=engine.model.sm_scale)
        assert engine.calls[0][3].shape == (32, *page)
        assert pool.shape == (32 * 16, 4, 128)
    assert module(SGLANG_BACKEND).ragged_paged_attention is theirs


def test_pages_of_the_pool_are_the_same_bytes_on_the_axes_of_the_bundle() -> None:
    engine = engine_of("separate")
    args = arguments("sglang_jax", engine_of())
    cache = np.arange(args[3].size, dtype=np.int32).reshape(args[3].shape)
    args[3] = cache.astype(jnp.bfloat16)
    with sglang_jax.install(engine):
        _, pool = module(SGLANG_BACKEND).ragged_paged_attention(*args, sm_scale=engine.model.sm_scale)
    assert np.asarray(pool).tobytes() == args[3].tobytes()


def test_what_takes_single_tokens_out_of_the_pool_is_refused_unless_the_layout_is_its_own() -> None:
    pool = module(SGLANG_POOL).MHATokenToKVPool()
    with sglang_jax.install(engine_of()):
        assert {getattr(pool, name)(None) for name in BY_TOKEN} == {"tokens"}
    with sglang_jax.install(engine_of("separate")):
        for name in BY_TOKEN:
            with pytest.raises(
                SelectionError, match=rf"(?s)MHATokenToKVPool\.{name} is called .*\n  kv_layout: interl"
            ):
                getattr(pool, name)(None)
        assert pool.get_fused_kv_buffer(0) == "pages"
    assert {getattr(pool, name)(None) for name in BY_TOKEN} == {"tokens"}


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((32, 32, 4, 128), r"page_size of kv_cache_fused is 32, must be 16, .*\nserving:\n  page_size: 32$"),
        ((32, 16, 8, 128), r"kv_cache_fused is bfloat16\[32, 16, 8, 128\]; must end in \[4, 128\]"),
        ((99, 16, 4, 128), r"num_pages of kv_cache is 99, must be 32, .*\nserving:\n  num_pages: 99$"),
    ],
)
def test_a_pool_of_other_sizes_is_refused(shape: tuple[int, ...], words: str) -> None:
    engine = engine_of("separate")
    args = arguments("sglang_jax", engine_of())
    args[3] = np.zeros(shape, jnp.bfloat16)
    with sglang_jax.install(engine), pytest.raises((SelectionError, BatchError), match=f"(?s){words}"):
        module(SGLANG_BACKEND).ragged_paged_attention(*args, sm_scale=engine.model.sm_scale)


def test_an_engine_that_the_server_cannot_use_is_refused() -> None:
    with pytest.raises(SelectionError, match="found 2 engines; must be one: sglang-jax"):
        sglang_jax.install([engine_of(), engine_of(sliding_window=64)])
    with pytest.raises(SelectionError, match="found no engine; must be at least one"):
        sglang_jax.install([])
    with pytest.raises(SelectionError, match="bundle tiny has head_dim 64, K and V of a token in one row of lanes"):
        sglang_jax.install(engine_of("separate", head_dim=64))
    with pytest.raises(SelectionError, match="bundle tiny has latent attention; must have grouped"):
        sglang_jax.install(engine_of("latent", kv_heads=1, head_dim=512, rope_dim=64))


def test_another_version_is_refused() -> None:
    with (
        serving_sglang("0.0.3"),
        pytest.raises(TargetError, match=r"sglang-jax is 0\.0\.3; must be 0\.0\.2, .*any_version"),
    ):
        sglang_jax.install(engine_of())
