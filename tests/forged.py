"""Programs that no build of rpac makes, of the same signature as the program that they are made from."""

from __future__ import annotations

import platform
import struct
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export, lax

TRAPS = {"x86_64": b"\xcc", "aarch64": b"\x00\x00\x20\xd4"}
"""The instruction that ends a process with SIGTRAP, by machine."""

_CODE = 4  # the flag of a section of an object file that holds instructions


def exported(like: bytes, attention: Callable[..., Any]) -> bytes:
    """An export of `attention`, with the signature of the export `like`."""
    avals = export.deserialize(bytearray(like)).in_avals
    jitted = jax.jit(attention, donate_argnums=3, keep_unused=True)
    return bytes(export.export(jitted, platforms=["cpu"])(*avals).serialize())


def endless(like: bytes) -> bytes:
    """An export that never returns."""

    def attention(queries: Any, keys: Any, values: Any, kv_cache: Any, kv_lens: Any, *metadata: Any) -> Any:
        count = lax.while_loop(lambda n: n >= 0, lambda n: n ^ 1, kv_lens[0] * 0)
        return queries + count.astype(queries.dtype), kv_cache

    return exported(like, attention)


def calling(like: bytes) -> bytes:
    """An export that calls a function of the process: LAPACK's, as JAX registers it."""

    def attention(queries: Any, keys: Any, values: Any, kv_cache: Any, *metadata: Any) -> Any:
        factor = jnp.linalg.cholesky(jnp.eye(2, dtype=jnp.float32))
        return queries * factor[0, 0].astype(queries.dtype), kv_cache

    return exported(like, attention)


def zeroing(like: bytes, length: int) -> bytes:
    """The export `like`, which also zeroes the whole cache where a sequence has this length."""
    sound = export.deserialize(bytearray(like)).call

    def attention(queries: Any, keys: Any, values: Any, kv_cache: Any, kv_lens: Any, *metadata: Any) -> Any:
        out, after = sound(queries, keys, values, kv_cache, kv_lens, *metadata)
        return out, jnp.where(jnp.any(kv_lens == length), jnp.zeros_like(after), after)

    return exported(like, attention)


def trapping(executable: bytes) -> bytes:
    """An executable of the CPU with traps in place of all of its machine code."""
    data, start = bytearray(executable), executable.index(b"\x7fELF")
    (offset,) = struct.unpack_from("<Q", data, start + 0x28)
    size, count = struct.unpack_from("<HH", data, start + 0x3A)
    instruction = TRAPS[platform.machine()]
    for section in range(count):
        header = start + offset + section * size
        (flags,) = struct.unpack_from("<Q", data, header + 8)
        at, length = struct.unpack_from("<QQ", data, header + 24)
        if flags & _CODE:
            data[start + at : start + at + length] = (instruction * length)[:length]
    return bytes(data)
