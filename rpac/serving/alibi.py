"""The slopes of position biases (ALiBi), as models with `model.alibi` are trained with them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def alibi_slopes(q_heads: int, max_bias: float = 8.0) -> NDArray[np.float32]:
    """The slope of each query head, float32 `[q_heads]`, for the argument `alibi_slopes` of an engine.

    For a power of two, head i of n has 2 ** (-max_bias * (i + 1) / n). Otherwise the heads take those of the next power of
    two: every second one from the second on, then those between (Press et al., arXiv 2108.12409; BLOOM and MPT do so, and
    MPT's `alibi_bias_max` is `max_bias`). Of tensor parallelism give the slopes of all heads: the engine cuts them. Raises
    ValueError for no heads.
    """
    if q_heads < 1:
        raise ValueError(f"found {q_heads} query heads; must be 1 or more")
    count = 1 << (q_heads - 1).bit_length()
    slopes = 2.0 ** (-max_bias * np.arange(1, count + 1) / count)
    if count != q_heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:q_heads]
    return slopes.astype(np.float32)
