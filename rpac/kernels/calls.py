"""The calls of kernels: their operands and results, and the public function of a program that makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rpac.contract.arrays import (
    ArrayDims,
    arg_specs,
    extra_specs,
    metadata_specs,
)
from rpac.contract.features import ARGUMENTS
from rpac.kernels.literals import dtype_name
from rpac.plan.recipe import PageTable, Recipe
from rpac.spec import Spec

# The shapes of arguments, in constants; `kv_cache` has one for each layout.
_SHAPES: Final = {
    "queries": "tokens, Q_HEADS, HEAD_DIM",
    "keys": "tokens, KV_HEADS, HEAD_DIM",
    "values": "tokens, KV_HEADS, HEAD_DIM",
    "interleaved": "pages, PAGE_ROWS, LANES",
    "separate": "pages, KV_PLANES, KV_HEADS, PAGE_SIZE, HEAD_LANES",
    "kv_lens": "MAX_SEQS",
    "page_indices": "MAX_SEQS * PAGES_PER_SEQ",
    "cu_q_lens": "MAX_SEQS + 1",
    "distribution": "3",
    **{one.name: one.constants for one in ARGUMENTS},
}
_NAMES: Final = {"kv_cache": "cache"}  # arguments by other names in the functions that call kernels
_IN_HBM: Final = {"queries": "q_hbm", "keys": "k_hbm", "values": "v_hbm", "kv_cache": "cache_in"}


@dataclass(frozen=True)
class Operand:
    """A parameter of a kernel: its name there, what a call passes, and its dtype and shape in words."""

    name: str
    argument: str
    comment: str


@dataclass(frozen=True)
class Call:
    """A call of the kernel of one kind of batches: operands in SMEM, operands in HBM, and results.

    `arguments` are the parameters of `attend_KIND`, in order. `aliases` maps operands to the results in their memory.
    `returned` and `sequences` are for the docstring.
    """

    kind: str
    scalars: tuple[Operand, ...]
    arrays: tuple[Operand, ...]
    results: tuple[Operand, ...]
    aliases: Mapping[int, int]
    arguments: tuple[str, ...]
    returned: str
    sequences: str


@dataclass(frozen=True)
class Program:
    """What the public function of a program says and does: `passed` are the arguments of each kernel's call.

    `cache` is the second result, out of what the last call returned.
    """

    arguments: tuple[str, ...]
    batches: str
    notes: tuple[str, ...]
    returned: str
    calls: tuple[Call, ...]
    passed: tuple[str, ...]
    cache: str


def program_of(spec: Spec, kind: str, recipe: Recipe, call: Callable[[Spec, str, Recipe], Call]) -> Program:
    """The public function of the programs of one kind."""
    lse, viewed = spec.serving.log_sum_exp, spec.serving.kv_layout != "separate"
    calls = tuple(call(spec, one, recipe) for one in (("decode", "mixed") if kind == "mixed" else (kind,)))
    # The first call takes the cache from the argument, a second one from the first.
    given = [{"cache": "cache_rows(kv_cache)" if viewed else "kv_cache"}, {}]
    several = spec.serving.decode_len > 1
    notes = {
        "decode": "Sequence s has rows [s * DECODE_LEN, (s + 1) * DECODE_LEN) of `queries`: `cu_q_lens` is not used."
        if several
        else "Sequence s has row s of `queries`: `cu_q_lens` is not used.",
        "prefill": "Sequence s has rows [s * CHUNK, (s + 1) * CHUNK) of `queries`: `cu_q_lens` is not used.",
    }
    return Program(
        tuple(dims.name for dims in arg_specs(spec, 0)),
        {
            "decode": "a batch of decode rows only",
            "prefill": "a batch of prefill chunks only",
            "mixed": "any batch, decode rows first",
        }[kind],
        (notes[kind],) if kind in notes else (),
        "out, kv_cache, lse" if lse else "out, kv_cache",
        calls,
        tuple(
            ", ".join(names.get(one, one) for one in call.arguments) for call, names in zip(calls, given, strict=False)
        ),
        "rows_cache(cache, kv_cache.shape)" if viewed else "cache",
    )


_OTHER_ROWS: Final = {
    "decode": "the decode sequences; other rows of `out` are undefined",
    "prefill": "the prefill sequences; other rows of `out` are undefined",
    "mixed": "the sequences that are not decode; other rows of `out` stay as they are",
}
_FLAT: Final = {"tree": "tree.reshape(-1)"}  # of one axis, because rows of two are padded in SMEM


def call_of(spec: Spec, kind: str, recipe: Recipe) -> Call:
    """The call of a kernel: scalars of the batch and the arguments beside it, then arrays.

    The cache is updated in place. In a mixed program the decode kernel's results go on as operands, and the mixed kernel's
    results are in their memory.
    """
    model, lse, mixed = spec.model, spec.serving.log_sum_exp, kind == "mixed"
    # Only mixed batches have sequences of different numbers of new tokens, and a tree is of decode rows alone.
    batch = [dims for dims in metadata_specs(spec.serving) if mixed or dims.name != "cu_q_lens"]
    batch += [dims for dims in extra_specs(spec) if kind == "decode" or dims.name != "tree"]
    batch = in_smem(batch, recipe.page_table)
    scalars = tuple(
        Operand(dims.name, _FLAT.get(dims.name, dims.name), _comment(dims.dtype, dims.name)) for dims in batch
    )
    own = [dims for dims in arg_specs(spec, 0) if dims.name in _IN_HBM]
    tables = tables_in_hbm(recipe.page_table)
    arrays = [*tables, *(_array(spec, dims, _order_of(recipe, dims.name)) for dims in own)]
    names = [*(one.argument for one in tables), *(_NAMES.get(dims.name, dims.name) for dims in own)]
    cache = len(scalars) + len(arrays) - 1
    results = [
        _output(spec, _order_of(recipe, "queries")),
        Operand("cache_hbm", "cache.shape, cache.dtype", _comment(model.kv_dtype, spec.serving.kv_layout)),
    ]
    aliases, returned = {cache: 1}, ["out", "cache"]
    if lse:
        rows, shape = (
            ("tokens, PADDED_Q_HEADS, LANES", "(len(queries), PADDED_Q_HEADS, LANES), jnp.float32")
            if kind == "decode"
            else ("tokens * PADDED_Q_HEADS, LANES", "(len(queries) * PADDED_Q_HEADS, LANES), jnp.float32")
        )
        results.append(Operand("lse_hbm", shape, f"float32[{rows}]"))
        returned.append("lse")
    if mixed:
        for name, result in (("out", 0), ("lse", 2))[: 1 + lse]:
            aliases[len(scalars) + len(arrays)] = result
            names.append(name)
            arrays.append(Operand(f"{name}_in", name, f"{results[result].comment}: the memory of {name}_hbm"))
    return Call(
        kind,
        scalars,
        tuple(arrays),
        tuple(results),
        aliases,
        (*names, *(dims.name for dims in batch)),
        ", ".join(returned),
        _OTHER_ROWS[kind],
    )


def in_smem(batch: Iterable[ArrayDims], table: PageTable) -> list[ArrayDims]:
    """Those arrays of scalars that a kernel has in SMEM from its start."""
    return [dims for dims in batch if table == "smem" or dims.name != "page_indices"]


def tables_in_hbm(table: PageTable) -> list[Operand]:
    """The page tables as an operand in HBM, where they are there."""
    return [Operand("table_hbm", "page_indices", "int32[TABLE_ENTRIES]")] if table == "hbm" else []


_ORDERS: Final = {"token": (0, 1, 2), "head": (1, 0, 2), "lane": (1, 2, 0)}  # of tokens, heads and lanes
_REORDERED: Final = {"token": "{}", "head": "swap_heads({})", "lane": "tokens_last({})"}


def _order_of(recipe: Recipe, name: str) -> str:
    """The order of the axes in which a kernel takes an argument, a key of `_ORDERS`."""
    if name == "queries" and recipe.queries_by_lane:
        return "lane"
    return "head" if name in recipe.by_head else "token"


def _output(spec: Spec, order: str) -> Operand:
    shape = ", ".join(_reordered(("len(queries)", "Q_HEADS", "HEAD_DIM"), order))
    shape = "queries.shape" if order == "token" else f"({shape})"
    return Operand("out_hbm", f"{shape}, queries.dtype", _comment(spec.model.q_dtype, "queries", order))


def _array(spec: Spec, dims: ArrayDims, order: str) -> Operand:
    if dims.name == "kv_cache":
        comment = f"{_comment(dims.dtype, spec.serving.kv_layout)}: the memory of cache_hbm"
        return Operand("cache_in", "cache", comment)
    of = "bfloat16" if spec.model.quantized and dims.name in ("keys", "values") else dims.dtype
    return Operand(_IN_HBM[dims.name], _REORDERED[order].format(dims.name), _comment(of, dims.name, order))


def _comment(of: str, name: str, order: str = "token") -> str:
    shape = _SHAPES[name]
    if order != "token":
        shape = ", ".join(_reordered(shape.split(", "), order))
    return f"{dtype_name(of)}[{shape}]"


def _reordered(axes: Sequence[str], order: str) -> list[str]:
    return [axes[i] for i in _ORDERS[order]]
