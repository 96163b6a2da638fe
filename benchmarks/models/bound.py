"""How fast a batch could be on a chip at best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rpac.contract.attention import Attention
from rpac.devices.chip import chip
from rpac.schedule import CallReport

FIXED_DMAS: Final = 3
"""One after another in any call: the batch's lengths and page ids, then the pages, then the output."""


@dataclass(frozen=True)
class Floor:
    """`name`: HBM, MXU or fixed cost. seconds: at least, for this batch."""

    name: str
    seconds: float


def floor_of(report: CallReport, model: Attention) -> Floor:
    """The longest of three times. Of the needed bytes over the HBM's bandwidth; of the needed flops over the MXU's rate at
    the clock of the timing model, where products of a head_dim narrower than the MXU leave a part of it empty; and of DMAs that
    must wait for one another (FIXED_DMAS).

    Of the two matmuls, that of queries and keys sums over head_dim lanes, so a 256-wide MXU is half empty at 128. That with the
    values sums over tokens and can fill it. Of latent attention the sums are over more than 256 lanes.
    """
    assert report.needed_bytes is not None
    assert report.needed_flops is not None
    one = chip(report.target)
    hbm = report.needed_bytes / one.hbm_bandwidth
    multiply_adds = one.mxu_size**2 * one.mxus * one.cores * report.model.clock_hz
    filled = min(1.0, model.head_dim / one.mxu_size)
    mxu = report.needed_flops / 2 / multiply_adds * (1 / filled + 1) / 2
    fixed = FIXED_DMAS * report.model.latency_s
    return max(Floor("HBM", hbm), Floor("MXU", mxu), Floor("fixed cost", fixed), key=lambda floor: floor.seconds)
