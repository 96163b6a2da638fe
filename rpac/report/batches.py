"""The batches of a report, few, because each kind of program that they run on is compiled for its schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rpac.batch import Limits
from rpac.predict.batches import expected
from rpac.traffic.trace import Workload

SHORTEST: Final = 256
STEP: Final = 4


def report_batches(limits: Limits, context_lens: tuple[int, ...], quick: bool) -> Iterator[Workload]:
    """Full decode batches and single prefill chunks, at the lengths that the spec expects and at powers of four below them.

    `quick`: decode alone, at the least and the greatest of the expected lengths.
    """
    longest = max(context_lens)
    if quick:
        lengths = {min(context_lens), longest}
    else:
        lengths = set(context_lens)
        length = SHORTEST
        while length < longest:
            lengths.add(length)
            length *= STEP
    for workload in expected(limits, tuple(sorted(lengths))):
        if not quick or workload.label.startswith("decode"):
            yield workload
