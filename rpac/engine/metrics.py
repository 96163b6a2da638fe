"""An engine's totals as Prometheus metrics. Needs prometheus_client, and is imported where metrics are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rpac.bundle import Variant
from rpac.engine.events import Recorder

LABELS = ("bundle", "target", "kind", "tokens")
COUNTERS = {
    "calls": "Batches that the program ran.",
    "rows": "Live sequences of these batches.",
    "tokens": "New tokens of these batches.",
    "padding": "Rows of queries that were padding.",
}


class EngineCollector(Collector):
    """For a server's own registry: `registry.register(engine.collector())`."""

    def __init__(self, bundle: str, target: str, variants: Iterable[Variant], recorder: Recorder) -> None:
        self._place = (bundle, target)
        self._variants = tuple(variants)
        self._recorder = recorder

    def collect(self) -> Iterator[Metric]:
        """All metrics; a program that did not run yet is there with zeros."""
        totals = self._recorder.totals()
        for name, text in COUNTERS.items():
            ran = {variant: getattr(count, name) for variant, count in totals.counts.items()}
            yield self._family(CounterMetricFamily(f"rpac_program_{name}", text, labels=LABELS), ran)
        failed = CounterMetricFamily("rpac_program_failures", "Loads and canaries that failed.", labels=LABELS)
        yield self._family(failed, totals.failed)
        ready = GaugeMetricFamily("rpac_program_ready", "1 where a call loads and compiles nothing.", labels=LABELS)
        yield self._family(ready, dict.fromkeys(totals.ready, 1))
        seconds = GaugeMetricFamily("rpac_program_load_seconds", "What the load took.", labels=LABELS)
        for variant, loaded in totals.ready.items():
            seconds.add_metric(self._labels(variant), loaded.seconds)
        yield seconds
        errors = GaugeMetricFamily("rpac_program_canary_error", "Relative error of the last canary.", labels=LABELS)
        for variant, canary in totals.canaries.items():
            errors.add_metric(self._labels(variant), canary.error)
        yield errors
        refused = CounterMetricFamily(
            "rpac_batches_refused", "Batches refused before anything ran.", labels=(*LABELS[:2], "error")
        )
        for error, count in totals.refused.items():
            refused.add_metric((*self._place, error), count)
        yield refused

    def _family(
        self, family: CounterMetricFamily | GaugeMetricFamily, found: Mapping[Variant, float]
    ) -> CounterMetricFamily | GaugeMetricFamily:
        for variant in self._variants:
            family.add_metric(self._labels(variant), found.get(variant, 0))
        return family

    def _labels(self, variant: Variant) -> tuple[str, ...]:
        return (*self._place, variant.kind, str(variant.tokens))


def text_of(collector: EngineCollector) -> str:
    """The text exposition format, of this engine alone."""
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()
