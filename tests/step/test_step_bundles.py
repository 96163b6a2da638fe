"""Steps in a bundle: built by the command line, kept by their lowered text, and read back strictly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import environment, rpac
from made import HERE

from rpac.bundle import read_manifest, verify_bundle
from rpac.bundle.manifest import MANIFEST, _seal, parse, render
from rpac.contract.step import builder, leaves_of, tree_of
from rpac.errors import BundleError, TargetError
from rpac.files.store import Store
from rpac.rebuild import rebuild
from rpac.spec import load_spec
from rpac.step import StepTask
from rpac.step.worker import lower_step

SPEC = HERE / "llama-step.yaml"


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A bundle that the command line built from a spec with the key `step`, and what it printed."""
    folder = tmp_path_factory.mktemp("built")
    spec = folder / "llama-step.yaml"
    spec.write_text(SPEC.read_text() + "step: llama_step:only_mixed\n")
    done = rpac("build", spec, "--target", "cpu", "-o", folder, "--json", cache=folder / "cache", cwd=HERE)
    assert done.returncode == 0, done.stderr
    assert "cpu step mixed t16: compiled" in done.stderr
    return folder / "llama-step.rpac", done.stdout


def test_a_build_and_what_inspect_says(listing: tuple[Path, str]) -> None:
    path, printed = listing
    [step] = json.loads(printed)["steps"]
    assert (step["kind"], step["tokens"], step["executable_bytes"]) == ("mixed", 16, None)
    done = rpac("inspect", path, cache=path.parent)
    assert "cpu steps of llama_step:only_mixed: 14 arrays of parameters, 1.31 MiB; 2 caches" in done.stdout
    steps = read_manifest(path).steps["cpu"]
    assert [array.name for array in steps.model.params[:2]] == ["params['embedding']", "params['head']"]
    assert load_spec(path / "spec.yaml").step == "llama_step:only_mixed"


