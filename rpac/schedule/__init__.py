"""Predicts what a kernel does on a TPU from the compiler's own final schedule and a batch's scalar operands.

    function.py -> dump.py (compilers.py): what the compiler leaves of a call
    parse.py -> program.py -> walk.py (over memory.py, hbm.py) -> loops.py: one kernel
        -> hlo.py -> scalars.py (layout.py), operands.py -> sequence.py -> report.py, call_report.py: the call around them
    identical.py, traffic.py, matmuls.py, interconnect.py, timeline.py -> step.py -> step_report.py: a model's whole step

`predict(function, *shapes, target=...)` times any jitted function with Pallas kernels. `Call(dump).predict(parameters, work)`
times a whole call that is compiled already; `walk(schedule, operands, model)` one kernel. Never needed by a serving process.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rpac.schedule.call_report import CallReport
from rpac.schedule.compilers import check_compiler
from rpac.schedule.dump import Dump, collect, dump_command, dump_export
from rpac.schedule.model import Model, model_of
from rpac.schedule.parse import Schedule, parse_schedule
from rpac.schedule.report import Call, Work, attention_work
from rpac.schedule.walk import Walk, walk

if TYPE_CHECKING:
    from rpac.schedule.function import CompiledFunction, compile_function, predict

__all__ = [
    "Call", "CallReport", "CompiledFunction", "Dump", "Model", "Schedule", "Walk", "Work", "attention_work", "check_compiler",
    "collect", "compile_function", "dump_command", "dump_export", "model_of", "parse_schedule", "predict", "walk",
]  # fmt: skip

_NEED_JAX = ("CompiledFunction", "compile_function", "predict")


def __getattr__(name: str) -> Any:
    if name not in _NEED_JAX:
        raise AttributeError(f"module 'rpac.schedule' has no attribute {name!r}")
    return getattr(importlib.import_module("rpac.schedule.function"), name)
