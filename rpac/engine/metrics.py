"""An engine's totals as Prometheus metrics. Needs prometheus_client, and is imported where metrics are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rpac.contract.program import Variant
from rpac.engine.events import Count, Totals

PLACE = ("bundle", "target", "device")
LABELS = (*PLACE, "kind", "tokens")
COUNTERS = {
    "calls": "Batches that the program ran.",
    "rows": "Live sequences of these batches.",
    "tokens": "New tokens of these batches.",
    "padding": "Rows of queries that were padding.",
}


class Engine(Protocol):
    """What metrics read of an engine, or of an engine of steps."""

    @property
    def name(self) -> str: ...

    @property
    def target(self) -> str: ...

    @property
    def device(self) -> Any: ...

    @property
    def programs(self) -> Mapping[Variant, object]: ...

    @property
    def totals(self) -> Totals: ...


class EngineCollector(Collector):
    """All metrics of some engines, for one registry; a program that did not run yet is there with zeros."""

    def __init__(self, *engines: Engine) -> None:
        self._engines = engines

    def collect(self) -> Iterator[Metric]:
        families = {
            name: CounterMetricFamily(f"rpac_program_{name}", text, labels=LABELS) for name, text in COUNTERS.items()
        }
        failed = CounterMetricFamily("rpac_program_failures", "Loads and canaries that failed.", labels=LABELS)
        overdue = CounterMetricFamily("rpac_program_overdue", "Calls that did not return in time.", labels=LABELS)
        ready = GaugeMetricFamily("rpac_program_ready", "1 where a call loads and compiles nothing.", labels=LABELS)
        seconds = GaugeMetricFamily("rpac_program_load_seconds", "What the load took.", labels=LABELS)
        errors = GaugeMetricFamily("rpac_program_canary_error", "Relative error of the last canary.", labels=LABELS)
        refused = CounterMetricFamily(
            "rpac_batches_refused", "Batches refused before anything ran.", labels=(*PLACE, "error")
        )
        for engine in self._engines:
            totals = engine.totals
            place = (engine.name, engine.target, str(engine.device))
            for variant in engine.programs:
                labels = (*place, variant.kind, str(variant.tokens))
                count = totals.counts.get(variant, Count())
                for name, family in families.items():
                    family.add_metric(labels, getattr(count, name))
                failed.add_metric(labels, totals.failed.get(variant, 0))
                overdue.add_metric(labels, totals.overdue.get(variant, 0))
                ready.add_metric(labels, variant in totals.ready)
                if variant in totals.ready:
                    seconds.add_metric(labels, totals.ready[variant].seconds)
                if variant in totals.canaries:
                    errors.add_metric(labels, totals.canaries[variant].error)
            for error, times in totals.refused.items():
                refused.add_metric((*place, error), times)
        yield from (*families.values(), failed, overdue, ready, seconds, errors, refused)


def text_of(collector: EngineCollector) -> str:
    """What a collector has in the text exposition format."""
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()
