"""What the adapters share: a peer's arguments held against what the bundle has, and the call on the host or in a trace."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rpac.batch import Limits
from rpac.bundle.manifest import ARGS
from rpac.contract import arrays as layout
from rpac.contract.attention import Attention
from rpac.errors import BatchError, SelectionError

Result = tuple[jax.Array, ...]

AXES = (3, 3, 3, 5, 1, 1, 1, 1)  # of each of ARGS

PREFILL_AS_MIXED = np.array([0, 0, 2])  # (i, j, k) becomes (i, i, k)

# What SGLang-JAX and ejkernel give masked scores by default; it weighs 0 in a softmax, as any value of its size does.
DEFAULT_MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)


class Programs(Protocol):
    """What an adapter needs of an engine; `rpac.Engine` is one."""

    name: str
    model: Attention
    kv_layout: str
    limits: Limits

    def __call__(self, *args: Any, **options: Any) -> Result: ...

    def traced(self, *args: Any, **options: Any) -> Result: ...


class Feature(NamedTuple):
    """An argument that no program follows: the values that ask for nothing, and what programs do."""

    neutral: tuple[Any, ...]
    programs: str


_SCALED = Feature((None,), "programs take keys, values and queries as they are, not quantized")
_MASK = "programs mask by position alone"

FEATURES = {
    "custom_mask": Feature((None,), _MASK),
    "debug_mode": Feature((False,), "programs attend; they print nothing"),
    "k_scale": _SCALED,
    "mask_aligned_to_cu_kv": Feature((False,), _MASK),
    "mask_value": Feature((None, DEFAULT_MASK_VALUE), "what programs mask weighs exactly 0"),
    "q_scale": _SCALED,
    "skip_kv_mask": Feature((False,), "programs mask what lies past the end of a sequence"),
    "softmax_dtype": Feature((None,), "programs compute softmax in float32"),
    "v_scale": _SCALED,
    "xai_temperature_len": Feature((None,), "programs do not scale scores by position"),
}


# Arguments that must be what the bundle has built in: the key of a spec's model that each is.
BUILT_IN = {
    "causal": "causal",
    "logits_soft_cap": "soft_cap",
    "sliding_window": "sliding_window",
    "soft_cap": "soft_cap",
    "update_kv_cache": "update_cache",
    "use_causal_mask": "causal",
}


class Size(NamedTuple):
    """A size or dtype of a call beside the bundle's, and the line of a spec that says it."""

    array: str
    section: str
    key: str
    found: Any
    built: Any


