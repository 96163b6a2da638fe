"""Steps of a bundle in a server: the right results, in place, and nothing compiled after the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import llama_step
import numpy as np
import pytest
from made import bundle_of, dense, random_params
from watching import compiles, python

import rpac
from rpac.check.deployment import serve_check
from rpac.engine import CanaryRun, Event
from rpac.engine.metrics import EngineCollector, text_of
from rpac.errors import CheckError, SelectionError, TargetError
from rpac.spec import Spec, parse_spec

STEPS = 2000
PAGES = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
ONE = np.float32(1)


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(llama_step.step_arrays("decode", 16, None)["params"])


def rows(batch: rpac.Batch, token_ids: Any) -> tuple[Any, Any]:
    """`token_ids` and `positions` of a batch whose rows have these tokens, from the first on."""
    ids, positions = np.zeros((2, batch.tokens), np.int32)
    for row in batch:
        at = np.arange(row.context_len, row.kv_len)
        ids[row.queries], positions[row.queries] = token_ids[batch.order[row.row]][at], at
    return ids, positions


def test_a_prompt_and_its_decode_give_what_dense_attention_gives(path: Path, params: Any) -> None:
    """Two sequences: one prefills a whole chunk, the other a few tokens in a mixed step; then both decode."""
    engine = rpac.load_steps(path, target="cpu", watchdog_s=60)
    model = engine.bind(engine.put(params))
    token_ids = np.random.default_rng(2).integers(0, llama_step.VOCABULARY, (2, 20)).astype(np.int32)
    caches, tables = engine.new_caches(), [[1, 7], [4, 2]]
    for rows_of in ([(0, 16, 0)], [(1, 5, 0)], [(0, 1, 16), (1, 1, 5)], [(1, 11, 6), (0, 1, 17)]):
        batch = rpac.Batch.build(
            engine.limits, [q for _, q, _ in rows_of], [c for _, _, c in rows_of], [tables[s] for s, _, _ in rows_of]
        )
        ids, positions = rows(batch, [token_ids[s] for s, _, _ in rows_of])
        outputs, caches = model(caches, ids, positions, batch, ONE)
        for row in batch:
            sequence = rows_of[batch.order[row.row]][0]
            wanted = dense(params, token_ids[sequence : sequence + 1, : row.kv_len]) @ params["head"]
            np.testing.assert_allclose(outputs["logits"][row.row], wanted[0], rtol=1e-4, atol=1e-4)
            assert outputs["token"][row.row] == np.argmax(wanted[0])
    assert {variant.kind for variant in engine.counts} == {variant.kind for variant in engine.programs}
    assert engine.overdue is None


def test_no_step_of_thousands_traces_lowers_or_compiles(path: Path, params: Any) -> None:
    engine = rpac.load_steps(path, target="cpu")
    with compiles() as seen:
        engine.warm()
        model = engine.bind(engine.put(params))
    assert seen == []
    assert engine.ready == set(engine.programs)
    rng = np.random.default_rng(3)
    caches = engine.new_caches()
    addresses = [one.unsafe_buffer_pointer() for one in caches]
    with compiles() as seen:
        for number in range(STEPS):
            q_lens = [[1, 1, 1], [16], [3, 1], []][number % 4]
            context = rng.integers(0, 30, len(q_lens))
            batch = rpac.Batch.build(engine.limits, q_lens, context, PAGES[: len(q_lens)])
            ids = np.zeros(16, np.int32) if number % 3 else jax.device_put(np.zeros(16, np.int32))
            run = model if number % 5 else model.step(batch.kind, batch.tokens)
            _, caches = run(caches, ids, ids, batch if number % 2 else batch.metadata, ONE)
    assert seen == []
    assert [one.unsafe_buffer_pointer() for one in caches] == addresses
    assert sum(count.calls for count in engine.counts.values()) == STEPS - STEPS // 5


def test_a_portable_bundle_compiles_each_step_once(tmp_path: Path, spec: Spec, params: Any) -> None:
    engine = rpac.load_steps(bundle_of(tmp_path / "a.rpac", spec, "llama_step:scanned"), target="cpu")
    stacked = {**params, "layers": jax.tree.map(lambda *layers: jnp.stack(layers), *params["layers"])}
    model, caches = engine.bind(engine.put(stacked)), engine.new_caches()
    token_ids = np.array([[5, 9, 11]], np.int32)
    engine.warm()
    for position in range(3):
        batch = rpac.Batch.build(engine.limits, [1], [position], [[2]])
        x, caches = model(caches, *rows(batch, token_ids), batch)
    np.testing.assert_allclose(x[0], dense(params, token_ids)[0], rtol=1e-4, atol=1e-4)


LAYERED = "layers:\n  window: {sliding_window: 16}\n  full: {}\nserving:"


def test_layers_of_two_kinds_in_one_step(tmp_path: Path, spec: Spec, params: Any) -> None:
    layered = parse_spec(spec.source.replace("serving:", LAYERED), "layered.yaml")
    engine = rpac.load_steps(
        bundle_of(tmp_path / "a.rpac", layered, "llama_step:layered", ["prefill", "decode"]), target="cpu"
    )
    model, caches = engine.bind(engine.put(params)), engine.new_caches()
    assert set(caches) == {"window", "full"}
    token_ids = np.random.default_rng(4).integers(0, llama_step.VOCABULARY, (1, 18)).astype(np.int32)
    for q_len, context in ((16, 0), (1, 16), (1, 17)):
        batch = rpac.Batch.build(engine.limits, [q_len], [context], [[2, 5]])
        output, caches = model(caches, *rows(batch, token_ids), batch)
    assert output._fields == llama_step.Output._fields
    assert output.rest is None
    found = output.x[0]
    np.testing.assert_allclose(found, dense(params, token_ids, [16, None])[0], rtol=1e-4, atol=1e-4)
    assert not np.allclose(found, dense(params, token_ids)[0], rtol=1e-4, atol=1e-4)


def test_the_canary_takes_a_sound_step_and_refuses_another(path: Path, params: Any) -> None:
    events: list[Event] = []
    engine = rpac.load_steps(path, target="cpu", observer=events.append)
    model = engine.bind(engine.put(params))
    decode, prefill = rpac.Variant("decode", 16), rpac.Variant("prefill", 16)
    model.canary(ONE, variants=[decode])
    assert [event.variant for event in events if isinstance(event, CanaryRun)] == [decode]
    slot = engine.slot(prefill)
    run = slot.ready()
    slot._run = lambda params, rest: [one * 0 for one in run(params, rest)]
    with pytest.raises(
        CheckError, match=r"step prefill/16 on cpu:0: its canary failed: caches\[0\] differs by 1; must be what"
    ):
        model.canary(ONE, variants=[prefill])
    batch = rpac.Batch.build(engine.limits, [16], [0], [[1]])
    ids = np.zeros(16, np.int32)
    with pytest.raises(CheckError, match="its canary failed"):
        model(engine.new_caches(), ids, ids, batch, ONE)
    assert decode in engine.ready
    assert prefill not in engine.ready


def test_a_step_that_was_not_built_is_refused(tmp_path: Path, spec: Spec, params: Any) -> None:
    engine = rpac.load_steps(bundle_of(tmp_path / "a.rpac", spec, "llama_step:step"), target="cpu")
    model = engine.bind(engine.put(params))
    batch = rpac.Batch.build(engine.limits, [3], [0], [[1]])
    ids = np.zeros(16, np.int32)
    caches = engine.new_caches()
    with pytest.raises(SelectionError, match="needs the program mixed/16; this bundle holds decode/16"):
        model(caches, ids, ids, batch, ONE)
    with pytest.raises(SelectionError, match="needs the program prefill/16"):
        model.step("prefill", 16)
    assert not caches[0].is_deleted()


def test_executables_of_another_runtime(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpac.engine.loading.build_string", lambda client: "jaxlib 0 on another CPU")
    with pytest.raises(
        TargetError, match=r"was compiled for .*; this process has 'jaxlib 0 on another CPU'; must be the same"
    ):
        rpac.load_steps(path, target="cpu")
    assert not rpac.load_steps(path, target="cpu", allow_compile=True).ready


def test_metrics_of_steps(path: Path) -> None:
    engine = rpac.load_steps(path, target="cpu")
    engine.warm([rpac.Variant("decode", 16)])
    text = text_of(EngineCollector(engine))
    labels = f'bundle="llama-step",device="{engine.device}",kind="decode",target="cpu",tokens="16"'
    assert f"rpac_program_ready{{{labels}}} 1.0" in text


def test_serve_check_loads_the_steps_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpac.check.deployment._run_programs", lambda *_: None)
    report = serve_check(path, "cpu", seed=1, allow_compile=True)
    assert [one.name for one in report.steps] == ["verify", "load", "warm", "steps"]
    assert report.steps[-1].detail == "3 steps of llama_step:step ready, from the executable tier"


def test_two_devices_compute_what_one_does(tmp_path: Path, spec: Spec, path: Path) -> None:
    """The spec for two devices, with half of the heads and of the hidden units on each."""
    text = spec.source.replace("kv_heads: 1", "kv_heads: 2") + "parallel: {tensor: 2}\n"
    code = """
