"""A program that does not return is named, while its caller waits; one that does costs nothing."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from calls import call
from forged import endless
from prometheus_client.parser import text_string_to_metric_families

from rpac.bundle import write_bundle
from rpac.contract.program import Variant
from rpac.engine import CallOverdue, Engine, load, watchdog
from rpac.engine.watchdog import Watchdog
from rpac.errors import TargetError
from rpac.spec import Spec

DECODE, MIXED = Variant("decode", 8), Variant("mixed", 8)


class Result:
    """What a program returns, as far as a watchdog looks at it."""

    def __init__(self, ready: bool = False) -> None:
        self.ready = ready
        self.deleted = False

    def is_ready(self) -> bool:
        return self.ready

    def is_deleted(self) -> bool:
        return self.deleted


class Watched:
    """A watchdog of 10 s whose thread never looks by itself, and what it told; its clock goes when `look` says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.told: list[CallOverdue] = []
        self.dog = Watchdog(10, self.told.append)
        self.dog._start = lambda: None  # type: ignore[method-assign]

    def begin(self, variant: Variant, result: Any) -> None:
        self.dog.watched(variant, lambda args: (result,))([])

    def look(self, after_s: float = 20) -> list[CallOverdue]:
        self.now += after_s
        self.dog.look()
        told, self.told[:] = list(self.told), []
        return told


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_a_program_that_hangs_is_named_once_and_until_it_is_done(watched: Watched) -> None:
    sound, stuck = Result(ready=True), Result()
    watched.begin(DECODE, sound)
    watched.begin(MIXED, stuck)
    (told,) = watched.look()
    assert (told.variant, told.waiting) == (MIXED, 1)
    assert told.seconds == 20
    assert watched.dog.overdue == MIXED
    assert watched.look() == []
    stuck.ready = True
    assert watched.look() == []
    assert watched.dog.overdue is None
    watched.begin(DECODE, Result())
    assert [one.variant for one in watched.look()] == [
        DECODE
    ]  # whose result is dropped: the watchdog holds the last one


def test_the_oldest_call_is_named_and_not_those_behind_it(watched: Watched) -> None:
    """A server drops the results of layers, and hands on the last one."""
    watched.begin(DECODE, Result(ready=True))
    watched.begin(MIXED, Result())
    watched.begin(DECODE, Result())
    watched.begin(DECODE, last := Result())
    (told,) = watched.look()
    assert (told.variant, told.waiting) == (DECODE, 4)  # the first is dropped: nobody can say that it is done
    last.ready = True
    assert watched.look() == []
    assert watched.dog.overdue is None


def test_a_busy_device_is_no_hang_although_results_are_dropped(watched: Watched) -> None:
    """The host runs ahead: at each look the last call is not done, and those before it are gone."""
    before: Result | None = None
    for _ in range(20):
        for _ in range(3):
            watched.begin(DECODE, latest := Result())
        assert watched.look(4) == []
        if before is not None:
            before.ready = True
        before = latest
    assert len(watched.dog._calls) < 10


def test_a_result_that_its_caller_donates_is_no_hang(watched: Watched) -> None:
    watched.begin(DECODE, donated := Result())
    donated.deleted = True
    assert watched.look() == []
    watched.begin(DECODE, Result(ready=True))
    assert watched.look() == []


def test_a_call_that_never_leaves_the_runtime_is_named_while_others_go_on(watched: Watched) -> None:
    inside, leave = threading.Event(), threading.Event()

    def blocks(args: Any) -> Any:
        inside.set()
        leave.wait(10)
        raise RuntimeError("the device is gone")

    def stuck() -> None:
        with pytest.raises(RuntimeError):
            watched.dog.watched(MIXED, blocks)([])

    thread = threading.Thread(target=stuck)
    thread.start()
    assert inside.wait(10)
    watched.begin(DECODE, Result(ready=True))
    assert [one.variant for one in watched.look()] == [MIXED]
    leave.set()
    thread.join()
    assert watched.look() == []
    assert watched.dog.overdue is None


@pytest.mark.parametrize("limit_s", [0, -1, float("nan")])
def test_a_limit_that_is_no_time_is_refused(bundle: Path, limit_s: float) -> None:
    with pytest.raises(TargetError, match=r"watchdog_s is .*; must be above 0 seconds"):
        load(bundle, target="cpu", watchdog_s=limit_s)


def test_calls_that_return_are_not_told_and_the_thread_ends_with_the_engine(bundle: Path) -> None:
    events: list[Any] = []
    engine = load(bundle, target="cpu", observer=events.append, watchdog_s=2)
    for _ in range(3):
        out, _ = call(engine, [1, 5])
        time.sleep(0.3)  # the thread looks in between
    assert out.is_ready()
    assert engine.overdue is None
    assert not [event for event in events if isinstance(event, CallOverdue)]
    assert _overdue_metric(engine) == {0.0}
    [thread] = [one for one in threading.enumerate() if one.name == "rpac-watchdog"]
    del engine
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_without_it_a_program_runs_as_it_was_loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watchdog, "__init__", lambda *_: pytest.fail("a watchdog was made"))
    engine = load(bundle, target="cpu")
    call(engine, [1])
    assert engine.overdue is None
    assert not [one for one in threading.enumerate() if one.name == "rpac-watchdog"]


def _overdue_metric(engine: Engine) -> set[float]:
    families = text_string_to_metric_families(engine.metrics())
    return {one.value for family in families for one in family.samples if one.name == "rpac_program_overdue_total"}


SERVER = """
import json, os, sys
import jax.numpy as jnp
import rpac
from rpac.engine import CallOverdue

def act(event):
    if isinstance(event, CallOverdue):
        print(json.dumps([str(event.variant), event.waiting, str(engine.overdue)]), flush=True)
        os._exit(75)

engine = rpac.load(sys.argv[1], target="cpu", observer=act, watchdog_s=0.5)
batch = rpac.Batch.build(engine.limits, [1], [2], [[5]])
q = jnp.ones(engine.programs[rpac.Variant("decode", 8)].args[0].shape, jnp.float32)
new = jnp.ones(engine.programs[rpac.Variant("decode", 8)].args[1].shape, jnp.float32)
dtype = engine.programs[rpac.Variant("decode", 8)].args[0].dtype
out, kv_cache = engine(q.astype(dtype), new.astype(dtype), new.astype(dtype), engine.new_cache(), *batch.metadata)
out.block_until_ready()
print("returned")
"""


def test_a_server_ends_itself_where_a_program_never_returns(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    forged = dataclasses.replace(programs[0], exported=endless(programs[0].exported))
    write_bundle(tmp_path / "tiny.rpac", tiny, [forged])
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(tmp_path / "tiny.rpac")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 75, done.stdout + done.stderr
    assert json.loads(done.stdout) == ["decode/8", 1, "decode/8"]
    assert "program decode/8 has not returned for" in done.stderr
