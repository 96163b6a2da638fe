"""The memory that a walk keeps: where pointers point, what SMEM holds, and values that the walk does not know."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rpac.errors import ScheduleError
from rpac.schedule.isa import GRANULE_BYTES
from rpac.schedule.parse import Address, Operand, Schedule

_OPERAND_BITS: Final = 40
"""An operand's address in granules is its index + 1 above this bit; the offset in granules is below."""

_VMEM_POINTER_GRANULES: Final = 16
"""A VMEM operand's address counts 512-byte rows, and is shifted to granules before use."""

GRANULE_WORDS: Final = GRANULE_BYTES // 4
_SPILL_WORDS: Final = 64
_ALLOCATION_WORDS: Final = 1 << 18
"""Room for an allocation in the walk's own numbering: all of SMEM in words, or 128 MiB of VMEM in rows."""


class Unknown:
    """A value that the walk cannot know, and why. Arithmetic on it stays unknown; deciding on it is an error."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def _same(self, *_: object) -> Unknown:
        return self

    def __and__(self, other: Value) -> Value:
        # The compiler reads ahead of a predicate and only then combines with it.
        return False if other is False else self

    def __or__(self, other: Value) -> Value:
        return True if other is True else self

    __rand__, __ror__ = __and__, __or__
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _same
    __xor__ = __rxor__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _same
    __lt__ = __le__ = __gt__ = __ge__ = _same

    def __eq__(self, other: object) -> Unknown:  # type: ignore[override]
        return self

    def __ne__(self, other: object) -> Unknown:  # type: ignore[override]
        return self

    def __hash__(self) -> int:
        raise ScheduleError(f"an address depends on a value that the walk cannot know: {self.reason}")

    def __bool__(self) -> bool:
        raise ScheduleError(f"a branch or predicate depends on a value that the walk cannot know: {self.reason}")


Value = int | bool | Unknown

Words = Sequence[int | None]
"""An int32 array, flattened; None where a word is not known. One of many words that are all known may be an `array`."""
_MOST_LISTED: Final = 1 << 16


def words_of(values: NDArray[Any]) -> Words:
    """Integers as words, in little memory where they are many: page tables have up to 2^28."""
    words = values.reshape(-1).astype(np.int32)
    return words.tolist() if words.size <= _MOST_LISTED else array("i", words.tobytes())


def are_known(words: Words) -> bool:
    """Whether all words are."""
    return isinstance(words, array) or None not in words


class Layout:
    """Numbers for a schedule's allocations and operands, so that pointers are plain integers."""

    def __init__(self, schedule: Schedule) -> None:
        self._bases: dict[str, int] = {}
        self._names: list[tuple[int, str]] = []
        self._next = _ALLOCATION_WORDS
        self._hbm_unit = schedule.generation.hbm_pointer_granules
        self.operands = {operand.index: operand for operand in schedule.operands}

    def address(self, address: Address) -> int:
        """The constant part of an address: the allocation's number plus the offset."""
        return address.offset + (self._base(address.allocation) if address.allocation else 0)

    def _base(self, name: str) -> int:
        if name not in self._bases:
            self._bases[name] = self._next
            self._names.append((self._next, name))
            self._next += _SPILL_WORDS if name.endswith("_spill") else _ALLOCATION_WORDS
        return self._bases[name]

    def pointer(self, operand: Operand, operands: Mapping[int, Words]) -> Value:
        """What the register that names an operand holds at entry: its address, or the value of a scalar."""
        if operand.space == "register":
            value = (operands.get(operand.index) or [None])[0]
            missing = f"operand {operand.index}, a scalar {operand.dtype}, is missing"
            return Unknown(missing) if value is None else int(value)
        unit = {"hbm": self._hbm_unit, "vmem": _VMEM_POINTER_GRANULES}.get(operand.space, 1)
        return (operand.index + 1 << _OPERAND_BITS) // unit

    def operand(self, address: int) -> tuple[Operand, int] | None:
        """The operand that a DMA's address lies in and the offset in bytes; None for scratch memory."""
        index = (address >> _OPERAND_BITS) - 1
        if index < 0:
            return None
        operand = self.operands.get(index)
        if operand is None:
            raise ScheduleError(f"a DMA's address lies in operand {index}, which the kernel does not have")
        return operand, (address & (1 << _OPERAND_BITS) - 1) * GRANULE_BYTES

    def describe(self, address: int) -> str:
        """An SMEM or semaphore address as the schedule writes it: `#allocation7 + 0x4`."""
        for base, name in reversed(self._names):
            if address >= base:
                return f"#{name} + {address - base:#x}"
        return f"{address:#x}"


