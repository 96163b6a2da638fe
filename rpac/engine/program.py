"""One program of an engine: its checked bytes until it is ready, then what runs it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping

import jax

from rpac.batch import Limits
from rpac.contract.program import Program
from rpac.devices.placement import Placement
from rpac.engine.arguments import Arguments, in_order
from rpac.engine.events import CanaryRun, ProgramReady, Recorder, Tier
from rpac.engine.prepared import Prepared
from rpac.engine.probe import probe
from rpac.engine.runtime import Results, Run, Traceable, load_native, load_portable, load_traceable
from rpac.engine.watchdog import Watchdog
from rpac.errors import BundleError
from rpac.oracle.canary import Verdict, canary


class Slot(Prepared[Run]):
    """A program, which is loaded once."""

    def __init__(
        self,
        program: Program,
        limits: Limits,
        kv_layout: str,
        blobs: Mapping[str, bytes],
        placement: Placement,
        use_executable: bool,
        recorder: Recorder,
        watchdog: Watchdog | None = None,
    ) -> None:
        super().__init__(program.variant, f"program {program.variant}", placement, recorder)
        self.program = program
        self.arguments = Arguments(program, kv_layout, placement)
        self._limits = limits
        self._kv_layout = kv_layout
        self._watchdog = watchdog
        self._exported = blobs[program.exported.sha256]
        self._executable = blobs[program.executable.sha256] if use_executable and program.executable else None
        self._answer = blobs[program.canary.sha256] if program.canary else None
        self._traceable: Traceable | None = None
        self._tracing = threading.Lock()  # of its own: a model is traced while programs compile

    def traceable(self) -> Traceable:
        """The portable program as a function for use inside jit; it checks shapes and dtypes when it is traced.

        Raises CheckError where the canary failed.
        """
        self.require_sound()
        with self._tracing:
            if self._traceable is None:
                self._traceable = load_traceable(self._exported, self.program, self._placement.mesh)
        traceable = self._traceable

        def call(*given: jax.Array, **extra: jax.Array) -> Results:
            args = in_order(self.program.args, given, extra)
            self.arguments.check_shapes(args)
            return traceable(*args)

        return call

    def check_canary(self, turn: threading.Lock) -> None:
        """Runs the canary on a cache of its own, when `turn` comes. Raises BundleError where the bundle has none, CheckError
        where the answer is not the oracle's; then the program is not run again.
        """
        run = self.ready()
        with turn:
            start = time.perf_counter()
            verdict = self._judged(run)
            seconds = time.perf_counter() - start
        if verdict.notes:
            raise self.refuse("; ".join(verdict.notes), "the oracle's answer")
        self._recorder.record(CanaryRun(self.program.variant, verdict.error, seconds))

    def _judged(self, run: Run) -> Verdict:
        variant = self.program.variant
        if self._answer is None:
            raise BundleError(
                f"program {variant}: the bundle holds no canary; must hold the oracle's answer; build the bundle again "
                "with `rpac build`, or warm without canaries"
            )
        call = canary(variant.kind, self.program.args, self._limits, self._kv_layout)
        try:
            found = probe(run, call, self.program, self._placement)
        except jax.errors.JaxRuntimeError as error:
            return Verdict(math.inf, (f"the runtime raised {error}",))
        try:
            return found.against(self._answer)
        except ValueError as error:
            raise BundleError(
                f"program {variant}: its canary is of no use ({error}); build the bundle again"
            ) from error

    def _load(self) -> tuple[Run, ProgramReady]:
        start = time.perf_counter()
        data = self._exported if self._executable is None else self._executable
        tier: Tier = "portable" if self._executable is None else "executable"
        load = load_portable if self._executable is None else load_native
        run = load(data, self.program, self._placement)
        if self._watchdog is not None:
            run = self._watchdog.watched(self.program.variant, run)
        return run, ProgramReady(self.program.variant, tier, len(data), time.perf_counter() - start)
