"""A bundle in the place of tpu-inference's attention and of the shape of its KV cache, version 0.32.0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Final

import numpy as np

from rpac.adapters._arguments import Programs, spec_lines
from rpac.adapters._common import Adapter, LatentAdapter
from rpac.adapters._install import Installation, begin, engines_of, method, named, of_layers, refusing, require_page
from rpac.adapters.tpu_inference import grouped, latent
from rpac.contract.arrays import LANES, align
from rpac.contract.attention import KV_LAYOUTS
from rpac.errors import SelectionError

TESTED: Final = ("0.32.0",)
PACKAGE: Final = "tpu_inference"
HEAD_DIM_64: Final = 64  # the server runs a kernel of its own there

_KERNELS: Final = f"{PACKAGE}.kernels"
_RPA_V3: Final = f"{_KERNELS}.ragged_paged_attention.v3.kernel"
_RPA_HD64: Final = f"{_KERNELS}.ragged_paged_attention.v3.kernel_hd64"
_BATCHED: Final = f"{_KERNELS}.experimental.batched_rpa.wrapper"
_MLA: Final = f"{_KERNELS}.mla.v2.kernel"
_INTERFACE: Final = f"{PACKAGE}.layers.common.attention_interface"
_MANAGER: Final = f"{PACKAGE}.runner.kv_cache_manager"

# Methods of the server's KVCacheManager that cut pages into tokens along the second axis of the cache.
_BY_TOKEN: Final = ("get_kv_cache_for_block_ids", "transfer_kv_cache", "insert_request_with_kv_cache")


def install(engine: Any, *, validate: bool = True, any_version: bool = False) -> Installation:
    """Puts `engine` in the place of tpu-inference's attention, and its cache's shape in the place of the server's.

    `engine` is one engine, or those of `rpac.load_layers` for a model of several kinds of layers, or a list; each of one
    device. Bundles of any `kv_layout` are taken: the server makes its cache by the functions that are replaced. What an
    engine does not serve keeps the server's kernel: grouped attention replaces RPA v3, or its kernel of head_dim 64, or
    batched RPA where USE_BATCHED_RPA_KERNEL is set; latent attention replaces MLA v2.

    Call it before the server makes its model and its cache. It raises TargetError for a version that was not tested, unless
    `any_version`, and SelectionError for an engine that a server cannot use. What would run another kernel on the cache, or
    move pages that have another layout than the server's, raises SelectionError when the server does it.
    """
    engines = engines_of(engine)
    installed = begin("tpu-inference", PACKAGE, TESTED, any_version)
    try:
        _replace(installed, engines, validate)
    except BaseException:
        installed.uninstall()
        raise
    return installed.finish()


def _replace(installed: Installation, engines: Sequence[Programs], validate: bool) -> None:
    of_latent = [LatentAdapter(one, grouped.PEER, validate) for one in engines if one.model.rope_dim is not None]
    of_heads = [Adapter(one, grouped.PEER, validate, KV_LAYOUTS) for one in engines if one.model.rope_dim is None]
    narrow = [one for one in of_heads if one.engine.model.head_dim == HEAD_DIM_64]
    wide = [one for one in of_heads if one.engine.model.head_dim != HEAD_DIM_64]
    if len(of_latent) > 1:
        raise SelectionError(
            f"found {len(of_latent)} engines of latent attention, bundles {' and '.join(one.engine.name for one in of_latent)}; "
            f"must be at most one: no argument of {grouped.PEER}'s MLA v2 says which layers a call is of; install one of them"
        )

    def serve(module: str, name: str, make: Callable[[Adapter], Any], served: Sequence[Adapter]) -> None:
        installed.replace(module, name, of_layers(served, make))
        installed.replace(module, "get_kv_cache_shape", _grouped_shape(served))

    if narrow:
        serve(_RPA_HD64, "ragged_paged_attention_hd64", grouped.rpa_hd64, narrow)
    if wide:
        serve(_RPA_V3, "ragged_paged_attention", grouped.rpa_v3, wide)
        if named(f"{PACKAGE}.envs", "USE_BATCHED_RPA_KERNEL"):
            serve(_BATCHED, "ragged_paged_attention", grouped.batched_rpa, wide)
    for one in of_latent:
        installed.replace(_MLA, "mla_ragged_paged_attention", latent.mla(one))
        installed.replace(_MLA, "get_kv_cache_shape", _latent_shape(one))
    if of_heads:
        for name, axis in (("dcp_forward", "decode"), ("pcp_forward", "prefill")):
            why = "must not be used: it runs a kernel of its own, which no bundle replaces; start the server without it"
            used = f"{axis} context parallelism is used with {of_heads[0].bundle}"
            installed.replace(_INTERFACE, name, refusing(used, why))
    if engines[0].kv_layout != "interleaved":
        _refuse_moves(installed, engines[0])


def _grouped_shape(adapters: Sequence[Adapter]) -> Callable[..., tuple[int, ...]]:
    def get_kv_cache_shape(
        total_num_pages: int,
        page_size: int,
        actual_num_kv_heads: int,
        actual_head_dim: int,
        kv_dtype: Any,
        kv_layout: Any = None,
    ) -> tuple[int, ...]:
        """The bundle's cache of so many pages; `kv_layout` is batched RPA's own, and only its default is there."""
        one = require_page(
            adapters,
            kv_heads=actual_num_kv_heads,
            head_dim=actual_head_dim,
            kv_dtype=np.dtype(kv_dtype).name,
            page_size=page_size,
        )
        one.require_neutral(kv_layout=kv_layout)
        return (total_num_pages, *one.page_shape)

    return get_kv_cache_shape


def _latent_shape(adapter: LatentAdapter) -> Callable[..., tuple[int, ...]]:
    def get_kv_cache_shape(
        total_num_pages: int,
        page_size: int,
        kv_dim: int,
        kv_dtype: Any,
        kv_packing: int | None = None,
        transpose_kv_cache: bool = False,
    ) -> tuple[int, ...]:
        """The bundle's cache of so many pages; `kv_packing` and `transpose_kv_cache` choose among the server's own layouts."""
        require_page([adapter], kv_dtype=np.dtype(kv_dtype).name, page_size=page_size)
        if align(kv_dim, LANES) != adapter.page_shape[-1]:
            model = adapter.engine.model
            raise SelectionError(
                f"the cache that the server asks for has {kv_dim} numbers a token; must have {model.head_dim} + "
                f"{model.rope_dim}, as in {adapter.bundle}; build with the model's kv_lora_rank and rope_dim"
            )
        return (total_num_pages, *adapter.page_shape)

    return get_kv_cache_shape


def _refuse_moves(installed: Installation, engine: Programs) -> None:
    """Refuses what moves pages by the server's own shape: prefill on other devices, connectors, offloading."""
    fix = (
        "use" + spec_lines(serving={"kv_layout": "interleaved"})
        if engine.kv_layout == "separate"
        else "serve this model on one server"
    )
    by_token = (
        f"must not be used with kv_layout {engine.kv_layout}: it takes the second axis of the cache for tokens; {fix}"
    )
    for name in _BY_TOKEN:
        used = f"the server's {name}, which moves pages between its engines, is used"
        installed.override(_MANAGER, "KVCacheManager", name, refusing(used, by_token))

    old = method(_MANAGER, "KVCacheManager", "initialize_kv_cache")

    @wraps(old)
    def initialize_kv_cache(self: Any, *args: Any, **options: Any) -> Any:
        config = self.runner.vllm_config.kv_transfer_config
        if config is not None:
            raise SelectionError(
                f"kv_connector is {config.kv_connector}; must be none with kv_layout {engine.kv_layout}: it moves "
                f"pages, and was never tested with pages of bundle {engine.name}'s layout; start the server without "
                f"--kv-transfer-config, or {fix}"
            )
        return old(self, *args, **options)

    installed.override(_MANAGER, "KVCacheManager", "initialize_kv_cache", initialize_kv_cache)
