"""The scalars that a function computes for its kernels from integer arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpac.schedule.operands import kernel_operands
from rpac.schedule.report import KernelOperands

ROWS = jax.ShapeDtypeStruct((32, 128), jnp.float32)
LENGTHS = jax.ShapeDtypeStruct((4,), jnp.int32)


def copy_rows(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Copies blocks of 8 rows in the order of a table."""
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(4,),
        in_specs=[pl.BlockSpec((8, 128), lambda i, table: (table[i], 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, table: (i, 0)),
    )

    def kernel(table: Any, source: Any, out: Any) -> None:
        out[...] = source[...]

    return pl.pallas_call(kernel, out_shape=ROWS, grid_spec=grid, name="copy_rows")(table, rows)


def operands(function: Callable[..., Any], values: dict[int, list[int]]) -> tuple[KernelOperands, ...]:
    traced = jax.jit(function).trace(LENGTHS, ROWS).jaxpr
    return kernel_operands(traced, {number: np.asarray(value, np.int32) for number, value in values.items()})


def test_what_is_computed_from_an_argument_is_known() -> None:
    [found] = operands(lambda lengths, rows: copy_rows(jnp.cumsum(lengths) - lengths, rows), {0: [1, 0, 2, 1]})
    assert found.shapes == ((4,), (32, 128))
    assert found.known[0].tolist() == [0, 1, 1, 3]


def test_constants_of_the_trace_are_known_without_any_argument() -> None:
    table = np.array([3, 2, 1, 0], np.int32)
    [found] = operands(lambda lengths, rows: copy_rows(jnp.asarray(table), rows), {})
    assert found.known[0].tolist() == [3, 2, 1, 0]


def test_an_argument_that_is_not_given_stays_unknown() -> None:
    [found] = operands(lambda lengths, rows: copy_rows(lengths + 1, rows), {})
    assert found.known == {}


def test_what_depends_on_data_stays_unknown() -> None:
    [found] = operands(lambda lengths, rows: copy_rows(lengths + rows[0, 0].astype(jnp.int32), rows), {0: [0] * 4})
    assert found.known == {}


def test_kernels_are_found_inside_of_calls() -> None:
    @jax.custom_vjp
    def inner(lengths: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.jit(copy_rows)(lengths * 2, rows)

    inner.defvjp(lambda lengths, rows: (inner(lengths, rows), None), lambda _, ct: (None, ct))
    first, second = operands(lambda lengths, rows: copy_rows(lengths, inner(lengths, rows)), {0: [0, 1, 1, 0]})
    assert first.known[0].tolist() == [0, 2, 2, 0]
    assert second.known[0].tolist() == [0, 1, 1, 0]


def test_a_kernel_goes_by_its_name() -> None:
    [found] = operands(lambda lengths, rows: copy_rows(lengths, rows), {})
    assert found.name == "copy_rows"


def test_loops_of_xla_are_computed_where_no_kernel_is_in_them() -> None:
    def function(lengths: jax.Array, rows: jax.Array) -> jax.Array:
        return copy_rows(jax.lax.fori_loop(0, 3, lambda i, table: (table + i) % 4, lengths), rows)

    [found] = operands(function, {0: [0, 1, 2, 3]})
    assert found.known[0].tolist() == [3, 0, 1, 2]


def test_a_kernel_in_a_loop_is_left_out() -> None:
    def function(lengths: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, kept: copy_rows(lengths, kept), rows)

    assert operands(function, {0: [0] * 4}) == ()


def test_arguments_bound_beforehand_are_constants() -> None:
    bound = functools.partial(
        lambda lengths, rows, order: copy_rows(lengths[order], rows), order=np.array([3, 2, 1, 0])
    )
    [found] = operands(bound, {0: [0, 1, 2, 3]})
    assert found.known[0].tolist() == [3, 2, 1, 0]
