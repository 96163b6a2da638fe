"""What a plan is: a case on a target, its tiles, what they take, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Final, TypeVar

from rpac.plan.decode_blocks import DecodeBlocks
from rpac.plan.decode_waves import DecodeWaves
from rpac.plan.latent import LatentBlockTiles
from rpac.plan.portable import XlaTiles
from rpac.plan.prefill import BlockTiles
from rpac.plan.recipe import Recipe

RULE: Final = "rule"
"""`KernelPlan.origin` of tiles that the rules of this package made, where there are no tuned ones."""
AnyTiles = TypeVar("AnyTiles", DecodeBlocks, DecodeWaves, BlockTiles, LatentBlockTiles)
_TYPES: Final = {"int": int, "bool": bool}  # by how a field is annotated; any other is a tuple of integers


@dataclass(frozen=True)
class KernelPlan:
    """The plan of one generated source: a case on a target, for the token buckets that share its tiles.

    `recipe` holds the decisions that choose its code. Bytes are per core. `vmem_need` is what the buffers and the temporaries
    of the larger of its kernels take, `vmem_limit` what the compiler is told it may use, `vmem_bytes` what the core has;
    zero for cpu. `origin` says where the tiles come from: `rule`, alone or with why not from tuning; or `tuned`, with what
    that rests on.
    """

    target: str
    kind: str
    tokens: tuple[int, ...]
    path: str
    decode: DecodeBlocks | DecodeWaves | XlaTiles | None
    block: BlockTiles | LatentBlockTiles | XlaTiles | None
    vmem_need: int
    vmem_limit: int
    vmem_bytes: int
    smem_need: int
    smem_bytes: int
    recipe: Recipe
    origin: str = RULE

    def as_dict(self) -> Mapping[str, Any]:
        """Plain data for a manifest, a table or a cache key."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KernelPlan:
        """The inverse of `as_dict`, by way of JSON too, for a TPU. Raises ValueError for tiles of other fields."""
        decode, block = decode_tiles_from(data["decode"]), _block_tiles_from(data["block"])
        tokens, recipe = tuple(data["tokens"]), Recipe.from_dict(data["recipe"])
        return cls(**{**data, "tokens": tokens, "decode": decode, "block": block, "recipe": recipe})


def decode_tiles_from(data: Mapping[str, Any] | None) -> DecodeBlocks | DecodeWaves | None:
    """The inverse of `asdict` for the decode tiles of either layout, as `tiles_from`."""
    if isinstance(data, Mapping) and "tiles_per_wave" in data:
        return tiles_from(DecodeWaves, data)
    return tiles_from(DecodeBlocks, data)


def _block_tiles_from(data: Mapping[str, Any] | None) -> BlockTiles | LatentBlockTiles | None:
    """The inverse of `asdict` for the tiles of either kernel of query blocks, as `tiles_from`."""
    if isinstance(data, Mapping) and "tile" not in data:
        return tiles_from(LatentBlockTiles, data)
    return tiles_from(BlockTiles, data)


def tiles_from(kind: type[AnyTiles], data: Mapping[str, Any] | None) -> AnyTiles | None:
    """The inverse of `asdict` for the tiles of a TPU kernel. Raises ValueError for other fields, or values of others.

    A field with a default may be missing, as it is in data that was written before the field was there.
    """
    if data is None:
        return None
    types = {field.name: _TYPES.get(str(field.type), tuple) for field in fields(kind)}
    required = {field.name for field in fields(kind) if field.default is MISSING}
    if not isinstance(data, Mapping) or not required <= set(data) <= set(types):
        raise ValueError(f"found {data!r}; must have the fields {', '.join(types)}")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if type(value) is not types[name] or not all(type(n) is bool or (type(n) is int and n > 0) for n in numbers):
            raise ValueError(f"{name}: found {data[name]!r}; must be {types[name].__name__}, above 0")
    return kind(**values)
