"""What an engine tells: events as they happen, to one observer, and their sums, which it keeps itself."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

from rpac.contract.program import Variant
from rpac.errors import RpacError

_LOG = logging.getLogger("rpac")

Tier = Literal["executable", "portable"]


@dataclass(frozen=True)
class BatchRun:
    """A batch is handed to its program: live sequences, their new tokens, and rows of queries that are padding."""

    variant: Variant
    rows: int
    tokens: int
    padding: int


@dataclass(frozen=True)
class BatchRefused:
    """A batch was refused before anything ran; its cache is still the caller's."""

    error: str
    message: str


@dataclass(frozen=True)
class ProgramReady:
    """A program was loaded or compiled: from which tier, how many bytes, in how many seconds."""

    variant: Variant
    tier: Tier
    size: int
    seconds: float


@dataclass(frozen=True)
class ProgramFailed:
    """A program could not be made ready, or its canary failed; a call that needs it raises."""

    variant: Variant
    error: str
    message: str


@dataclass(frozen=True)
class CanaryRun:
    """A canary gave the oracle's answer; `error` is the largest relative one of a token's head."""

    variant: Variant
    error: float
    seconds: float


@dataclass(frozen=True)
class CallOverdue:
    """A call did not return within the engine's `watchdog_s`, and `waiting` calls, itself included, wait for its program.

    Nothing can end a program on a device: drain the server, and end the process.
    """

    variant: Variant
    seconds: float
    waiting: int


Event = BatchRun | BatchRefused | ProgramReady | ProgramFailed | CanaryRun | CallOverdue


class Observer(Protocol):
    """Called with each event, in the thread where it happens; must be quick, and safe to call from several threads."""

    def __call__(self, event: Event, /) -> None: ...


class JsonLog:
    """An observer that writes each event as a line of JSON to a logger, refusals, failures and overdue calls as warnings."""

    def __init__(self, logger: logging.Logger = _LOG, level: int = logging.INFO) -> None:
        self._logger = logger
        self._level = level

    def __call__(self, event: Event, /) -> None:
        level = logging.WARNING if isinstance(event, (BatchRefused, ProgramFailed, CallOverdue)) else self._level
        if self._logger.isEnabledFor(level):
            data = {key: str(value) if key == "variant" else value for key, value in asdict(event).items()}
            self._logger.log(level, "%s", json.dumps({"event": type(event).__name__, **data}))


@dataclass(frozen=True)
class Count:
    """What one program did: calls, live sequences, their new tokens, and rows of queries that were padding."""

    calls: int = 0
    rows: int = 0
    tokens: int = 0
    padding: int = 0


@dataclass(frozen=True)
class Totals:
    """All events so far: what ran by variant, refusals by the error's class, failures and overdue calls by variant, and
    the last of each other kind.
    """

    counts: Mapping[Variant, Count]
    refused: Mapping[str, int]
    ready: Mapping[Variant, ProgramReady]
    failed: Mapping[Variant, int]
    canaries: Mapping[Variant, CanaryRun]
    overdue: Mapping[Variant, int]


class Recorder:
    """Adds up events and hands them on. An observer that raises an Exception is logged and does not stop the engine; what
    ends a thread or the process (SystemExit, KeyboardInterrupt) goes on to whoever caused the event.

    Call it with no lock held: an observer may use the engine.
    """

    def __init__(self, observer: Observer | None) -> None:
        self._observer = observer
        self._lock = threading.Lock()
        self._counts: dict[Variant, Count] = {}
        self._refused: Counter[str] = Counter()
        self._ready: dict[Variant, ProgramReady] = {}
        self._failed: Counter[Variant] = Counter()
        self._canaries: dict[Variant, CanaryRun] = {}
        self._overdue: Counter[Variant] = Counter()

    def record(self, event: Event) -> None:
        """Counts an event and tells the observer."""
        self.count(event)
        self.tell(event)

    def count(self, event: Event) -> None:
        """Counts an event without telling anybody."""
        with self._lock:
            self._add(event)

    def tell(self, event: Event) -> None:
        """Tells the observer of an event that is counted elsewhere."""
        if self._observer is not None:
            try:
                self._observer(event)
            except Exception:
                _LOG.exception("the observer %r failed on %r; the engine goes on", self._observer, event)

    def refused(self, error: RpacError) -> None:
        """Records that a batch was refused with this error."""
        self.record(BatchRefused(type(error).__name__, str(error)))

    def overdue(self, event: CallOverdue) -> None:
        """Records that a program does not return, and says so in the log, which a server may have and no observer."""
        _LOG.error(
            "program %s has not returned for %.1f s, and %d calls wait for it; nothing can end it but the end of this process",
            event.variant,
            event.seconds,
            event.waiting,
        )
        self.record(event)

    def failed(self, variant: Variant, error: Exception) -> None:
        """Records that a program is not ready because of this error."""
        self.record(ProgramFailed(variant, type(error).__name__, str(error)))

    @property
    def counts(self) -> Mapping[Variant, Count]:
        with self._lock:
            return dict(self._counts)

    def totals(self) -> Totals:
        """Everything so far, at one moment."""
        with self._lock:
            return Totals(
                dict(self._counts),
                dict(self._refused),
                dict(self._ready),
                dict(self._failed),
                dict(self._canaries),
                dict(self._overdue),
            )

    def _add(self, event: Event) -> None:
        match event:
            case BatchRun():
                old = self._counts.get(event.variant, Count())
                self._counts[event.variant] = Count(
                    calls=old.calls + 1,
                    rows=old.rows + event.rows,
                    tokens=old.tokens + event.tokens,
                    padding=old.padding + event.padding,
                )
            case BatchRefused():
                self._refused[event.error] += 1
            case ProgramReady():
                self._ready[event.variant] = event
            case ProgramFailed():
                self._failed[event.variant] += 1
                self._ready.pop(event.variant, None)
            case CanaryRun():
                self._canaries[event.variant] = event
            case CallOverdue():
                self._overdue[event.variant] += 1
