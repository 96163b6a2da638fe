"""Counts the matrix products of a compiled module: the flops of what it computes, as compiled."""

from __future__ import annotations

import math
import re
from typing import Final

from rpac.schedule.hlo import Module, Operation

_LABELS: Final = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED: Final = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_WINDOW: Final = re.compile(r"window=\{([^}]*)\}")


def flops_of(module: Module, operation: Operation) -> int:
    """Flops of the matrix products in an operation and in what it calls; a multiply-add is two."""
    if operation.opcode == "dot":
        return 2 * math.prod(operation.shapes[0].dims) * _contracted(module, operation)
    if operation.opcode == "convolution":
        return _convolution(module, operation)
    return sum(
        flops_of(module, inner)
        for names in operation.called.values()
        for name in names
        for inner in module.computations[name].operations
    )


def _contracted(module: Module, operation: Operation) -> int:
    left = module[operation.inputs[0]].shapes[0].dims
    match = _CONTRACTED.search(operation.attributes)
    return math.prod(left[int(n)] for n in (match[1] if match else "").split(",") if n)


def _convolution(module: Module, operation: Operation) -> int:
    """XLA makes convolutions of matrix products. Those of a batch have the batch as a window, and most of its places lie in
    padding, so only pairs of a result and a place that holds an element are counted.
    """
    labels = _LABELS.search(operation.attributes)
    if labels is None:
        return 0
    arrays = (*(module[name].shapes[0] for name in operation.inputs[:2]), operation.shapes[0])
    left, right, result = (
        dict(zip(names, array.dims, strict=True)) for names, array in zip(labels.groups(), arrays, strict=True)
    )
    spatial = sorted(label for label in right if label.isdigit())
    pairs: int = math.prod(_pairs(operation, at, left[dim], right[dim], result[dim]) for at, dim in enumerate(spatial))
    flops: int = 2 * result["b"] * result["f"] * right["i"] * pairs
    return flops


def _pairs(operation: Operation, at: int, size: int, window: int, results: int) -> int:
    """How many pairs of a result and a place of its window hold an element, along one spatial dimension."""
    found = _WINDOW.search(operation.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", found[1] if found else ""))

    def value(name: str, default: int) -> int:
        return int(fields[name].split("x")[at]) if name in fields else default

    before = int(fields["pad"].split("x")[at].partition("_")[0]) if "pad" in fields else 0
    stride, spread, reach = value("stride", 1), value("lhs_dilate", 1), value("rhs_dilate", 1)
    places = (o * stride + k * reach - before for o in range(results) for k in range(window))
    return sum(1 for place in places if 0 <= place <= (size - 1) * spread and place % spread == 0)