@dataclass(frozen=True)
class Adapter:
    """One engine behind a function of `peer`. Raises SelectionError at once where its cache is not the peer's.

    `validate=False` leaves out the check of the metadata's values on the host, as `rpac.Engine` does.
    """

    engine: Programs
    peer: str
    validate: bool = True

    def __post_init__(self) -> None:
        if self.engine.kv_layout != "interleaved":
            raise SelectionError(
                f"{self._bundle} has kv_layout {self.engine.kv_layout}; must be interleaved, as {self.peer} keeps "
                "K and V in its cache; build with\nserving:\n  kv_layout: interleaved"
            )
        if self.engine.limits.decode_len > 1:
            raise SelectionError(
                f"{self._bundle} has decode_len {self.engine.limits.decode_len}; must be 1, the new tokens of a decode row "
                f"of {self.peer}; build with\nserving:\n  decode_len: 1"
            )
        if self.engine.model.attention_chunk is not None:
            raise SelectionError(
                f"{self._bundle} has attention_chunk {self.engine.model.attention_chunk}; must have none, for {self.peer} has no "
                "argument that asks for it; build without model.attention_chunk"
            )

    def require_neutral(self, **given: Any) -> None:
        """Raises SelectionError for the first argument that asks for what no program does."""
        for name, value in given.items():
            neutral, programs = FEATURES[name]
            if not any(_same(value, one) for one in neutral):
                raise SelectionError(
                    f"{name} is {_shown(value)}; must be {' or '.join(map(str, neutral))}: {programs}; no line of a "
                    f"spec adds it: run the layers that need it on the kernel of {self.peer}"
                )

    def require_built(self, **given: Any) -> None:
        """Raises for the first argument of `BUILT_IN` that is not the bundle's."""
        for name, value in given.items():
            key = BUILT_IN[name]
            built = getattr(self.engine.model, key)
            if isinstance(value, jax.core.Tracer):
                raise BatchError(f"{name} is traced; must be {built}: {self._bundle} has it built in; pass a number")
            if (value is None) != (built is None) or (value is not None and float(value) != built):
                line = str(bool(value)).lower() if isinstance(built, bool) else value
                build = f"with this, where a spec allows it\nmodel:\n  {key}: {line}"
                if value is None:
                    build = f"without model.{key}"
                raise SelectionError(
                    f"{name} is {value}; must be {built}, the {key} of {self._bundle}; pass that, or build {build}"
                )

    def sinks(self, name: str, value: Any) -> dict[str, Any]:
        """The engine's argument for a peer's sinks. Raises SelectionError where one of the two has them alone."""
        if (value is not None) != self.engine.model.sinks:
            has, line = ("has no sinks", "true") if value is not None else ("takes sinks", "false")
            raise SelectionError(
                f"{name} is {_shown(value)}, and {self._bundle} {has}; pass what it takes, or build with\nmodel:\n"
                f"  sinks: {line}"
            )
        return {} if value is None else {"sinks": value}

    def require_scale(self, name: str, value: Any) -> None:
        """Raises unless the scale of the scores is the bundle's, to the precision of float32."""
        built = self.engine.model.sm_scale
        if isinstance(value, jax.core.Tracer):
            raise BatchError(f"{name} is traced; must be a number: {self._bundle} has {built} built in; pass a float")
        if not math.isclose(float(value), built, rel_tol=1e-6):
            raise SelectionError(
                f"{name} is {float(value)}; must be {built}, the sm_scale of {self._bundle}; pass that, or build with\n"
                f"model:\n  sm_scale: {float(value)}"
            )

    def require_out_dtype(self, out_dtype: Any) -> None:
        """Raises unless the output's dtype is left open or the queries'."""
        built = self.engine.model.q_dtype
        if out_dtype is not None and np.dtype(out_dtype).name != built:
            raise SelectionError(
                f"out_dtype is {np.dtype(out_dtype).name}; must be None or {built}: programs accumulate in float32 and "
                "return the dtype of queries; no line of a spec adds another; convert the output"
            )

    def run(self, *args: Any, chunk_prefill_size: int | None = None, **extra: Any) -> Result:
        """The call on the contract's arguments: `engine.traced` where one is a tracer, else `engine` itself.

        There may be fewer rows than max_num_seqs. Without `chunk_prefill_size`, rows [i, j) may have any length: they
        run as mixed rows. `extra` are the engine's arguments by name.
        """
        require_axes(ARGS, args, AXES)
        queries, keys, _, kv_cache, kv_lens, page_indices, cu_q_lens, distribution = args
        sizes = self.array_sizes(queries, keys, kv_cache), self._row_sizes(kv_cache, kv_lens, page_indices)
        self.require_sizes(itertools.chain(*sizes))
        self._require_chunk(chunk_prefill_size)
        rows = len(kv_lens)
        for name, array, size in (("cu_q_lens", cu_q_lens, rows + 1), ("distribution", distribution, 3)):
            if len(array) != size:
                raise BatchError(f"{name} is {_shown(array)}; must be int32[{size}]; see docs/batch-contract.md")
        arrays = args[:4] if self.engine.model.update_cache else (queries, kv_cache)
        in_trace = traced((*args, *extra.values()))
        xp: Any = jnp if in_trace else np
        metadata = [xp.asarray(array) for array in args[4:]]
        if rows < self.engine.limits.max_num_seqs:
            metadata = self._with_dead_rows(xp, rows, *metadata)
        if chunk_prefill_size is None:
            metadata[-1] = metadata[-1][PREFILL_AS_MIXED]
        if in_trace:
            return self.engine.traced(*arrays, *metadata, **extra)
        return self.engine(*arrays, *metadata, validate=self.validate, **extra)

    def array_sizes(self, queries: Any, keys: Any, kv_cache: Any) -> Iterator[Size]:
        """What the arrays that hold tokens and pages say about the spec."""
        model, limits = self.engine.model, self.engine.limits
        yield Size("queries", "model", "q_heads", queries.shape[1], model.q_heads)
        yield Size("keys", "model", "kv_heads", keys.shape[1], model.kv_heads)
        yield Size("queries", "model", "head_dim", queries.shape[2], model.head_dim)
        yield Size("queries", "model", "q_dtype", np.dtype(queries.dtype).name, model.q_dtype)
        yield Size("kv_cache", "model", "kv_dtype", np.dtype(kv_cache.dtype).name, model.kv_dtype)
        yield Size("kv_cache", "serving", "page_size", kv_cache.shape[1], limits.page_size)
        yield Size("kv_cache", "serving", "num_pages", kv_cache.shape[0], limits.num_pages)

    def rows_size(self, rows: int) -> Size:
        """What the number of rows says about the spec: a batch may have fewer than it."""
        most = self.engine.limits.max_num_seqs
        return Size("kv_lens", "serving", "max_num_seqs", max(rows, most), most)

    def require_sizes(self, sizes: Iterable[Size]) -> None:
        """Raises SelectionError naming those that are not the bundle's, with the lines of a spec that build for them."""
        wrong = [one for one in sizes if one.found != one.built]
        if not wrong:
            return
        found = "; ".join(f"{one.key} of {one.array} is {one.found}, must be {one.built}" for one in wrong)
        if any(one.key.endswith("dtype") and one.found not in layout.BITS for one in wrong):
            raise SelectionError(
                f"{found}, as in {self._bundle}; no line of a spec adds that dtype; convert the arrays"
            )
        lines = []
        for section in dict.fromkeys(one.section for one in wrong):
            lines += [f"{section}:", *(f"  {one.key}: {one.found}" for one in wrong if one.section == section)]
        raise SelectionError(
            f"{found}, as in {self._bundle}; pass arrays of its sizes, or build with these lines, where a spec allows "
            "them\n" + "\n".join(lines)
        )

    @property
    def _bundle(self) -> str:
        return f"bundle {self.engine.name}"

    def _require_chunk(self, chunk_prefill_size: int | None) -> None:
        built = self.engine.limits.prefill_chunk
        if chunk_prefill_size not in (None, built):
            raise SelectionError(
                f"chunk_prefill_size is {chunk_prefill_size}; must be None or {built}, the prefill_chunk of "
                f"{self._bundle}; pass that, or build with\nserving:\n  prefill_chunk: {chunk_prefill_size}"
            )

    def _row_sizes(self, kv_cache: Any, kv_lens: Any, page_indices: Any) -> Iterator[Size]:
        limits, rows, entries = self.engine.limits, len(kv_lens), len(page_indices)
        yield self.rows_size(rows)
        if rows and entries % rows == 0:
            longest = entries // rows * kv_cache.shape[1]
            yield Size("page_indices", "serving", "max_model_len", longest, limits.max_kv_len)

    def _with_dead_rows(
        self, xp: Any, rows: int, kv_lens: Any, page_indices: Any, cu_q_lens: Any, distribution: Any
    ) -> list[Any]:
        """The metadata with as many rows as the programs take; the rows added are past distribution[2]."""
        dead = self.engine.limits.max_num_seqs - rows
        pages = dead * self.engine.limits.pages_per_seq
        ends = xp.pad(cu_q_lens, (0, dead), mode="edge")
        return [xp.pad(kv_lens, (0, dead)), xp.pad(page_indices, (0, pages)), ends, distribution]


def require_axes(names: Sequence[str], arrays: Sequence[Any], axes: Sequence[int]) -> None:
    """Raises BatchError for the first that is no array of so many axes."""
    for name, array, wanted in zip(names, arrays, axes, strict=True):
        if not hasattr(array, "dtype") or len(array.shape) != wanted:
            raise BatchError(
                f"{name} is {_shown(array)}; must be an array of {wanted} axes; see docs/batch-contract.md"
            )


def traced(arrays: Sequence[Any]) -> bool:
    """Whether the call is inside a trace: jit, shard_map and the like."""
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


def _same(value: Any, neutral: Any) -> bool:
    if neutral is None or not isinstance(value, (bool, int, float, np.generic)):
        return value is neutral
    return bool(value == neutral)


def _shown(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return repr(value) if not shape or dtype is None else f"{dtype}{list(shape)}"
