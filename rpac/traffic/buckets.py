"""Which token buckets a spec should have for the traffic of a trace: the fewest that pad little enough.

A batch runs in the smallest bucket that holds it, and the model computes the bucket's rows, padding too. Every bucket
more is a program more of each kind to build, to store and to make ready. For each number of buckets, the set that pads
least is found exactly: a bucket lies at the size of a batch, so a set divides the sizes into as many runs, and the best
division of the first sizes is one of fewer of them and a last run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rpac.batch.build import Int64s
from rpac.contract.arrays import align
from rpac.contract.kind import Kind, select_kind
from rpac.devices.chip import is_tpu
from rpac.errors import BatchError
from rpac.plan import KIND_ORDER, kinds_of
from rpac.spec import Spec
from rpac.spec.parse import MAX_TOKENS
from rpac.traffic.trace import Workload

ROWS = 8  # of a tile on a TPU: a bucket between two multiples of it computes as many rows as the larger one
# Of a program of llama3-8b, on two cores: a build of 10 for tpu7x takes 46 s, with 10 for cpu 57 s.
TPU_SECONDS, CPU_SECONDS = 4.6, 1.1
TPU_BYTES, CPU_BYTES = 1_300_000, 20_000


@dataclass(frozen=True, eq=False)
class Traffic:
    """The batches of a trace: how many new tokens each has, and its kind as an index of `KIND_ORDER`."""

    tokens: Int64s
    kinds: Int64s
    largest: int

    @classmethod
    def of(cls, workloads: Sequence[Workload], spec: Spec | None) -> Traffic:
        """The traffic of some batches, one at least; without a spec, no batch is known to be prefill alone.

        Raises BatchError for a batch that is larger than the spec's `max_num_tokens`, or than that of any spec.
        """
        sizes = [sum(one.q_lens) for one in workloads]
        most = MAX_TOKENS if spec is None else spec.serving.max_num_tokens
        for one, size in zip(workloads, sizes, strict=True):
            if size > most:
                limit = "max_num_tokens of any spec" if spec is None else f"max_num_tokens of {spec.file}"
                fix = "split the batch" if spec is None else f"split the batch, or write max_num_tokens: {max(sizes)}"
                raise BatchError(f"{one.label}: has {size} new tokens; must be at most {most}, {limit}; {fix}")
        chunk, new = (0, 1) if spec is None else (spec.serving.prefill_chunk, spec.serving.decode_len)
        kinds = np.array([KIND_ORDER.index(_kind(one.q_lens, chunk, new)) for one in workloads], np.int64)
        return cls(np.array(sizes, np.int64), kinds, align(max(sizes), ROWS) if spec is None else most)


@dataclass(frozen=True)
class Choice:
    """A set of buckets. Shares are rows of padding of all rows computed; None for a kind that the trace lacks."""

    buckets: tuple[int, ...]
    padding: float
    padding_of: Mapping[Kind, float | None]
    programs: int
    seconds: float  # of a build from nothing, about, on two cores
    nbytes: int  # of the programs in the bundle, about

    def as_dict(self) -> dict[str, object]:
        """Plain data."""
        return {
            "token_buckets": list(self.buckets),
            "padding": self.padding,
            "padding_of": dict(self.padding_of),
            "programs": self.programs,
            "build_seconds": self.seconds,
            "build_bytes": self.nbytes,
        }


def choices(traffic: Traffic, spec: Spec | None, most: int) -> list[Choice]:
    """The best set of each number of buckets, from 1 to `most`, or to as many as there are sizes."""
    return [judge(traffic, spec, buckets) for buckets in best_buckets(traffic.tokens, traffic.largest, most)]


def choose(found: Sequence[Choice], share: float) -> Choice | None:
    """The one with the fewest buckets whose padding is at most `share` of the rows, or None."""
    return next((one for one in found if one.padding <= share), None)


def judge(traffic: Traffic, spec: Spec | None, buckets: tuple[int, ...]) -> Choice:
    """What a set of buckets pads and costs; the last must hold every batch. Without a spec, all kinds of one TPU target."""
    rows = np.array(buckets)[np.searchsorted(buckets, traffic.tokens)]
    padding_of = {
        kind: _padding(traffic.tokens[traffic.kinds == index], rows[traffic.kinds == index])
        for index, kind in enumerate(KIND_ORDER)
    }
    per_target = sum(len(KIND_ORDER if spec is None else kinds_of(spec, bucket)) for bucket in buckets)
    targets = ("tpu7x",) if spec is None else spec.targets
    tpus = sum(map(is_tpu, targets))
    cpus = len(targets) - tpus
    return Choice(
        buckets=buckets,
        padding=_padding(traffic.tokens, rows) or 0.0,
        padding_of=padding_of,
        programs=per_target * len(targets),
        seconds=per_target * (tpus * TPU_SECONDS + cpus * CPU_SECONDS),
        nbytes=per_target * (tpus * TPU_BYTES + cpus * CPU_BYTES),
    )


def best_buckets(tokens: Int64s, largest: int, most: int) -> list[tuple[int, ...]]:
    """For each number of buckets up to `most`, the set with the fewest rows of padding; `largest` is in all of them.

    Takes time in the number of different sizes squared, times `most`.
    """
    tiles = -(-tokens // ROWS)
    sizes = np.unique(np.append(np.minimum(tiles * ROWS, largest), largest))
    at = np.searchsorted(sizes, tokens)
    # Rows computed are what differs between sets: batches before each size, and 0 before the first.
    batches = np.concatenate([[0], np.cumsum(np.bincount(at, minlength=len(sizes)))])
    count = len(sizes)
    rows = np.concatenate([[0], np.full(count, np.iinfo(np.int64).max // 2)])  # of the first n sizes, by no bucket
    starts: list[Int64s] = []
    found = []
    for buckets in range(1, min(most, count) + 1):
        fewest, start = rows.copy(), np.zeros(count + 1, np.int64)
        fewest[0] = rows[1]  # a set of some buckets holds one size at least
        for end in range(1, count + 1):
            totals = rows[:end] + (batches[end] - batches[:end]) * sizes[end - 1]
            start[end] = totals.argmin()
            fewest[end] = totals[start[end]]
        rows = fewest
        starts.append(start)
        found.append(_backwards(sizes, starts, buckets))
    return found


def _backwards(sizes: Int64s, starts: Sequence[Int64s], buckets: int) -> tuple[int, ...]:
    """The buckets, from where the last run of each best division starts."""
    end, chosen = len(sizes), []
    for start in reversed(starts[:buckets]):
        chosen.append(int(sizes[end - 1]))
        end = int(start[end])
    return tuple(reversed(chosen))


def _padding(tokens: Int64s, rows: Int64s) -> float | None:
    return float(1 - tokens.sum() / rows.sum()) if len(tokens) else None


def _kind(q_lens: Sequence[int], chunk: int, new: int) -> Kind:
    decodes = q_lens.count(new)
    return select_kind((decodes, decodes + (q_lens.count(chunk) if chunk != new else 0), len(q_lens)))
