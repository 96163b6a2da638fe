"""The text of a kernel's final schedule (`*-packed-bundles-post-ra.txt`) -> typed instructions.

One VLIW instruction a line: `0x2d2 LB: >>> { %dest = opcode (predicate), arguments ;; ... }`. The compiler calls it a
bundle, and so do the names in this package's code. What is in its slots is only counted where it is vector work;
everything that moves scalars, DMAs, semaphores or the program counter becomes an `Instruction`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rpac.errors import ScheduleError
from rpac.schedule import isa


@dataclass(frozen=True, slots=True)
class Address:
    """`[smem:[#allocation7 + %s3 + $0x4]]`: an allocation's name (or None), registers, and a constant offset."""

    allocation: str | None
    registers: tuple[str, ...]
    offset: int


Argument = str | int | bool | Address
"""A register's name (`%s12_s3`), an integer, a predicate constant, or an address."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One scalar, DMA, semaphore or branch instruction.

    predicate: register and the value it must have, or None. passthrough: what `dest` becomes where the predicate fails
    (`op (!%p, %old), ...`), or None. target: where a branch goes to. note: the compiler's remark where it decides
    the meaning (`kRem`, `core id`).
    """

    opcode: str
    dest: str
    arguments: tuple[Argument, ...]
    predicate: tuple[str, bool] | None
    passthrough: Argument | None
    target: int | None
    note: str
    line: int

    def __str__(self) -> str:
        return f"{self.dest} = {self.opcode}" if self.dest else self.opcode


@dataclass(frozen=True, slots=True)
class Bundle:
    """One VLIW instruction, issued in one cycle: its line in the file, label (`LB`, `PF`, ...) and non-vector slots."""

    line: int
    label: str
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class Operand:
    """An operand of the kernel: its index, where it lives, its dtype and shape as the compiler wrote them.

    kind: `input` or `output`. result: of an output, which of the call's results it is. aliases: operands that may be the
    same memory, this one included; empty where there are no others.
    """

    index: int
    space: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    result: int = 0
    aliases: tuple[int, ...] = ()

    @property
    def memory(self) -> int:
        """The operand that names this one's memory: the first of its aliases."""
        return min(self.aliases, default=self.index)


@dataclass(frozen=True)
class Spills:
    """Instructions in the schedule that move registers to memory and back because the compiler ran out of them."""

    vector_stores: int
    vector_fills: int
    scalar_stores: int
    scalar_fills: int


@dataclass(frozen=True)
class Schedule:
    """A kernel's final schedule for one target. `slots[i]` counts SLOTS in VLIW instruction i, where the dump says so.

    cores: 2 where the grid is split over both cores of a device, which begin with a barrier.
    """

    name: str
    target: str
    bundles: tuple[Bundle, ...]
    operands: tuple[Operand, ...]
    spills: Spills
    slots: tuple[tuple[int, ...], ...] | None = None
    slot_capacity: tuple[int, ...] | None = None
    cores: int = 1

    @property
    def generation(self) -> isa.Generation:
        return isa.GENERATIONS[self.target]


_COMMENT = re.compile(r"/\*(?!\w+=\*/)((?:[^/*]++|/\*\w+=\*/|/(?!\*)|\*(?!/))*+)\*/")
_BREAK = re.compile(r"[\n\v]")
_NAMED = re.compile(r"/\*\w+=\*/")
_NOTE = re.compile(r"\s*(?:[\w ]+ :: )*(kDivAndRem|kDiv|kRem|core id)\b")
_HINT = re.compile(r"(?<=\S) \[#\w+\]$|\[resolvable:\$\w+\] ")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+([A-Z]*)\s*:[\s>]*\{(.*)\}\s*$")
_START = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+[A-Z]*\s*:")
_REGION = re.compile(r"(Start|End) region (\d+)")
_INSTRUCTION = re.compile(r"(?:%([\w.]+) = )?([\w.\-]+(?:<no memory space>)?)(?:\[\d+\][\w.]*)?\s*(.*)$")
_PREDICATE = re.compile(r"\((!?)%(p\w+)(?:, ([^)]+))?\),?\s*")
_BRANCH = re.compile(r"target bundleno = (\d+)")
_OPERAND = re.compile(
    r"\[shape: (\w+)\[([\d,]*)\].*?index: (\d+), kind: (\w+)"
    r"(?:, shape index: \{(\d*)[\d,]*\})?(?:, may-alias: \{([\d,]+)\})?"
)
_ALLOCATION = re.compile(r"#\w+")
_SPILLS = tuple(re.compile(rf"\b{opcode} \[[^\]]*_spill\]") for opcode in ("vst", "vld", "sst", "sld"))
_PUSHED = re.compile(r"= vpush\.ccrf %(v\w+)")
_POPPED = re.compile(r"%(v\w+) = vpop\.ccrf\b")
_THREAD = re.compile(r"\[thread:[^\]]*\]\s*")


