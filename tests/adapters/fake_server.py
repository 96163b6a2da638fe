"""Stand-ins for the modules of servers that `install` changes: the names, and who imports what from whom."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = "tpu_inference"
KERNELS = f"{ROOT}.kernels"
INTERFACE = f"{ROOT}.layers.common.attention_interface"
LAYER = f"{ROOT}.layers.jax.attention.attention"
MANAGER = f"{ROOT}.runner.kv_cache_manager"
RPA_V3 = f"{KERNELS}.ragged_paged_attention.v3.kernel"
RPA_HD64 = f"{KERNELS}.ragged_paged_attention.v3.kernel_hd64"
BATCHED = f"{KERNELS}.experimental.batched_rpa.wrapper"
MLA = f"{KERNELS}.mla.v2.kernel"

SGLANG = "sgl_jax.srt"
SGLANG_KERNEL = f"{SGLANG}.layers.attention.flash_attn_kernel.flash_attention"
SGLANG_BACKEND = f"{SGLANG}.layers.attention.flashattention_backend"
SGLANG_POOL = f"{SGLANG}.mem_cache.memory_pool"


class KVCacheManager:
    """What the server does with its cache: notes it."""

    def __init__(self, connector: str | None = None) -> None:
        config = None if connector is None else SimpleNamespace(kv_connector=connector)
        self.runner = SimpleNamespace(vllm_config=SimpleNamespace(kv_transfer_config=config))

    def initialize_kv_cache(self, config: Any) -> str:
        return f"made of {config}"

    def get_kv_cache_for_block_ids(self, block_ids: Any) -> str:
        return "moved"

    def transfer_kv_cache(self, slices: Any) -> str:
        return "moved"

    def insert_request_with_kv_cache(self, *args: Any) -> str:
        return "moved"


def _function(name: str) -> Any:
    def function(*args: Any, **options: Any) -> str:
        return name

    return function


def _tpu_inference(batched: bool) -> dict[str, dict[str, Any]]:
    kernels = {
        RPA_V3: ("ragged_paged_attention", "get_kv_cache_shape"),
        RPA_HD64: ("ragged_paged_attention_hd64", "get_kv_cache_shape"),
        BATCHED: ("ragged_paged_attention", "get_kv_cache_shape"),
        MLA: ("mla_ragged_paged_attention", "get_kv_cache_shape"),
    }
    modules: dict[str, dict[str, Any]] = {
        module: {name: _function(f"{module}.{name}") for name in names} for module, names in kernels.items()
    }
    rpa, hd64 = modules[BATCHED if batched else RPA_V3], modules[RPA_HD64]
    modules[INTERFACE] = {
        **rpa,
        "ragged_paged_attention_hd64": hd64["ragged_paged_attention_hd64"],
        "get_kv_cache_shape_hd64": hd64["get_kv_cache_shape"],
        "mla_ragged_paged_attention": modules[MLA]["mla_ragged_paged_attention"],
        "dcp_forward": _function("dcp"),
        "pcp_forward": _function("pcp"),
    }
    modules[LAYER] = {"ragged_paged_attention": modules[RPA_V3]["ragged_paged_attention"]}
    modules[MANAGER] = {"KVCacheManager": type("KVCacheManager", (), dict(vars(KVCacheManager)))}
    modules[f"{ROOT}.envs"] = {"USE_BATCHED_RPA_KERNEL": batched}
    return modules


class MHATokenToKVPool:
    """SGLang-JAX's pool of pages."""

    def get_fused_kv_buffer(self, layer: int) -> str:
        return "pages"

    def _by_token(self, *args: Any) -> str:
        return "tokens"

    clear_cache = get_cpu_copy = get_kv_buffer = get_kv_data = load_cpu_copy = _by_token
    move_kv_cache = set_kv_buffer = set_kv_buffer_legacy = _by_token


def _sglang_jax() -> dict[str, dict[str, Any]]:
    kernel = {"ragged_paged_attention": _function("fused")}
    return {
        SGLANG_KERNEL: kernel,
        SGLANG_BACKEND: dict(kernel),
        SGLANG_POOL: {"MHATokenToKVPool": type("MHATokenToKVPool", (), dict(vars(MHATokenToKVPool)))},
    }


def module(name: str) -> Any:
    """One of the stand-ins, while they are importable."""
    return sys.modules[name]


@contextmanager
def serving(version: str | None = "0.32.0", batched: bool = False, without: str = "") -> Iterator[None]:
    """tpu-inference's stand-ins importable, as of a version of the package; `without` is a name that none of them has."""
    with _importable("tpu-inference", version, _tpu_inference(batched), without):
        yield


@contextmanager
def serving_sglang(version: str = "0.0.2") -> Iterator[None]:
    """SGLang-JAX's stand-ins importable."""
    with _importable("sglang-jax", version, _sglang_jax()):
        yield


@contextmanager
def _importable(
    distribution: str, version: str | None, modules: dict[str, dict[str, Any]], without: str = ""
) -> Iterator[None]:
    made: dict[str, ModuleType] = {}
    for path, names in modules.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            whole = ".".join(parts[:end])
            if whole not in made:
                made[whole] = ModuleType(whole)
                made[whole].__path__ = []  # type: ignore[attr-defined]
                if end > 1:
                    setattr(made[".".join(parts[: end - 1])], parts[end - 1], made[whole])
        vars(made[path]).update({name: value for name, value in names.items() if name != without})
    real = importlib.metadata.version

    def installed(asked: str) -> str:
        if asked != distribution:
            return real(asked)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(asked)
        return version

    sys.modules.update(made)
    importlib.metadata.version = installed
    try:
        yield
    finally:
        importlib.metadata.version = real
        for name in made:
            sys.modules.pop(name, None)
