"""The files that `rpac bench` writes on a machine with the device, as points that no constant was fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from calibration.results import constants
from rpac.bench import result
from rpac.bench.result import Bench, Entry
from rpac.errors import BatchError, ScheduleError
from rpac.schedule import model_of


@dataclass(frozen=True)
class Measured:
    """A program on a batch, and where the profiler named them also each of its kernels. Seconds; `measured` is a median, or of a
    kernel the mean. `note` says what keeps the two from being compared, if anything.
    """

    device: str
    bundle: str
    label: str
    method: str
    measured: float
    predicted: float | None
    note: str = ""

    @property
    def error(self) -> float | None:
        return None if self.predicted is None else self.predicted / self.measured - 1


def read(path: Path) -> list[Measured]:
    """The entries of a file. Raises SystemExit with what is wrong where it is none."""
    try:
        bench = result.read(path)
        return [one for entry in bench.entries for one in _entry(bench, entry)]
    except (BatchError, KeyError) as error:
        raise SystemExit(f"{path}: not a file that rpac bench wrote ({type(error).__name__}: {error})") from error


def _entry(bench: Bench, entry: Entry) -> list[Measured]:
    timing, predicted = entry.timing, entry.predicted
    layer = f"{entry.layer} " if entry.layer else ""
    label = f"{layer}{entry.kind}/{entry.tokens}, {entry.label}"
    place = (bench.machine["device_kind"], f"{bench.bundle['name']} {bench.bundle['digest'][:12]}")

    def row(name: str, measured: float, seconds: float | None, note: str = "") -> Measured:
        return Measured(*place, name, timing.method, measured, seconds, note)

    whole = timing.spread.median
    if predicted is None:
        return [row(label, whole, None, entry.not_predicted)]
    note = _other_constants(bench.bundle["target"], predicted.model)
    kernels = [
        row(f"{label}: {name}", timing.operations[name], seconds, note)
        for name, seconds in predicted.kernels.items()
        if name in timing.operations
    ]
    return [row(label, whole, predicted.seconds, note), *kernels]


def _other_constants(target: str, model: Mapping[str, float]) -> str:
    """Says so where a prediction rests on other constants than those of today."""
    try:
        today = constants(model_of(target))
    except ScheduleError:
        return ""
    other = [f"{name} {model[name]:g}" for name, value in today.items() if name in model and model[name] != value]
    return f"predicted with {', '.join(other)}" if other else ""
