"""The interconnect between the chips of a slice, and what a collective takes on it.

Nothing here is fitted: a link's bandwidth is the vendor's figure, the rest is assumed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from rpac.devices.chip import chip
from rpac.errors import ScheduleError
from rpac.schedule.hlo import BITS, Array, Module, Operation

HOP_S: Final = 1e-6
"""Between two neighbors, assumed: "How to Scale Your Model" (jax-ml.github.io/scaling-book) reckons with about 1 us."""

RING_LINKS: Final = 2
"""Links that a chip uses in a ring, assumed: one to each neighbor. Small slices have no more in use along one axis."""

_COLLECTIVE: Final = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)(-start)?"
)
_GROUPS: Final = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}")
_COUNTED: Final = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_MESH: Final = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


@dataclass(frozen=True)
class Interconnect:
    """One chip's share of it. link_bytes_per_s: of one link, one way; links: of a chip; devices_per_chip share them all."""

    target: str
    links: int
    link_bytes_per_s: float
    devices_per_chip: int
    ring_links: int = RING_LINKS
    hop_s: float = HOP_S
    source: str = ""

    @property
    def ring_bytes_per_s(self) -> float:
        """What a chip sends a second in a ring."""
        return self.ring_links * self.link_bytes_per_s


_LINKS: Final = {"tpu7x": 6, "v6e": 4, "v5p": 6, "v5e": 4}
"""Of a chip: a 3D torus on TPU7x and v5p, a 2D torus on v6e and v5e."""

_BIDIRECTIONAL_BYTES_PER_S: Final = {"tpu7x": 1.2e12, "v6e": 0.8e12, "v5p": 1.2e12, "v5e": 0.4e12}
"""Of a chip, all links and both ways: the pages TPU7x, v6e, v5p and v5e of https://docs.cloud.google.com/tpu/docs."""


def interconnect_of(target: str) -> Interconnect:
    """Raises ScheduleError for a target without a table entry."""
    if target not in _LINKS:
        raise ScheduleError(f"no interconnect is known for target {target!r}; allowed: {', '.join(_LINKS)}")
    return Interconnect(
        target,
        _LINKS[target],
        _BIDIRECTIONAL_BYTES_PER_S[target] / 2 / _LINKS[target],
        chip(target).devices_per_chip,
        source=f"nominal: docs.cloud.google.com/tpu/docs, {target}; ring and hop assumed",
    )


@dataclass(frozen=True)
class Collective:
    """kind: as HLO names it. bytes: of one device, whole (all-reduce: its array; all-gather: its result). devices: of a group."""

    kind: str
    bytes: int
    devices: int


def collective_of(module: Module, operation: Operation) -> Collective | None:
    """The collective that an operation runs or starts: itself, or the one of the computation that it calls on another core."""
    match = _COLLECTIVE.fullmatch(operation.opcode)
    if match is not None:
        return _collective(match[1], operation)
    if operation.opcode in ("call-start", "async-start", "fusion", "call"):
        for name in (name for names in operation.called.values() for name in names):
            for inner in module.computations[name].operations:
                found = collective_of(module, inner)
                if found is not None:
                    return found
    return None


def _collective(kind: str, operation: Operation) -> Collective:
    # The largest array: the whole of a gather or a scatter. A start's result repeats its operand.
    size = max((_bytes(array) for array in operation.shapes), default=0)
    devices = _devices(operation.attributes)
    if kind == "reduce-scatter":
        size *= devices  # its result is one device's part
    return Collective(kind, size, devices)


def _devices(attributes: str) -> int:
    """Of a group: `{{0,1},{2,3}}`, `[2,2]<=[4]`, or some axes of a mesh, `mesh['x'=2,'y'=2] {'y'}`."""
    mesh = _MESH.search(attributes)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([^']+)'", mesh[2]))
    counted, groups = _COUNTED.search(attributes), _GROUPS.search(attributes)
    return int(counted[2]) if counted else len(groups[1].split(",")) if groups else 1


def _bytes(array: Array) -> int:
    return array.count * BITS.get(array.dtype, 0) // 8


def seconds_of(collective: Collective, wires: Interconnect) -> float:
    """On a ring of the group's chips, both ways at once, with the latency of each hop.

    Of n chips an all-reduce sends 2 (n - 1) / n of its bytes from each, an all-gather or a reduce-scatter half of that; what
    goes both ways around passes n / 2 hops. An all-to-all takes at most what an all-gather takes. Formulas: "How to Scale Your
    Model", the section on collectives. What the devices of one chip exchange among themselves is not counted.
    """
    chips = max(1, collective.devices // wires.devices_per_chip)
    if collective.devices == 1:
        return 0.0
    if chips == 1:
        return wires.hop_s
    once = collective.bytes * (chips - 1) / chips / wires.ring_bytes_per_s + chips / 2 * wires.hop_s
    if collective.kind == "all-reduce":
        return 2 * once
    if collective.kind.startswith("collective-"):
        return collective.bytes / wires.link_bytes_per_s + wires.hop_s
    return once
