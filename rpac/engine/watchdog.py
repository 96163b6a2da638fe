"""Tells of a program that does not return: in a thread of its own, because the caller waits inside the runtime.

A call returns before its program has run, and nothing can stop a program that runs. So a call leaves its result here, and the
thread looks whether it is ready. That costs a call an append to a list, and nothing in an engine without a watchdog.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias, TypeVar

import jax

from rpac.contract.program import Variant
from rpac.engine.events import CallOverdue
from rpac.errors import TargetError

Results = TypeVar("Results", bound=Sequence[jax.Array])
Run: TypeAlias = Callable[..., Results]

_LOOKS: Final = 8  # in the time that a call may take
_LONGEST_S: Final = 1.0  # between two looks


class _Call:
    """A call that was begun. Results may be large, so they are referenced weakly; the watchdog holds two of them."""

    __slots__ = ("failed", "result", "since", "variant")

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.since = time.monotonic()
        self.result: weakref.ref[jax.Array] | None = None  # None while the runtime has not returned
        self.failed = False

    def done(self) -> bool | None:
        """None where the caller dropped the result or donated it: then nobody can tell."""
        if self.failed or self.result is None:
            return self.failed
        array = self.result()
        try:
            return None if array is None or array.is_deleted() else bool(array.is_ready())
        except RuntimeError:  # donated between the two questions
            return None


class Watchdog:
    """Calls `tell` where a call is not done after `limit_s` seconds, once until that call is done.

    What it names is the oldest call that is not known to be done: a device runs programs in the order of the calls, and those
    behind a program that hangs wait too. Raises TargetError where `limit_s` is not above 0.
    """

    def __init__(self, limit_s: float, tell: Callable[[CallOverdue], None]) -> None:
        if not limit_s > 0:
            raise TargetError(f"watchdog_s is {limit_s}; must be above 0 seconds, or None for no watchdog")
        self.limit_s = limit_s
        self._tell = tell
        self._calls: deque[_Call] = deque()
        # Two results are held, so that it can be asked of them: the last one, and one that was the last at an earlier look.
        self._last: tuple[_Call, jax.Array] | None = None
        self._earlier: tuple[_Call, jax.Array] | None = None
        self._named: _Call | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    @property
    def overdue(self) -> Variant | None:
        """The program that does not return now."""
        named = self._named
        return None if named is None else named.variant

    def watched(self, variant: Variant, run: Run[Results], which: int = 0) -> Run[Results]:
        """`run`, watched; `which` of its results is looked at, one that is not donated to the next call."""

        def call(*args: Any) -> Results:
            one = _Call(variant)
            self._calls.append(one)
            if self._thread is None:
                self._start()
            try:
                results = run(*args)
            except BaseException:
                one.failed = True
                raise
            one.result = weakref.ref(results[which])
            self._last = (one, results[which])
            return results

        return call

    def look(self) -> None:
        """Forgets the calls that are done, and tells of one that is overdue. Only the thread calls it, or a test in its place."""
        calls = tuple(self._calls)
        states = [one.done() for one in calls]
        newest_done = max((index for index, done in enumerate(states) if done), default=-1)
        waiting = [
            one
            for index, (one, done) in enumerate(zip(calls, states, strict=True))
            if done is False or (done is None and index > newest_done)
        ]
        if self._earlier is None or self._earlier[0].done() is not False:
            self._earlier = self._last
        now = time.monotonic()
        known = [one for one, done in zip(calls, states, strict=True) if done is False]
        if not known:
            waiting = []
        for _ in calls:
            self._calls.popleft()
        self._calls.extendleft(reversed(waiting))  # calls that were begun meanwhile are at the other end
        if self._named not in waiting:
            self._named = None
        if self._named is None and any(now - one.since > self.limit_s for one in known):
            self._named = waiting[0]
            self._tell(CallOverdue(self._named.variant, now - self._named.since, len(waiting)))

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                # A daemon: it ends with the process, or with the engine.
                self._thread = threading.Thread(
                    target=_watch, args=(weakref.ref(self), self.limit_s), name="rpac-watchdog", daemon=True
                )
                self._thread.start()


def _watch(of: weakref.ref[Watchdog], limit_s: float) -> None:
    pause = threading.Event()
    while True:
        pause.wait(min(limit_s / _LOOKS, _LONGEST_S))
        watchdog = of()
        if watchdog is None:
            return
        watchdog.look()
        del watchdog
