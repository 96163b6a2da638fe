"""The time of a whole call: its kernels, walked with the batch's scalars, and XLA's operations around them.

Definitions. *Needed* bytes and flops are what the attention of the batch cannot do without (`attention_work`), whatever
a kernel moves. MBU = needed bytes / (time x the chip's peak HBM bytes/s); MFU = needed flops / (time x its peak bf16
flop/s); a multiply-add is two flops. Both are given over the whole call, and over its kernels alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rpac.devices.chip import chip
from rpac.errors import ScheduleError
from rpac.schedule.compilers import check_compiler, is_verified
from rpac.schedule.dump import Dump
from rpac.schedule.hlo import Module, Operation, parse_module
from rpac.schedule.loops import loop_around, loops_of
from rpac.schedule.model import Model, model_of
from rpac.schedule.parse import Spills, parse_schedule
from rpac.schedule.program import Program, translate
from rpac.schedule.walk import Walk, walk

DEFINITIONS = {
    "seconds": "the whole call, XLA's operations included, one after another",
    "kernel_seconds": "the Pallas kernels of the call",
    "mbu": "needed_bytes / (seconds x the chip's peak HBM bytes/s)",
    "mfu": "needed_flops / (seconds x the chip's peak bf16 flop/s); a multiply-add is two flops",
    "needed_bytes": "cached K and V read once, new K and V read and written once, queries read, output written",
    "needed_flops": "4 x head_dim x q_heads for each pair of a query and a token that it may attend to; of latent attention "
    "2 x (2 x kv_lora_rank + rope_dim) x q_heads",
    "moved_bytes": "what DMAs between HBM and the core move, with what XLA's operations read and write",
    "compute_seconds": "instructions issued, empty ones included, over the clock",
    "stall_seconds": "what waits add to them; the two make up a kernel's seconds",
    "dma_seconds": "how long the HBM channel was busy; overlaps both",
    "utilization": "share of a slot's capacity that the instructions issued in a loop used, as the compiler counts it",
}


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
class WaitReport:
    """One wait of a kernel: where, on what, how often, and how long it stalled in all.

    line: of the schedule's text. loop: first instruction of the innermost loop around it, None outside of all. semaphore: the
    first that it waited on; a wait in a loop goes through those of several buffers.
    """

    instruction: int
    line: int
    loop: int | None
    semaphore: str
    count: int
    stall_seconds: float


@dataclass(frozen=True)
class LoopReport:
    """One loop of a kernel, without the loops inside it. Utilization by slot, None where the dump does not say."""

    first_instruction: int
    last_instruction: int
    depth: int
    iterations: int
    compute_seconds: float
    stall_seconds: float
    utilization: dict[str, float] | None


@dataclass(frozen=True)
class KernelReport:
    """One kernel. seconds = compute_seconds (instructions issued) + stall_seconds; the channel's dma_seconds overlap both."""

    name: str
    seconds: float
    compute_seconds: float
    stall_seconds: float
    dma_seconds: float
    dmas: int
    read_bytes: int
    written_bytes: int
    instructions: int
    spills: Spills
    waits: tuple[WaitReport, ...]
    loops: tuple[LoopReport, ...]


@dataclass(frozen=True)
class XlaReport:
    """One operation of XLA around the kernels.

    timed_by: `schedule` (walked) or `bytes` (over the HBM bandwidth). reason: why it was not walked, or empty.
    """

    name: str
    opcode: str
    seconds: float
    read_bytes: int
    written_bytes: int
    timed_by: str
    reason: str


@dataclass(frozen=True)
class CallReport:
    """The prediction for one call and batch. Times in seconds, sizes in bytes; see DEFINITIONS.

    compiler: libtpu's version; compiler_verified: whether the reading of its schedules is.
    """

    target: str
    compiler: str
    compiler_verified: bool
    seconds: float
    kernel_seconds: float
    mbu: float | None
    mfu: float | None
    kernel_mbu: float | None
    kernel_mfu: float | None
    needed_bytes: int | None
    needed_flops: int | None
    moved_bytes: int
    kernels: tuple[KernelReport, ...]
    xla: tuple[XlaReport, ...]
    model: Model

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the definitions of its fields under `definitions`."""
        return {**asdict(self), "definitions": DEFINITIONS}


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
        self.kernels = tuple(o for o in self.module.operations if o.is_kernel)
        if not self.kernels:
            raise ScheduleError("the dumped call holds no Pallas kernel; nothing to predict")

    def operands(self, parameters: Mapping[int, Sequence[int]]) -> dict[str, dict[int, list[int]]]:
        """Kernel name -> its int32 operands by index, as far as the call's int32 parameters and constants give them."""
        return {kernel.name: self.module.scalars(kernel, parameters) for kernel in self.kernels}

    def walk_kernel(self, name: str, operands: Mapping[int, Sequence[int]], *, trace: bool = False) -> Walk:
        """Walks one kernel of the call. Raises ScheduleError as `walk`."""
        return walk(self._program(name), operands, self.model, trace=trace)

    def predict(self, parameters: Mapping[int, Sequence[int]], work: Work | None = None) -> CallReport:
        """Times the call for one batch.

        `parameters`: the call's int32 arguments, flattened, by parameter number. Raises ScheduleError where a kernel
        needs a scalar that they and the call's constants do not give, and as `walk`.
        """
        operands = self.operands(parameters)
        kernels = tuple(self._kernel(kernel, operands[kernel.name]) for kernel in self.kernels)
        xla = tuple(self._operation(o) for o in self.module.operations if not (o.is_kernel or o.is_free))
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
            kernel_mbu=None if by_bytes is None else by_bytes / kernel_seconds,
            kernel_mfu=None if by_flops is None else by_flops / kernel_seconds,
            needed_bytes=work.bytes if work else None,
            needed_flops=work.flops if work else None,
            moved_bytes=moved,
            kernels=kernels,
            xla=xla,
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

    def _kernel(self, kernel: Operation, operands: Mapping[int, Sequence[int]]) -> KernelReport:
        try:
            done = self.walk_kernel(kernel.name, operands)
        except ScheduleError as error:
            raise ScheduleError(f"{error}{self._computed(kernel, operands)}") from None
        loops = loops_of(done)
        second = 1 / self.model.clock_hz
        return KernelReport(
            name=kernel.name,
            seconds=done.cycles * second,
            compute_seconds=done.issued * second,
            stall_seconds=done.stalled * second,
            dma_seconds=done.dma_busy * second,
            dmas=done.dmas,
            read_bytes=done.read_bytes,
            written_bytes=done.written_bytes,
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

    def _computed(self, kernel: Operation, operands: Mapping[int, Sequence[int]]) -> str:
        """Which scalar operands the call's own operations compute, for the report of a walk that failed."""
        names = [
            f"operand {index} is %{name}, a {self.module[name].opcode}"
            for index, name in enumerate(kernel.inputs)
            if index not in operands and self.module[name].shapes[0][0] == "s32"
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
