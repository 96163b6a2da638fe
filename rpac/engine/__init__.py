"""Loads a bundle, picks the program for each batch, runs it, and counts what ran.

Nothing here knows specs, templates or kernels' sources. A program is made ready at its first use or by `warm`:
a TPU executable by handing its bytes to the runtime, a portable program by one XLA compile.
"""

from rpac.engine.engine import Engine
from rpac.engine.events import (
    BatchRefused,
    BatchRun,
    CallOverdue,
    CanaryRun,
    Count,
    Event,
    JsonLog,
    Observer,
    ProgramFailed,
    ProgramReady,
)
from rpac.engine.loading import load, load_layers, load_steps
from rpac.engine.steps import BoundSteps, StepEngine
from rpac.engine.warmup import Warming

__all__ = [
    "BatchRefused",
    "BatchRun",
    "BoundSteps",
    "CallOverdue",
    "CanaryRun",
    "Count",
    "Engine",
    "Event",
    "JsonLog",
    "Observer",
    "ProgramFailed",
    "ProgramReady",
    "StepEngine",
    "Warming",
    "load",
    "load_layers",
    "load_steps",
]
