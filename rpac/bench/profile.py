"""Device time from JAX's profiler: how long each execution of a program took on the device, and each of its operations.

On TPU the trace (an XPlane) has a plane for each device. The plane's line `XLA Modules` has one event for each execution of
a program, and its line `XLA Ops` one for each operation.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
from jax.profiler import ProfileData

from rpac.bench.time import Timed

DEVICE = "/device:"
MODULES = "XLA Modules"
OPERATIONS = "XLA Ops"
_OPERATION = re.compile(r"%?([\w.\-]+)")  # the name alone, where the event is named by a whole line of HLO


class NoDeviceTime(Exception):
    """The profiler does not say how long calls took on the device; the message says why."""


@dataclass(frozen=True)
class DeviceTimes:
    """Seconds of each call, in order, and the mean seconds of each operation in a call, by its name. Operations of an `XLA Ops`
    line nest: a loop's time includes that of what is in it.
    """

    calls: tuple[float, ...]
    operations: Mapping[str, float] = field(default_factory=dict)


def profiled(calls: Timed, count: int) -> DeviceTimes:
    """Runs `count` calls under the profiler. Raises NoDeviceTime."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host down
    with tempfile.TemporaryDirectory(prefix="rpac-profile-") as folder:
        try:
            calls.wait()
            with jax.profiler.trace(folder, profiler_options=options):
                for _ in range(count):
                    calls()
                calls.wait()
        except (RuntimeError, ValueError) as error:
            raise NoDeviceTime(f"the profiler failed: {error}") from error
        traces = sorted(Path(folder).rglob("*.xplane.pb"))
        if len(traces) != 1:
            raise NoDeviceTime(f"the profiler wrote {len(traces)} traces; must be one")
        return device_times(ProfileData.from_file(str(traces[0])), count)


def device_times(trace: ProfileData, count: int) -> DeviceTimes:
    """The `count` executions of the program that took most of the time; of several devices, the slowest at each execution.

    Raises NoDeviceTime where no device has such executions, or another number of them.
    """
    by_device: list[tuple[float, ...]] = []
    operations: dict[str, float] = {}
    for plane in trace.planes:
        if not plane.name.startswith(DEVICE):
            continue
        lines = {line.name: line for line in plane.lines}
        by_program: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for event in lines[MODULES].events if MODULES in lines else ():
            by_program[event.name].append((event.start_ns, event.duration_ns))
        if not by_program:
            continue
        name, events = max(by_program.items(), key=lambda item: sum(duration for _, duration in item[1]))
        if len(events) != count:
            raise NoDeviceTime(f"the profile of {plane.name} has {len(events)} executions of {name}; must be {count}")
        by_device.append(tuple(duration * 1e-9 for _, duration in sorted(events)))
        if not operations and OPERATIONS in lines:
            operations = _operations(lines[OPERATIONS], count)
    if not by_device:
        raise NoDeviceTime(f"the profile has no device with a line of {MODULES}")
    return DeviceTimes(tuple(max(times) for times in zip(*by_device, strict=True)), operations)


def _operations(line: object, count: int) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for event in line.events:  # type: ignore[attr-defined]
        match = _OPERATION.match(event.name)
        seconds[match[1] if match else event.name] += event.duration_ns * 1e-9 / count
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
