"""Holds what a call made against the oracle: some rows of the very batch that is timed, and the cache of those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import jax
import numpy as np
from numpy.typing import NDArray

from rpac.batch import Batch
from rpac.bench.batches import Case
from rpac.bench.inputs import Calls, Inputs
from rpac.check.arrays import Arguments, Array
from rpac.check.compare import Difference, compare, lse_notes
from rpac.contract.arrays import cdiv
from rpac.engine import Engine
from rpac.errors import CheckError
from rpac.oracle.expected import oracle

MOST_ROWS = 4
# Of all rows looked at together, unless each row alone has more. The oracle takes some seconds for as many.
MOST_TOKENS = 1 << 15
MOST_PAIRS = 1 << 24  # of a query and a token


@dataclass(frozen=True)
class Checked:
    """What a program that passed was held against: the largest error of any token and head, and the rows looked at."""

    error: float
    tolerance: float
    rows: tuple[int, ...]


def verify(engine: Engine, case: Case, inputs: Inputs) -> Checked:
    """Runs a case once. Raises CheckError where the output of a row, or its pages of the cache, are not the oracle's."""
    rows = rows_to_look_at(inputs.batch)
    args, pages = part_of(engine, inputs, rows)
    want_out, want_cache, want_lse = oracle(engine.model, engine.kv_layout, args.of_batch, args.extra)
    calls = Calls(engine, case, inputs)
    out, *more = calls()
    tokens = np.concatenate([np.arange(*inputs.batch.cu_q_lens[row : row + 2]) for row in rows])
    look = jax.jit(lambda kv_cache, at: kv_cache[at])
    worst: Difference | None = None
    for place, (part, cache) in enumerate(
        zip(engine.placement.parts(out), engine.placement.parts(calls.kv_cache), strict=True)
    ):
        found = compare(
            args,
            np.asarray(part)[tokens],
            np.asarray(look(cache, pages)),
            want_out,
            want_cache,
            kv_layout=engine.kv_layout,
        )
        notes = list(found.notes)
        if more and want_lse is not None:
            notes += lse_notes(args, np.asarray(engine.placement.parts(more[0])[place])[tokens], want_lse)
        if notes:
            _refuse(engine, case, rows, notes)
        if worst is None or found.error > worst.error:
            worst = found
    assert worst is not None
    return Checked(worst.error, worst.tolerance, tuple(rows))


def rows_to_look_at(batch: Batch) -> list[int]:
    """Up to MOST_ROWS rows, spread from the first to the last, as far as the oracle's time allows; at least one."""
    views = list(batch)
    spread = np.unique(np.linspace(0, len(views) - 1, MOST_ROWS).round().astype(int)).tolist()
    chosen, tokens, pairs = [], 0, 0
    for row in spread:
        view = views[row]
        if tokens + view.kv_len <= MOST_TOKENS and pairs + view.q_len * view.kv_len <= MOST_PAIRS:
            chosen.append(row)
            tokens, pairs = tokens + view.kv_len, pairs + view.q_len * view.kv_len
    return chosen or [min(views, key=lambda view: view.q_len * view.kv_len).row]


def part_of(engine: Engine, inputs: Inputs, rows: list[int]) -> tuple[Arguments, NDArray[np.int32]]:
    """The call of some rows alone, on a cache of their pages alone, and which pages of the whole cache these are."""
    batch = inputs.batch
    size = engine.limits.page_size
    kv_lens = batch.kv_lens[rows]
    q_lens = np.diff(batch.cu_q_lens)[rows]
    counts = [cdiv(int(kv_len), size) for kv_len in kv_lens]
    table = np.zeros((len(rows), engine.limits.pages_per_seq), np.int32)
    used = []
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        table[index, :count] = sum(counts[:index]) + np.arange(count)
        used.append(batch.page_indices.reshape(-1, engine.limits.pages_per_seq)[row, :count])
    pages = np.concatenate(used)
    place_of = dict(zip(inputs.pages.tolist(), inputs.places.tolist(), strict=True))
    kv_cache = inputs.held[[place_of[page] for page in pages.tolist()]]
    tokens = np.concatenate([np.arange(*batch.cu_q_lens[row : row + 2]) for row in rows])
    extra: dict[str, Array] = dict(inputs.extra)
    if "tree" in extra:
        extra["tree"] = extra["tree"][rows]
    args = Arguments(
        {name: array[tokens] for name, array in inputs.by_token.items()},
        kv_cache,
        kv_lens,
        table.reshape(-1),
        np.cumsum([0, *q_lens]).astype(np.int32),
        np.array([sum(row < end for row in rows) for end in batch.distribution], np.int32),
        extra,
    )
    return args, pages


def _refuse(engine: Engine, case: Case, rows: list[int], notes: list[str]) -> NoReturn:
    raise CheckError(
        f"program {case} on {engine.placement}, rows {' '.join(map(str, rows))}: {'; '.join(notes)}; "
        "must be the oracle's; nothing was timed; do not serve with this bundle here; `rpac serve-check` looks at every program"
    )
