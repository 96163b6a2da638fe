"""After `warm` nothing surprises: no compile for any batch; what fails in the background is told."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calls import BUILT, LIMITS, arrays, batch_of, call, compiles, metadata, python

from rpac.batch import Batch
from rpac.bundle import write_bundle
from rpac.contract.program import Variant
from rpac.engine import Engine, Event, ProgramFailed, ProgramReady, load
from rpac.errors import SelectionError, TargetError
from rpac.spec import Spec

STEPS = 3000


def random_batch(rng: np.random.Generator) -> Batch:
    """Any batch of the contract of tiny's limits, of up to four sequences on pages of their own."""
    count = int(rng.integers(0, 5))
    choices = [1, LIMITS.prefill_chunk, int(rng.integers(1, 8))]
    q_lens = [int(rng.choice(choices)) for _ in range(count)]
    while sum(q_lens) > 32:
        q_lens.pop()
    room = LIMITS.max_kv_len
    context = [int(rng.integers(0, room - q_len + 1)) for q_len in q_lens]
    pages = rng.permutation(LIMITS.num_pages).reshape(4, 8).tolist()
    return Batch.build(LIMITS, q_lens, context, pages[: len(q_lens)])


def test_no_step_of_thousands_traces_lowers_or_compiles(engine: Engine) -> None:
    seed = 20261121
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    engine.warm()
    assert engine.ready == BUILT
    made = {tokens: arrays(engine, tokens) for tokens in (8, 32)}
    kv_cache = made[8][3]
    on_host = {tokens: [np.asarray(one) for one in three[:3]] for tokens, three in made.items()}
    with compiles() as seen:
        for step in range(STEPS):
            batch = random_batch(rng)
            tokens = batch.tokens if step % 3 else 32
            three = made[tokens][:3] if step % 2 else on_host[tokens]
            rest = map(jax.device_put, metadata(batch)) if step % 5 == 0 else metadata(batch)
            _, kv_cache = engine(*three, kv_cache, *rest)
    assert seen == []
    assert set(engine.counts) == BUILT
    assert sum(count.calls for count in engine.counts.values()) == STEPS


def test_the_listener_of_these_tests_sees_a_compile() -> None:
    with compiles() as seen:
        jax.jit(lambda x: x + 20261121)(jnp.ones(3))
    assert {event.rsplit("/", 1)[1] for event in seen} >= {
        "jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration"
    }  # fmt: skip


def test_the_first_program_serves_while_others_load(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(bundle, target="cpu")
    loading, go_on = threading.Event(), threading.Event()
    hold_back(monkeypatch, Variant("prefill", 32), loading, go_on)
    warming = engine.warm([Variant("decode", 8), Variant("prefill", 32)], background=True)
    assert loading.wait(60)
    assert engine.ready == {Variant("decode", 8)}
    with compiles() as seen:
        engine(*(made := arrays(engine, 8))[:3], made[3], *metadata(batch_of([1])))
    assert [event for event in seen if "backend_compile" in event] == []
    assert not warming.done
    assert not warming.wait(0.01)
    go_on.set()
    assert warming.wait()
    assert engine.ready == {Variant("decode", 8), Variant("prefill", 32)}


def hold_back(
    monkeypatch: pytest.MonkeyPatch, variant: Variant, loading: threading.Event, go_on: threading.Event
) -> None:
    """Makes the load of a program wait."""
    from rpac.engine import program as slot

    load_portable = slot.load_portable

    def slow(data: bytes, program: Any, device: Any) -> Any:
        if program.variant == variant:
            loading.set()
            assert go_on.wait(60)
        return load_portable(data, program, device)

    monkeypatch.setattr(slot, "load_portable", slow)


def test_a_call_waits_for_a_program_that_is_being_loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    engine = load(bundle, target="cpu", observer=events.append)
    loading, go_on = threading.Event(), threading.Event()
    hold_back(monkeypatch, Variant("decode", 8), loading, go_on)
    warming = engine.warm([Variant("decode", 8)], background=True)
    assert loading.wait(60)
    threading.Timer(0.1, go_on.set).start()
    out, _ = call(engine, [1])
    assert np.all(np.asarray(out, np.float32) == 3)
    assert warming.wait()
    assert sum(isinstance(event, ProgramReady) for event in events) == 1


def test_a_cancelled_warm_leaves_out_what_was_not_begun(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(bundle, target="cpu")
    loading, go_on = threading.Event(), threading.Event()
    hold_back(monkeypatch, Variant("decode", 8), loading, go_on)
    warming = engine.warm([Variant("decode", 8), Variant("decode", 32)], background=True)
    assert loading.wait(60)
    warming.cancel()
    go_on.set()
    assert warming.wait()
    assert engine.ready == {Variant("decode", 8)}
    call(engine, [1])


def test_a_background_load_that_fails_is_told_and_stops_nothing_else(
    tmp_path: Path, tiny: Spec, programs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    engine = load(failing(tmp_path, tiny, programs), target="cpu", observer=events.append)
    bad = Variant("prefill", 32)
    warming = engine.warm([bad, Variant("decode", 8)], background=True)
    with pytest.raises(TargetError, match=r"program prefill/32: jax .* cannot"):
        warming.wait(120)
    assert warming.done
    assert list(warming.errors) == [bad]
    assert engine.ready == {Variant("decode", 8)}
    assert [(event.variant, event.error) for event in events if isinstance(event, ProgramFailed)] == [
        (bad, "TargetError")
    ]
    queries, keys, values, kv_cache = arrays(engine, 32)
    with pytest.raises(TargetError, match="program prefill/32"):  # the call that needs it says so again
        engine(queries, keys, values, kv_cache, *metadata(batch_of([16])))
    assert not kv_cache.is_deleted()
    call(engine, [1])


def failing(tmp_path: Path, tiny: Spec, programs: list[Any]) -> Path:
    """A bundle whose prefill program was exported for another platform, which only its load finds."""
    from jax import export

    def for_tpu(data: bytes) -> bytes:
        exported = export.deserialize(bytearray(data))
        return bytes(dataclasses.replace(exported, platforms=("tpu",)).serialize(vjp_order=0))

    broken = [
        dataclasses.replace(one, exported=for_tpu(one.exported)) if one.kind == "prefill" else one for one in programs
    ]
    write_bundle(tmp_path / "tiny.rpac", tiny, broken)
    return tmp_path / "tiny.rpac"


def test_a_process_that_ends_while_it_loads_begins_no_other_program(bundle: Path) -> None:
    code = """
import json, sys, time, rpac
from rpac.engine import program as slot
def slow(data, program, device):
    print(json.dumps(str(program.variant)), flush=True)
    loading.set()
    time.sleep(0.5)
slot.load_portable = slow
import threading; loading = threading.Event()
rpac.load(sys.argv[1], target="cpu").warm(background=True)
loading.wait()
"""
    assert python(code, str(bundle)) == "decode/8"


def test_warming_what_was_not_built_is_refused(bundle: Path) -> None:
    with pytest.raises(SelectionError, match="prefill in 8 query rows"):
        load(bundle, target="cpu").warm([Variant("prefill", 8)])
