"""Predicts a kernel that is not rpac's: JAX's megablox gmm, the grouped matrix product of a mixture of experts.

    python examples/predict_kernel.py tpu7x

Tokens are sorted by expert, and `group_sizes` says how many each expert has. The kernel's grid depends on them.
"""

from __future__ import annotations

import functools
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is installed to compile, and would look for a TPU

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.megablox import gmm

from rpac.schedule import Work, compile_function

TOKENS, K, N, EXPERTS = 2048, 1024, 1024, 8
TILING = (256, 1024, 512)  # of tokens, K and N
GROUPS = {
    "balanced": [256] * EXPERTS,
    "ragged": [900, 20, 300, 4, 60, 500, 200, 64],
}


def main(target: str) -> None:
    shapes = (
        jax.ShapeDtypeStruct((TOKENS, K), jnp.bfloat16),
        jax.ShapeDtypeStruct((EXPERTS, K, N), jnp.bfloat16),
        jax.ShapeDtypeStruct((EXPERTS,), jnp.int32),
    )
    function = functools.partial(gmm, preferred_element_type=jnp.bfloat16, tiling=TILING)
    compiled = compile_function(function, *shapes, target=target)  # once, for any group sizes
    needed = Work(bytes=2 * (TOKENS * K + EXPERTS * K * N + TOKENS * N), flops=2 * TOKENS * K * N)
    for name, sizes in GROUPS.items():
        report = compiled.predict({"group_sizes": np.array(sizes)}, needed)
        print(f"{name} groups: {report}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
