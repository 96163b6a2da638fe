"""A build makes the same bytes for any user, folder, hash seed, locale, time zone, umask and number of cores."""

from __future__ import annotations

import functools
import shutil
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

# In a user namespace without a mapping the process is nobody, and still reads what it could read before.
NOBODY = ("unshare", "--user", "--")

CASES: Mapping[str, tuple[dict[str, str], int, tuple[str, ...]]] = {
    "user": ({"HOME": "HOME", "XDG_DATA_HOME": "HOME/data", "USER": "another"}, 0o022, ()),
    "folder": ({}, 0o022, ()),
    "hash seed": ({"PYTHONHASHSEED": "12345"}, 0o022, ()),
    "locale": ({"LC_ALL": "C", "LANG": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu"}, 0o022, ()),
    "umask": ({}, 0o077, ()),
    "cores": (ONE_CORE, 0o022, ("--jobs", "1")),
}


def build(
    spec: Path,
    folder: Path,
    env: Mapping[str, str],
    umask: int,
    *options: str,
    cores: int = 0,
    prefix: tuple[str, ...] = (),
) -> Path:
    """A bundle built with nothing from a cache; `cores`: how many the build may run on, 0 for all. `prefix`: a command that runs
    another one.
    """
    home = folder / "home"
    home.mkdir(parents=True)
    own = {name: value.replace("HOME", str(home)) for name, value in env.items()}

    done = subprocess.run(
        [
            *prefix, sys.executable, "-c", START, str(umask), str(cores), *RPAC,
            "build", str(spec), "-o", str(folder / "out"), *options,
        ],
        capture_output=True, text=True, timeout=600, env=environment(folder / "cache", own), cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (bundle,) = (folder / "out").glob("*.rpac")
    return bundle


def test_everything_about_the_machine_at_once(small: Path, tmp_path: Path, tree: Tree) -> None:
    env = {name: value for one, _, _ in CASES.values() for name, value in one.items()}
    other = build(SMALL, tmp_path / "somewhere" / "else", env, 0o077, "--jobs", "1", cores=1)
    assert tree(other) == tree(small)


@functools.cache
def another_user() -> tuple[str, ...]:
    """What makes a command run as another user, where this machine lets it."""
    code = "import os; print(os.getuid())"
    if shutil.which(NOBODY[0]):
        done = subprocess.run([*NOBODY, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        if done.returncode == 0 and done.stdout != here.stdout:
            return NOBODY
    return ()


@pytest.fixture(scope="module", params=["cpu", "tpu7x"])
def first(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A target, and tiny built for it as everybody does."""
    return request.param, build(TINY, tmp_path_factory.mktemp("first"), {}, 0o022, "--target", request.param)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_thing_alone(tmp_path: Path, tree: Tree, first: tuple[str, Path], name: str) -> None:
    target, bundle = first
    env, umask, options = CASES[name]
    folder = tmp_path / ("a folder with späces" if name == "folder" else "again")
    cores = 1 if name == "cores" else 0
    again = build(TINY, folder, env, umask, "--target", target, *options, cores=cores)
    assert tree(again) == tree(bundle)


@pytest.mark.slow
def test_another_user_of_the_machine(tmp_path: Path, tree: Tree, first: tuple[str, Path]) -> None:
    """By number too, not only by the environment; a machine may not let a test do that."""
    if not another_user():
        pytest.skip("no command runs as another user here")
    target, bundle = first
    again = build(TINY, tmp_path / "again", {}, 0o022, "--target", target, prefix=another_user())
    assert tree(again) == tree(bundle)
