"""Counts the matrix products of a compiled module: the flops of what it computes, as compiled."""

from __future__ import annotations

import math
import re
from typing import Final

from rpac.schedule.hlo import Module, Operation

_LABELS: Final = re.compile(r"dim_labels=\w+_(\w+)->\w+")
_CONTRACTED: Final = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_DILATED: Final = re.compile(r"\b[lr]hs_dilate=")


def flops_of(module: Module, operation: Operation) -> int:
    """Flops of the matrix products in an operation and in what it calls; a multiply-add is two.

    A convolution that stands for a batch of products has the batch as a dilated window, of which each result uses one place.
    """
    if operation.opcode in ("dot", "convolution"):
        return 2 * math.prod(operation.shapes[0].dims) * _contracted(module, operation)
    return sum(
        flops_of(module, inner)
        for names in operation.called.values()
        for name in names
        for inner in module.computations[name].operations
    )


def _contracted(module: Module, operation: Operation) -> int:
    left, right = (module[name].shapes[0].dims for name in operation.inputs[:2])
    if operation.opcode == "dot":
        match = _CONTRACTED.search(operation.attributes)
        return math.prod(left[int(n)] for n in (match[1] if match else "").split(",") if n)
    labels = _LABELS.search(operation.attributes)
    if labels is None:
        return 0
    dilated = _DILATED.search(operation.attributes) is not None
    return math.prod(
        size for size, label in zip(right, labels[1], strict=True) if label == "i" or not (dilated or label == "o")
    )
