"""The batches of a report, few, because each kind of program that they run on is compiled for its schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rpac.batch import Limits
from rpac.predict import expected, expected_decode
from rpac.traffic.trace import Workload

SHORTEST: Final = 256
STEP: Final = 4


def report_batches(limits: Limits, context_lens: tuple[int, ...], quick: bool) -> Iterator[Workload]:
    """Full decode batches and single prefill chunks, at the lengths that the spec expects and at powers of four below them.

    `quick`: decode alone, at the least and the greatest of the expected lengths.
    """
    longest = max(context_lens)
    if quick:
        yield from expected_decode(limits, sorted({min(context_lens), longest}))
        return
    lengths = set(context_lens)
    length = SHORTEST
    while length < longest:
        lengths.add(length)
        length *= STEP
    yield from expected(limits, sorted(lengths))
