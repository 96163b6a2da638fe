"""From the start of a process to its first token: with a bundle, and with everything compiled by jit from nothing.

    PYTHONPATH=examples python -m serve.first_token build/model build/model.rpac build/model.yaml [RUNS]

runs fresh processes of each kind in turn, so that other load on the machine affects both alike, and prints a table.
`bundle` loads the bundle. `jit` generates the same kernels from the spec, traces them and compiles them with the model, as a
server without rpac would. Both read the same checkpoint, and must give the same token.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
SPAWNED = float(os.environ.get("SPAWNED", time.time()))  # wall clock, by the parent

PROMPT = list(range(1, 33))
COLUMNS = {"one": "its step ready", "one_cores": "(cores)", "all": "all steps ready", "all_cores": "(cores)"}


def main(model: str, bundle: str, spec: str, count: str = "1") -> None:
    ways = {"jit": ("jit", model, spec), "bundle": ("bundle", model, bundle)}
    runs = [{way: started(*arguments) for way, arguments in ways.items()} for _ in range(int(count))]
    tokens = {found["token"] for run in runs for found in run.values()}
    if len(tokens) != 1:
        sys.exit(f"the tokens differ: {tokens}")
    fastest = {way: {key: min(run[way][key] for run in runs) for key in COLUMNS} for way in ways}
    print(
        f"fresh processes on {os.cpu_count()} cores, each figure the least of {count}; in brackets the time of all cores:\n"
    )
    rows = [(way, *(f"{fastest[way][key]:.2f} s" for key in COLUMNS)) for way in ways]
    print(tabulated(rows))
    one, every = (fastest["jit"][key] / fastest["bundle"][key] for key in ("one", "all"))
    print(
        f"\nwith the bundle the first token comes {every:.1f} times sooner from a server that has all steps ready before it "
        f"takes a request, and {one:.1f} times sooner from one that has only the step of this token"
    )


def tabulated(rows: list[tuple[str, ...]]) -> str:
    from tabulate import tabulate

    return tabulate(rows, headers=("", *COLUMNS.values()), tablefmt="simple")


def started(*arguments: str) -> dict[str, Any]:
    """What one fresh process measures."""
    environment = {**os.environ, "SPAWNED": str(time.time())}
    command = [sys.executable, "-m", "serve.first_token", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(way: str, model: str, source: str) -> None:
    """Prints JSON, in seconds since the process was started: the first token if only its step is made ready, and if all are."""
    from serve.generate import Generator, Request

    folder = Path(model)
    if way == "bundle":
        from serve.bundle import open_bundle

        steps = open_bundle(source, folder, "cpu")
    else:
        from serve.scratch import make_scratch

        steps = make_scratch(folder, source)
    generator = Generator(steps)
    generator.add(Request(PROMPT, 1))
    tokens: list[int] = []
    while not tokens:
        tokens = [one.token for one in generator.step()]
    first = now()
    steps.warm()
    every = now()  # in the other order, the token would come now
    print(json.dumps({**dict(zip(COLUMNS, (*first, *every), strict=True)), "token": tokens[0]}))


def now() -> tuple[float, float]:
    """Seconds since the process was started, and seconds of all cores together."""
    return time.time() - SPAWNED, time.process_time()


if __name__ == "__main__":
    (measure if sys.argv[1] in ("jit", "bundle") else main)(*sys.argv[1:])
