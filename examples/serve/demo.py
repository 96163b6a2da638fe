"""Starts the server, sends it requests, compares every token with dense attention, and times the way to a first token.

PYTHONPATH=examples python -m serve.demo build/serve-demo.rpac examples/serve/spec.yaml
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from tabulate import tabulate

from serve import toy as model
from serve.load import Request, compare, requests, send_all

SEED, REQUESTS, RATE = 0, 120, 10.0
LENGTH = 128  # tokens of the longest request, its answer included
RUNS = 3
COLUMNS = {
    "model": "model",
    "attention": "attention ready",
    "attention_cores": "(cores)",
    "all": "all programs ready",
    "all_cores": "(cores)",
    "first_token": "first token",
}


def main(bundle: str, spec: str) -> None:
    cache = str(Path(bundle).with_suffix(".jaxcache"))
    config = model.Config()
    load = requests(REQUESTS, config.vocabulary, np.random.default_rng(SEED), RATE)
    with server(bundle, "--compile-cache", cache) as url:
        print(f"{REQUESTS} requests, {RATE:g} a second, seed {SEED}, to {url}")
        seconds = asyncio.run(send_all(url, load))
        with urllib.request.urlopen(f"{url}/stats") as answer:
            report(load, seconds, json.load(answer))
    verdict = compare(config, model.init(config, 0), load, LENGTH)
    print(
        f"{verdict.tokens - len(verdict.wrong)} of {verdict.tokens} tokens are those of dense attention; {verdict.ties} ties"
    )
    if verdict.wrong:
        sys.exit("\n".join(verdict.wrong))
    first_tokens(bundle, spec, cache)


@contextlib.contextmanager
def server(bundle: str, *options: str) -> Iterator[str]:
    """Runs a server in a process of its own. Yields its address."""
    command = [sys.executable, "-m", "serve.app", bundle, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            listening = process.stdout.readline()
            if not listening.startswith("listening on "):
                sys.exit("the server did not start")
            yield listening.split()[-1]
        finally:
            process.terminate()


def report(load: Sequence[Request], seconds: float, stats: dict[str, Any]) -> None:
    """Prints what was served, and by which programs."""
    tokens, prompts = sum(len(one.tokens) for one in load), sum(len(one.prompt) for one in load)
    first = statistics.quantiles([one.first for one in load], n=20)
    totals = stats["totals"]
    print(
        f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} a second; "
        f"first token after {first[9]:.2f} s (median), {first[-1]:.2f} s (95%)\n"
        f"{totals['steps']} steps, {totals['preemptions']} preemptions; {totals['shared_tokens']} of {prompts} prompt "
        f"tokens found in the cache, {totals['copied_pages']} pages copied\n"
    )
    counts = sorted(stats["programs"].items())
    rows = [
        (name, one["calls"], one["rows"], one["tokens"], f"{one['padding'] / (one['padding'] + one['tokens']):.0%}")
        for name, one in counts
    ]
    print(tabulate(rows, headers=("program", "calls", "rows", "tokens", "padding"), tablefmt="simple"))
    padding, computed = (sum(one[key] for _, one in counts) for key in ("padding", "tokens"))
    print(f"\npadding in all: {padding / (padding + computed):.0%} of the rows; a step calls a program once a layer")


def first_tokens(bundle: str, spec: str, cache: str) -> None:
    """Times fresh processes of each kind in turn, so that other load on the machine affects all kinds alike."""
    ways = {
        "from scratch": ("scratch", spec),
        "bundle": ("bundle", bundle),
        "bundle, compile cache": ("bundle", bundle, cache),
    }
    started(*ways["bundle, compile cache"])  # fills the cache
    runs = [{way: started(*args) for way, args in ways.items()} for _ in range(RUNS)]
    fastest = {way: {key: min(run[way][key] for run in runs) for key in COLUMNS} for way in ways}
    rows = [(way, *(f"{fastest[way][key]:.2f} s" for key in COLUMNS)) for way in ways]
    print(f"\nfresh processes, each figure the least of {RUNS}; in brackets the time of all cores:\n")
    print(tabulate(rows, headers=("", *COLUMNS.values()), tablefmt="simple"))
    for way in list(ways)[1:]:
        ratio = {key: f"{fastest['from scratch'][key] / fastest[way][key]:.1f}" for key in COLUMNS}
        print(
            f"{way}: attention is ready {ratio['attention']} ({ratio['attention_cores']}) times sooner than from scratch, "
            f"all programs {ratio['all']} ({ratio['all_cores']}), the first token {ratio['first_token']}"
        )


def started(*args: str) -> dict[str, float]:
    environment = {**os.environ, "SPAWNED": str(time.time())}
    command = [sys.executable, "-m", "serve.first_token", *args]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
