"""The time of a model's whole step: every operation of the compiled module by its own schedule, in the compiler's order.

The compiler schedules each distinct operation once and then a program that calls them (`inlined_call`), starts asynchronous
copies and collectives, and waits for them. The scheduled HLO module has the same order, and it is what is followed here.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from rpac.devices.chip import chip
from rpac.errors import ScheduleError
from rpac.schedule.compilers import check_compiler
from rpac.schedule.dump import TOP, Dump
from rpac.schedule.hlo import Module, Operation, parse_module
from rpac.schedule.identical import schedule_names
from rpac.schedule.interconnect import Collective, collective_of, interconnect_of, seconds_of
from rpac.schedule.matmuls import flops_of
from rpac.schedule.memory import Words
from rpac.schedule.model import model_of
from rpac.schedule.parse import parse_schedule
from rpac.schedule.program import Program, translate
from rpac.schedule.sequence import run
from rpac.schedule.timeline import Timeline
from rpac.schedule.traffic import copied_bytes, moved_bytes
from rpac.schedule.walk import Walk, walk

ATTENTION: Final = re.compile(r"rpa_\w+")
"""How the kernels of rpac's programs are called."""

_NO_WORK: Final = re.compile(
    r'custom_call_target="(?:ConcatBitcast|PrepareAsyncCall\w+|Sharding|SPMD\w+|AssumeGather\w+)"'
)
_HYPHENED: Final = re.compile(r"\b(vclamps)-(f32)\b")
"""An instruction that is in fusions with a clamp. The parser knows it by its name with a dot. It does not take the other, because
the kept predictions of calls time such a fusion by its bytes, and would all change."""
_PREFETCH: Final = "cross_program_prefetch_index"
_MOST_ASSUMED: Final = 1 << 18
_COUNTED: Final = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+[A-Z]*\s*: \s*\{", re.MULTILINE)


@dataclass(frozen=True)
class Event:
    """One operation that ran. category: one of CATEGORIES.

    schedule: the operation whose schedule it has; empty where it has none, and then `reason` says why. seconds: that the core
    spent on it, waits included. assumed: whether integers that it reads from data were taken to be 0.
    """

    name: str
    opcode: str
    category: str
    seconds: float
    read_bytes: int
    written_bytes: int
    flops: int
    schedule: str = ""
    reason: str = ""
    assumed: bool = False


CATEGORIES: Final = {
    "attention": "the kernels of rpac's programs",
    "kernels": "other Pallas kernels",
    "matrix products": "operations of XLA that hold a matrix product, with what is fused into them",
    "vector work": "all other operations of XLA: norms, rotary embeddings, activations, gathers, copies by the core",
    "collectives": "what the core waits for collectives",
    "copies": "what the core waits for asynchronous copies, also where DMAs of an operation queue behind them",
    "calls": "the instructions of the program that calls the operations",
}


@dataclass(frozen=True)
class Timed:
    """A step that was followed to its end. copied_bytes: of asynchronous copies. wires_seconds: of collectives, hidden or not.

    loops_once: loops that run as often as data says, and were followed once.
    """

    events: tuple[Event, ...]
    seconds: float
    copied_bytes: int
    collectives: tuple[Collective, ...]
    wires_seconds: float
    loops_once: tuple[str, ...]


class StepCall:
    """A dumped step, read once, to be timed for any number of batches.

    Raises ScheduleError for a module that cannot be read, and for a compiler that is not verified, unless `any_compiler`.
    """

    def __init__(self, dump: Dump, *, any_compiler: bool = False) -> None:
        if not any_compiler:
            check_compiler(dump.compiler)
        self.dump = dump
        self.model = model_of(dump.target)
        self.wires = interconnect_of(dump.target)
        self.module: Module = parse_module(dump.hlo)
        self.schedules = schedule_names(self.module, dump.schedules)
        self._programs: dict[str, Program] = {}
        self._walks: dict[tuple[object, ...], Walk | ScheduleError] = {}
        self._flops: dict[str, int] = {}
        self.call_seconds = self._instructions_between() / self.model.clock_hz

    def time(self, parameters: Mapping[int, Words]) -> Timed:
        """Follows the step for one batch. `parameters`: its int32 arguments, flattened, by number among all leaves.

        Raises ScheduleError where a kernel of Pallas cannot be walked, or where a loop runs as often as data says.
        """
        return _Run(self, parameters).timed()

    def flops(self, operation: Operation) -> int:
        """Of the matrix products in an operation, as compiled."""
        if operation.name not in self._flops:
            self._flops[operation.name] = flops_of(self.module, operation)
        return self._flops[operation.name]

    def walked(self, operation: Operation, operands: Mapping[int, Words], backlog: int) -> Walk:
        """Walks an operation's schedule, once for each backlog and each set of operands. Raises ScheduleError as `walk`."""
        name = self.schedules.get(operation.name)
        if name is None:
            raise ScheduleError(f"the dump has no schedule of {operation.name} ({operation.opcode})")
        given = [(index, operands[index]) for index in sorted(operands)]
        key = (name, backlog, *((index, w.tobytes() if isinstance(w, array) else tuple(w)) for index, w in given))
        if key not in self._walks:
            try:
                self._walks[key] = walk(self._program(name), operands, self.model, backlog=float(backlog))
            except ScheduleError as error:
                self._walks[key] = error
        found = self._walks[key]
        if isinstance(found, ScheduleError):
            raise found
        return found

    def _program(self, name: str) -> Program:
        if name not in self._programs:
            text = _HYPHENED.sub(r"\1.\2", self.dump.schedules[name])
            self._programs[name] = translate(parse_schedule(text, self.dump.target, name))
        return self._programs[name]

    def _instructions_between(self) -> float:
        """Instructions of the top-level program for each operation of the entry: those in no loop, each issued once at most."""
        timed = [o for o in self.module.computations[self.module.entry].operations if not o.is_free]
        return len(_COUNTED.findall(self.dump.schedules.get(TOP, ""))) / max(1, len(timed))


class _Run:
    def __init__(self, call: StepCall, parameters: Mapping[int, Words]) -> None:
        self.call = call
        self.module = call.module
        self.parameters = parameters
        self.timeline = Timeline(call.model)
        self.events: list[Event] = []
        self.collectives: list[Collective] = []
        self.wires_seconds = 0.0
        self.loops_once: list[str] = []
        self.prefetched = _prefetched(call.module)
        self.followed = _followed(call)

    def timed(self) -> Timed:
        run(self.module, self.parameters, self._kernel, self._other, self.followed.__contains__, self._once)
        return Timed(
            tuple(self.events),
            self.timeline.now,
            round(self.timeline.copied),
            tuple(self.collectives),
            self.wires_seconds,
            tuple(self.loops_once),
        )

    def _once(self, operation: Operation) -> None:
        self.loops_once.append(operation.name)

    def _kernel(self, operation: Operation, operands: dict[int, Words]) -> Mapping[int, Words]:
        self._between()
        category = "attention" if ATTENTION.match(operation.name) else "kernels"
        return self._by_schedule(operation, operands, category).written

    def _other(self, operation: Operation, operands: Callable[[], dict[int, Words]]) -> None:
        collective = collective_of(self.module, operation)
        self._between()
        if operation.opcode.endswith("-done"):
            self._await(operation)
        elif collective is not None:
            self._collective(operation, collective)
        elif operation.opcode.endswith("-start"):
            size = 0 if operation.name in self.prefetched else copied_bytes(self.module, operation)
            self.timeline.start_copy(operation.name, size)
        elif not (operation.opcode.endswith("-update") or _NO_WORK.search(operation.attributes)):
            self._work(operation, operands())

    def _between(self) -> None:
        self.timeline.pass_by(self.call.call_seconds)
        self.events.append(Event("calls", "", "calls", self.call.call_seconds, 0, 0, 0, "calls"))

    def _await(self, operation: Operation) -> None:
        started = self.module[operation.inputs[0]]
        waited = self.timeline.wait(started.name)
        is_collective = collective_of(self.module, started) is not None
        category, reason = ("collectives", "by its bytes over the interconnect") if is_collective else ("copies", "")
        if not is_collective and started.called:
            reason = "runs on another core; by its bytes"
        self.events.append(Event(operation.name, operation.opcode, category, waited, 0, 0, 0, "", reason))

    def _collective(self, operation: Operation, collective: Collective) -> None:
        seconds = seconds_of(collective, self.call.wires)
        self.collectives.append(collective)
        self.wires_seconds += seconds
        self.timeline.start_collective(operation.name, seconds)
        if not operation.opcode.endswith("-start"):
            waited = self.timeline.wait(operation.name)
            reason = "by its bytes over the interconnect"
            self.events.append(Event(operation.name, collective.kind, "collectives", waited, 0, 0, 0, "", reason))

    def _work(self, operation: Operation, operands: dict[int, Words]) -> None:
        category = "matrix products" if self.call.flops(operation) else "vector work"
        try:
            self._by_schedule(operation, {}, category)
        except ScheduleError as without:
            try:
                self._by_schedule(operation, self._filled(operation, operands), category, assumed=True)
            except ScheduleError:
                self._by_bytes(operation, category, str(without))

    def _filled(self, operation: Operation, operands: dict[int, Words]) -> dict[int, Words]:
        """The scalar operands, 0 where they are data, such as token ids: how long a gather takes does not depend on them."""
        arrays = [self.module[name].shapes[0] for name in operation.inputs]
        return {
            index: [word or 0 for word in operands[index]] if index in operands else [0] * array.count
            for index, array in enumerate(arrays)
            if index in operands or (array.is_scalars and array.count <= _MOST_ASSUMED)
        }

    def _by_schedule(
        self, operation: Operation, operands: dict[int, Words], category: str, *, assumed: bool = False
    ) -> Walk:
        began, backlog = self.timeline.now, self.timeline.backlog
        done = self.timeline.walk(lambda backlog: self.call.walked(operation, operands, backlog))
        late = 0.0
        if backlog:
            alone = self.call.walked(operation, operands, 0)
            late = max(0.0, done.cycles - alone.cycles) / self.call.model.clock_hz
            self.events.append(Event(operation.name, operation.opcode, "copies", late, 0, 0, 0))
        cores = done.schedule.cores
        self.events.append(
            Event(
                operation.name,
                operation.opcode,
                category,
                self.timeline.now - began - late,
                done.read_bytes * cores,
                done.written_bytes * cores,
                self.call.flops(operation),
                self.call.schedules[operation.name],
                assumed=assumed,
            )
        )
        return done

    def _by_bytes(self, operation: Operation, category: str, reason: str) -> None:
        """Its bytes at the HBM's rate and then its flops at the peak rate: an upper bound where both could overlap."""
        read, written = moved_bytes(self.module, operation)
        flops = self.call.flops(operation)
        seconds = self.timeline.stream(flops / chip(self.call.dump.target).peak_bf16_flops, read + written)
        self.events.append(Event(operation.name, operation.opcode, category, seconds, read, written, flops, "", reason))


def _followed(call: StepCall) -> frozenset[str]:
    """Computations with operations of their own, which loops, conditionals and calls run."""
    module = call.module
    found: set[str] = set()
    for computation in module.computations.values():
        for operation in computation.operations:
            if operation.opcode in ("while", "conditional", "call"):
                found.update(name for names in operation.called.values() for name in names)
    return frozenset(name for name in found if _has_own(call, name))


def _has_own(call: StepCall, computation: str) -> bool:
    return any(
        o.is_kernel or o.name in call.schedules or collective_of(call.module, o) is not None
        for o in call.module.computations[computation].operations
    ) or call.module.holds_kernel(computation)


def _prefetched(module: Module) -> frozenset[str]:
    """Copies at the start that the end of the call before has made: the runtime keeps that memory between calls."""
    operations = module.computations[module.entry].operations
    starts = [o for o in operations if o.opcode == "copy-start"]
    again = {o.inputs[0] for o in starts if _PREFETCH not in o.attributes}
    return frozenset(o.name for o in starts if _PREFETCH in o.attributes and o.inputs[0] in again)