def parse_schedule(text: str, target: str, name: str = "schedule", utilization: str | None = None) -> Schedule:
    """Reads one kernel's final schedule.

    `utilization`: the text of its `*-pre-delay_hlo-static-per-bundle-utilization.txt`, where there is one. `name` stands
    for the file in errors. Raises ScheduleError, naming the line, for an unknown target or instruction, a line that is
    no instruction, a gap in their numbers, a truncated file, or the marks of another generation.
    """
    generation = isa.GENERATIONS.get(target)
    if generation is None:
        raise ScheduleError(
            f"{name}: cannot read a schedule for target {target!r}; allowed: {', '.join(isa.GENERATIONS)}"
        )
    bundles: list[Bundle] = []
    operands: list[Operand] = []
    opcodes: set[str] = set()
    number = 0
    plain = _strip_comments(text)
    barriers = _barriers(plain)
    for line in plain.split("\n"):
        number += 1
        match = _BUNDLE.match(line)
        if match is None:
            if (bundles and line.strip()) or _START.match(line):
                raise ScheduleError(
                    f"{name}:{number}: found {line.strip()[:80]!r}; an instruction must be one line, `N : {{ ... }}`; the file "
                    "is truncated or of another compiler version: dump it again"
                )
            number += line.count("\v")
            continue
        if int(match[1], 16) != len(bundles):
            raise ScheduleError(
                f"{name}:{number}: found instruction {match[1]}, expected {len(bundles):#x}; lines are missing: dump it again"
            )
        bundles.append(Bundle(number, match[2], _bundle(match[3], number, name, operands, opcodes, barriers)))
        number += line.count("\v")
    _check_whole(text, bundles, name)
    _check_generation(opcodes, operands, generation, bundles, name)
    capacity, slots = parse_utilization(utilization, name) if utilization is not None else (None, None)
    if slots is not None and len(slots) != len(bundles):
        raise ScheduleError(
            f"{name}: {len(slots)} utilization rows for {len(bundles)} instructions; the files are not a pair"
        )
    spills = Spills(*(len(pattern.findall(text)) for pattern in _SPILLS))
    in_order = tuple(sorted(operands, key=lambda operand: operand.index))
    return Schedule(name, target, tuple(bundles), in_order, spills, slots, capacity, 2 if barriers else 1)


