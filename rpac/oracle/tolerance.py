"""How far a program's attention may be from the oracle's: the tolerances, stated once, and the error that they bound."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Of the norm of one token's output in one head, relative to the oracle's.
# bfloat16: weights are rounded before they are multiplied, and the output in the end, by 2**-8 of an element at most each.
# float32: sums and products round by 2**-24 each, but an error in a score is one of an exponent, and scores are tens.
TOLERANCE = {"bfloat16": 2.0**-7, "float32": 2.0**-15}


def attention_error(out: NDArray[np.float32], want: NDArray[np.float32]) -> tuple[float, tuple[int, int]]:
    """The largest relative error of `[tokens, heads, head_dim]`, and the token and head that have it."""
    if not out.size:
        return 0.0, (0, 0)
    errors = np.linalg.norm(out - want, axis=-1) / np.linalg.norm(want, axis=-1)
    errors = np.where(np.isfinite(errors), errors, np.inf)
    token, head = np.unravel_index(int(errors.argmax()), errors.shape)
    return float(errors.max()), (int(token), int(head))
