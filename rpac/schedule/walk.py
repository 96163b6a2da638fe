"""Executes a schedule's scalar program with a batch's scalar operands and times it: instructions, DMAs, waits.

One VLIW instruction is one cycle. A DMA goes through the HBM model; a `dma.done.wait` stalls until its semaphore has
what it asks for. Vector work only takes its instructions: the schedule already holds its latencies as empty ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rpac.errors import ScheduleError
from rpac.schedule.hbm import Channel, Semaphore
from rpac.schedule.isa import GRANULE_BYTES
from rpac.schedule.layout import Image
from rpac.schedule.memory import GRANULE_WORDS, Contents, Smem, Unknown, Value, Words
from rpac.schedule.model import Model
from rpac.schedule.parse import Schedule
from rpac.schedule.program import Program, translate

_H, _M = 1 << 31, (1 << 32) - 1


@dataclass(frozen=True)
class Transfer:
    """One DMA: cycles, the operand at its HBM end (None: none), offset and size there in bytes, and which way it went."""

    started: float
    done: float
    opcode: str
    operand: int | None
    offset: int
    size: int
    to_hbm: bool


@dataclass(frozen=True)
class Wait:
    """What one `dma.done.wait` instruction cost over the whole walk. Cycles of the walk's clock."""

    bundle: int
    line: int
    semaphore: str
    count: int
    stalled: float


@dataclass(frozen=True)
class Walk:
    """A finished walk. Cycles are of the model's clock; `executed[i]` counts how often VLIW instruction i was issued.

    written: the int32 words that the scalar program's DMAs left in the kernel's results, by result. channel_free_at: when the HBM
    channel has moved all that was started, which may be after the end.
    """

    schedule: Schedule
    cycles: float
    issued: int
    stalled: float
    dma_busy: float
    dmas: int
    read_bytes: int
    written_bytes: int
    waits: tuple[Wait, ...]
    executed: tuple[int, ...]
    transfers: tuple[Transfer, ...]
    written: Mapping[int, Words]
    channel_free_at: float


def walk(
    schedule: Schedule | Program,
    operands: Mapping[int, Words],
    model: Model,
    *,
    trace: bool = False,
    max_cycles: float = 1e12,
    backlog: float = 0.0,
) -> Walk:
    """Runs a kernel's schedule with its scalar operands.

    `operands`: int32 values by operand index, flattened, or an `Image` of an operand's memory; those that the scalar program
    does not read may be missing, and a word that is not known is None.
    `trace`: also record every transfer. `backlog`: for how many cycles the HBM channel is still busy with transfers that were
    started before. Raises ScheduleError where an operand is missing or has another length than the
    schedule says, where control flow needs a value that is not known (it names it), where a wait is never satisfied,
    where a check in the kernel fails, and past `max_cycles`.
    """
    program = schedule if isinstance(schedule, Program) else translate(schedule)
    return _Walker(program, operands, model, trace, backlog).run(max_cycles)


