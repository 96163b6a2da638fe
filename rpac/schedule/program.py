"""A schedule -> Python functions, one for each straight run of instructions between places that branches go to.

Only what decides control flow, DMAs, semaphores and memory is translated; scalar work that feeds nothing but vector
addresses is left out, and instructions without scalar work cost nothing. Registers that one run sets and uses are Python
locals; the others live in a list. A phi takes what was last written to its register: each of its operands, where it is
set, is also written to the phi's own cell.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType

from rpac.errors import ScheduleError
from rpac.schedule import isa
from rpac.schedule.memory import Layout
from rpac.schedule.parse import Address, Argument, Instruction, Schedule


@dataclass(frozen=True)
class Exit:
    """One way out of a run: instructions [first, last) were executed, and the program goes on at `target`."""

    first: int
    last: int
    target: int


@dataclass(frozen=True)
class Program:
    """The translated scalar program of one schedule.

    code: defines `b<N>(c) -> (next bundle, cycle)` for each leader N. exits: indexed by the counters that the code
    keeps. cells: name of the register behind each cell of the register list. sites: instructions that the code refers
    to by number, with their bundle.
    """

    schedule: Schedule
    layout: Layout
    code: CodeType
    leaders: tuple[int, ...]
    exits: tuple[Exit, ...]
    cells: tuple[str, ...]
    sites: tuple[tuple[int, Instruction], ...]


def translate(schedule: Schedule) -> Program:
    """Translates a schedule once; the result can be walked with many batches."""
    return _Translator(schedule).run()


def _ordered(schedule: Schedule, bundle: int) -> Iterator[Instruction]:
    """Instructions of a bundle in an order that gives each its inputs: phis, work, renames, and the branch last."""

    def rank(instruction: Instruction) -> int:
        if instruction.opcode in isa.PHIS:
            return 0
        return 3 if instruction.opcode == "sbr.rel" else 2 if instruction.opcode in isa.RENAMES else 1

    instructions = schedule.bundles[bundle].instructions
    return iter(sorted(instructions, key=rank) if len(instructions) > 1 else instructions)


def _reads(instruction: Instruction) -> Iterator[str]:
    for argument in (*instruction.arguments, instruction.passthrough):
        if isinstance(argument, str):
            yield argument
        elif isinstance(argument, Address):
            yield from argument.registers
    if instruction.predicate:
        yield instruction.predicate[0]


_ROOTS = (isa.EFFECTS | isa.DMAS) - {"sld", "sdivrem.u32"}


def _needed(schedule: Schedule) -> set[str]:
    """Registers that control flow, DMAs, semaphores or memory depend on."""
    definitions: dict[str, list[Instruction]] = defaultdict(list)
    pending: list[str] = []
    for bundle in schedule.bundles:
        for instruction in bundle.instructions:
            if instruction.opcode in _ROOTS:
                pending.extend(_reads(instruction))
            if instruction.dest:
                definitions[instruction.dest].append(instruction)
    needed: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            for instruction in definitions[name]:
                pending.extend(_reads(instruction))
    return needed


class _Translator:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.layout = Layout(schedule)
        self.delay = schedule.generation.delay_slots
        self.needed = _needed(schedule)
        self.wide = {
            a
            for bundle in schedule.bundles
            for i in bundle.instructions
            if i.opcode in isa.RENAMES
            for a in i.arguments
            if isinstance(a, str)
        }
        self.phis_of: dict[str, list[str]] = defaultdict(list)
        branches = []
        for bundle in schedule.bundles:
            for i in bundle.instructions:
                if i.opcode in isa.PHIS and i.dest in self.needed:
                    for argument in dict.fromkeys(i.arguments):
                        self.phis_of[str(argument)].append(i.dest)
                if i.target is not None:
                    branches.append(i.target)
        self.leaders = sorted({0, *branches})
        self.cells: dict[str, int] = {}
        self.exits: list[Exit] = []
        self.sites: list[tuple[int, Instruction]] = []
        self.shared: set[str] = set()

    def run(self) -> Program:
        runs = [list(self._run_bundles(leader)) for leader in self.leaders]
        self._find_shared(runs)
        lines: list[str] = []
        for leader, bundles in zip(self.leaders, runs, strict=True):
            lines += [f"def b{leader}(c):", *(f" {line}" for line in self._function(leader, bundles))]
        code = compile("\n".join(lines), f"<walk of {self.schedule.name}>", "exec")
        return Program(
            self.schedule,
            self.layout,
            code,
            tuple(self.leaders),
            tuple(self.exits),
            tuple(self.cells),
            tuple(self.sites),
        )

    def _run_bundles(self, leader: int) -> Iterator[int]:
        """The instructions that follow a leader with no branch taken, up to the next leader."""
        following = [other for other in self.leaders if other > leader]
        last = following[0] if following else len(self.schedule.bundles)
        for bundle in range(leader, last):
            yield bundle
            branch = self._branch(bundle)
            if branch is not None and branch.predicate is None:
                return

    def _branch(self, bundle: int) -> Instruction | None:
        return next((i for i in self.schedule.bundles[bundle].instructions if i.opcode == "sbr.rel"), None)

    def _shadow(self, bundle: int) -> range:
        end = bundle + 1 + self.delay
        if end > len(self.schedule.bundles):
            raise ScheduleError(
                f"{self.schedule.name}:{self.schedule.bundles[bundle].line}: a branch has fewer than {self.delay} instructions "
                "after it; the dump is truncated or of another generation"
            )
        return range(bundle + 1, end)

    def _find_shared(self, runs: Iterable[list[int]]) -> None:
        """Registers that more than one run touches, or that a run reads before it sets them."""
        owner: dict[str, int] = {}
        for index, bundles in enumerate(runs):
            seen: set[str] = set()
            touched = [
                b for bundle in bundles for b in (bundle, *(self._shadow(bundle) if self._branch(bundle) else ()))
            ]
            for bundle in touched:
                for i in _ordered(self.schedule, bundle):
                    reads = () if i.opcode in isa.PHIS else _reads(i)
                    for name in (*reads, *((i.dest,) if i.dest else ())):
                        if owner.setdefault(name, index) != index or (name != i.dest and name not in seen):
                            self.shared.add(name)
                    if i.dest:
                        seen.add(i.dest)
                        if i.predicate is not None and i.dest in self.phis_of:
                            self.shared.add(i.dest)

    # One function

    def _function(self, leader: int, bundles: list[int]) -> Iterator[str]:
        loaded: set[str] = set()
        for bundle in bundles:
            offset = bundle - leader
            branch = self._branch(bundle)
            yield from self._bundle(bundle, offset, loaded)
            if branch is None:
                continue
            body = list(self._taken(leader, bundle, offset, branch, set(loaded)))
            if branch.predicate is None:
                yield from body
                return
            yield f"if {self._condition(branch.predicate, loaded)}:"
            yield from (f" {line}" for line in body)
        end = bundles[-1] + 1
        yield from self._leave(leader, end, end)

    def _taken(self, leader: int, bundle: int, offset: int, branch: Instruction, loaded: set[str]) -> Iterator[str]:
        for slot in self._shadow(bundle):
            if self._branch(slot) is not None:
                raise ScheduleError(
                    f"{self.schedule.name}:{self.schedule.bundles[slot].line}: a branch in the {self.delay} delay slots of "
                    f"the branch at instruction {bundle:#x}; the dump is of another generation"
                )
            yield from self._bundle(slot, offset + slot - bundle, loaded)
        end = bundle + 1 + self.delay
        assert branch.target is not None
        yield from self._leave(leader, end, branch.target)

    def _leave(self, first: int, last: int, target: int) -> Iterator[str]:
        self.exits.append(Exit(first, last, target))
        yield f"X[{len(self.exits) - 1}] += 1"
        yield f"return {target}, c + {last - first}"

    def _bundle(self, bundle: int, offset: int, loaded: set[str]) -> Iterator[str]:
        for i in _ordered(self.schedule, bundle):
            if i.opcode == "sbr.rel" or i.opcode in isa.NOOPS:
                continue
            if i.opcode in _ROOTS or i.opcode in isa.OPERANDS:
                yield from self._effect(i, bundle, offset, loaded)
            elif i.dest in self.needed:
                yield from self._value(i, bundle, loaded)

    def _value(self, i: Instruction, bundle: int, loaded: set[str]) -> Iterator[str]:
        if i.opcode in isa.PHIS:
            yield from self._assign(i.dest, f"R[{self._cell('phi ' + i.dest)}]", loaded)
            return
        arguments = [self._read(a, loaded) for a in i.arguments]
        expression = self._expression(i, bundle, arguments, loaded)
        if i.passthrough is not None:
            assert i.predicate is not None
            holds = self._condition(i.predicate, loaded)
            yield from self._assign(i.dest, f"pick({holds}, {expression}, {self._read(i.passthrough, loaded)})", loaded)
        elif i.predicate is not None and i.dest in self.phis_of:
            # A register that keeps its old value where the predicate fails: the phi sees that value.
            yield f"if {self._condition(i.predicate, loaded)}:"
            yield from (f" {line}" for line in self._assign(i.dest, expression, set()))
        else:
            yield from self._assign(i.dest, expression, loaded)

    def _expression(self, i: Instruction, bundle: int, arguments: list[str], loaded: set[str]) -> str:
        opcode = i.opcode
        if opcode in isa.RENAMES:
            return arguments[0]
        if opcode == "sld":
            address = i.arguments[0]
            if i.note == "core id":
                return "0"
            assert isinstance(address, Address)
            return f"load({self._location(address, loaded)}, {i.line})"
        if opcode == "sdivrem.u32":
            return f"divrem({arguments[0]}, {arguments[1]}, {i.note!r})"
        if opcode == "sshll.u32":
            if i.dest in self.wide:
                return isa.WIDE_SHIFT.format(*arguments)
            if isinstance(i.arguments[1], int) and 0 <= i.arguments[1] < 32:
                return f"(({arguments[0]} << {arguments[1]})+H & M)-H"
        if opcode == "sshrl.u32" and isinstance(i.arguments[1], int) and 0 < i.arguments[1] < 32:
            return f"({arguments[0]} & M) >> {arguments[1]}"
        if opcode in isa.PURE:
            return isa.PURE[opcode].format(*arguments)
        kind = "float arithmetic" if isa.FLOAT_SCALAR.fullmatch(opcode) else "a vector"
        return f"unknown({self._site(bundle, i)}, {kind!r})"

    def _assign(self, name: str, expression: str, loaded: set[str]) -> Iterator[str]:
        targets = [_identifier(name)]
        if name in self.shared:
            targets.append(f"R[{self._cell(name)}]")
        targets += [f"R[{self._cell('phi ' + phi)}]" for phi in self.phis_of.get(name, ())]
        loaded.add(name)
        yield f"{' = '.join(targets)} = {expression}"

    def _effect(self, i: Instruction, bundle: int, offset: int, loaded: set[str]) -> Iterator[str]:
        site = self._site(bundle, i)
        now = f"c + {offset}"
        arguments = [self._read(a, loaded) for a in i.arguments]
        opcode = i.opcode
        if opcode in isa.OPERANDS:
            if i.dest in self.needed:
                yield from self._assign(i.dest, f"O[{arguments[0]}]", loaded)
            return
        if opcode == "spop.drf":
            yield from self._assign(i.dest, f"take({arguments[0]})", loaded)
            return
        if opcode == "vpop.sfrf":
            yield from self._assign(i.dest, arguments[0], loaded)
            return
        if opcode == "vsyncmov":
            yield from self._assign(i.dest, f"sync_value({now}, {arguments[0]})", loaded)
            return
        guard = ""
        if i.predicate is not None:
            guard = f"if {self._condition(i.predicate, loaded)}: "
        if opcode == "sst":
            address = i.arguments[0]
            assert isinstance(address, Address)
            yield f"{guard}store({self._location(address, loaded)}, {arguments[1]}, {site})"
        elif opcode == "dma.done.wait":
            yield f"{guard}c += wait({now}, {site}, {', '.join(arguments)})"
        elif opcode in ("vsyncadd", "vsyncpa"):
            yield f"{guard}{'sync_add' if opcode == 'vsyncadd' else 'sync_set'}({now}, {site}, {', '.join(arguments)})"
        elif opcode == "shalt.err":
            yield f"{guard}halt({site})"
        else:
            yield f"{guard}dma({now}, {site}, {', '.join(arguments[:4])})"

    # Arguments

    def _read(self, argument: Argument, loaded: set[str]) -> str:
        if isinstance(argument, Address):
            return f"({self._location(argument, loaded)})"
        if not isinstance(argument, str):
            return repr(argument) if isinstance(argument, bool) or argument >= 0 else f"({argument})"
        if argument in self.shared and argument not in loaded:
            return f"R[{self._cell(argument)}]"
        return _identifier(argument)

    def _location(self, address: Address, loaded: set[str]) -> str:
        constant = self.layout.address(address)
        return (
            " + ".join([*(self._read(r, loaded) for r in address.registers), *([str(constant)] if constant else [])])
            or "0"
        )

    def _condition(self, predicate: tuple[str, bool], loaded: set[str]) -> str:
        name, value = predicate
        return self._read(name, loaded) if value else f"({self._read(name, loaded)} ^ True)"

    def _cell(self, name: str) -> int:
        return self.cells.setdefault(name, len(self.cells))

    def _site(self, bundle: int, i: Instruction) -> int:
        self.sites.append((bundle, i))
        return len(self.sites) - 1


def _identifier(name: str) -> str:
    return name if name[0].isalpha() else f"n{name}"
