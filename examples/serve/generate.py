"""Requests in, tokens out: the scheduler picks a step, the model runs it. One thread calls this; `worker` owns it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rpac
from rpac.serving import Scheduler, Step
from serve import toy as model
from serve.attention import PagedAttention


class Token(NamedTuple):
    """A new token of a request. `last` is set if no more follow."""

    request: int
    token: int
    last: bool


@dataclass
class Totals:
    """What the scheduler did so far."""

    steps: int = 0
    tokens: int = 0
    preemptions: int = 0
    shared_tokens: int = 0
    copied_pages: int = 0


class Generator:
    """Continues prompts greedily, many at once."""

    def __init__(self, engine: rpac.Engine, config: model.Config, params: model.Params) -> None:
        self.engine = engine
        self.scheduler = Scheduler(engine.limits)
        self.totals = Totals()
        self.config = config
        self._params = params
        self._attention = PagedAttention(engine, config.layers)

    def warm(self) -> None:
        """Compiles what steps run, so that no request has to wait for a compile."""
        self.engine.warm()
        for tokens in self.engine.limits.token_buckets:
            zeros = np.zeros(tokens, np.int32)
            x = model.forward(self.config, self._params, zeros, zeros, lambda _, queries, *__: queries)
            greedy(self.config, self._params, x, self._sample_rows(np.zeros(0, np.int32)))

    def step(self) -> list[Token]:
        """Runs one step. Returns nothing if there is nothing to do, or if the step only computed parts of prompts.

        Raises StepError where the model fails. All that ran then wait to be computed again; it is for the caller to
        remove those that were in the step.
        """
        step = self.scheduler.step()
        if step is None:
            return []
        try:
            tokens = self._run(step)
        except Exception as error:
            self.scheduler.undo(step)
            self._attention.reset()
            raise StepError(step.sequences) from error
        self.totals.steps += 1
        self.totals.tokens += len(step.sampled)
        self.totals.preemptions += len(step.preempted)
        self.totals.shared_tokens += step.shared
        self.totals.copied_pages += len(step.copies)
        ended = set(self.scheduler.commit(step, tokens))
        return [Token(name, token, name in ended) for name, token in zip(step.sampled, tokens.tolist(), strict=True)]

    def _run(self, step: Step) -> np.ndarray:
        self._attention.copy_pages(step.copies)
        x = model.forward(self.config, self._params, step.token_ids, step.positions, self._attention.of(step.batch))
        tokens = greedy(self.config, self._params, x, self._sample_rows(step.samples))
        return np.asarray(tokens)[: len(step.samples)]

    def _sample_rows(self, samples: np.ndarray) -> np.ndarray:
        """Pads to a fixed number of rows, so that the last piece is compiled once for each bucket."""
        rows = np.zeros(self.engine.limits.max_num_seqs, np.int32)
        rows[: len(samples)] = samples
        return rows


class StepError(Exception):
    """A step failed; `requests` were in it."""

    def __init__(self, requests: tuple[int, ...]) -> None:
        super().__init__(f"the step of requests {', '.join(map(str, requests))} failed")
        self.requests = requests


@partial(jax.jit, static_argnums=0)
def greedy(config: model.Config, params: model.Params, x: jax.Array, rows: jax.Array) -> jax.Array:
    """The most likely token after each of these rows; the lowest id of several that are equally likely."""
    return jnp.argmax(model.logits(config, params, x[rows]), axis=-1)
