"""What limits a batch, in words: a prediction's parts, compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rpac.report.facts import Bound
from rpac.schedule.call_report import CallReport, KernelReport

BUSY: Final = 0.85
"""The share of a kernel's time from which on the HBM channel, the instructions or the MXU are called busy all the time."""
XLA_MATTERS: Final = 0.25


def bound_of(report: CallReport) -> Bound:
    """The part of a call that its time follows from."""
    kernels = report.kernels
    total = sum(kernel.seconds for kernel in kernels)
    around = sum(operation.seconds for operation in report.xla)
    if around > XLA_MATTERS * report.seconds:
        return Bound("XLA", f"XLA operations around the kernel take {around / report.seconds:.0%} of the call")
    hbm = sum(kernel.dma_seconds for kernel in kernels) / total
    issue = sum(kernel.compute_seconds for kernel in kernels) / total
    channel, issued = f"the HBM channel is busy {hbm:.0%} of the time", f"instructions take {issue:.0%}"
    if hbm >= BUSY and issue >= BUSY:
        return Bound("balanced", f"HBM bandwidth and instructions: {channel}, and {issued}")
    if hbm >= BUSY:
        return Bound("HBM", f"HBM bandwidth: {channel}")
    if issue < BUSY:
        return Bound("latency", f"latency: {channel} and {issued}, so that neither fills it")
    slots = _slots(kernels)
    if slots.get("MXU", 0.0) >= BUSY:
        return Bound("MXU", f"the MXU: it is busy {slots['MXU']:.0%} of the time, and {channel}")
    busiest = max(slots, key=lambda name: slots[name], default=None)
    slot = "" if busiest is None else f"; the busiest slot is {busiest}, {slots[busiest]:.0%} used"
    return Bound("issue", f"instructions: they take {issue:.0%} of the time{slot}; {channel}")


def _slots(kernels: Sequence[KernelReport]) -> dict[str, float]:
    """The used share of each slot over all loops, weighted by their time; empty where the dump does not say."""
    loops = [loop for kernel in kernels for loop in kernel.loops if loop.utilization is not None]
    total = sum(loop.compute_seconds for loop in loops)
    if not total:
        return {}
    names = dict.fromkeys(name for loop in loops for name in loop.utilization or ())
    return {
        name: sum((loop.utilization or {}).get(name, 0.0) * loop.compute_seconds for loop in loops) / total
        for name in names
    }
