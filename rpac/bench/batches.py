"""Which batches a program is timed on: those that the command line names, or for each program those that fill it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rpac.batch import Batch, Limits
from rpac.batch.select import select
from rpac.contract.arrays import cdiv
from rpac.contract.kind import Int32s
from rpac.contract.program import Variant
from rpac.errors import BatchError
from rpac.oracle.canary import spread_batch
from rpac.predict import Workload

MIXED_DECODES = 4  # of the token bucket of a mixed batch, one part in so many is decode rows


@dataclass(frozen=True)
class Case:
    """One program and the batch that it is timed on."""

    layer: str
    variant: Variant
    workload: Workload

    def __str__(self) -> str:
        return f"{self.layer} {self.variant}, {self.workload.label}".strip()


def batch_of(limits: Limits, case: Case) -> tuple[Batch, Int32s]:
    """The batch of a case, and the pages that it uses: the same on every machine.

    Raises BatchError where it breaks the contract or needs more pages than the cache has.
    """
    workload = case.workload
    context = [kv - q for q, kv in zip(workload.q_lens, workload.kv_lens, strict=True)]
    return spread_batch(case.variant.kind, limits, workload.q_lens, context)


def cases_of_programs(
    layer: str, variants: Collection[Variant], limits: Limits, context_lens: Sequence[int]
) -> list[Case]:
    """For each program and each of the lengths that the spec expects, the largest batch that the program takes.

    decode: as many rows as fit. prefill: as many chunks as fit. mixed: a quarter of the token bucket is decode rows, and
    one sequence has the rest. A batch takes at most the pages of the cache. A length that no row can have is left out.
    """
    return [
        Case(layer, variant, workload)
        for variant in variants
        for length in context_lens
        if (workload := _filling(variant, limits, length)) is not None
    ]


def cases_asked(
    layer: str, variants: Mapping[Variant, object], limits: Limits, workloads: Sequence[Workload]
) -> list[Case]:
    """Each batch on the program that it selects. Raises BatchError or SelectionError where the bundle does not take one."""
    found = []
    for workload in workloads:
        batch = workload.batch(limits)
        pages = sum(cdiv(kv_len, limits.page_size) for kv_len in workload.kv_lens)
        if pages > limits.num_pages:
            raise BatchError(
                f"{workload.label}: takes {pages} pages; must be at most {limits.num_pages}, those of the bundle's cache; "
                f"name a smaller batch, or build with `num_pages: {pages}`"
            )
        found.append(Case(layer, select(variants, limits, batch.tokens, batch.distribution), workload))
    return found


def _filling(variant: Variant, limits: Limits, length: int) -> Workload | None:
    rows = list(_rows(variant, limits, length))
    free = limits.num_pages
    kept: list[tuple[int, int]] = []
    for q_len, kv_len in rows:
        need = cdiv(kv_len, limits.page_size)
        if need <= free:
            kept.append((q_len, kv_len))
            free -= need
    if not kept:
        return None
    q_lens, kv_lens = zip(*kept, strict=True)
    return Workload(_label(variant, kept, length), q_lens, kv_lens)


def _rows(variant: Variant, limits: Limits, length: int) -> Iterator[tuple[int, int]]:
    """New tokens and length of each row, the longest new part first."""
    kind, tokens = variant
    new, chunk, full = limits.decode_len, limits.prefill_chunk, min(length, limits.max_kv_len)
    if kind == "prefill":
        if full >= chunk:
            yield from [(chunk, full)] * min(tokens // chunk, limits.max_num_seqs)
        return
    decodes = min(tokens // new, limits.max_num_seqs)
    if kind == "mixed":
        decodes = min(tokens // MIXED_DECODES // new, limits.max_num_seqs - 1)
        rest = min(tokens - decodes * new, full)
        yield rest, full
    if full >= new:
        yield from [(new, full)] * decodes


def _label(variant: Variant, rows: Sequence[tuple[int, int]], length: int) -> str:
    if variant.kind == "decode":
        return f"decode {len(rows)}x{length}"
    if variant.kind == "prefill":
        return f"prefill {len(rows)}x{rows[0][0]}/{length}"
    (rest, _), *decodes = rows
    return f"mixed 1x{rest}+{len(decodes)}x{decodes[0][0]}/{length}" if decodes else f"mixed 1x{rest}/{length}"