@pytest.mark.slow
def test_a_rebuild_makes_the_steps_again_where_the_function_is(listing: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = listing
    step = "llama_step:only_mixed"
    done = rpac("rebuild", path, "--step", step, cache=tmp_path, cwd=HERE)
    assert "the same bytes" in done.stdout, done.stderr
    done = rpac("rebuild", path, "--step", step, cache=tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "found llama_step:only_mixed, but there is no module 'llama_step' in" in done.stderr


def test_a_rebuild_runs_no_function_that_a_bundle_names_by_itself(listing: tuple[Path, str]) -> None:
    path, _ = listing
    for given, text in (("", "no --step"), ("os:walk", "--step os:walk")):
        with pytest.raises(
            TargetError, match=f"found {text}; must name the function of .* steps, llama_step:only_mixed"
        ):
            rebuild(path, step=given)


def test_the_cache_goes_by_what_a_step_is_lowered_to(task: Callable[..., StepTask], tmp_path: Path) -> None:
    store = Store(tmp_path)
    made, cached = lower_step(task("llama_step:step"), {}, store)
    assert not cached
    again, cached = lower_step(task("llama_step:spelled_otherwise"), {}, store)
    assert cached
    assert (again.exported, again.lowered_sha256) == (made.exported, made.lowered_sha256)
    assert not lower_step(task("llama_step:warmer"), {}, store)[1]
    assert not lower_step(task("llama_step:step"), {"jax": "another"}, store)[1]


def test_a_manifest_with_steps_is_read_back_as_it_was(path: Path) -> None:
    manifest = verify_bundle(path)
    assert parse(render(manifest), MANIFEST) == manifest
    assert manifest.steps["cpu"].blobs < manifest.blobs


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    data = json.loads((path / MANIFEST).read_text())
    del data["digest"]
    edit(data)
    return _seal(data)


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "target": (lambda steps: steps.update(tpu7x=steps.pop("cpu")), "must be an object whose keys are among the targets cpu"),
    "nothing": (lambda steps: steps.clear(), "must be an object with the steps of one target or more, or left out"),
    "function": (lambda steps: steps["cpu"].update(function="llama_step"), "must be package.module:function"),
    "layer": (lambda steps: steps["cpu"]["caches"].append("full"), r"caches\[2\]: found 'full'"),
    "no program": (lambda steps: steps["cpu"]["programs"].clear(), "must be a list with one step or more"),
    "twice": (lambda steps: steps["cpu"]["programs"].append(steps["cpu"]["programs"][0]), "each of another kind or token bucket"),
    "bucket": (lambda steps: steps["cpu"]["programs"][0].update(tokens=17), r"one of the token buckets \[16\]"),
    "tree": (lambda steps: steps["cpu"].update(caches_tree={"set": [0, 1]}), "must be the structure of a tree"),
    "deep tree": (lambda steps: steps["cpu"].update(caches_tree=deep(400)), "caches_tree"),
    "leaf twice": (lambda steps: steps["cpu"].update(caches_tree={"list": [0, 0]}), "the numbers 0 to 1, once for each cache"),
    "dtype": (lambda steps: steps["cpu"]["params"][0].__setitem__(1, "complex64"), r"params\[0\]\[1\]: found 'complex64'"),
    "cut": (lambda steps: steps["cpu"]["params"][0].__setitem__(3, [["kv"], ["kv"]]), "axes of the mesh, each once, that divide"),
    "axis": (lambda steps: steps["cpu"]["params"][0].__setitem__(3, [["model"]]), "found 'model'; must be one of copy, data, kv"),
    "size": (lambda steps: steps["cpu"]["programs"][0]["exported"].update(size=1 << 40), "an integer from 1 to 2147483648"),
}  # fmt: skip


def deep(levels: int) -> Any:
    return {"list": [deep(levels - 1)]} if levels else {"list": []}


@pytest.mark.parametrize("name", EDITS)
def test_a_manifest_that_no_build_writes(path: Path, name: str) -> None:
    edit, text = EDITS[name]
    with pytest.raises(BundleError, match=text):
        parse(edited(path, lambda data: edit(data["steps"])), MANIFEST)


def test_a_tree_comes_back_from_json() -> None:
    tree = {"b": [0, None, (1, 2)], "a": {3: 3}}
    stored = json.loads(json.dumps(tree_of(tree, "outputs")))
    assert builder(stored)([10, 11, 12, 13]) == {"b": [10, None, (11, 12)], "a": {3: 13}}
    assert leaves_of(stored) == [0, 1, 2, 3]
    for bad in (
        {"namedtuple": ["a b", []]},
        {"namedtuple": ["N", [["class", 0]]]},
        {"dict": [[0]]},
        "0",
        True,
        {"list": []} | {"tuple": []},
    ):
        with pytest.raises(ValueError, match=r".+"):
            builder(bad)


ON_TPU = """
import hashlib, json, sys
from rpac.devices.toolchain import prepare, toolchain
prepare()
from rpac.build import all_tasks
from rpac.files.store import Store
from rpac.spec import load_spec
from rpac.step import steps_of
from rpac.step.worker import lower_step
spec = load_spec(sys.argv[1])
tasks = [one for one in all_tasks(spec, ["tpu7x"]) if one.kind == "decode"]
[task] = steps_of(spec, tasks, "llama_step:step", sys.argv[2])
made, _ = lower_step(task, toolchain(), Store(None))
sha = [hashlib.sha256(data).hexdigest() for data in (made.exported, made.executable)]
print(json.dumps([made.device_kind, made.memory, made.lowered_sha256, sha]))
"""


@pytest.mark.compile
@pytest.mark.once
def test_a_step_is_compiled_for_a_tpu_to_the_same_bytes_each_time(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ON_TPU, str(SPEC), str(HERE)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(tmp_path), cwd=folder,
        )
        for folder in (HERE, tmp_path)
    ]  # fmt: skip
    ended = [one.communicate(timeout=300) for one in started]
    assert [one.returncode for one in started] == [0, 0], ended
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in ended)
    assert first == second
    device_kind, memory, _, _ = first
    assert device_kind == "TPU7x"
    assert memory["alias_bytes"] == 2 * 12 * 16 * 2 * 128 * 4
