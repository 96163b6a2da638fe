"""Which program a batch runs on: one pure function, for the engine and the command line alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches

from rpac.batch import Limits
from rpac.batch.limits import bucket_lines
from rpac.contract.kind import KINDS, Int32s, select_kind
from rpac.contract.program import Variant
from rpac.errors import BatchError, SelectionError


def select(built: Collection[Variant], limits: Limits, tokens: int, distribution: Sequence[int] | Int32s) -> Variant:
    """The variant for a batch of `tokens` query rows, padding included, and this distribution (i, j, k).

    Total over the contract: it returns a member of `built` or raises. Raises BatchError where `distribution` is none,
    and SelectionError, with the spec lines that would add it, where the batch is outside what was built; it never
    substitutes another program. Pass a set or a mapping: it is searched on every call.
    """
    i, j, k = distribution
    if not 0 <= i <= j <= k:
        raise BatchError(f"distribution is ({i}, {j}, {k}); must be 0 <= i <= j <= k; see docs/batch-contract.md")
    variant = Variant(select_kind((i, j, k)), tokens)
    if variant in built and k <= limits.max_num_seqs:
        return variant
    raise SelectionError(advice(built, limits, variant, int(k)))


def advice(built: Collection[Variant], limits: Limits, variant: Variant, sequences: int = 0) -> str:
    """Why a batch of this many sequences for `variant` is not in `built`, and the spec lines that would add it."""
    if sequences > limits.max_num_seqs:
        return (
            f"the batch has {sequences} sequences; max_num_seqs is {limits.max_num_seqs}; "
            f"split the batch, or build with\nserving:\n  max_num_seqs: {sequences}"
        )
    kind, tokens = variant
    if kind not in KINDS:
        close = get_close_matches(str(kind), KINDS, 1)
        return f"{kind!r} is no kind of program; must be one of {', '.join(KINDS)}" + (
            f"; write {close[0]!r}" if close else ""
        )
    if not hasattr(tokens, "__index__"):
        return f"the token bucket is {tokens!r}; must be an integer, of {', '.join(map(str, limits.token_buckets))}"
    if tokens not in limits.token_buckets:
        listed = ", ".join(map(str, limits.token_buckets))
        return (
            f"the batch has {tokens} query rows; the token buckets built are {listed}; pad queries, keys and values "
            f"to one of them, or build with\n{bucket_lines([*limits.token_buckets, tokens])}"
        )
    if kind == "prefill" and tokens < limits.prefill_chunk:
        return (
            f"the batch is prefill in {tokens} query rows; one prefill chunk has {limits.prefill_chunk}; "
            f"pad to a larger bucket, or build with\nserving:\n  prefill_chunk: {tokens}"
        )
    names = ", ".join(map(str, sorted(built)))
    return f"the batch needs the program {variant}; this bundle holds {names}; build the spec again"
