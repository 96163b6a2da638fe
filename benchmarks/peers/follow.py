"""For calls that compute scalars for their kernels: compiles such a call, or computes those scalars from a batch's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from abstract_tpu import Device


def compile_or_follow(
    device: Device,
    call: Callable[..., object],
    arguments: list[object],
    donate: tuple[int, ...],
    values: Mapping[str, Sequence[int]] | None,
) -> None:
    """With the values of a batch's parameters, by number, prints what the kernels take; rpac must be importable then."""
    if values is None:
        device.compile(call, arguments, donate)
        return
    from rpac.schedule.operands import kernel_operands

    with jax.sharding.use_abstract_mesh(device.mesh()):
        traced = jax.jit(call).trace(*arguments).jaxpr
    given = {int(number): np.asarray(value, np.int32) for number, value in values.items()}
    found = [
        {
            "name": one.name,
            "shapes": one.shapes,
            "known": {index: value.tolist() for index, value in one.known.items()},
        }
        for one in kernel_operands(traced, given)
    ]
    print(json.dumps(found))