class Contents:
    """The 32-bit words in HBM and VMEM that a scalar program can read: those of operands, as the call gives them and as
    the kernel's scalars write them, and those that scalars write to scratch memory, such as spilled registers.

    What a DMA brings out of vectors makes words unknown. Vector stores are not seen: a kernel that changes by them what its
    scalars wrote into the same result in VMEM would be read wrongly.
    """

    def __init__(self, layout: Layout, operands: Mapping[int, Words], name: str) -> None:
        self._layout = layout
        self._given = sorted(operands)
        self._name = name
        self._words: dict[int, list[Value | None] | array[int]] = {
            layout.operands[index].memory: values if isinstance(values, array) else list(values)
            for index, values in operands.items()
        }
        self._scratch: dict[tuple[str, int], Sequence[Value | None]] = {}

    def read(self, space: str, address: int, count: int) -> list[Value | None]:
        """`count` words from an address on. Raises ScheduleError for an operand whose values nobody gave."""
        found = self._layout.operand(address)
        if found is None:
            nothing = (None,) * GRANULE_WORDS
            granules = range(address, address + count // GRANULE_WORDS)
            return [word for granule in granules for word in self._scratch.get((space, granule), nothing)]
        operand, offset = found
        words = self._words.get(operand.memory)
        if words is None:
            if operand.kind == "output":
                return [None] * count
            raise ScheduleError(
                f"{self._name}: the scalar program reads operand {operand.index} ({operand.dtype}{list(operand.shape)}), "
                f"which is missing; given: {self._given or 'none'}; pass its values"
            )
        first = offset // 4
        read: list[Value | None] = list(words[first : first + count])
        return read + [None] * (count - len(read))

    def write(self, space: str, address: int, words: Sequence[Value | None] | int) -> None:
        """Words that a DMA writes from an address on, or how many where they are data that the walk does not have."""
        found = self._layout.operand(address)
        if found is None:
            self._write_scratch(space, address, words)
            return
        operand, offset = found
        if isinstance(words, int):
            if operand.memory not in self._words:
                return
            words = [None] * words
        held = self._words.setdefault(operand.memory, [])
        if isinstance(held, array):
            held = self._words[operand.memory] = list(held)
        first = offset // 4
        held.extend([None] * (first + len(words) - len(held)))
        held[first : first + len(words)] = words

    def _write_scratch(self, space: str, address: int, words: Sequence[Value | None] | int) -> None:
        if not isinstance(words, int):
            for i in range(0, len(words), GRANULE_WORDS):
                self._scratch[space, address + i // GRANULE_WORDS] = words[i : i + GRANULE_WORDS]
        elif self._scratch:
            for granule in range(address, address + words // GRANULE_WORDS):
                self._scratch.pop((space, granule), None)

    def written(self) -> dict[int, Words]:
        """What the kernel's outputs hold, by the call's result; those that scalars never wrote are left out."""
        found: dict[int, Words] = {}
        for operand in self._layout.operands.values():
            held = self._words.get(operand.memory)
            if operand.kind == "output" and held is not None:
                words = [None if value is None or isinstance(value, Unknown) else int(value) for value in held]
                size = math.prod(operand.shape)
                found[operand.result] = words[:size] + [None] * (size - len(words))
        return found


class Smem:
    """Scalar memory: words written so far, by address."""

    def __init__(self, layout: Layout, name: str) -> None:
        self.words: dict[int, Value] = {}
        self._layout = layout
        self._name = name

    def load(self, address: int | Unknown, line: int) -> Value:
        """The word at an address; unknown where the address is, or where nothing was ever written."""
        if isinstance(address, Unknown):
            return address
        value = self.words.get(address)
        if value is None:
            return Unknown(f"{self._name}:{line} reads smem[{self._layout.describe(address)}], which was never written")
        return value

    def read(self, address: int, count: int) -> list[Value | None]:
        """`count` words from an address on; None where nothing was ever written."""
        get = self.words.get
        return [get(place) for place in range(address, address + count)]

    def fill(self, address: int, words: Sequence[Value | None]) -> None:
        """What a DMA brings. A word that is not known is as good as never written."""
        for place, value in enumerate(words, address):
            if value is None:
                self.words.pop(place, None)
            else:
                self.words[place] = value
