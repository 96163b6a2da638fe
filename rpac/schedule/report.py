"""The time of a whole call: its kernels, walked with the batch's scalars, and XLA's operations around them.

Definitions. *Needed* bytes and flops are what the attention of the batch cannot do without (`attention_work`), whatever
a kernel moves. MBU = needed bytes / (time x the chip's peak HBM bytes/s); MFU = needed flops / (time x its peak bf16
flop/s); a multiply-add is two flops. Both are given over the whole call, and over its kernels alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpac.devices.chip import chip
from rpac.errors import ScheduleError
from rpac.schedule.call_report import CallReport, KernelReport, LoopReport, WaitReport, XlaReport
from rpac.schedule.compilers import check_compiler, is_verified
from rpac.schedule.dump import Dump
from rpac.schedule.hlo import Module, Operation, parse_module
from rpac.schedule.layout import words
from rpac.schedule.loops import loop_around, loops_of
from rpac.schedule.memory import Words, are_known
from rpac.schedule.model import Model, model_of
from rpac.schedule.parse import parse_schedule
from rpac.schedule.program import Program, translate
from rpac.schedule.sequence import run
from rpac.schedule.walk import Walk, walk


@dataclass(frozen=True)
class Work:
    """What a batch's attention needs: bytes in HBM and flops."""

    bytes: int
    flops: int


def attention_work(
    kv_lens: Sequence[int],
    q_lens: Sequence[int],
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    q_bytes: int,
    kv_bytes: int,
    sliding_window: int | None = None,
    causal: bool = True,
    rope_dim: int | None = None,
    attention_chunk: int | None = None,
    update_cache: bool = True,
) -> Work:
    """Needed bytes and flops of attention; `kv_lens` include the new tokens, `*_bytes` are of one element.

    Of cached tokens those that the first new token does not see, before its window or its chunk, are not needed. With
    `rope_dim` it is latent attention: keys are that much longer than values, which are part of them and have no bytes of
    their own. Without `update_cache` the new tokens' rows are read, and not written.
    """
    q_row = head_dim + (rope_dim or 0)
    kv_row = (2 * kv_heads * head_dim if rope_dim is None else q_row) * kv_bytes
    tokens = sum(q_lens)
    window = max(kv_lens, default=0) if sliding_window is None else sliding_window
    chunk = max(kv_lens, default=0) + 1 if attention_chunk is None else attention_chunk
    cached = sum(
        min((kv - q) % chunk, window - 1 if sliding_window else kv) for kv, q in zip(kv_lens, q_lens, strict=True)
    )
    pairs = sum(
        _seen(kv, window, chunk) - _seen(kv - q, window, chunk) if causal else kv * q
        for kv, q in zip(kv_lens, q_lens, strict=True)
    )
    moved = (
        cached * kv_row + (2 if update_cache else 1) * tokens * kv_row + tokens * q_heads * (q_row + head_dim) * q_bytes
    )
    return Work(moved, 2 * (q_row + head_dim) * q_heads * pairs)


def _seen(tokens: int, window: int, chunk: int) -> int:
    """How many tokens the queries of the first `tokens` positions see, all together."""
    if tokens > chunk:
        return tokens // chunk * _seen(chunk, window, chunk) + _seen(tokens % chunk, window, chunk)
    growing = min(tokens, window)
    return growing * (growing + 1) // 2 + (tokens - growing) * window


