"""Chooses tiles, buffers and the recipe for each (case, target, token bucket) within the VMEM and SMEM of the target."""

from rpac.plan.buffers import Buffer, RowDims
from rpac.plan.decode_blocks import DecodeBlocks
from rpac.plan.decode_waves import DecodeWaves
from rpac.plan.kernel_plan import KernelPlan
from rpac.plan.latent import LatentBlockTiles, LatentWaves
from rpac.plan.planner import KIND_ORDER, kinds_of, plan_spec
from rpac.plan.portable import XlaTiles
from rpac.plan.prefill import BlockTiles
from rpac.plan.recipe import BlockRecipe, DecodeRecipe, Recipe

__all__ = [
    "KIND_ORDER",
    "BlockRecipe",
    "BlockTiles",
    "Buffer",
    "DecodeBlocks",
    "DecodeRecipe",
    "DecodeWaves",
    "KernelPlan",
    "LatentBlockTiles",
    "LatentWaves",
    "Recipe",
    "RowDims",
    "XlaTiles",
    "kinds_of",
    "plan_spec",
]
