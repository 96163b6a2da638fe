"""Predictions without a compile: plain numbers that a page must show."""

from __future__ import annotations

from rpac.batch.select import select
from rpac.predict import Prediction, Programs, Workload
from rpac.schedule import CallReport, model_of
from rpac.schedule.call_report import KernelReport, LoopReport
from rpac.schedule.parse import Spills

RATES = {"tpu7x": 1e-9, "v6e": 3e-9, "v5p": 2e-9, "v5e": 5e-9}
"""Seconds a token of context."""


def kernel(seconds: float, compute: float = 0.5, dma: float = 0.9, mxu: float | None = 0.3) -> KernelReport:
    """A kernel of which such shares of the time are instructions, and the HBM channel's; `mxu` of its one loop."""
    slots = None if mxu is None else {"MXU": mxu, "VALU": 0.4}
    loop = LoopReport(0, 9, 1, 5, compute * seconds, 0.0, slots)
    return KernelReport(
        "rpa",
        seconds,
        compute * seconds,
        (1 - compute) * seconds,
        dma * seconds,
        1,
        1,
        1,
        10,
        Spills(0, 0, 0, 0),
        (),
        (loop,),
    )


def report(target: str, seconds: float, *kernels: KernelReport) -> CallReport:
    return CallReport(
        target=target, compiler="0.0.1", compiler_verified=True, seconds=seconds, kernel_seconds=seconds, mbu=0.625, mfu=0.125,
        kernel_mbu=0.625, kernel_mfu=0.125, needed_bytes=10**6, needed_flops=10**9, moved_bytes=3 << 20,
        kernels=kernels or (kernel(seconds),), xla=(), model=model_of(target),
    )  # fmt: skip


def stub(programs: Programs, workload: Workload) -> Prediction:
    """Takes as long as its tokens are many; refuses what the programs do."""
    batch = workload.batch(programs.limits)
    variant = select(programs.tasks, programs.limits, batch.tokens, batch.distribution)
    seconds = RATES[programs.target] * sum(workload.kv_lens)
    return Prediction(programs.name, workload, variant, report(programs.target, seconds))
