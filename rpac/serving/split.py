"""How a step's tokens are shared out, and where each of them lies: pure functions of numpy arrays."""

from __future__ import annotations

import numpy as np

from rpac.batch import Batch
from rpac.batch.build import Int64s
from rpac.contract.kind import Int32s


def split_budget(left: Int64s, chunk: int, budget: int) -> Int64s:
    """How many tokens of each sequence a step computes; 0 for one that waits.

    `left` counts what each sequence, the oldest first, still has to compute. Sequences with one token left decode, and
    come first; what remains of `budget` goes to the others in their order, up to `chunk` tokens each.
    """
    decode = left == 1
    wanted = np.where(decode, 0, np.minimum(left, chunk))
    before = np.cumsum(wanted) - wanted + decode.sum()
    return np.where(decode, np.cumsum(decode) <= budget, np.clip(budget - before, 0, wanted)).astype(np.int64)


def query_positions(batch: Batch) -> tuple[Int32s, Int32s]:
    """The sequence and the position in it of every row of queries, `[tokens]` each; 0 in rows of padding.

    A sequence is named by its index among those that the batch was built of: gather tokens by both.
    """
    ends = batch.cu_q_lens[: len(batch) + 1]
    rows = np.repeat(np.arange(len(batch)), np.diff(ends))
    sequences, positions = np.zeros(batch.tokens, np.int32), np.zeros(batch.tokens, np.int32)
    sequences[: len(rows)] = np.array(batch.order, np.int32)[rows]
    positions[: len(rows)] = np.arange(len(rows)) + (batch.kv_lens[: len(batch)] - ends[1:])[rows]
    return sequences, positions
