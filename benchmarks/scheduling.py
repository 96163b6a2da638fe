"""What a step of continuous batching costs on the host: choosing, page tables, metadata, and taking the tokens.

python benchmarks/scheduling.py
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
from tabulate import tabulate

from rpac.batch import Batch, Limits
from rpac.serving import Scheduler

CONTEXT, NEW, SEED = 1024, 256, 0


@dataclass(frozen=True)
class Case:
    """`arrivals`: a sequence that ends is followed by another, so that steps hold prompts too; else all decode."""

    sequences: int
    arrivals: bool
    prefix: int  # tokens that all prompts begin with

    @property
    def label(self) -> str:
        return "decode and prompts" if self.arrivals else "decode only"


CASES = [Case(count, arrivals, prefix) for count in (64, 256) for arrivals in (False, True) for prefix in (0, 512)]


def main() -> None:
    header = ("sequences", "batches", "shared prefix", "steps", "us a step", "of it the check", "slowest 1%")
    print(tabulate([row(case) for case in CASES], headers=header, tablefmt="simple", disable_numparse=True))
    print(f"prompts of about {CONTEXT} tokens, {NEW} new ones, pages of 128; medians, seed {SEED}")


def row(case: Case) -> tuple[str, ...]:
    limits = Limits(128, 16, case.sequences, case.sequences * 16, 512, (case.sequences, 2048))
    rng = np.random.default_rng(SEED)
    scheduler = Scheduler(limits)
    prefix = rng.integers(0, 32000, case.prefix)

    def add() -> None:
        size = CONTEXT - case.prefix + int(rng.integers(0, NEW))
        new = int(rng.integers(NEW // 2, NEW)) if case.arrivals else NEW
        scheduler.add(np.concatenate([prefix, rng.integers(0, 32000, size)]), new)

    add()
    step = scheduler.step()
    while step is not None and not step.sampled:  # so that the others find its prefix in the cache
        scheduler.commit(step, [])
        step = scheduler.step()
    assert step is not None
    scheduler.commit(step, np.zeros(1, np.int32))
    for _ in range(case.sequences - 1):
        add()
    seconds, checks = [], []
    decoding = case.arrivals
    while len(seconds) < (4 * NEW if case.arrivals else NEW // 2):
        start = time.perf_counter()
        step = scheduler.step()
        chosen = time.perf_counter()
        assert step is not None
        tokens = np.zeros(len(step.sampled), np.int32)  # the model
        resumed = time.perf_counter()
        ended = scheduler.commit(step, tokens)
        spent = time.perf_counter() - resumed + chosen - start
        if case.arrivals:
            for _ in ended:
                add()
        decoding = decoding or (step.batch.kind == "decode" and len(step.batch) == case.sequences)
        if decoding:
            seconds.append(spent)
            checks.append(check(step.batch))
    slow = statistics.quantiles(seconds, n=100)[-1]
    figures = (1e6 * statistics.median(seconds), 1e6 * statistics.median(checks), 1e6 * slow)
    return (str(case.sequences), case.label, str(case.prefix), str(len(seconds)), *(f"{one:.0f}" for one in figures))


def check(batch: Batch) -> float:
    """The time of checking this batch against the contract once more."""
    start = time.perf_counter()
    Batch.of_arrays(batch.limits, batch.tokens, batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