def parse_utilization(text: str, name: str) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Reads a utilization text: (capacity, one row a VLIW instruction), columns as isa.SLOTS."""
    lines = text.split("\n")
    if len(lines) < 4 or [column.strip() for column in lines[1].split(",")] != list(isa.SLOTS):
        found = lines[1] if len(lines) > 1 else text
        raise ScheduleError(
            f"{name}:2: found {found[:80]!r}; the columns must be {', '.join(isa.SLOTS)}: another compiler?"
        )
    try:
        capacity, *rows = (tuple(map(int, line.split())) for line in (lines[2], *lines[4:]) if line.strip())
    except ValueError as error:
        raise ScheduleError(f"{name}: a row holds something that is no count: {error}") from None
    if any(len(row) != len(isa.SLOTS) for row in (capacity, *rows)):
        raise ScheduleError(f"{name}: a row has not {len(isa.SLOTS)} counts; the file is truncated: dump it again")
    return capacity, tuple(rows)


def _strip_comments(text: str) -> str:
    """Drops remarks, but keeps argument names (`/*hbm=*/`, also inside of remarks) and what kind of division is meant.

    A remark can span lines inside one instruction: each line break in it becomes a vertical tab, so that lines still count.
    And it can hold others (those of bounds checks quote the DMA that they guard, remarks and all): innermost first.
    """

    def replace(match: re.Match[str]) -> str:
        note = _NOTE.match(match[1])
        return f"@{note[1]}" if note else "\v" * len(_BREAK.findall(match[1]))

    count = 1
    while count:
        text, count = _COMMENT.subn(replace, text)
    return text


def _barriers(text: str) -> dict[str, int]:
    """Scalar registers that hold what the other core pushed -> what that is.

    Both cores run one program, so it is what this core pushed: `vpush.ccrf` of a constant, and then `vpop.ccrf`, which
    reaches a scalar through a `vpush` and an `spop`. What each core does after the barrier, it does alone.
    """
    found = {}
    for pushed, popped in zip(_PUSHED.findall(text), _POPPED.findall(text), strict=False):
        constant = re.search(rf"%{pushed} = vmov (\d+)\b", text)
        queue = re.search(rf"%(\d+) = vpush %{popped}\b", text)
        scalar = re.search(rf"%(s\w+) = spop %{queue[1]}\b", text) if queue else None
        if constant and scalar:
            found[scalar[1]] = (int(constant[1]) + 2**31) % 2**32 - 2**31
    return found


def _bundle(
    body: str, line: int, name: str, operands: list[Operand], opcodes: set[str], barriers: Mapping[str, int]
) -> tuple[Instruction, ...]:
    instructions = []
    for text in body.split(";;"):
        text = text.strip()
        if not text:
            continue
        match = _INSTRUCTION.match(text)
        opcode = match[2] if match else text.split(" ", 1)[0]
        if match and isa.is_vector(opcode) and opcode != "vpop.sfrf":
            opcodes.add(text[match.start(2) : match.start(3)])
            if match[1] and match[1][0] in "sp" and "_" in match[1]:
                instructions.append(Instruction("spop", match[1], (), None, None, None, opcode, line))
            continue
        if match is None or not _is_scalar(opcode):
            raise ScheduleError(
                f"{name}:{line}: unknown instruction {opcode!r} in {text[:100]!r}; this compiler emits what this version of "
                "rpac cannot time: use the libtpu that it was written for, or report the instruction"
            )
        if match[1] in barriers:
            instructions.append(Instruction("smov", match[1], (barriers[match[1]],), None, None, None, "", line))
            continue
        instruction, operand = _scalar(opcode, match[1] or "", match[3], line, name)
        if operand is not None:
            operands.append(operand)
        instructions.append(instruction)
    return tuple(instructions)


def _is_scalar(opcode: str) -> bool:
    known = (isa.PURE, isa.RENAMES, isa.PHIS, isa.OPERANDS, isa.DMAS, isa.EFFECTS, isa.UNKNOWN_SCALARS, isa.NOOPS)
    return any(opcode in group for group in known) or isa.FLOAT_SCALAR.fullmatch(opcode) is not None


def _scalar(opcode: str, dest: str, rest: str, line: int, name: str) -> tuple[Instruction, Operand | None]:
    if opcode in isa.OPERANDS:
        found = _OPERAND.match(rest)
        if found is None:
            raise ScheduleError(
                f"{name}:{line}: operand {rest[:80]!r} has no shape and index; another compiler version?"
            )
        shape = tuple(int(n) for n in found[2].split(",") if n)
        aliases = tuple(int(n) for n in (found[6] or "").split(",") if n)
        operand = Operand(int(found[3]), isa.OPERANDS[opcode], found[1], shape, found[4], int(found[5] or 0), aliases)
        return Instruction(opcode, dest, (operand.index,), None, None, None, "", line), operand
    rest, _, note = rest.rstrip().partition("@")
    target = None
    branch = _BRANCH.search(rest)
    if opcode == "sbr.rel":
        if branch is None:
            raise ScheduleError(f"{name}:{line}: branch {rest[:80]!r} has no target; another compiler version?")
        target = int(branch[1])
        rest = rest[: branch.start()]
    rest = _NAMED.sub("", _THREAD.sub("", rest))
    predicate, passthrough = None, None
    match = _PREDICATE.search(rest)
    if match:
        predicate = (match[2], not match[1])
        passthrough = _argument(match[3], line, name) if match[3] else None
        rest = f"{rest[: match.start()]}, {rest[match.end() :]}"
    if opcode in ("sst", "sld"):
        rest = rest.replace("]]", "]],")
    arguments = tuple(_argument(_HINT.sub("", a.strip()), line, name) for a in rest.split(",") if a.strip())
    return Instruction(opcode, dest, arguments, predicate, passthrough, target, note.strip(), line), None


def _argument(text: str, line: int, name: str) -> Argument:
    if text[0] == "%":
        return text[1:]
    if text[0] == "[":
        return _address(text, line, name)
    if text in ("true", "false"):
        return text == "true"
    try:
        value = int(text, 0)
    except ValueError:
        try:
            float(text)
        except ValueError:
            raise ScheduleError(f"{name}:{line}: cannot read argument {text!r}; another compiler version?") from None
        return Address(text, (), 0)
    return (value + 2**31) % 2**32 - 2**31


def _address(text: str, line: int, name: str) -> Address:
    inner = text.strip("[]").removeprefix("smem:[")
    allocation, registers, offset = None, [], 0
    for term in inner.split(" + "):
        if _ALLOCATION.fullmatch(term):
            allocation = term[1:]
        elif term.startswith("%"):
            registers.append(term[1:])
        else:
            try:
                offset += int(term.removeprefix("$"), 0)
            except ValueError:
                raise ScheduleError(f"{name}:{line}: cannot read address {text!r}; another compiler version?") from None
    return Address(allocation, tuple(registers), offset)


def _check_whole(text: str, bundles: list[Bundle], name: str) -> None:
    opened: dict[str, set[str]] = {"Start": set(), "End": set()}
    for edge, region in _REGION.findall(text):
        opened[edge].add(region)
    missing = sorted(opened["Start"] - opened["End"], key=int)
    if not bundles or missing:
        what = f"regions {', '.join(missing[:5])} never end" if missing else "no instruction"
        raise ScheduleError(f"{name}: {what}; the file is truncated or no schedule: dump it again")
    for bundle in bundles:
        for instruction in bundle.instructions:
            if instruction.target is not None and instruction.target >= len(bundles):
                raise ScheduleError(
                    f"{name}:{bundle.line}: a branch to instruction {instruction.target:#x} of {len(bundles):#x}; the file is "
                    "truncated: dump it again"
                )


def _check_generation(
    opcodes: set[str], operands: list[Operand], generation: isa.Generation, bundles: list[Bundle], name: str
) -> None:
    """Matrix opcodes differ by generation, and so do HBM pointers (v5e's are shifted before use)."""
    for opcode in sorted(opcodes):
        if opcode.startswith("vmatmul") and not generation.matmul.search(opcode):
            likely = [g.target for g in isa.GENERATIONS.values() if g.matmul.search(opcode)]
            raise ScheduleError(
                f"{name}: found {opcode!r}, which {generation.target} does not have ({' or '.join(likely) or 'no target'} "
                "does): the dump is of another generation; name its own target"
            )
    shifted = any(i.opcode == "int_to_ptr.hbm" for bundle in bundles for i in bundle.instructions)
    moved = any(i.opcode.startswith("dma.") and "hbm" in i.opcode for bundle in bundles for i in bundle.instructions)
    if moved and operands and shifted != (generation.hbm_pointer_granules > 1):
        raise ScheduleError(
            f"{name}: HBM addresses are {'' if shifted else 'not '}shifted before use, unlike {generation.target}'s: the "
            "dump is of another generation; name its own target"
        )
