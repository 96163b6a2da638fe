"""Models with several kinds of layers: one spec, one bundle, an engine for each kind."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from command import rpac

from rpac import Batch, BatchError, Engine, TargetError, load, load_layers
from rpac.build import all_tasks
from rpac.bundle import read_manifest
from rpac.check.deployment import serve_check
from rpac.contract import arrays as layout
from rpac.errors import SpecError
from rpac.oracle.canary import ProbeCall, make_call
from rpac.oracle.expected import oracle
from rpac.oracle.tolerance import attention_error
from rpac.spec import load_spec, parse_spec

SMALL = Path(__file__).with_name("small.yaml").read_text()
LAYERS = """layers:
  local: {sliding_window: 10}
  global: {soft_cap: 5.0, sinks: true}
  reader: {sliding_window: 10, update_cache: false}
"""
TEXT = SMALL.replace("serving:", f"{LAYERS}serving:")
SINKS = np.array([1.5, -0.5], np.float32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers")
    (folder / "layers.yaml").write_text(TEXT)
    done = rpac("build", folder / "layers.yaml", "-o", folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "small.rpac"


def test_each_kind_of_layer_is_served_as_the_oracle_says(bundle: Path) -> None:
    engines = load_layers(bundle, "cpu")
    assert sorted(engines) == ["global", "local", "reader"]
    outs, caches, calls = {}, {}, {}
    for name, engine in engines.items():
        assert engine.layer == name
        engine.warm(canary=True)
        program = next(iter(engine.programs.values()))
        call = make_call("mixed", program.args, engine.limits, engine.kv_layout, [1, 5], [30, 3], 7)
        cache = np.zeros(program.args[layout.index_of(program.args, "kv_cache")].shape, np.float32)
        cache[call.pages] = call.held
        calls[name], batch = call, call.batch
        args = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
        extra = {"sinks": SINKS} if name == "global" else {}
        new = tuple(call.by_token.values())
        out, after = engine(*new, jax.device_put(cache.copy(), engine.sharding("kv_cache")), *args, **extra)
        want, held, _ = oracle(engine.model, engine.kv_layout, (*new, cache, *args), extra)
        outs[name], caches[name] = np.asarray(out)[: batch.num_tokens], np.asarray(after)
        np.testing.assert_array_equal(caches[name], held)
        error, _ = attention_error(outs[name], want[: batch.num_tokens])
        assert error < 1e-5
    assert not np.allclose(outs["local"], outs["global"])
    out, _ = engines["reader"](call.queries, jax.device_put(caches["local"]), *args)
    np.testing.assert_array_equal(np.asarray(out)[: batch.num_tokens], outs["local"])
    serve_without_the_first_page(engines, calls["local"], outs["local"])
    assert serve_check(bundle, "cpu", seed=1).exit_code == 0


def serve_without_the_first_page(engines: dict[str, Engine], call: ProbeCall, wanted: np.ndarray) -> None:
    """A page before the window of its row is another's by now: what it holds, and its entry, change nothing."""
    local = engines["local"]
    cache = np.zeros(local.new_cache().shape, np.float32)
    cache[call.pages] = call.held
    metadata = [array.copy() for array in call.batch.metadata]
    (row,) = (
        row for row in call.batch if row.context_len == 30
    )  # its new token sees tokens 21 to 30, on its second page
    cache[row.pages[0]] = np.nan
    metadata[1][row.row * local.limits.pages_per_seq] = -1
    new = tuple(call.by_token.values())
    out, _ = local(*new, jax.device_put(cache), *metadata)
    np.testing.assert_array_equal(np.asarray(out)[: call.batch.num_tokens], wanted)
    with pytest.raises(BatchError, match="entry 0 of its page table is -1; must be 0 to 11"):
        engines["global"](*new, jax.device_put(cache), *metadata, sinks=SINKS)
    Batch.of_arrays(local.limits, call.batch.tokens, *metadata)


def test_a_layer_must_be_named(bundle: Path) -> None:
    with pytest.raises(
        TargetError, match=r"found layer ''; the model's kinds of layers are 'global', 'local', 'reader'"
    ):
        load(bundle, target="cpu")
    assert load(bundle, target="cpu", layer="local").layer == "local"


def test_the_parts_have_the_whole_specs_hash_and_paths_of_their_own(bundle: Path) -> None:
    spec = load_spec(bundle.parent / "layers.yaml")
    assert [part.layer for part in spec.parts] == ["local", "global", "reader"]
    assert {part.hash for part in spec.parts} == {spec.hash} != {parse_spec(SMALL, "x").hash}
    assert spec.part("local").model.sliding_window == 10
    assert spec.part("local").model.soft_cap is None
    paths = {task.source.path for task in all_tasks(spec, ["cpu"])}
    kinds = ("decode", "mixed", "prefill")
    assert paths == {f"cpu/{layer}/{kind}.py" for layer in ("global", "local", "reader") for kind in kinds}
    assert [dims.name for dims in layout.extra_specs(spec.part("global"))] == ["sinks"]
    assert sorted(read_manifest(bundle).targets) == ["cpu.global", "cpu.local", "cpu.reader"]
    taken = [[dims.name for dims in layout.arg_specs(spec.part(layer), 8)][:4] for layer in ("local", "reader")]
    assert taken == [["queries", "keys", "values", "kv_cache"], ["queries", "kv_cache", "kv_lens", "page_indices"]]
    with pytest.raises(SpecError, match="must be one of local, global, reader"):
        spec.part("other")


def test_inspect_says_what_each_kind_of_layer_has(bundle: Path) -> None:
    done = rpac("inspect", bundle, cache=bundle.parent / "cache")
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("cpu.reader:"))
    assert line.endswith("; sliding_window 10, update_cache false")


NAME = "must be lower-case letters, digits and dashes, 32 at most, a letter or digit first, each name once"


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("layers: []", "layers: found a list; must be a mapping of names to mappings"),
        ("layers: {}", "layers: found a mapping; must be a mapping of names to mappings"),
        ("layers: {Local: {}}", f"layers.Local: found Local; {NAME}"),
        ("layers: {local: 3}", "layers.local: found 3; must be a mapping with attention, q_heads, kv_heads"),
        ("layers: {local: {window: 3}}", "layers.local.window: found an unknown key"),
        ("layers: {local: {sliding_window: 48}}", "layers.local.sliding_window: found 48; must be below serving.max"),
        ("layers: {local: {q_heads: 3, kv_heads: 2}}", "layers.local.q_heads: found 3; must be a multiple of kv_heads"),
        (
            "layers: {local: {q_heads: 4}}\nparallel: {tensor: 1}",
            "layers.local.q_heads: found 4; must be those of model (2 and 1) beside parallel",
        ),
    ],
)
def test_layers_that_are_none(layers: str, said: str) -> None:
    with pytest.raises(SpecError) as raised:
        parse_spec(SMALL.replace("serving:", f"{layers}\nserving:"), "x.yaml")
    assert said in str(raised.value)
