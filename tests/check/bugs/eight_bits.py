"""Bugs of decode kernels that multiply rows in parts of int8 with an int8 cache."""

from __future__ import annotations

from mutation import Bug, BugSuite
from small import eight_bits, eight_bits_plan

PARTS = (
    Bug("parts of a row added as if of one size", "matmul_parts", "total * (1 / PART_STEPS)", "total"),
    Bug(
        "scores not scaled back",
        "matmul_keys",
        "matmul_parts(queries * (1 / unit), keys, 1) * unit",
        "matmul_parts(queries * (1 / unit), keys, 1)",
    ),
    Bug("probabilities rounded to whole numbers", "matmul_values", "p * PART_LARGEST", "jnp.round(p) * PART_LARGEST"),
)
SUITES = [
    BugSuite(
        "decode, int8 parts",
        eight_bits("int8"),
        eight_bits_plan,
        PARTS,
        ordinary=("probabilities rounded to whole numbers",),
    )
]
