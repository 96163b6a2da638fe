"""How fast a batch could be on a chip at best, and what a prediction spends beyond that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rpac.contract.attention import Attention
from rpac.devices.chip import chip
from rpac.schedule import CallReport
from rpac.schedule.call_report import KernelReport, LoopReport

ENOUGH: Final = 0.75
"""A row with a smaller fraction of its bound says where the time goes."""

FIXED_DMAS: Final = 3
"""One after another in any call: the batch's lengths and page ids, then the pages, then the output."""


@dataclass(frozen=True)
class Bound:
    """`name`: HBM, MXU or fixed cost. seconds: at least, for this batch."""

    name: str
    seconds: float


def bound_of(report: CallReport, model: Attention) -> Bound:
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
    return max(Bound("HBM", hbm), Bound("MXU", mxu), Bound("fixed cost", fixed), key=lambda bound: bound.seconds)


def explained(report: CallReport) -> str:
    """Where the time of a call goes, in one sentence: its longest loop with its busiest slots, waits, and all else."""
    kernel = max(report.kernels, key=lambda one: one.seconds)
    loop = max(kernel.loops, key=_loop_seconds, default=None)
    parts = []
    if loop is not None:
        share = _loop_seconds(loop) / report.seconds
        parts.append(
            f"{share:.0%} is the longest loop ({_slots(loop)}; {loop.stall_seconds / report.seconds:.0%} waits)"
        )
    outside = sum(map(_outside_seconds, report.kernels))
    parts.append(f"{outside / report.seconds:.0%} is outside of all loops")
    parts.append(f"{(report.seconds - report.kernel_seconds) / report.seconds:.0%} is XLA's operations")
    return ", ".join(parts)


def _loop_seconds(loop: LoopReport) -> float:
    return loop.compute_seconds + loop.stall_seconds


def _outside_seconds(kernel: KernelReport) -> float:
    return max(0.0, kernel.seconds - sum(map(_loop_seconds, kernel.loops)))


def _slots(loop: LoopReport) -> str:
    busiest = sorted((loop.utilization or {}).items(), key=lambda item: -item[1])[:2]
    return ", ".join(f"{name} {used:.2f}" for name, used in busiest) or "slots unknown"
