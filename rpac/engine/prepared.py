"""What a bundle holds of one variant: made ready once, whoever asks first, and refused after a canary that failed."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from rpac.contract.program import Variant
from rpac.devices.placement import Placement
from rpac.engine.events import ProgramReady, Recorder
from rpac.errors import CheckError

R = TypeVar("R")


class Prepared(ABC, Generic[R]):
    """`R` is what runs it; everybody who needs it while it is loaded waits for that. `what` names it in errors."""

    def __init__(self, variant: Variant, what: str, placement: Placement, recorder: Recorder) -> None:
        self.variant = variant
        self.what = what
        self._placement = placement
        self._recorder = recorder
        self._run: R | None = None
        self._wrong: str | None = None  # what its canary found
        self._loading = threading.Lock()

    @property
    def is_ready(self) -> bool:
        """Whether a call of it loads and compiles nothing."""
        return self._run is not None and self._wrong is None

    def ready(self) -> R:
        """What runs it; loads or compiles it the first time. Raises CheckError where its canary failed."""
        if self._run is None:
            event = None
            try:
                with self._loading:
                    if self._run is None:
                        self._run, event = self._load()
            except Exception as error:
                self._recorder.failed(self.variant, error)
                raise
            if event is not None:  # told without the lock: an observer may call the engine
                self._recorder.record(event)
        self.require_sound()
        return self._run

    def require_sound(self) -> None:
        """Raises CheckError where its canary failed."""
        if self._wrong is not None:
            raise CheckError(self._wrong)

    def refuse(self, why: str, wanted: str) -> CheckError:
        """Makes every later use of it raise the error that this returns; `wanted` is what its canary must give."""
        self._wrong = (
            f"{self.what} on {self._placement}: its canary failed: {why}; must be {wanted}; do not serve "
            "with this pair of compiler and runtime: install those of the bundle's toolchain, or build the bundle again "
            "with these"
        )
        failure = CheckError(self._wrong)
        self._recorder.failed(self.variant, failure)
        return failure

    @abstractmethod
    def _load(self) -> tuple[R, ProgramReady]:
        """Loads or compiles it, and says so."""
