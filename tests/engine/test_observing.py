"""What an engine tells: events as they happen, and metrics that a Prometheus server reads."""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from calls import arrays, batch_of, call, metadata
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from rpac.contract.program import Variant
from rpac.engine import BatchRefused, BatchRun, Engine, Event, JsonLog, ProgramReady, load
from rpac.engine.metrics import EngineCollector
from rpac.errors import BatchError, BundleError, SelectionError, TargetError


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Name, and the values of the labels in their names' order -> value."""
    return {
        (one.name, *(value for _, value in sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def refuse_two(engine: Any) -> None:
    with pytest.raises(BatchError):
        engine(*arrays(engine, 8), *[1, 2, 3, 4])
    made = [jnp.zeros((9, *one.shape[1:]), one.dtype) for one in arrays(engine, 8)[:3]]
    with pytest.raises(SelectionError):
        engine(*made, arrays(engine, 8)[3], *metadata(batch_of([1])))


def test_events_come_in_order_with_what_happened(bundle: Path) -> None:
    events: list[Event] = []
    engine = load(bundle, target="cpu", observer=events.append)
    call(engine, [1, 5])
    refuse_two(engine)
    ready, ran, *refused = events
    variant = Variant("mixed", 8)
    assert isinstance(ready, ProgramReady)
    assert (ready.variant, ready.tier, ready.size) == (variant, "portable", engine.programs[variant].exported.size)
    assert ready.seconds > 0
    assert ran == BatchRun(variant, rows=2, tokens=6, padding=2)
    assert [type(event) for event in refused] == [BatchRefused, BatchRefused]
    assert [event.error for event in refused if isinstance(event, BatchRefused)] == ["BatchError", "SelectionError"]


def test_an_observer_that_raises_does_not_stop_the_engine(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("no room")

    engine = load(bundle, target="cpu", observer=broken)
    call(engine, [1])
    assert engine.counts[Variant("decode", 8)].calls == 1
    assert "the observer" in caplog.text
    assert "no room" in caplog.text


@pytest.mark.parametrize("ends", [SystemExit, KeyboardInterrupt])
def test_an_observer_that_ends_a_warm_is_told_by_wait_and_leaves_nothing_out(
    bundle: Path, ends: type[BaseException]
) -> None:
    def quits(event: Event) -> None:
        if isinstance(event, ProgramReady):
            raise ends("enough")

    engine = load(bundle, target="cpu", observer=quits)
    warming = engine.warm(background=True)
    with pytest.raises(ends, match="enough"):
        warming.wait()
    assert engine.ready == set(engine.programs) == set(warming.errors)
    with pytest.raises(ends, match="enough"):
        load(bundle, target="cpu", observer=quits).warm()


def test_an_observer_may_use_the_engine_of_any_event(bundle: Path) -> None:
    """Whatever it is told of, the engine holds no lock that a call, a warm or its totals need."""
    engines: list[Engine] = []
    seen: list[str] = []

    def busy(event: Event) -> None:
        if engines and type(event).__name__ not in seen:
            seen.append(type(event).__name__)
            call(engines[0], [1])
            call(engines[0], [1, 5])
            assert engines[0].totals
            engines[0].warm()
            with pytest.raises(BundleError, match="holds no canary"):
                engines[0].warm([Variant("decode", 8)], canary=True)

    engines.append(load(bundle, target="cpu", observer=busy))
    thread = threading.Thread(target=lambda: (call(engines[0], [1]), refuse_two(engines[0])), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "a call waits for ever"
    assert {"ProgramReady", "BatchRun", "BatchRefused"} <= set(seen)


@pytest.mark.parametrize("ends", [SystemExit, KeyboardInterrupt])
def test_an_observer_that_ends_a_call_loses_no_cache(bundle: Path, ends: type[BaseException]) -> None:
    def quits(event: Event) -> None:
        if isinstance(event, BatchRun):
            raise ends("enough")

    engine = load(bundle, target="cpu", observer=quits)
    queries, keys, values, kv_cache = arrays(engine, 8)
    with pytest.raises(ends, match="enough"):
        engine(queries, keys, values, kv_cache, *metadata(batch_of([1])))
    assert not kv_cache.is_deleted()
    assert not engine.counts  # nothing ran


def test_a_json_log_has_one_object_a_line(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = load(bundle, target="cpu", observer=JsonLog(level=logging.DEBUG))
    with caplog.at_level(logging.DEBUG, "rpac"):
        call(engine, [1])
        refuse_two(engine)
    lines = [json.loads(record.message) for record in caplog.records if record.name == "rpac"]
    assert [line["event"] for line in lines] == ["ProgramReady", "BatchRun", "BatchRefused", "BatchRefused"]
    assert lines[1] == {"event": "BatchRun", "variant": "decode/8", "rows": 1, "tokens": 1, "padding": 7}
    levels = [record.levelno for record in caplog.records if record.name == "rpac"]
    assert levels == [logging.DEBUG, logging.DEBUG, logging.WARNING, logging.WARNING]


def test_metrics_are_what_prometheus_reads(bundle: Path) -> None:
    engine = load(bundle, target="cpu")
    for q_lens in ([1, 1], [1, 1], [1, 5]):
        call(engine, q_lens)
    refuse_two(engine)
    found = samples(engine.metrics())

    def of(name: str, kind: str, tokens: int) -> float | None:
        return found.get((f"rpac_program_{name}", "tiny", str(engine.device), kind, "cpu", str(tokens)))

    names = ("calls_total", "rows_total", "tokens_total", "padding_total", "failures_total", "ready")
    assert [of(name, "decode", 8) for name in names] == [2, 4, 4, 12, 0, 1]
    assert [of(name, "mixed", 8) for name in names] == [1, 2, 6, 2, 0, 1]
    assert [of(name, "prefill", 32) for name in names] == [0, 0, 0, 0, 0, 0]
    seconds = of("load_seconds", "decode", 8)
    assert seconds is not None and seconds > 0
    assert of("load_seconds", "prefill", 32) is None
    refused = {key[1:]: value for key, value in found.items() if key[0] == "rpac_batches_refused_total"}
    device = str(engine.device)
    assert refused == {("tiny", device, "BatchError", "cpu"): 1, ("tiny", device, "SelectionError", "cpu"): 1}


def test_metrics_go_into_a_server_s_own_registry(bundle: Path) -> None:
    engine = load(bundle, target="cpu")
    registry = CollectorRegistry()
    registry.register(engine.collector())
    call(engine, [1])
    assert samples(generate_latest(registry).decode()) == samples(engine.metrics())


def test_several_engines_share_a_registry(bundle: Path, small: Path) -> None:
    engines = [load(bundle, target="cpu"), load(small, target="cpu")]
    call(engines[0], [1])
    registry = CollectorRegistry()
    registry.register(EngineCollector(*engines))
    text = generate_latest(registry).decode()
    assert samples(text) == {**samples(engines[0].metrics()), **samples(engines[1].metrics())}
    assert text.count("# TYPE rpac_program_calls_total counter") == 1


def test_metrics_without_prometheus_client_say_what_to_install(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(bundle, target="cpu")
    monkeypatch.delitem(sys.modules, "rpac.engine.metrics", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(TargetError, match=r"metrics need prometheus_client; install rpac\[metrics\]"):
        engine.metrics()
