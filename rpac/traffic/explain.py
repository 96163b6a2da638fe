"""Says which program a batch runs on and why, or why there is none."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from rpac.batch import Batch, Limits
from rpac.batch.select import select
from rpac.contract.program import Variant
from rpac.errors import BatchError, SelectionError
from rpac.traffic.trace import Workload


@dataclass(frozen=True)
class Explanation:
    """A batch and its program. `program` is None where there is none: then `reasons` has the error."""

    workload: Workload
    distribution: tuple[int, int, int] | None
    num_tokens: int
    program: Variant | None
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {
            "batch": {
                "label": self.workload.label,
                "q_lens": list(self.workload.q_lens),
                "kv_lens": list(self.workload.kv_lens),
            },
            "distribution": self.distribution,
            "num_tokens": self.num_tokens,
            "program": None if self.program is None else str(self.program),
            "reasons": list(self.reasons),
        }


def explain(built: Collection[Variant], limits: Limits, workload: Workload) -> Explanation:
    """Selects the program for a batch as the engine does. Raises nothing for a batch that has none."""
    num_tokens = sum(workload.q_lens)
    try:
        batch = workload.batch(limits)
    except (BatchError, SelectionError) as error:
        return Explanation(workload, None, num_tokens, None, (str(error),))
    i, j, k = (int(value) for value in batch.distribution)
    try:
        program = select(built, limits, batch.tokens, batch.distribution)
    except SelectionError as error:
        return Explanation(workload, (i, j, k), num_tokens, None, (str(error),))
    return Explanation(workload, (i, j, k), num_tokens, program, (_kind(batch), _bucket(batch)))


def _kind(batch: Batch) -> str:
    limits, (i, j, k) = batch.limits, (int(value) for value in batch.distribution)
    decode = "1 new token" if limits.decode_len == 1 else f"{limits.decode_len} new tokens"
    prefill = f"a prefill chunk of {limits.prefill_chunk} new tokens"
    if batch.kind != "mixed":
        return f"{batch.kind}: every sequence has {decode if batch.kind == 'decode' else prefill}"
    counts = [(i, decode), (j - i, prefill), (k - j, "another number of new tokens")]
    found = ", ".join(f"{count} with {what}" for count, what in counts if count)
    return f"mixed: the batch is neither all decode rows nor all prefill chunks ({found})"


def _bucket(batch: Batch) -> str:
    buckets = ", ".join(map(str, batch.limits.token_buckets))
    padding = batch.tokens - batch.num_tokens
    return (
        f"{batch.tokens} query rows: the smallest of the token buckets {buckets} that holds {batch.num_tokens} new tokens; "
        f"{padding} rows ({padding / batch.tokens:.0%}) are padding"
    )
