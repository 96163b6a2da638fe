"""Chooses tiles and buffers for each (case, target, token bucket) within the VMEM and SMEM of the target."""

from rpac.plan.buffers import Buffer, RowDims
from rpac.plan.kernel_plan import KernelPlan
from rpac.plan.latent import LatentBlockTiles, LatentDecodeTiles
from rpac.plan.planner import KIND_ORDER, kinds_of, plan_spec
from rpac.plan.tiles import BlockTiles, DecodeTiles, GroupTiles

__all__ = [
    "KIND_ORDER",
    "BlockTiles",
    "Buffer",
    "DecodeTiles",
    "GroupTiles",
    "KernelPlan",
    "LatentBlockTiles",
    "LatentDecodeTiles",
    "RowDims",
    "kinds_of",
    "plan_spec",
]
