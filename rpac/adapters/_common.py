"""What the adapters share: the arrays of a peer's call held against the bundle's, and the call on the host or in a trace."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from rpac.adapters._arguments import Arguments, Result, require_axes, shown, spec_lines, traced
from rpac.bundle.manifest import ARGS, LATENT_ARGS
from rpac.contract import arrays as layout
from rpac.contract.attention import DTYPES, KV_DTYPES, LATENT_LAYOUT
from rpac.contract.features import features_of
from rpac.errors import BatchError, SelectionError

PREFILL_AS_MIXED = np.array([0, 0, 2])  # (i, j, k) becomes (i, i, k)


class Size(NamedTuple):
    """A size or dtype of a call beside the bundle's, and the line of a spec that says it."""

    array: str
    section: str
    key: str
    found: Any
    built: Any


def wrong_ones(sizes: Iterable[Size]) -> list[Size]:
    """Those that are not the bundle's."""
    return [one for one in sizes if one.found != one.built]


@dataclass(frozen=True)
class Adapter(Arguments):
    """One engine behind a function of `peer`. Raises SelectionError at once where its cache is not the peer's.

    `validate=False` leaves out the check of the metadata's values on the host, as `rpac.Engine` does. `layouts` are those
    that the caller's cache may have: the peer's own, and any other where `install` replaces the shape of the cache too.
    """

    layouts: tuple[str, ...] = ("interleaved",)

    names: ClassVar[tuple[str, ...]] = ARGS
    axes: ClassVar[tuple[int, ...]] = (3, 3, 3, 5, 1, 1, 1, 1)  # of each of `names`
    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {"q_dtype": DTYPES, "kv_dtype": KV_DTYPES}  # those of specs

    def __post_init__(self) -> None:
        self.require_kind()
        if self.engine.kv_layout not in self.layouts:
            raise SelectionError(
                f"{self.bundle} has kv_layout {self.engine.kv_layout}; must be interleaved, as {self.peer} keeps "
                "K and V in its cache; install it, where the package's adapter has `install`, which replaces the shape of "
                "the cache too, or build with" + spec_lines(serving={"kv_layout": "interleaved"})
            )
        for feature in features_of("model"):
            value = getattr(self.engine.model, feature.key)
            if not feature.servers and value != feature.default:
                raise SelectionError(
                    f"{self.bundle} has {feature.key} {value}; must have none, because {self.peer} has no "
                    f"argument that asks for it; build without model.{feature.key}"
                )

    def require_kind(self) -> None:
        """Raises SelectionError for a bundle of attention of another kind than the peer's function computes."""
        if self.engine.model.rope_dim is not None:
            raise SelectionError(
                f"{self.bundle} has latent attention; must have grouped attention, which is all that this function of "
                f"{self.peer} computes; call the engine itself, with the arguments of docs/batch-contract.md"
            )

    def run(self, *args: Any, chunk_prefill_size: int | None = None, results: int = 2, **extra: Any) -> Result:
        """The call on the contract's arguments: `engine.traced` where one is a tracer, else `engine` itself.

        There may be fewer rows than max_num_seqs. Without `chunk_prefill_size`, rows [i, j) may have any length: they
        run as mixed rows. Where the bundle has drafts, the first rows of exactly decode_len new tokens are decode rows,
        whatever the distribution calls them, and those behind them prefill or mixed rows. `extra` are the engine's arguments
        by name. Returns the first of the engine's results: the output and the cache, and with `results` 3 lse too.
        """
        require_axes(self.names, args, self.axes)
        *tokens, kv_cache, kv_lens, page_indices, cu_q_lens, distribution = args
        self._require_page(kv_cache)
        self.require_sizes(
            itertools.chain(self.array_sizes(*tokens, kv_cache), self._row_sizes(kv_cache, kv_lens, page_indices))
        )
        self._require_chunk(chunk_prefill_size)
        rows = len(kv_lens)
        for name, array, size in (("cu_q_lens", cu_q_lens, rows + 1), ("distribution", distribution, 3)):
            if len(array) != size:
                raise BatchError(f"{name} is {shown(array)}; must be int32[{size}]; see docs/batch-contract.md")
        arrays = [*tokens, kv_cache] if self.engine.model.update_cache else [tokens[0], kv_cache]
        in_trace = traced((*args, *extra.values()))
        xp: Any = jnp if in_trace else np
        metadata = [xp.asarray(array) for array in args[-4:]]
        if rows < self.engine.limits.max_num_seqs:
            metadata = self._with_dead_rows(xp, rows, *metadata)
        metadata[-1] = self._distribution(xp, metadata[-2], metadata[-1], chunk_prefill_size is not None)
        extra = {**extra, **self._causal_tree}
        if in_trace:
            return self.engine.traced(*arrays, *metadata, **extra)[:results]
        return self.engine(*arrays, *metadata, validate=self.validate, **extra)[:results]

    def array_sizes(self, *arrays: Any) -> Iterator[Size]:
        """What the arrays that hold tokens and pages say about the spec."""
        queries, keys, _, kv_cache = arrays
        model = self.engine.model
        yield Size("queries", "model", "q_heads", queries.shape[1], model.q_heads)
        yield Size("keys", "model", "kv_heads", keys.shape[1], model.kv_heads)
        yield Size("queries", "model", "head_dim", queries.shape[2], model.head_dim)
        yield from self._cache_sizes(queries, kv_cache)

    def in_layout(self, name: str, kv_cache: Any) -> Any:
        """A cache of `[pages, page_size, 2 * kv_heads, head_dim]` on the axes of the bundle's layout: a reshape, of the same
        bytes. Raises where it has not the bundle's pages."""
        require_axes((name,), (kv_cache,), (4,))
        pages, page_size, heads, head_dim = kv_cache.shape
        if self.engine.kv_layout == "separate":
            _, _, built, lanes = self.page_shape
            self.require_sizes([Size(name, "serving", "page_size", page_size, built)])
            wanted = 2 * self.engine.model.kv_heads, lanes
            if (heads, head_dim) != wanted:
                raise BatchError(
                    f"{name} is {shown(kv_cache)}; must end in {list(wanted)}, K and V of each KV head of {self.bundle}; "
                    "give each device as many"
                )
            return kv_cache.reshape(pages, *self.page_shape)
        packing = layout.packing(self.engine.model.kv_dtype)
        if heads % packing:
            raise BatchError(f"{name} has {heads} heads; must be a multiple of {packing}: K and V of each KV head")
        return kv_cache.reshape(pages, page_size, heads // packing, packing, head_dim)

    def require_lse(self, name: str) -> None:
        """Raises where the bundle's programs return no lse, which the argument of that name asks for."""
        if not any(dims.name == "lse" for program in self.engine.programs.values() for dims in program.results):
            raise SelectionError(
                f"{name} is True; must be False: {self.bundle} returns no lse; pass that, or build with"
                + spec_lines(serving={"log_sum_exp": True})
            )

    def rows_size(self, rows: int) -> Size:
        """What the number of rows says about the spec: a batch may have fewer than it."""
        most = self.engine.limits.max_num_seqs
        return Size("kv_lens", "serving", "max_num_seqs", max(rows, most), most)

    def page_sizes(self, **asked: Any) -> list[Size]:
        """What a server asks of the pages of its cache: some of `kv_heads`, `head_dim`, `kv_dtype`, `page_size`."""
        parts = {key: "serving" if key == "page_size" else "model" for key in asked}
        built = {"serving": self.engine.limits, "model": self.engine.model}
        return [
            Size("the server's cache", parts[key], key, found, getattr(built[parts[key]], key))
            for key, found in asked.items()
        ]

    def require_sizes(self, sizes: Iterable[Size]) -> None:
        """Raises SelectionError naming those that are not the bundle's, with the lines of a spec that build for them."""
        wrong = wrong_ones(sizes)
        if wrong:
            raise self.refusal(wrong, "pass arrays of its sizes", "convert the arrays")

    def refusal(self, wrong: Sequence[Size], fix: str, convert: str) -> SelectionError:
        """What to raise for sizes that are not the bundle's: `fix` is what to do instead of a build with the lines of a spec,
        and `convert` what to do about a dtype that no spec has."""
        found = "; ".join(f"{one.key} of {one.array} is {one.found}, must be {one.built}" for one in wrong)
        if any(one.found not in self.dtypes.get(one.key, (one.found,)) for one in wrong):
            return SelectionError(f"{found}, as in {self.bundle}; no line of a spec adds that dtype; {convert}")
        sections: dict[str, dict[str, Any]] = {}
        for one in wrong:
            sections.setdefault(one.section, {})[one.key] = one.found
        return SelectionError(
            f"{found}, as in {self.bundle}; {fix}, or build with these lines, where a spec allows them"
            + spec_lines(**sections)
        )

    @property
    def page_shape(self) -> layout.Shape:
        """The shape of one page of the bundle's cache: `rpac.contract.arrays.kv_page_shape`."""
        program = next(iter(self.engine.programs.values()))
        return program.args[layout.index_of(program.args, "kv_cache")].shape[1:]

    def _cache_sizes(self, queries: Any, kv_cache: Any) -> Iterator[Size]:
        model, limits = self.engine.model, self.engine.limits
        yield Size("queries", "model", "q_dtype", np.dtype(queries.dtype).name, model.q_dtype)
        yield Size("kv_cache", "model", "kv_dtype", np.dtype(kv_cache.dtype).name, model.kv_dtype)
        yield Size("kv_cache", "serving", "page_size", kv_cache.shape[self._token_axis], limits.page_size)
        yield Size("kv_cache", "serving", "num_pages", kv_cache.shape[0], limits.num_pages)

    @property
    def _token_axis(self) -> int:
        return layout.TOKEN_AXES[self.engine.kv_layout]

    def _require_page(self, kv_cache: Any) -> None:
        """Raises for a cache of the peer's shape, where the bundle has another: then sizes say nothing of the spec."""
        if self.engine.kv_layout != "interleaved" and kv_cache.shape[1:] != self.page_shape:
            raise BatchError(
                f"kv_cache is {shown(kv_cache)}; must have pages of {list(self.page_shape)}, the kv_layout "
                f"{self.engine.kv_layout} of {self.bundle}; install the bundle before {self.peer} makes its cache"
            )

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
                f"{self.bundle}; pass that, or build with" + spec_lines(serving={"prefill_chunk": chunk_prefill_size})
            )

    def _row_sizes(self, kv_cache: Any, kv_lens: Any, page_indices: Any) -> Iterator[Size]:
        limits, rows, entries = self.engine.limits, len(kv_lens), len(page_indices)
        yield self.rows_size(rows)
        if rows and entries % rows == 0:
            longest = entries // rows * kv_cache.shape[self._token_axis]
            yield Size("page_indices", "serving", "max_model_len", longest, limits.max_kv_len)

    def _with_dead_rows(
        self, xp: Any, rows: int, kv_lens: Any, page_indices: Any, cu_q_lens: Any, distribution: Any
    ) -> list[Any]:
        """The metadata with as many rows as the programs take; the rows added are past distribution[2]."""
        dead = self.engine.limits.max_num_seqs - rows
        pages = dead * self.engine.limits.pages_per_seq
        ends = xp.pad(cu_q_lens, (0, dead), mode="edge")
        return [xp.pad(kv_lens, (0, dead)), xp.pad(page_indices, (0, pages)), ends, distribution]


