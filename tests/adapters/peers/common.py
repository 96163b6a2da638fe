"""What the checks in the peers' environments share: batches, an engine that counts, and comparison.

Run by tests/adapters/test_real_packages.py as `check_NAME.py BUNDLE SEED`, with rpac on PYTHONPATH. Each line printed is
a claim that held; a claim that does not ends the process.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from signatures import signature

import rpac
from rpac.contract.program import Variant

# One last place of bfloat16, to which both round their outputs, and what a peer's bfloat16 weights of the softmax add.
RELATIVE, ABSOLUTE = 2**-7, 1e-2

# New tokens and context of each sequence: every program of tiny, lengths around pages (16) and the prefill chunk (16).
SHAPES = [
    ([1], [0]),
    ([1, 1, 1, 1], [0, 15, 16, 200]),
    ([16, 16], [0, 33]),
    ([5], [0]),
    ([1, 7], [40, 9]),
    ([1, 1, 16, 3], [31, 5, 16, 100]),
    ([31], [481]),
]


class TracedEngine:
    """A loaded engine that counts the calls which are traced."""

    def __init__(self, path: str) -> None:
        self.engine = rpac.load(path, target="cpu")
        self.traces = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.engine(*args, **options)

    def traced(self, *args: Any, **extra: Any) -> Any:
        self.traces += 1
        return self.engine.traced(*args, **extra)


@dataclass(frozen=True)
class Call:
    """Random arrays for one batch, on the contract's shapes."""

    batch: rpac.Batch
    queries: Any
    keys: Any
    values: Any
    kv_cache: Any

    @property
    def arrays(self) -> list[Any]:
        """Fresh ones, because a call donates."""
        return [jnp.array(array) for array in (self.queries, self.keys, self.values, self.kv_cache)]

    @property
    def metadata(self) -> list[Any]:
        batch = self.batch
        return [jnp.array(a) for a in (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)]

    @property
    def as_mixed(self) -> list[Any]:
        """The metadata with prefill rows among the mixed, as servers that leave their length open have it."""
        *rest, (i, _, k) = self.metadata
        return [*rest, jnp.array([i, i, k], jnp.int32)]


def calls(engine: Any, seed: int) -> Iterator[Call]:
    """A call for each of SHAPES, with pages in random order."""
    rng = np.random.default_rng(seed)
    limits = engine.limits
    for q_lens, contexts in SHAPES:
        pages = iter(rng.permutation(limits.num_pages).tolist())
        tables = [[next(pages) for _ in range(limits.pages_per_seq)] for _ in q_lens]
        batch = rpac.Batch.build(limits, q_lens, contexts, tables)
        args = engine.programs[Variant("mixed", batch.tokens)].args[:4]
        yield Call(batch, *(jnp.asarray(rng.standard_normal(dims.shape), dims.dtype) for dims in args))


def claim(what: str, holds: bool, why: object = "") -> None:
    if not holds:
        raise SystemExit(f"FAILED: {what}: {why}")
    print(what, flush=True)


def require_signature(name: str, stored: str, real: Any, adapter: Any) -> None:
    claim(f"{name}: the stored signature is the package's", signature(real) == stored, signature(real))
    claim(f"{name}: the adapter has it", signature(adapter) == stored, signature(adapter))


def require_equal(what: str, call: Call, got: Any, wanted: Any) -> None:
    """Outputs of live rows within the tolerance, caches equal to the bit."""
    live = call.batch.num_tokens
    out, expected = (np.asarray(array[:live], np.float32) for array in (got[0], wanted[0]))
    error = np.abs(out - expected)
    close = out.shape == expected.shape and bool((error <= ABSOLUTE + RELATIVE * np.abs(expected)).all())
    where = f"{what}, q_lens {[row.q_len for row in call.batch]}"
    claim(f"{where}: outputs within {error.max():.4f}", close)
    same = np.array_equal(np.asarray(got[1], np.float32), np.asarray(wanted[1], np.float32))
    claim(f"{where}: caches equal", same and got[1].shape == wanted[1].shape)


class _Mocked(type):
    """The class of what an absent package has by a name of a class: one that the peer can derive from, with any attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def _mocked(name: str) -> Any:
    if not name[0].isupper():
        return MagicMock()
    return _Mocked(name, (), {"__init__": lambda self, *args, **options: None})


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets packages that a peer's server imports, and this check does not use, be imported as mocks."""

    def __init__(self, *names: str) -> None:
        self.names = names
        sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self.names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = _mocked
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass
