"""Runs a compile in a process of its own with the TPU compiler's dump flags, and collects the schedules it leaves.

The flags must be set before JAX is imported, hence the process. The dump is written to a temporary folder that is
removed whatever happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rpac.errors import ScheduleError

_PASSES = "packed-bundles-post-ra|pre-delay_hlo-static-per-bundle"
_SCHEDULE = re.compile(r"\d+-(.+)-\d+-packed-bundles-post-ra\.txt")
_UTILIZATION = re.compile(r"\d+-(.+)-\d+-pre-delay_hlo-static-per-bundle-utilization\.txt")
_LAST = re.compile(r"\d+-TLP-\d+-pre-delay_hlo-static-per-bundle-utilization\.txt")
_HLO = re.compile(r"\d+-TLP-hlo\.txt")
TOP: Final = "TLP"
"""The module itself: its schedule calls those of its operations."""
_NO_OPERATION: Final = frozenset({TOP, "<late-initialization>", "<late-finalization>"})

_ENVIRONMENT: Final = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_HLO_SOURCE_FILE_CANONICALIZATION_REGEX": ".*",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
}
"""What lets JAX compile for a TPU where there is none, and beside another process that does; and leaves no paths."""


@dataclass(frozen=True)
class Dump:
    """What the compiler left of one compiled call.

    compiler: the libtpu version, as the compiling process reported it. hlo: the scheduled HLO module. schedules and
    utilizations: text by the name of the HLO operation, kernels and XLA's own operations alike.
    """

    target: str
    compiler: str
    hlo: str
    schedules: Mapping[str, str]
    utilizations: Mapping[str, str]


def dump_command(command: Sequence[str], target: str, *, timeout: float = 900.0, cwd: Path | None = None) -> Dump:
    """Runs `command`, which must compile exactly one call for `target`, and collects its dump.

    The command must print a line `libtpu VERSION` before it compiles, for only its own process knows. Once the schedules
    are written it is stopped: the assembly listing that follows takes as long again. Raises ScheduleError where it
    fails (with the end of what it printed), takes longer than `timeout` seconds, or leaves no schedule.
    """
    with _dumped(command, target, timeout, cwd) as (folder, compiler):
        return collect(folder, target, compiler)


def dump_step(command: Sequence[str], target: str, *, timeout: float = 900.0) -> Dump | None:
    """As `dump_command`, with the schedule of the module itself as TOP; None where it ends well and compiles nothing."""
    with _dumped(command, target, timeout, None) as (folder, compiler):
        return collect(folder, target, compiler, top=True) if any(folder.iterdir()) else None


@contextlib.contextmanager
def _dumped(command: Sequence[str], target: str, timeout: float, cwd: Path | None) -> Iterator[tuple[Path, str]]:
    """The folder with what a command's compile left, and the version of libtpu that it printed."""
    with tempfile.TemporaryDirectory(prefix="rpac-dump-") as folder:
        dumped, printed, errors = (Path(folder, name) for name in ("dump", "out", "err"))
        dumped.mkdir()
        flags = f"--xla_jf_dump_to={dumped} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={_PASSES}"
        environment = os.environ | _ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags}
        with printed.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(list(command), env=environment, cwd=cwd, stdout=out, stderr=err)
            try:
                stopped = _await(process, dumped, timeout)
            finally:
                process.kill()
                process.wait()
        if stopped is None:
            raise ScheduleError(f"the compile for {target} took over {timeout:.0f} s; raise the timeout")
        if stopped:
            raise ScheduleError(f"the compile for {target} failed ({stopped}):\n{errors.read_text()[-3000:]}")
        version = re.search(r"^libtpu (\S+)$", printed.read_text(), re.MULTILINE)
        if version is None:
            raise ScheduleError(
                f"the compile for {target} did not say which libtpu it used; it must print `libtpu VERSION`"
            )
        yield dumped, version[1]


def _await(process: subprocess.Popen[bytes], dumped: Path, timeout: float) -> int | None:
    """0 once the dump is whole, the exit status where the process failed, None where it took too long."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        status = process.poll()
        if status is not None:
            return status
        # The module's own schedule comes after those of all its operations.
        if any(_LAST.fullmatch(path.name) for path in dumped.iterdir()):
            return 0
        time.sleep(0.1)
    return None


def dump_export(exported: bytes, target: str, *, donate: Sequence[int] = (), timeout: float = 900.0) -> Dump:
    """Compiles a serialized `jax.export` artifact for `target` and collects its dump.

    `donate`: arguments whose buffers the call may reuse, as its caller will compile it. Raises as `dump_command`.
    """
    with tempfile.TemporaryDirectory(prefix="rpac-export-") as folder:
        artifact = Path(folder, "call.export")
        artifact.write_bytes(exported)
        command = [
            sys.executable,
            "-m",
            "rpac.schedule.compile_export",
            str(artifact),
            target,
            json.dumps(list(donate)),
        ]
        return dump_command(command, target, timeout=timeout)


def collect(folder: Path, target: str, compiler: str, *, top: bool = False) -> Dump:
    """Reads a dump folder; with `top`, also the schedule of the module itself, as TOP.

    Raises ScheduleError where it holds no HLO module, more than one, or no schedule.
    """
    modules: list[Path] = []
    schedules: dict[str, str] = {}
    utilizations: dict[str, str] = {}
    left_out = _NO_OPERATION - {TOP} if top else _NO_OPERATION
    for path in sorted(folder.iterdir()):
        if _HLO.fullmatch(path.name):
            modules.append(path)
        for pattern, found in ((_SCHEDULE, schedules), (_UTILIZATION, utilizations)):
            match = pattern.fullmatch(path.name)
            if match and not match[1].endswith("schedule-analysis") and match[1] not in left_out:
                found[match[1]] = path.read_bytes().decode()
    if len(modules) != 1 or not schedules:
        raise ScheduleError(
            f"{folder}: found {len(modules)} HLO modules and {len(schedules)} schedules; a dump has one module and a "
            "schedule for each of its operations: compile one call, for a TPU, in a process that has not yet imported JAX"
        )
    return Dump(target, compiler, modules[0].read_text(), schedules, utilizations)