@dataclass(frozen=True)
class KernelOperands:
    """A kernel of a function: its name if it has one, the shapes of all its operands, and the integers known among them."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    known: Mapping[int, NDArray[np.integer[Any]]]


class Call:
    """A dumped call, read and translated once, to be predicted for any number of batches.

    Raises ScheduleError for a module that cannot be read, and for a compiler that is not verified, unless
    `any_compiler`.
    """

    def __init__(self, dump: Dump, model: Model | None = None, *, any_compiler: bool = False) -> None:
        if not any_compiler:
            check_compiler(dump.compiler)
        self.dump = dump
        self.model = model or model_of(dump.target)
        self.module: Module = parse_module(dump.hlo)
        self._programs: dict[str, Program] = {}
        self._xla: dict[str, XlaReport] = {}
        self.kernels = self.module.kernels
        if not self.kernels:
            raise ScheduleError("the dumped call holds no Pallas kernel; nothing to predict")

    def operands(
        self, parameters: Mapping[int, Words], traced: Sequence[KernelOperands] = ()
    ) -> dict[str, dict[int, Words]]:
        """Kernel name -> its scalar operands by index, as far as they follow from the call's int32 parameters, its
        constants, what the scalars of earlier kernels write, and what the function's kernels are known to take. Of a kernel
        in a loop, those of its first iteration.

        Raises ScheduleError as `predict`.
        """
        found: dict[str, dict[int, Words]] = {}

        def kernel(operation: Operation, operands: dict[int, Words]) -> Mapping[int, Words]:
            operands = self._with_traced(operation, operands, traced)
            found.setdefault(operation.name, operands)
            writes = any(array.is_scalars for array in operation.shapes)
            return self._walk(operation, operands).written if writes else {}

        run(self.module, parameters, kernel, lambda operation, operands: None)
        return found

    def walk_kernel(self, name: str, operands: Mapping[int, Words], *, trace: bool = False) -> Walk:
        """Walks one kernel of the call. Raises ScheduleError as `walk`."""
        return walk(self._program(name), operands, self.model, trace=trace)

    def predict(
        self, parameters: Mapping[int, Words], work: Work | None = None, traced: Sequence[KernelOperands] = ()
    ) -> CallReport:
        """Times the call for one batch.

        `parameters`: the call's int32 arguments, flattened, by parameter number. `traced`: what the kernels of the
        function are known to take, as `kernel_operands` finds it. What runs more than once is reported each time. Raises
        ScheduleError where a kernel, or a loop or conditional around one, needs a scalar that follows
        neither from them, nor from the call's constants, nor from what earlier kernels write, and as `walk`.
        """
        kernels: list[KernelReport] = []
        xla: list[XlaReport] = []

        def kernel(operation: Operation, operands: dict[int, Words]) -> Mapping[int, Words]:
            done = self._walk(operation, self._with_traced(operation, operands, traced))
            kernels.append(self._kernel(operation.name, done))
            return done.written

        run(self.module, parameters, kernel, lambda operation, operands: xla.append(self._operation(operation)))
        kernel_seconds = sum(kernel.seconds for kernel in kernels)
        seconds = kernel_seconds + sum(operation.seconds for operation in xla)
        moved = sum(k.read_bytes + k.written_bytes for k in kernels) + sum(x.read_bytes + x.written_bytes for x in xla)
        facts = chip(self.dump.target)
        # Both in seconds at the chip's peak.
        by_bytes = work.bytes / facts.hbm_bandwidth if work else None
        by_flops = work.flops / facts.peak_bf16_flops if work else None
        return CallReport(
            target=self.dump.target,
            compiler=self.dump.compiler,
            compiler_verified=is_verified(self.dump.compiler),
            seconds=seconds,
            kernel_seconds=kernel_seconds,
            mbu=None if by_bytes is None else by_bytes / seconds,
            mfu=None if by_flops is None else by_flops / seconds,
            kernel_mbu=None if by_bytes is None or not kernels else by_bytes / kernel_seconds,
            kernel_mfu=None if by_flops is None or not kernels else by_flops / kernel_seconds,
            needed_bytes=work.bytes if work else None,
            needed_flops=work.flops if work else None,
            moved_bytes=moved,
            kernels=tuple(kernels),
            xla=tuple(xla),
            model=self.model,
        )

    def _program(self, name: str) -> Program:
        if name not in self._programs:
            text = self.dump.schedules.get(name)
            if text is None:
                raise ScheduleError(
                    f"the dump has no schedule of {name}; it has {', '.join(sorted(self.dump.schedules))}"
                )
            schedule = parse_schedule(text, self.dump.target, name, self.dump.utilizations.get(name))
            self._programs[name] = translate(schedule)
        return self._programs[name]

    def _with_traced(
        self, kernel: Operation, operands: dict[int, Words], traced: Sequence[KernelOperands]
    ) -> dict[int, Words]:
        """Also what a traced kernel of its name and shapes takes; of several such kernels, what all of them take.

        What follows from the compiled call itself comes first. A kernel in a loop is no traced one.
        """
        if all(one is not kernel for one in self.module.computations[self.module.entry].operations):
            return operands
        arrays = [self.module[name].shapes[0] for name in kernel.inputs]
        shapes, stem = tuple(array.dims for array in arrays), kernel.name.rpartition(".")[0]
        same = [one.known for one in traced if one.shapes == shapes and one.name in ("", stem)]
        found: dict[int, Words] = {
            index: words(value.reshape(-1).tolist(), arrays[index])
            for index, value in (same[0] if same else {}).items()
            if all(index in other and np.array_equal(other[index], value) for other in same)
        }
        return {**operands, **found, **{index: values for index, values in operands.items() if are_known(values)}}

    def _walk(self, kernel: Operation, operands: Mapping[int, Words]) -> Walk:
        try:
            return self.walk_kernel(kernel.name, operands)
        except ScheduleError as error:
            raise ScheduleError(f"{error}{self._computed(kernel, operands)}") from None

    def _kernel(self, name: str, done: Walk) -> KernelReport:
        loops = loops_of(done)
        second = 1 / self.model.clock_hz
        return KernelReport(
            name=name,
            seconds=done.cycles * second,
            compute_seconds=done.issued * second,
            stall_seconds=done.stalled * second,
            dma_seconds=done.dma_busy * second,
            dmas=done.dmas,
            read_bytes=done.read_bytes * done.schedule.cores,
            written_bytes=done.written_bytes * done.schedule.cores,
            instructions=len(done.schedule.bundles),
            spills=done.schedule.spills,
            waits=tuple(
                WaitReport(w.bundle, w.line, loop_around(loops, w.bundle), w.semaphore, w.count, w.stalled * second)
                for w in done.waits
            ),
            loops=tuple(
                LoopReport(
                    loop.first,
                    loop.last,
                    loop.depth,
                    loop.iterations,
                    loop.issued * second,
                    loop.stalled * second,
                    dict(loop.utilization) if loop.utilization else None,
                )
                for loop in loops
            ),
        )

    def _computed(self, kernel: Operation, operands: Mapping[int, Words]) -> str:
        """Which scalar operands the call's own operations compute, for the report of a walk that failed."""
        names = [
            f"operand {index} is %{name}, a {self.module[name].opcode}"
            for index, name in enumerate(kernel.inputs)
            if index not in operands and self.module[name].shapes[0].is_scalars
        ]
        return f"; not followed from the call's parameters: {'; '.join(names)}" if names else ""

    def _operation(self, operation: Operation) -> XlaReport:
        """XLA's operations take the same time for every batch, so each is timed once."""
        if operation.name not in self._xla:
            read, written = self.module.traffic(operation)
            timed_by, reason = "schedule", ""
            try:
                seconds = walk(self._program(operation.name), {}, self.model).cycles / self.model.clock_hz
            except ScheduleError as error:
                # It is a DMA, runs on another core, or depends on what only XLA knows: its bytes bound it from below.
                seconds, timed_by, reason = (read + written) / self.model.hbm_bytes_per_s, "bytes", str(error)
            self._xla[operation.name] = XlaReport(
                operation.name, operation.opcode, seconds, read, written, timed_by, reason
            )
        return self._xla[operation.name]
