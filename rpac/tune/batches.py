"""The batches that candidates are timed on, drawn from the lengths that a spec expects."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

from rpac.batch import Limits
from rpac.contract.arrays import cdiv
from rpac.plan import KernelPlan
from rpac.predict import Workload
from rpac.spec import Spec


def limits_of(spec: Spec, plan: KernelPlan) -> Limits:
    """The limits of a spec with one token bucket, the largest of the plan: the one that stands for the others."""
    return replace(Limits.of(spec), token_buckets=plan.tokens[-1:])


def batches_of(spec: Spec, plan: KernelPlan, seed: int) -> tuple[Workload, ...]:
    """Batches of a plan's kind that fill its largest bucket: at each expected length, and one of lengths between them.

    The same seed draws the same lengths. None for a bucket that is too small for a batch of this kind.
    """
    limits = limits_of(spec, plan)
    distinct = {one.kv_lens: one for one in reversed(list(_drawn(spec, plan, seed)))}
    return tuple(one for one in reversed(distinct.values()) if one.batch(limits).kind == plan.kind)


def _drawn(spec: Spec, plan: KernelPlan, seed: int) -> Iterator[Workload]:
    q_lens = _q_lens(spec, plan.kind, plan.tokens[-1])
    if not q_lens:
        return
    lengths = sorted(set(spec.serving.context_lens))
    for length in lengths:
        yield _workload(plan.kind, str(length), q_lens, itertools.repeat(length))
    low, high = (lengths[0], lengths[-1]) if len(lengths) > 1 else (cdiv(lengths[0], 2), lengths[0])
    rng = random.Random(f"{seed} {plan.kind} {plan.tokens[-1]}")
    yield _workload(plan.kind, f"{low}-{high}", q_lens, (rng.randint(low, high) for _ in q_lens))


def _workload(kind: str, name: str, q_lens: tuple[int, ...], lengths: Iterable[int]) -> Workload:
    """A sequence is no shorter than its new tokens."""
    counted = " + ".join(f"{q_lens.count(q_len)}x{q_len}" for q_len in dict.fromkeys(q_lens))
    kv_lens = tuple(max(q_len, length) for q_len, length in zip(q_lens, lengths, strict=False))
    return Workload(f"{kind} {counted} at {name}", q_lens, kv_lens)


def _q_lens(spec: Spec, kind: str, tokens: int) -> tuple[int, ...]:
    """New tokens of each sequence: all decoding, all chunks, or chunks in half of the bucket beside decoding ones."""
    chunk, most, new = spec.serving.prefill_chunk, spec.serving.max_num_seqs, spec.serving.decode_len
    if kind == "decode":
        return (new,) * min(most, tokens // new)
    if kind == "prefill":
        return (chunk,) * min(most, tokens // chunk)
    if tokens < 2:  # holds one decoding sequence, which is no mixed batch
        return ()
    chunks = max(min(tokens // 2 // chunk, most - 1), 1)
    # Where the bucket has no room for a whole chunk beside a decoding sequence, a part of one.
    part = chunk if chunks * chunk < tokens and most > 1 else max(min(tokens, chunk) // 2, 2)
    return (new,) * min(most - chunks, (tokens - chunks * part) // new) + (part,) * chunks
