"""What the adapters share: a peer's arguments held against what the bundle has, and the call on the host or in a trace."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rpac.batch import Limits
from rpac.bundle.manifest import ARGS
from rpac.contract import arrays as layout
from rpac.contract.attention import Attention
from rpac.contract.features import features_of
from rpac.contract.program import Program, Variant
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

    @property
    def programs(self) -> Mapping[Variant, Program]: ...

    def __call__(self, *args: Any, **options: Any) -> Result: ...

    def traced(self, *args: Any, **options: Any) -> Result: ...


class Feature(NamedTuple):
    """An argument that no program follows: the values that ask for nothing, and what programs do."""

    neutral: tuple[Any, ...]
    programs: str


_MASK = "programs mask by position alone"

FEATURES = {
    "custom_mask": Feature((None,), _MASK),
    "debug_mode": Feature((False,), "programs attend; they print nothing"),
    "mask_aligned_to_cu_kv": Feature((False,), _MASK),
    "mask_value": Feature((None, DEFAULT_MASK_VALUE), "what programs mask weighs exactly 0"),
    "q_scale": Feature((None,), "programs take queries as they are, not quantized"),
    "skip_kv_mask": Feature((False,), "programs mask what lies past the end of a sequence"),
    "softmax_dtype": Feature((None,), "programs compute softmax in float32"),
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
        if self.engine.model.rope_dim is not None:
            raise SelectionError(
                f"{self._bundle} has latent attention; must have grouped attention, which is all that this function of "
                f"{self.peer} computes; call the engine itself, with the arguments of docs/batch-contract.md"
            )
        if self.engine.kv_layout != "interleaved":
            raise SelectionError(
                f"{self._bundle} has kv_layout {self.engine.kv_layout}; must be interleaved, as {self.peer} keeps "
                "K and V in its cache; build with\nserving:\n  kv_layout: interleaved"
            )
        for feature in features_of("model"):
            value = getattr(self.engine.model, feature.key)
            if not feature.servers and value != feature.default:
                raise SelectionError(
                    f"{self._bundle} has {feature.key} {value}; must have none, because {self.peer} has no "
                    f"argument that asks for it; build without model.{feature.key}"
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

    def kv_scales(self, k_scale: Any, v_scale: Any) -> dict[str, Any]:
        """The engine's argument for a peer's scales of stored K and V; a scale that is left out is 1, as the peers have it.

        Raises SelectionError for a scale that a bundle without them cannot follow.
        """
        model = self.engine.model
        given = {"k_scale": k_scale, "v_scale": v_scale}
        if model.kv_scale is None:
            for name, value in given.items():
                if value is not None and (isinstance(value, jax.core.Tracer) or float(value) != 1):
                    self._refuse_scale(name, value)
            return {}
        heads = (model.kv_heads,) if model.kv_scale == "head" else ()
        xp: Any = jnp if traced(tuple(given.values())) else np
        scales = [xp.asarray(1 if value is None else value, np.float32) for value in given.values()]
        for name, scale in zip(given, scales, strict=True):
            if scale.shape not in ((), heads):
                each = f" or float32{list(heads)}" if heads else ""
                raise BatchError(
                    f"{name} is float32{list(scale.shape)}; must be a number{each}, as {self._bundle} has it"
                )
        return {"kv_scales": xp.stack([xp.broadcast_to(scale, heads) for scale in scales])}

    def _refuse_scale(self, name: str, value: Any) -> NoReturn:
        shown = "traced" if isinstance(value, jax.core.Tracer) else _shown(value)
        if self.engine.model.quantized:
            fix = "build with\nmodel:\n  kv_scale: tensor"
        elif name == "k_scale":
            fix = "multiply sm_scale by it, for scores are linear in K, and build with that"
        else:
            fix = "multiply the output by it, for it is linear in V"
        raise SelectionError(f"{name} is {shown}; must be None or 1: {self._bundle} has no scales of K and V; {fix}")

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
        run as mixed rows. Where the bundle has drafts, the first rows of exactly decode_len new tokens are decode rows,
        whatever the distribution calls them, and those behind them prefill or mixed rows. `extra` are the engine's arguments
        by name. Returns what the peers do: the output and the cache.
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
        metadata[-1] = self._distribution(xp, metadata[-2], metadata[-1], chunk_prefill_size is not None)
        extra = {**extra, **self._causal_tree}
        if in_trace:
            return self.engine.traced(*arrays, *metadata, **extra)[:2]
        return self.engine(*arrays, *metadata, validate=self.validate, **extra)[:2]

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

    def _distribution(self, xp: Any, cu_q_lens: Any, distribution: Any, has_chunks: bool) -> Any:
        """Which rows are decode, prefill and mixed rows for the bundle's programs."""
        new = self.engine.limits.decode_len
        if new == 1:
            return distribution if has_chunks else distribution[PREFILL_AS_MIXED]
        i, j, k = distribution
        drafts = (cu_q_lens[1:] - cu_q_lens[:-1] == new) & (np.arange(len(cu_q_lens) - 1) < k)
        decodes = xp.cumprod(drafts.astype(np.int32)).sum()  # those before the first row of another length
        prefills = xp.where((decodes == i) & has_chunks, j, decodes)
        return xp.stack([decodes, prefills, k]).astype(np.int32)

    @cached_property
    def _causal_tree(self) -> dict[str, Any]:
        """The engine's `tree`, where it takes one, for drafts that each see those before it: all that a peer asks for."""
        if not any(dims.name == "tree" for program in self.engine.programs.values() for dims in program.args):
            return {}
        limits = self.engine.limits
        rows = (2 << np.arange(limits.decode_len, dtype=np.int32)) - 1
        return {"tree": np.broadcast_to(rows, (limits.max_num_seqs, limits.decode_len)).astype(np.int32)}

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