class _Walker:
    def __init__(
        self, program: Program, operands: Mapping[int, Words], model: Model, trace: bool, backlog: float
    ) -> None:
        self.program = program
        self.schedule = program.schedule
        self.layout = program.layout
        _check_operands(program.schedule, operands)
        self.smem = Smem(program.layout, program.schedule.name)
        self.contents = Contents(program.layout, operands, program.schedule.name)
        # Where the other core does its half at the same time, each has half of the channel.
        share = model.bytes_per_cycle / program.schedule.cores
        self.channel = Channel(share, model.cycles(model.latency_s), model.cycles(model.setup_s), backlog)
        self.local_latency = model.cycles(model.local_latency_s)
        self.semaphores: dict[int, Semaphore] = {}
        self.waits: dict[int, list[float]] = {}
        self.transfers: list[Transfer] | None = [] if trace else None
        self.operands = operands
        self.counts = [0] * len(program.exits)
        self.dmas = self.read = self.written = 0

    def run(self, max_cycles: float) -> Walk:
        functions = self._functions()
        bundle, cycle, end = 0, 0.0, len(self.schedule.bundles)
        try:
            while bundle < end:
                bundle, cycle = functions[bundle](cycle)
                if cycle > max_cycles:
                    raise ScheduleError(f"still running after {cycle:.3g} cycles; a loop's bound may be wrong")
        except ScheduleError as error:
            raise ScheduleError(
                f"{self.schedule.name}: walking the instructions from {bundle:#x} on, at cycle {cycle:.0f}: {error}"
            ) from None
        executed = self._executed()
        issued = sum(executed)
        return Walk(
            schedule=self.schedule,
            cycles=cycle,
            issued=issued,
            stalled=cycle - issued,
            dma_busy=self.channel.busy,
            dmas=self.dmas,
            read_bytes=self.read,
            written_bytes=self.written,
            waits=self._waits(),
            executed=executed,
            transfers=tuple(self.transfers or ()),
            written=self.contents.written(),
            channel_free_at=self.channel.free_at,
        )

    def _functions(self) -> dict[int, Callable[[float], tuple[int, float]]]:
        cells: list[Value] = [Unknown(f"register %{name} was never set") for name in self.program.cells]
        space: dict[str, Any] = {
            "R": cells,
            "X": self.counts,
            "O": {
                index: self.layout.pointer(operand, self.operands) for index, operand in self.layout.operands.items()
            },
            "H": _H,
            "M": _M,
            "load": self.smem.load,
            "store": self._store,
            "unknown": self._unknown,
            "dma": self._dma,
            "wait": self._wait,
            "sync_add": self._sync_add,
            "sync_set": self._sync_set,
            "sync_value": lambda cycle, flag: self._semaphore(flag).settle(cycle),
            "halt": self._halt,
            "shl": lambda a, b: ((a << b) + _H & _M) - _H if 0 <= b < 32 else 0,
            "shr": lambda a, b: (((a & _M) >> b) + _H & _M) - _H if 0 <= b < 32 else 0,
            "umin": lambda a, b: pick((a & _M) <= (b & _M), a, b),
            "umax": lambda a, b: pick((a & _M) >= (b & _M), a, b),
            "pick": pick,
            "divrem": divrem,
            "take": lambda results: results.pop(0) if isinstance(results, list) else results,
        }
        exec(self.program.code, space)  # the code is this package's own translation, not text of the dump
        return {leader: space[f"b{leader}"] for leader in self.program.leaders}

    def _place(self, site: int) -> str:
        bundle, instruction = self.program.sites[site]
        return f"{self.schedule.name}:{instruction.line}: {instruction} in instruction {bundle:#x}"

    def _known(self, value: Value, site: int, what: str) -> int:
        if isinstance(value, Unknown):
            raise ScheduleError(f"{self._place(site)}: {what} is not known: {value.reason}")
        return value

    def _unknown(self, site: int, kind: str) -> Unknown:
        return Unknown(f"{self._place(site)} comes out of {kind}")

    def _store(self, address: Value, value: Value, site: int) -> None:
        self.smem.words[self._known(address, site, "the address")] = value

    def _halt(self, site: int) -> None:
        raise ScheduleError(f"{self._place(site)}: a check that the compiler put into the kernel fails for this batch")

    def _semaphore(self, flag: int) -> Semaphore:
        return self.semaphores.setdefault(flag, Semaphore())

    def _dma(self, cycle: float, site: int, source: Value, size: Value, destination: Value, flag: Value) -> None:
        opcode = self.program.sites[site][1].opcode
        granules = self._known(size, site, "the size")
        if granules < 0:
            raise ScheduleError(f"{self._place(site)}: the size is {granules} granules")
        semaphore = self._semaphore(self._known(flag, site, "the semaphore"))
        self.dmas += 1
        if granules == 0:
            return
        start = self._known(source, site, "the source")
        end = self._known(destination, site, "the destination")
        read, written = self._hbm_end(start, opcode, "hbm_to"), self._hbm_end(end, opcode, "to_hbm")
        size_bytes = granules * GRANULE_BYTES
        self.read += size_bytes if read else 0
        self.written += size_bytes if written else 0
        through_hbm = size_bytes * ((read is not None) + (written is not None))
        done = self.channel.start(cycle, through_hbm) if through_hbm else cycle + self.local_latency
        semaphore.expect(done, granules)
        self._carry(opcode, start, end, granules * GRANULE_WORDS)
        if self.transfers is not None:
            operand, offset = written or read or (None, 0)
            self.transfers.append(Transfer(cycle, done, opcode, operand, offset, size_bytes, written is not None))

    def _carry(self, opcode: str, source: int, destination: int, words: int) -> None:
        """Moves the scalars that a DMA carries; what comes out of vectors is not known."""
        from_space, _, to_space = opcode.removeprefix("dma.").partition("_to_")
        if to_space == "smem":
            self.smem.fill(destination, self.contents.read(from_space, source, words))
        elif from_space == "smem":
            self.contents.write(to_space, destination, self.smem.read(source, words))
        else:
            self.contents.write(to_space, destination, words)

    def _hbm_end(self, address: int, opcode: str, mark: str) -> tuple[int | None, int] | None:
        """(operand, offset) where this end of a DMA is in HBM, else None."""
        if mark not in opcode and opcode != "dma.general":
            return None
        found = self.layout.operand(address)
        if found is None or found[0].space != "hbm":
            return (None, 0) if mark in opcode else None
        return found[0].index, found[1]

    def _wait(self, cycle: float, site: int, flag: Value, amount: Value) -> float:
        wanted = self._known(amount, site, "the amount")
        address = self._known(flag, site, "the semaphore")
        done = self._semaphore(address).wait(cycle, wanted)
        if done is None:
            raise ScheduleError(
                f"{self._place(site)}: waits for {wanted} granules on {self.layout.describe(address)}, which has "
                f"{self._semaphore(address).value} and nothing under way: the kernel would hang"
            )
        record = self.waits.setdefault(site, [address, 0, 0.0])
        record[1] += 1
        record[2] += done - cycle
        return done - cycle

    def _sync_add(self, cycle: float, site: int, flag: Value, amount: Value) -> None:
        semaphore = self._semaphore(self._known(flag, site, "the semaphore"))
        semaphore.settle(cycle)
        semaphore.value += self._known(amount, site, "the amount")

    def _sync_set(self, cycle: float, site: int, flag: Value, value: Value) -> None:
        semaphore = self._semaphore(self._known(flag, site, "the semaphore"))
        semaphore.settle(cycle)
        semaphore.value = self._known(value, site, "the value")

    def _waits(self) -> tuple[Wait, ...]:
        merged: dict[int, Wait] = {}
        for site, (flag, count, stalled) in self.waits.items():
            bundle, instruction = self.program.sites[site]
            # An instruction in the shadow of a branch has a site on each way.
            earlier = merged.get(bundle)
            merged[bundle] = Wait(
                bundle,
                instruction.line,
                self.layout.describe(int(flag)),
                int(count) + (earlier.count if earlier else 0),
                stalled + (earlier.stalled if earlier else 0.0),
            )
        return tuple(merged[bundle] for bundle in sorted(merged))

    def _executed(self) -> tuple[int, ...]:
        steps = [0] * (len(self.schedule.bundles) + 1)
        for way, count in zip(self.program.exits, self.counts, strict=True):
            steps[way.first] += count
            steps[way.last] -= count
        total, executed = 0, []
        for step in steps[:-1]:
            total += step
            executed.append(total)
        return tuple(executed)


