"""Which program a batch needs, and which part of a batch a row is in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]
Kind = Literal["decode", "prefill", "mixed"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def select_kind(distribution: Sequence[int] | Int32s) -> Kind:
    """Which program takes a batch of this distribution (i, j, k); an empty batch is decode."""
    i, j, k = distribution
    if i == k:
        return "decode"
    if i == 0 and j == k:
        return "prefill"
    return "mixed"


def row_kind(distribution: Sequence[int] | Int32s, row: int) -> Kind:
    """The part of the batch that a live row is in."""
    if row < distribution[0]:
        return "decode"
    return "prefill" if row < distribution[1] else "mixed"
