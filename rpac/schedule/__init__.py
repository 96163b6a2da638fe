"""Predicts what a kernel does on a TPU from the compiler's own final schedule and a batch's scalar operands.

    dump.py (compilers.py) -> parse.py -> program.py -> walk.py (over memory.py, hbm.py) -> loops.py: one kernel
                           -> hlo.py -> scalars.py (layout.py) -> sequence.py -> report.py: the call around them

`Call(dump).predict(parameters, work)` times a whole call; `walk(schedule, operands, model)` one kernel. Never needed by
a serving process.
"""

from __future__ import annotations

from rpac.schedule.compilers import check_compiler
from rpac.schedule.dump import Dump, collect, dump_command, dump_export
from rpac.schedule.model import Model, model_of
from rpac.schedule.parse import Schedule, parse_schedule
from rpac.schedule.report import Call, CallReport, Work, attention_work
from rpac.schedule.walk import Walk, walk

__all__ = [
    "Call", "CallReport", "Dump", "Model", "Schedule", "Walk", "Work", "attention_work", "check_compiler", "collect",
    "dump_command", "dump_export", "model_of", "parse_schedule", "walk",
]  # fmt: skip
