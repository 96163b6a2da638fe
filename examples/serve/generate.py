"""Requests in, tokens out: the scheduler picks a step, the model runs it. One thread calls this; `worker` owns it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from rpac.serving import Scheduler, Step
from serve.sampling import Sampling
from serve.steps import Steps


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is continued: by up to `max_tokens` tokens, or by as many as there is room for.

    A token of `ends` is the last one. `temperature`, `top_p` and `seed` are those of `serve.sampling.Sampling`.
    """

    prompt: Sequence[int]
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ends: frozenset[int] = frozenset()


class Token(NamedTuple):
    """A new token of a request. `end` says why no more follow, and is empty if more do."""

    request: int
    token: int
    end: Literal["", "stop", "length"]


@dataclass
class Totals:
    """What happened so far. `shared_tokens` are prompt tokens that were found in the cache."""

    steps: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    preemptions: int = 0
    shared_tokens: int = 0
    copied_pages: int = 0


class Generator:
    """Continues prompts, many at once. Not safe to call from several threads."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.scheduler = Scheduler(steps.limits)
        self.totals = Totals()
        self._caches = steps.new_caches()
        self._requests: dict[int, Request] = {}

    def add(self, request: Request) -> int:
        """The name of a request that waits from here on. Raises BatchError if it can never run."""
        room = max(self.scheduler.max_tokens - len(request.prompt), 1)  # add refuses a prompt that leaves no room
        name = self.scheduler.add(request.prompt, room if request.max_tokens is None else request.max_tokens)
        self._requests[name] = request
        self.totals.prompt_tokens += len(request.prompt)
        return name

    def remove(self, name: int) -> None:
        """Ends a request that runs or waits."""
        self.scheduler.remove(name)
        del self._requests[name]

    def step(self) -> list[Token]:
        """Runs one step. Returns nothing if there is nothing to do, or if the step only computed parts of prompts.

        Raises StepError if the model fails. All that ran then wait to be computed again; the caller removes those that
        were in the step.
        """
        step = self.scheduler.step()
        if step is None:
            return []
        start = time.perf_counter()
        try:
            found, self._caches = self.steps(step, self._caches, self._sampling(step))
        except Exception as error:
            self.scheduler.undo(step)
            self._caches = self.steps.new_caches()  # the call may have lost those that it was given
            raise StepError(step.sequences) from error
        self.totals.steps += 1
        self.totals.step_seconds += time.perf_counter() - start
        self.totals.tokens += len(step.sampled)
        self.totals.preemptions += len(step.preempted)
        self.totals.shared_tokens += step.shared
        self.totals.copied_pages += len(step.copies)
        rows = {name: row for row, name in enumerate(step.sequences)}
        tokens = found[[rows[name] for name in step.sampled]] if step.sampled else np.zeros(0, np.int32)
        complete = set(self.scheduler.commit(step, tokens))
        return [
            self._token(name, token, name in complete)
            for name, token in zip(step.sampled, tokens.tolist(), strict=True)
        ]

    def _token(self, name: int, token: int, is_last: bool) -> Token:
        if token in self._requests[name].ends:
            if not is_last:
                self.scheduler.remove(name)
            del self._requests[name]
            return Token(name, token, "stop")
        if is_last:
            del self._requests[name]
        return Token(name, token, "length" if is_last else "")

    def _sampling(self, step: Step) -> Sampling:
        rows = self.steps.limits.max_num_seqs
        chosen = Sampling(np.zeros(rows, np.float32), np.ones(rows, np.float32), np.zeros(rows, np.uint32))
        for row, name in enumerate(step.sequences):
            request = self._requests[name]
            chosen.temperature[row], chosen.top_p[row], chosen.seed[row] = (
                request.temperature,
                request.top_p,
                request.seed,
            )
        return chosen


class StepError(Exception):
    """A step failed; `requests` were in it."""

    def __init__(self, requests: tuple[int, ...]) -> None:
        super().__init__(f"the step of requests {', '.join(map(str, requests))} failed")
        self.requests = requests
