"""What the server counts, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serve.worker import Worker

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """The server's own metrics. Handlers count requests and times; the rest is read from the worker when it is asked for."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._registry = CollectorRegistry()
        self.requests = Counter("serve_requests", "Answered requests.", ("path", "status"), registry=self._registry)
        self.first_token = Histogram(
            "serve_first_token_seconds", "From a request to its first token.", buckets=SECONDS, registry=self._registry
        )
        self.next_token = Histogram(
            "serve_next_token_seconds", "From a token to the next one.", buckets=SECONDS, registry=self._registry
        )
        self._registry.register(self)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        totals, state, limits = self._worker.generator.totals, self._worker.state, self._worker.generator.steps.limits
        for name, text, value in (
            ("steps", "Steps of the model.", totals.steps),
            ("step_seconds", "Seconds in steps of the model.", totals.step_seconds),
            ("prompt_tokens", "Tokens of prompts.", totals.prompt_tokens),
            ("generated_tokens", "New tokens.", totals.tokens),
            ("shared_prompt_tokens", "Tokens of prompts that were found in the cache.", totals.shared_tokens),
            ("preemptions", "Sequences that gave their pages back.", totals.preemptions),
            ("copied_pages", "Pages that were copied in every layer.", totals.copied_pages),
            ("accepted", "Accepted requests.", state.accepted),
        ):
            yield CounterMetricFamily(f"serve_{name}", text, value)
        for name, text, value in (
            ("running", "Sequences that have pages.", state.running),
            ("waiting", "Sequences that wait for pages.", state.waiting),
            ("free_pages", "Free pages of the cache.", state.free_pages),
            ("pages", "Pages of the cache.", limits.num_pages),
        ):
            yield GaugeMetricFamily(f"serve_{name}", text, value)
