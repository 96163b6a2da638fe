"""The families of kernels: asks the one that tiles belong to for the recipe, for what is legal, and for candidates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from rpac.contract.features import features_in_kernels
from rpac.devices.chip import Chip, chip, is_tpu
from rpac.plan import decode_blocks, decode_waves, latent, page_table, prefill
from rpac.plan.access import reads_all_heads
from rpac.plan.decode_blocks import DecodeBlocks
from rpac.plan.decode_waves import DecodeWaves
from rpac.plan.kernel_plan import KernelPlan
from rpac.plan.latent import LatentBlockTiles, LatentWaves
from rpac.plan.portable import XlaTiles
from rpac.plan.prefill import BlockTiles
from rpac.plan.recipe import (
    BLOCK_OPTIONS,
    DECODE_OPTIONS,
    PROGRAM_OPTIONS,
    BlockRecipe,
    Chooser,
    DecodeRecipe,
    PageTable,
    Recipe,
    Wanted,
)
from rpac.spec import Spec

Tiles: TypeAlias = DecodeBlocks | DecodeWaves | BlockTiles | LatentBlockTiles
"""The tiles of a kernel for a TPU."""
OPTIONS: Final = {"decode": DECODE_OPTIONS, "block": BLOCK_OPTIONS}
"""The decisions of each kernel. Those of a program, `PROGRAM_OPTIONS`, no tiles decide."""
_PARTS: Final = {**OPTIONS, "program": PROGRAM_OPTIONS}


@dataclass(frozen=True)
class Override:
    """Decisions that are not the rule's, by name, of each kernel and of a program as a whole."""

    decode: Wanted = field(default_factory=dict)
    block: Wanted = field(default_factory=dict)
    program: Wanted = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.as_dict())

    def as_dict(self) -> dict[str, dict[str, str | bool]]:
        """Plain data, without parts that leave all to the rule."""
        return {part: dict(getattr(self, part)) for part in _PARTS if getattr(self, part)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Override:
        """The inverse of `as_dict`. Raises ValueError for anything else; whether tiles allow it shows with the recipe."""
        for part, wanted in data.items():
            if part not in _PARTS or not isinstance(wanted, Mapping) or not set(wanted) <= set(_PARTS[part]):
                raise ValueError(f"recipe: found {part}: {wanted!r}; must be some of {_PARTS}")
        return cls(**data)


RULES: Final = Override()
"""All is left to the rule."""


def make_recipe(
    spec: Spec,
    target: str,
    kind: str,
    decode: DecodeBlocks | DecodeWaves | XlaTiles | None,
    block: BlockTiles | LatentBlockTiles | XlaTiles | None,
    override: Override = RULES,
) -> Recipe:
    """The recipe of a plan of a kind with these tiles. Raises ValueError where the override wants what the tiles do not allow."""
    return Recipe(
        tuple(feature.key for feature in features_in_kernels(spec.model, spec.serving)),
        None
        if decode is None or isinstance(decode, XlaTiles)
        else _decode(spec, decode, Chooser(target, override.decode)),
        None if block is None or isinstance(block, XlaTiles) else _block(spec, block, Chooser(target, override.block)),
        _page_table(spec, Chooser(target, override.program)),
        _by_head(spec, kind, decode or block),
    )


def _page_table(spec: Spec, chooser: Chooser) -> PageTable:
    """Where the kernels have the page tables; portable programs, which have no SMEM, have them as any array."""
    return chooser.choose(
        "page_table", *page_table.options(spec, chip(chooser.target) if is_tpu(chooser.target) else None)
    )


def _by_head(spec: Spec, kind: str, tiles: Tiles | XlaTiles | None) -> tuple[str, ...]:
    """Mixed batches begin their sequences at any token, but of arrays by head a DMA takes whole sublane tiles of tokens."""
    match tiles:
        case LatentWaves():
            return ()
        case DecodeWaves() if kind == "decode":
            return decode_waves.by_head(spec, tiles)
        case BlockTiles() if kind == "prefill":
            return prefill.by_head(spec, tiles)
    return ()


def options_of(spec: Spec, target: str, tiles: Tiles, wanted: Wanted) -> Mapping[str, tuple[str | bool, ...]]:
    """What the tiles allow for each decision of their kernel, the rule's first, where those before it are as wanted."""
    chooser = Chooser(target, wanted)
    _decisions(spec, tiles, chooser)
    return chooser.legal


def allowed(spec: Spec, target: str, tiles: Tiles, wanted: Wanted) -> Wanted:
    """Those of some wanted decisions that the tiles allow, and that are not the rule's."""
    kept: dict[str, str | bool] = {}
    for name in (*DECODE_OPTIONS, *BLOCK_OPTIONS):
        if wanted.get(name) in options_of(spec, target, tiles, kept).get(name, ())[1:]:
            kept[name] = wanted[name]
    return kept


def override_of(spec: Spec, plan: KernelPlan) -> Override:
    """The decisions of a plan's recipe that are not the rule's for its tiles."""
    found: dict[str, Wanted] = {}
    for part, names in OPTIONS.items():
        tiles, recipe = getattr(plan, part), getattr(plan.recipe, part)
        wanted: dict[str, str | bool] = {}
        for name in names if recipe is not None else ():
            if getattr(_decisions(spec, tiles, Chooser(plan.target, wanted)), name) != getattr(recipe, name):
                wanted[name] = getattr(recipe, name)
        found[part] = wanted
    rule = _page_table(spec, Chooser(plan.target))
    if plan.recipe.page_table != rule:
        found["program"] = {"page_table": plan.recipe.page_table}
    return Override(**found)


def _decisions(spec: Spec, tiles: Tiles, chooser: Chooser) -> DecodeRecipe | BlockRecipe:
    if isinstance(tiles, BlockTiles | LatentBlockTiles):
        return _block(spec, tiles, chooser)
    return _decode(spec, tiles, chooser)


def _decode(spec: Spec, tiles: DecodeBlocks | DecodeWaves, chooser: Chooser) -> DecodeRecipe:
    match tiles:
        case LatentWaves():
            return latent.decode_recipe(spec, tiles, chooser)
        case DecodeWaves():
            return decode_waves.recipe(spec, tiles, chooser)
        case DecodeBlocks():
            return decode_blocks.recipe(spec)


def _block(spec: Spec, tiles: BlockTiles | LatentBlockTiles, chooser: Chooser) -> BlockRecipe:
    return latent.BLOCK_RECIPE if isinstance(tiles, LatentBlockTiles) else prefill.recipe(spec, tiles, chooser)


def is_legal(spec: Spec, kind: str, buckets: Sequence[int], tiles: Tiles) -> bool:
    """Whether the kernels of a case work with these tiles at all."""
    match tiles:
        case DecodeWaves():
            return decode_waves.is_legal(spec, tiles)
        case DecodeBlocks():
            return decode_blocks.is_legal(spec, tiles)
        case BlockTiles():
            return prefill.is_legal(spec, kind, buckets, tiles)
        case LatentBlockTiles():
            return True


def is_short(spec: Spec, device: Chip, kind: str, tiles: Tiles, recipe: Recipe) -> bool:
    """Whether no piece of code is longer than the rules make it: what that wins, an executable pays for in size."""
    match tiles:
        case DecodeWaves():
            return decode_waves.is_short(spec, kind, tiles)
        case BlockTiles():
            assert recipe.block is not None
            return prefill.is_short(spec, device, kind, tiles, recipe.block)
    return True


def decode_choices(spec: Spec, device: Chip, kind: str, tokens: int) -> Iterator[DecodeBlocks | DecodeWaves]:
    """Tiles of a decode kernel from large to small."""
    if spec.model.rope_dim is not None:
        return latent.decode_choices(spec, device.target, tokens)
    waves = decode_waves.choices(spec, kind, tokens)
    blocks = decode_blocks.choices(spec, device, tokens)
    if spec.serving.kv_layout == "separate":
        return waves
    return itertools.chain(waves, blocks) if reads_all_heads(spec) else blocks


def block_choices(spec: Spec, device: Chip, kind: str, tokens: int) -> Iterator[BlockTiles | LatentBlockTiles]:
    """Tiles of a prefill or mixed kernel from large to small."""
    if spec.model.rope_dim is not None:
        return latent.block_choices(spec, kind, tokens)
    return prefill.choices(spec, device, kind, tokens)


def vmem_need(spec: Spec, tiles: Tiles, recipe: Recipe) -> int:
    """Bytes of VMEM that the kernel of these tiles takes: its scratch arrays, and values that registers cannot hold."""
    return sum(buffer.vmem_bytes for buffer in tiles.scratch(spec, recipe)) + tiles.temporaries(spec, recipe)


def smem_need(spec: Spec, recipe: Recipe, *kernels: Tiles | None) -> int:
    """Bytes of SMEM that the scalars of a batch take, with those that the kernel with the most windows fetches."""
    windows = [page_table.window_bytes(tiles.scratch(spec, recipe)) for tiles in kernels if tiles is not None]
    return sum(page_table.scalar_bytes(spec, recipe.page_table)) + max(windows, default=0)
