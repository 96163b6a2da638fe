"""A published point beside its prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peers import environment
from published import Point
from rpa_v3 import Config, dump, grid, parameters, working_kernel

from rpac.errors import ScheduleError
from rpac.schedule import Call, Model

BUILD = Path(__file__).parents[2] / "build"


@dataclass(frozen=True)
class Row:
    """A point beside its prediction; `config` is the best of those tried."""

    point: Point
    seconds: float
    config: Config

    @property
    def error(self) -> float:
        return self.seconds / self.point.seconds - 1


class Predictor:
    """Reads each dump once and walks it for any model. `python`: the interpreter for RPA v3; None: one is made."""

    def __init__(self, cache: Path, python: str | None = None) -> None:
        self.cache = cache
        self._pythons = {"v3": python} if python else {}
        self._calls: dict[Config, Call] = {}

    def kernel_seconds(
        self, config: Config, kv_lens: Sequence[int], q_lens: Sequence[int], case: str, model: Model
    ) -> float:
        """Seconds of the one kernel of the call that has the work; the other, empty, runs beside no measurement."""
        if config not in self._calls:
            self._calls[config] = Call(dump(config, lambda: self._python(config.kernel), self.cache), model)
        call = self._calls[config]
        call.model = model
        name = next(k.name for k in call.kernels if k.name.startswith(working_kernel(config, case)))
        operands = call.operands(parameters(config, kv_lens, q_lens, case))[name]
        return call.walk_kernel(name, operands | grid(config, kv_lens)).cycles / model.clock_hz

    def row(self, point: Point, model: Model) -> Row:
        """The best of a point's configs. One that the compiler refuses is left out; all of them is an error."""
        found, refused = [], None
        for config in point.configs:
            try:
                seconds = self.kernel_seconds(config, point.kv_lens, point.q_lens, point.case, model)
            except ScheduleError as error:
                refused = error
                continue
            found.append(Row(point, seconds, config))
        if not found:
            raise ScheduleError(f"{point.source}, {point.label}: no tiles compile: {refused}")
        return min(found, key=lambda row: row.seconds)

    def _python(self, kernel: str) -> str:
        if kernel not in self._pythons:
            early = kernel == "early"
            folder, peers = ("peers-early", environment.EARLY) if early else ("peers", environment.PEERS)
            self._pythons[kernel] = environment.ensure(BUILD / folder, environment.COMPILER, peers)
        return self._pythons[kernel]
