"""Programs being made ready, by threads of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from rpac.contract.program import Variant

Job = tuple[Variant, Callable[[], object]]


class Warming:
    """Made by `Engine.warm`. Jobs are taken in order; one that fails does not stop those after it."""

    def __init__(self, jobs: Sequence[Job], threads: int) -> None:
        self._jobs = iter(jobs)
        self._lock = threading.Lock()
        self._cancelled = False
        self._errors: dict[Variant, BaseException] = {}
        # Not daemons: Python would end under a compile. They stop by themselves between two programs instead.
        self._threads = [threading.Thread(target=self._work, name=f"rpac-warm-{number}") for number in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def done(self) -> bool:
        """Whether nothing is under way any more."""
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def errors(self) -> Mapping[Variant, BaseException]:
        """What failed so far, by variant; an observer's SystemExit is among it."""
        with self._lock:
            return dict(self._errors)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits for the end, at most `timeout_s` seconds, and says whether it came. Raises the first job's error."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if deadline is None else max(deadline - time.monotonic(), 0))
        for error in self.errors.values():
            raise error
        return self.done

    def cancel(self) -> None:
        """Leaves out what is not begun yet; those programs are made ready at their first use."""
        self._cancelled = True

    def _work(self) -> None:
        while not self._cancelled and threading.main_thread().is_alive():  # it is not while the process ends
            with self._lock:
                job = next(self._jobs, None)
            if job is None:
                return
            variant, make = job
            try:
                make()
            except BaseException as error:  # else the thread would end in silence, and leave out what is left
                with self._lock:
                    self._errors[variant] = error