@dataclass(frozen=True)
class LatentAdapter(Adapter):
    """As `Adapter`, of latent attention; the tokens are `queries`, `queries_rope`, `new_kv` and `new_rope` of the contract."""

    layouts: tuple[str, ...] = (LATENT_LAYOUT,)

    names: ClassVar[tuple[str, ...]] = LATENT_ARGS
    axes: ClassVar[tuple[int, ...]] = (3, 3, 2, 2, 3, 1, 1, 1, 1)
    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {"q_dtype": DTYPES, "kv_dtype": DTYPES}

    def require_kind(self) -> None:
        if self.engine.model.rope_dim is None:
            raise SelectionError(
                f"{self.bundle} has grouped attention; must have latent attention, which is all that this function of "
                f"{self.peer} computes; build with" + spec_lines(model={"attention": "latent"})
            )

    def array_sizes(self, *arrays: Any) -> Iterator[Size]:
        queries, queries_rope, _, _, kv_cache = arrays
        model = self.engine.model
        yield Size("queries", "model", "q_heads", queries.shape[1], model.q_heads)
        yield Size("queries", "model", "kv_lora_rank", queries.shape[2], model.head_dim)
        yield Size("queries_rope", "model", "rope_dim", queries_rope.shape[2], model.rope_dim)
        yield from self._cache_sizes(queries, kv_cache)