def pick(condition: Value, yes: Value, no: Value) -> Value:
    """`yes if condition else no`; unknown where the condition is, so that a choice nobody uses does no harm."""
    return yes if condition is True else no if condition is False else condition


def divrem(a: Value, b: Value, which: str) -> list[Value]:
    """What the unsigned divider pushes: the quotient, the remainder, or both in that order."""
    if isinstance(a, Unknown) or isinstance(b, Unknown):
        unknown = a if isinstance(a, Unknown) else b
        return [unknown, unknown]
    if b & _M == 0:
        return [Unknown("a division by zero")] * 2
    quotient, remainder = divmod(a & _M, b & _M)
    results = {"kDiv": [quotient], "kRem": [remainder], "kDivAndRem": [quotient, remainder]}.get(which)
    if results is None:
        return [Unknown(f"a division of kind {which!r}")] * 2
    return [(x + _H & _M) - _H for x in results]


def _check_operands(schedule: Schedule, operands: Mapping[int, Words]) -> None:
    shapes = {operand.index: operand.shape for operand in schedule.operands}
    for index, values in operands.items():
        if index not in shapes:
            raise ScheduleError(f"{schedule.name}: operand {index} was given; the kernel has {sorted(shapes)}")
        size = 1
        for n in shapes[index]:
            size *= n
        if len(values) != size and not isinstance(values, Image):
            raise ScheduleError(
                f"{schedule.name}: operand {index} has {len(values)} values; the kernel takes {list(shapes[index])}, so {size}"
            )
