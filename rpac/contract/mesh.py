"""How the programs of a spec are spread over devices: which axis of each array is cut along which axis of the mesh.

No JAX here. Everything else in rpac deals with the part of one device; whole arrays are made here, out of parts.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final

from rpac.contract.arrays import ArrayDims
from rpac.contract.features import ARGUMENTS

AXES: Final = ("data", "kv", "copy")

Cut = tuple[str, ...]  # the axes of the mesh that one axis of an array is cut along, the slowest first

_DATA: Final[Cut] = ("data",)
_KV: Final[Cut] = ("kv",)


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis, in row-major order of `AXES`.

    `data`: replicas, each with sequences, pages and metadata of its own. `kv`: parts of the KV heads. `copy`: devices that
    hold the same KV heads; with `splits_queries` they share the query heads of these, else they all do the same.
    """

    data: int = 1
    kv: int = 1
    copy: int = 1
    splits_queries: bool = False

    @classmethod
    def of(cls, q_heads: int, kv_heads: int, tensor: int, data: int) -> Mesh:
        """`data` replicas of `tensor` devices for a model of these heads, with as few copies of a KV head as can be."""
        kv = math.gcd(kv_heads, tensor)
        copy = tensor // kv
        # The query heads of one KV head lie side by side; those of several are not one piece for each of its copies.
        return cls(data, kv, copy, copy > 1 and kv == kv_heads and q_heads // kv_heads % copy == 0)

    def __str__(self) -> str:
        replicas = f"{self.data} replicas, " if self.data > 1 else ""
        copies = f", {self.copy} copies of each" if self.copy > 1 else ""
        shared = " that share its queries" if self.splits_queries else ""
        return f"{replicas}KV heads in {self.kv} parts{copies}{shared}"

    @property
    def devices(self) -> int:
        return self.data * self.kv * self.copy

    @property
    def query_parts(self) -> int:
        """Parts of the query heads."""
        return self.kv * (self.copy if self.splits_queries else 1)

    def cuts(self, dims: ArrayDims) -> tuple[Cut, ...]:
        """How an argument or a result of a program is cut along each of its axes."""
        heads: Cut = ("kv", "copy") if self.splits_queries else _KV
        axes: dict[str, Cut] = {"q_heads": heads, "kv_heads": _KV, "replicas": _DATA, "": ()}
        by_name: dict[str, tuple[Cut, ...]] = {
            "queries": (_DATA, heads),
            "queries_rope": (_DATA, heads),
            "out": (_DATA, heads),
            "lse": (_DATA, heads),
            "keys": (_DATA, _KV),
            "values": (_DATA, _KV),
            "kv_cache": (_DATA, (), _KV),  # the words or the KV heads of a page, by its layout
            **{one.name: tuple(axes[cut] for cut in one.cuts) for one in ARGUMENTS},
        }
        cuts = by_name.get(dims.name, (_DATA,))  # by default what describes the batch
        return (*cuts, *(() for _ in dims.shape))[: len(dims.shape)]

    def repeats(self, dims: ArrayDims) -> tuple[int, ...]:
        """How many parts there are along each axis of an array."""
        return tuple(math.prod(getattr(self, axis) for axis in cut) for cut in self.cuts(dims))

    def whole(self, dims: ArrayDims) -> ArrayDims:
        """The array that is made of the parts `dims` of all devices."""
        shape = tuple(size * count for size, count in zip(dims.shape, self.repeats(dims), strict=True))
        return dims._replace(shape=shape)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a manifest or a cache key."""
        return asdict(self)


ONE_DEVICE: Final = Mesh()
