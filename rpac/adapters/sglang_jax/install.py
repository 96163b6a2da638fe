"""A bundle in the place of SGLang-JAX's attention, version 0.0.2, and what its pool of pages may no longer do.

The pool keeps `[tokens, 2 * kv_heads, head_dim]`, the second axis cut over the devices. A page of one device is then a row of
bytes, in which the bundle's layout has its own axes: nothing about the pool has to change, but what reads K and V out of it.
"""

from __future__ import annotations

from typing import Any, Final

from rpac.adapters._arguments import spec_lines
from rpac.adapters._common import Adapter
from rpac.adapters._install import Installation, begin, engines_of, refusing
from rpac.adapters.sglang_jax.grouped import PEER, fused
from rpac.contract.arrays import joins_rows
from rpac.contract.attention import KV_LAYOUTS
from rpac.errors import SelectionError

TESTED: Final = ("0.0.2",)
PACKAGE: Final = "sgl_jax"

_KERNEL: Final = f"{PACKAGE}.srt.layers.attention.flash_attn_kernel.flash_attention"
_POOL: Final = f"{PACKAGE}.srt.mem_cache.memory_pool"

# Methods of the server's pool that take its rows for tokens, with K and V of each head side by side.
_BY_TOKEN: Final = (
    "clear_cache",
    "get_cpu_copy",
    "get_kv_buffer",
    "get_kv_data",
    "load_cpu_copy",
    "move_kv_cache",
    "set_kv_buffer",
    "set_kv_buffer_legacy",
)


def install(engine: Any, *, validate: bool = True, any_version: bool = False) -> Installation:
    """Puts `engine`, of one device, in the place of SGLang-JAX's attention with its backend `fa`.

    A bundle of any `kv_layout` is taken: the bytes of a page are the same. With `separate`, what reads or writes single
    tokens of the pool raises SelectionError when the server does it: the backend `native`, copies of the cache to the host.
    Call it before the server makes its model. It raises TargetError for a version that was not tested, unless
    `any_version`, and SelectionError for an engine that the server cannot use.
    """
    engines = engines_of(engine)
    if len(engines) > 1:
        raise SelectionError(
            f"found {len(engines)} engines; must be one: {PEER} {' or '.join(TESTED)} asks for no window, so it serves models of "
            "one kind of layers"
        )
    (one,) = engines
    if one.model.rope_dim is None and joins_rows(one.model):
        raise SelectionError(
            f"bundle {one.name} has head_dim {one.model.head_dim}, K and V of a token in one row of lanes; must be 128 or "
            f"more: the pool of {PEER} has them in two rows, and its own kernel takes no such heads either; use the server's "
            "backend native for this model"
        )
    function = fused(Adapter(one, PEER, validate, KV_LAYOUTS))
    installed = begin("sglang-jax", PACKAGE, TESTED, any_version)
    try:
        installed.replace(_KERNEL, "ragged_paged_attention", function)
        if one.kv_layout != "interleaved":
            why = (
                f"must not be with kv_layout {one.kv_layout}: it takes single tokens out of pages of the server's layout; run "
                "the backend fa and keep the cache on the device, or build with"
                + spec_lines(serving={"kv_layout": "interleaved"})
            )
            for name in _BY_TOKEN:
                used = f"the server's MHATokenToKVPool.{name} is called with bundle {one.name}"
                installed.override(_POOL, "MHATokenToKVPool", name, refusing(used, why))
    except BaseException:
        installed.uninstall()
        raise
    return installed.finish()
