"""What a search asks for: the times of a candidate, or whether a winner passes the oracle. Runs in any process.

A job holds all that its result depends on, so that it may run on another machine, and its result be kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from rpac.batch import Limits
from rpac.contract.attention import Attention
from rpac.contract.program import Variant
from rpac.devices.toolchain import toolchain
from rpac.errors import ScheduleError, TargetError
from rpac.files.store import Store
from rpac.lower import Task
from rpac.plan import KernelPlan
from rpac.predict import Programs, Workload, predict
from rpac.spec import Spec

FORMAT: Final = 1  # of stored results
RESULT: Final = "result.json"
CHECK_LIMIT_S: Final = 600.0
REASON_CHARS: Final = 240


@dataclass(frozen=True)
class Result:
    """Of a job: predicted seconds of each batch, or the reason why not. Both empty: a check that passed.

    final: False where another try may end otherwise, for instance out of memory. Such a result is not kept.
    """

    seconds: tuple[float, ...] = ()
    reason: str = ""
    final: bool = True


@dataclass(frozen=True)
class Measure:
    """Compile a candidate, and walk its schedule for each batch. `label` and `case` are for people."""

    case: str
    label: str
    task: Task
    model: Attention
    limits: Limits
    batches: tuple[Workload, ...]
    toolchain: Mapping[str, str]

    def key(self) -> str:
        """sha256 over everything that decides the result: the walker's own code too."""
        lengths = [[one.q_lens, one.kv_lens] for one in self.batches]
        return _digest("measure", self.task.key(self.toolchain, "tune"), lengths, _code("schedule"))

    def run(self) -> Result:
        """A candidate that the compiler refuses, or the walker cannot read, has a reason; anything else raises."""
        variant = Variant(self.task.kind, self.task.tokens)  # type: ignore[arg-type]
        programs = Programs(
            self.case,
            self.task.target,
            self.model,
            self.limits,
            (),
            {variant: self.task},
            Store(None),
            lambda line: None,
        )
        try:
            programs.call(variant)
        except ScheduleError as error:
            # What the compiler says names the program; of a compile that was killed nothing does.
            text = str(error)
            _, _, refusal = text.partition(f"{self.task.label}: ")
            return Result(reason=_line(refusal or text), final=bool(refusal) or not text.startswith("the compile for"))
        try:
            return Result(tuple(predict(programs, batch).report.seconds for batch in self.batches))
        except ScheduleError as error:
            return Result(reason=_line(str(error)))


@dataclass(frozen=True)
class Check:
    """Run a plan's kernel in the interpreter on a few batches, against the oracle."""

    case: str
    label: str
    spec: Spec
    plan: KernelPlan
    source_sha256: str
    seed: int
    toolchain: Mapping[str, str]

    def key(self) -> str:
        """sha256 over everything that decides the result: the oracle's own code too."""
        judges = [_code("check"), _code("oracle")]
        plan = self.plan.as_dict()
        return _digest("check", self.spec.meaning(), plan, self.source_sha256, self.seed, dict(self.toolchain), judges)

    def run(self) -> Result:
        """In a process of its own: the interpreter keeps one kernel's state a process, and may end it."""
        what = {
            "spec": self.spec.source,
            "file": self.spec.file,
            "layer": self.spec.layer,
            "plan": self.plan.as_dict(),
            "seed": self.seed,
        }
        with tempfile.TemporaryDirectory(prefix="rpac-check-") as folder:
            path = Path(folder, "check.json")
            path.write_text(json.dumps(what))
            command = [sys.executable, "-m", "rpac.tune.check_task", str(path)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_LIMIT_S)
            except subprocess.TimeoutExpired:
                return Result(reason=f"the oracle's check took over {CHECK_LIMIT_S:.0f} s", final=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            return Result(
                reason=_line(f"the oracle's check ended with {done.returncode} and said: {said}"), final=False
            )
        return Result(reason=_line(done.stdout))


Job: TypeAlias = Measure | Check


def run_job(job: Job) -> Result:
    """Runs a job here. Raises TargetError where the toolchain is not the one that the job is for."""
    here = toolchain()
    for name in sorted({*here, *job.toolchain}):
        if here.get(name) != job.toolchain.get(name):
            raise TargetError(
                f"the worker has {name} {here.get(name)}, the search {job.toolchain.get(name)}; install the same on both"
            )
    return job.run()


def read_result(store: Store, job: Job) -> Result | None:
    """The stored result of a job, or None."""
    files = store.read(job.key())
    if files is None:
        return None
    data = json.loads(files[RESULT])
    return Result(tuple(data["seconds"]), data["reason"])


def write_result(store: Store, job: Job, result: Result) -> None:
    """Keeps a result that is final."""
    if result.final:
        store.write(job.key(), {RESULT: json.dumps(asdict(result), sort_keys=True).encode()})


def _digest(*what: Any) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *what], sort_keys=True).encode()).hexdigest()


@functools.cache
def _code(part: str) -> str:
    """A digest of the sources of a part of rpac: results of other code are other results."""
    root = Path(__file__).parent.parent / part
    paths = sorted(root.rglob("*.py")) if root.is_dir() else [root]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


def _line(text: str) -> str:
    """The first line, cut to what a data file should hold of it."""
    return text.strip().partition("\n")[0][:REASON_CHARS]
