"""Any jitted function with Pallas kernels is predicted: what it takes, what it says, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rpac.errors import ScheduleError, TargetError
from rpac.schedule import CompiledFunction, Work, compile_function, predict

from .test_operands import LENGTHS, ROWS, copy_rows

pytestmark = pytest.mark.compile
BLOCK_BYTES = 8 * 128 * 4


def sum_rows(counts: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Reads as many blocks of 8 rows from HBM as the running sum of `counts` says in the end, from a table's places."""
    total = jnp.cumsum(counts)[-1:]

    def kernel(total: Any, table: Any, source: Any, out: Any, buffer: Any, semaphore: Any) -> None:
        out[...] = jnp.zeros_like(out)

        @pl.loop(0, total[0])
        def _(i: Any) -> None:
            copy = pltpu.make_async_copy(source.at[pl.ds(table[0, i] * 8, 8)], buffer, semaphore)
            copy.start()
            copy.wait()
            out[...] += buffer[...]

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(1,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
    )
    call = pl.pallas_call(
        kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), grid_spec=grid, name="sum_rows"
    )
    return call(total, batch["table"], batch["rows"])


ARGUMENTS = (
    LENGTHS,
    {
        "rows": jax.ShapeDtypeStruct((1 << 20, 128), jnp.float32),  # more than XLA could put into VMEM
        "table": jax.ShapeDtypeStruct((2, 40), jnp.int32),
    },
)
TABLE = np.arange(80).reshape(2, 40)


@pytest.fixture(scope="module")
def compiled() -> CompiledFunction:
    return compile_function(sum_rows, *ARGUMENTS, target="tpu7x")


@pytest.mark.parametrize("counts", [[1, 0, 0, 0], [2, 3, 4, 5]])
def test_a_kernel_moves_what_its_scalars_say(compiled: CompiledFunction, counts: list[int]) -> None:
    report = compiled.predict({"counts": counts, "batch['table']": TABLE})
    [kernel] = report.kernels
    assert kernel.name.startswith("sum_rows")
    assert kernel.read_bytes == sum(counts) * BLOCK_BYTES
    # One DMA after the other, so each waits out the latency.
    assert kernel.stall_seconds > sum(counts) * report.model.latency_s


def test_a_table_of_rows_is_read_as_it_lies_in_memory(compiled: CompiledFunction) -> None:
    """Its rows are padded to 128 words there: 40 in a row come out in order, whatever the second row holds."""
    walk = compiled.call.walk_kernel(
        compiled.call.kernels[0].name,
        compiled.operands({"counts": [0, 0, 0, 4], "batch['table']": TABLE[::-1]})[compiled.call.kernels[0].name],
        trace=True,
    )
    reads = [transfer.offset // BLOCK_BYTES for transfer in walk.transfers if transfer.size == BLOCK_BYTES]
    assert reads[:4] == [40, 41, 42, 43]


def test_scalars_go_by_number_too(compiled: CompiledFunction) -> None:
    by_name = compiled.predict({"counts": [1, 1, 0, 0], "batch['table']": TABLE})
    assert compiled.predict({0: [1, 1, 0, 0], 2: TABLE}) == by_name


def test_the_text_says_time_cycles_slots_and_stalls(compiled: CompiledFunction) -> None:
    report = compiled.predict({"counts": [2, 3, 4, 5], "batch['table']": TABLE}, Work(14 * BLOCK_BYTES, 14 * 1024))
    text = str(report)
    for part in (
        " us on tpu7x, predicted",
        " cycles at ",
        "MBU 0.",
        "compute + ",
        "stalls",
        "wait at instruction ",
        "SALU 0.",
    ):
        assert part in text
    assert "MBU" not in str(dataclasses.replace(report, needed_bytes=None, needed_flops=None))


def test_one_call_does_it_all() -> None:
    report = predict(copy_rows, LENGTHS, ROWS, target="v6e", scalars={"table": [3, 2, 1, 0]})
    assert report.target == "v6e"
    assert report.kernel_seconds > 0


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        ({"count": [1] * 4}, r"scalars: found 'count'; must be an argument: counts, batch\['rows'\], batch\['table'\]"),
        ({7: [1] * 4}, "scalars: found 7; must be an argument"),
        ({"counts": [1] * 3}, r"scalars\['counts'\]: found shape \[3\]; must be \[4\]"),
        ({"counts": [0.5] * 4}, r"scalars\['counts'\]: found float64 for an argument of int32; must be integers"),
        ({}, r"reads operand \d \(s32\[[\d, ]+\]\), which is missing"),
    ],
)
def test_scalars_that_do_not_fit_are_refused(compiled: CompiledFunction, scalars: dict[Any, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        compiled.predict(scalars)


def test_a_target_that_is_no_tpu_is_refused() -> None:
    with pytest.raises(TargetError, match="target 'cpu' has no chip"):
        compile_function(copy_rows, LENGTHS, ROWS, target="cpu")


def test_an_instruction_that_is_not_known_is_an_error_that_names_it(compiled: CompiledFunction) -> None:
    name = compiled.call.kernels[0].name
    text = compiled.call.dump.schedules[name].replace("sadd.s32", "snovel.s32")
    dump = dataclasses.replace(compiled.call.dump, schedules={**compiled.call.dump.schedules, name: text})
    with pytest.raises(ScheduleError, match=r"unknown instruction 'snovel\.s32'"):
        type(compiled.call)(dump).walk_kernel(name, {})
