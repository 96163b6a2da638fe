"""The Python of the README and of docs/ runs.

A comment above each Python block says how: `<!-- snippet: NAME -->` names a test here, an `excerpt` is compared with its file
by test_samples, and `<!-- not run: WHY -->` says why no test runs it.
"""

from __future__ import annotations

import functools
import io
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import rpac as command
from jax import lax
from my_models import tiny_llama
from samples import PAGES, ROOT

import rpac
from rpac.build import all_tasks
from rpac.bundle import read_manifest, write_bundle
from rpac.bundle.wheel import wheel_of
from rpac.devices.toolchain import toolchain
from rpac.engine import CallOverdue
from rpac.files.store import Store
from rpac.lower.worker import lower
from rpac.spec import load_spec
from rpac.step import steps_of
from rpac.step.worker import lower_step
from rpac.trust.keys import generate, policy_lines, read_private
from rpac.trust.sign import sign

SPEC = Path(__file__).with_name("snippets.yaml")
SNIPPET = re.compile(r"^<!-- snippet: (\w+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^(.*)\n```python\n", re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with build/llama3-8b.rpac."""
    folder = tmp_path_factory.mktemp("snippets")
    done = command("build", SPEC, "-o", folder / "build", cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a server has: an engine, and the arrays of a batch of 1 and of 512 new tokens."""
    monkeypatch.chdir(folder)
    engine = rpac.load("build/llama3-8b.rpac")
    tables = [[3, 14, 15, 92, 65, 35, 89, 79], [32, 38, 46, 26]]
    batch = rpac.Batch.build(engine.limits, [1, 512], [900, 0], tables)
    return {"engine": engine, "batch": batch, **arrays_of(engine, batch)}


def arrays_of(engine: rpac.Engine, batch: rpac.Batch) -> dict[str, Any]:
    taken = engine.programs[rpac.Variant(batch.kind, batch.tokens)].args
    made = {dims.name: jnp.ones(dims.shape, dims.dtype) for dims in taken[:3]}
    metadata = {dims.name: getattr(batch, dims.name) for dims in taken[4:]}
    return {**made, "kv_cache": engine.new_cache(), **metadata}


def snippet(name: str) -> str:
    [found] = [code for page in PAGES for label, code in SNIPPET.findall(page.read_text()) if label == name]
    return found


def run(name: str, names: dict[str, Any]) -> dict[str, Any]:
    """The names of the snippet after it ran."""
    exec(compile(snippet(name), f"<snippet {name}>", "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_python_block_says_how_it_is_tested(page: Path) -> None:
    for above in PYTHON.findall(page.read_text()):
        assert re.match(r"<!-- (snippet: \w+|excerpt: .+|not run: .+) -->$", above), f"{page.name}: after {above!r}"


def test_each_snippet_has_a_test() -> None:
    labels = [label for page in PAGES for label, _ in SNIPPET.findall(page.read_text())]
    assert sorted(labels) == sorted(
        name.removeprefix("test_") for name in globals() if name.removeprefix("test_") in labels
    )


def test_first(built: Callable[[str], Path], tmp_path: Path) -> None:
    """As a reader runs it: a script in a process of its own, beside the bundle."""
    (tmp_path / "build").symlink_to(built("cpu").parent)
    done = subprocess.run(
        [sys.executable, "-c", snippet("first")], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "[(1, 4, 128), (3, 4, 128)]\n", done.stderr


def test_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the one step that its batch needs, made in this process."""
    spec = load_spec(ROOT / "specs" / "tiny.yaml")
    tasks = [one for one in all_tasks(spec, ["cpu"]) if (one.kind, one.tokens) == ("mixed", 8)]
    steps = steps_of(spec, tasks, "my_models.tiny_llama:step", str(Path(__file__).parent))
    lowered = [lower(one, toolchain()) for one in tasks]
    made = [lower_step(one, toolchain(), Store(None))[0] for one in steps]
    write_bundle(tmp_path / "build" / "tiny.rpac", spec, lowered, steps=made)
    monkeypatch.chdir(tmp_path)
    params = jax.tree.map(lambda one: np.ones(one.shape, one.dtype), tiny_llama.step_arrays("mixed", 8, None)["params"])
    done = run("steps", {"params": params})
    assert done["outputs"]["logits"].shape == (4, tiny_llama.VOCABULARY)
    assert done["engine"].counts == {rpac.Variant("mixed", 8): rpac.Count(calls=1, rows=2, tokens=4, padding=4)}


def test_serve(names: dict[str, Any]) -> None:
    heads = {"queries": 4, "keys": 2, "values": 2}
    done = run(
        "serve", {name: [jnp.ones((size, n, 128), "bfloat16") for size in (512, 1)] for name, n in heads.items()}
    )
    assert done["batch"].kind == "mixed"
    prefilled, decoded = done["outputs"]
    assert (prefilled.shape, decoded.shape) == ((512, 4, 128), (1, 4, 128))
    # All new values are one and all of the context is zero: a prompt sees ones alone, the decoded token 900 zeros and a one.
    assert float(prefilled[0, 0, 0]) == 1
    assert 0 < float(decoded[0, 0, 0]) < 1


def test_open(names: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rpac")
    engine = run("open", names)["engine"]
    assert engine.ready == engine.programs.keys()
    assert caplog.text.count('"event": "CanaryRun"') == len(engine.programs)
    assert caplog.text.count('"event": "BatchRun"') == 1


def test_watchdog(names: dict[str, Any]) -> None:
    done = run("watchdog", {**names, "rpac": rpac, "os": os, "CallOverdue": CallOverdue})
    assert done["engine"].overdue is None


def test_load(names: dict[str, Any]) -> None:
    done = run("load", names)
    assert done["engine"].ready == done["engine"].programs.keys()
    assert done["out"].shape == (1024, 4, 128)


def test_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = wheel_of(folder / "build" / "llama3-8b.rpac")
    with zipfile.ZipFile(io.BytesIO(wheel.data)) as archive:
        archive.extractall(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run("package", {"rpac": rpac})["engine"].limits == rpac.load(folder / "build" / "llama3-8b.rpac").limits


def test_trust(names: dict[str, Any], folder: Path) -> None:
    bundle = folder / "build" / "llama3-8b.rpac"
    key = generate(folder / "ci")
    sign(bundle, read_manifest(bundle), {"bench": {}}, read_private(folder / "ci.key"))
    (folder / "policy.yaml").write_text(policy_lines("ci", key))
    assert run("trust", {"rpac": rpac})["engine"].limits == names["engine"].limits


def test_warm(names: dict[str, Any]) -> None:
    done = run("warm", names | {"rpac": rpac})
    assert done["warming"].done
    assert done["engine"].ready == done["engine"].programs.keys()


def layer(names: dict[str, Any]) -> SimpleNamespace:
    """A layer that makes queries, keys and values of its input, and hands attention's output on."""
    return SimpleNamespace(
        qkv=lambda x: (x, names["keys"] * x[:, :2], names["values"] * x[:, :2]), rest=lambda x, out: x + out
    )


def test_program(names: dict[str, Any]) -> None:
    engine = names["engine"]
    metadata = tuple(names[name] for name in ("kv_lens", "page_indices", "cu_q_lens", "distribution"))
    layers, caches = [layer(names)] * 2, [engine.new_cache(), engine.new_cache()]
    given = {"functools": functools, "jax": jax, "x": names["queries"], "layers": layers, "caches": caches}
    done = run("program", {**names, **given, "metadata": metadata})
    assert len(done["caches"]) == 2
    # The second sequence sees ones, then twos: x is 1, 1 + 1, 2 + 2.
    assert float(done["x"][1, 0, 0]) == 4


def test_scan(names: dict[str, Any]) -> None:
    small = rpac.Batch.build(names["engine"].limits, [1], [10], [[5]])
    names |= arrays_of(names["engine"], small)
    one = layer(names)
    given = {
        "attend": names["engine"].program(small.kind, small.tokens),
        "x": names["queries"],
        "layers": 2,
        "pages": 64,
        "weights": jnp.ones(2),
        "qkv": lambda weights, x: one.qkv(x),
        "rest": lambda weights, x, out: one.rest(x, out),
    }
    done = run("scan", {**names, **given, "jax": jax, "jnp": jnp, "lax": lax})
    written = np.flatnonzero(np.asarray(done["kv_cache"], np.float32).any(axis=(1, 2, 3, 4)))
    assert written.tolist() == [5, 64 + 5]  # a page of each layer


def test_scheduler(names: dict[str, Any]) -> None:
    seen: list[Any] = []

    def model(token_ids: Any, positions: Any, batch: rpac.Batch) -> Any:
        seen.append(batch.num_tokens)
        return np.eye(8)[token_ids % 8]

    copies: Callable[[Any], None] = lambda pages: seen.append(len(pages))  # noqa: E731
    run("scheduler", {**names, "prompt": [1, 2, 3], "max_new_tokens": 3, "model": model, "copy_pages": copies})
    assert seen == [0, 3, 0, 1, 0, 1]


def test_adapter(names: dict[str, Any]) -> None:
    done = run("adapter", {})
    metadata = (names[name] for name in ("kv_lens", "page_indices", "cu_q_lens", "distribution"))
    out, _ = done["attention"](
        names["queries"], names["keys"], names["values"], names["kv_cache"], *metadata, sm_scale=128**-0.5
    )
    assert out.shape == (1024, 4, 128)


def test_the_spec_is_that_of_the_name(names: dict[str, Any]) -> None:
    """The snippets are about llama3-8b, whose pages and chunks these are."""
    shown = (ROOT / "specs" / "llama3-8b.yaml").read_text()
    for line in ("page_size: 128", "prefill_chunk: 512"):
        assert line in shown
        assert line in SPEC.read_text()