import json, sys
sys.path.insert(0, sys.argv[4])
import jax, numpy as np, rpac, llama_step
llama_step.KV_HEADS = 2
from pathlib import Path
from made import bundle_of, random_params
from rpac.spec import parse_spec
params = random_params(llama_step.step_arrays("decode", 16, None)["params"])
found, names = [], ["step", "sharded"]
for number, text in enumerate(sys.argv[1:3]):
    spec = parse_spec(text, "spec.yaml")
    engine = rpac.load_steps(bundle_of(Path(sys.argv[3], f"{number}.rpac"), spec, "llama_step:" + names[number]), "cpu")
    placed = engine.put(params)
    model, caches = engine.bind(placed), engine.new_caches()
    for position in range(4):
        batch = rpac.Batch.build(engine.limits, [1, 1], [position] * 2, [[3], [8]])
        ids = np.arange(16, dtype=np.int32) + position
        out, caches = model(caches, ids, np.full(16, position, np.int32), batch, np.float32(1))
    found.append(np.asarray(out["logits"])[:2])
errors = []
one = jax.device_put(params, jax.devices()[0])
alike = jax.device_put(params, engine.placement.cut(()))
for wrong in (one, alike):
    try:
        engine.bind(wrong)
    except rpac.BatchError as error:
        errors.append(str(error))
try:
    rpac.load_steps(Path(sys.argv[3], "1.rpac"), "cpu", devices=jax.devices()[:1])
except rpac.TargetError as error:
    errors.append(str(error))
print(json.dumps([float(np.abs(found[0] - found[1]).max()), errors]))
"""
    one = text.replace("parallel: {tensor: 2}\n", "")
    flags = "--xla_force_host_platform_device_count=2"
    error, errors = python(code, one, text, str(tmp_path), str(Path(__file__).parent), XLA_FLAGS=flags)
    assert error < 1e-4
    on_one, not_cut, too_few = errors
    assert "params['embedding'] is on cpu:0; must be on cpu:0, cpu:1 in this device order" in on_one
    assert "params['head'] is sharded as NamedSharding" in not_cut
    assert "place the parameters with `put`" in not_cut
    assert "found 1 devices; the bundle's programs run on 2; give as many" in too_few
