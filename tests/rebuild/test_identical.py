"""A build makes the same bytes wherever it runs: for any user, hash seed, locale, time zone, umask and number of cores."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from command import ROOT, RPAC, TINY, environment

Tree = Callable[[Path], dict[str, bytes]]
SMALL = ROOT / "tests" / "engine" / "small.yaml"
# In the new process: a function that runs between fork and exec is not safe beside JAX's threads.
START = """
import os, sys
umask, cores, *command = sys.argv[1:]
os.umask(int(umask))
if int(cores):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
os.execv(command[0], command)
"""
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

CASES: Mapping[str, tuple[dict[str, str], int, tuple[str, ...]]] = {
    "user": ({"HOME": "HOME", "XDG_DATA_HOME": "HOME/data", "USER": "another"}, 0o022, ()),
    "hash seed": ({"PYTHONHASHSEED": "12345"}, 0o022, ()),
    "locale": ({"LC_ALL": "C", "LANG": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu"}, 0o022, ()),
    "umask": ({}, 0o077, ()),
    "cores": (ONE_CORE, 0o022, ("--jobs", "1")),
}


def build(spec: Path, folder: Path, env: Mapping[str, str], umask: int, *options: str, cores: int = 0) -> Path:
    """A bundle built with nothing from a cache; `cores`: how many the build may run on, 0 for all."""
    home = folder / "home"
    home.mkdir(parents=True)
    own = {name: value.replace("HOME", str(home)) for name, value in env.items()}

    done = subprocess.run(
        [sys.executable, "-c", START, str(umask), str(cores), *RPAC, "build", str(spec), "-o", str(folder / "out"), *options],
        capture_output=True, text=True, timeout=600, env=environment(folder / "cache", own), cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (bundle,) = (folder / "out").glob("*.rpac")
    return bundle


def test_everything_about_the_machine_at_once(small: Path, tmp_path: Path, tree: Tree) -> None:
    env = {name: value for one, _, _ in CASES.values() for name, value in one.items()}
    other = build(SMALL, tmp_path / "somewhere" / "else", env, 0o077, "--jobs", "1", cores=1)
    assert tree(other) == tree(small)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "tpu7x"])
def test_each_thing_alone(tmp_path: Path, tree: Tree, target: str) -> None:
    first = tree(build(TINY, tmp_path / "first", {}, 0o022, "--target", target))
    for name, (env, umask, options) in CASES.items():
        cores = 1 if name == "cores" else 0
        again = build(TINY, tmp_path / name, env, umask, "--target", target, *options, cores=cores)
        assert tree(again) == first, name
