"""Starts the server, sends it requests, compares every token with dense attention, and reports what ran.

PYTHONPATH=examples python -m serve.demo build/serve-demo-model build/serve-demo-model.rpac
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from serve.checkpoint import load_params
from serve.config import read_config
from serve.load import Request, compare, requests, send_all
from serve.text import Text

SEED, REQUESTS, RATE = 0, 120, 10.0
LENGTH = 128  # tokens of the longest request, its answer included


def main(model: str, bundle: str) -> None:
    folder = Path(model)
    config = read_config(folder)
    load = requests(REQUESTS, config.vocabulary, np.random.default_rng(SEED), RATE)
    with server(model, bundle) as url:
        print(f"{REQUESTS} requests, {RATE:g} a second, seed {SEED}, to {url}")
        seconds = asyncio.run(send_all(url, folder.name, load))
        report(load, seconds, metrics_of(url))
    verdict = compare(config, load_params(folder, config), load, LENGTH, Text(folder).ends)
    right = verdict.tokens - len(verdict.wrong)
    print(f"{right} of {verdict.tokens} tokens are those of dense attention; {verdict.ties} ties")
    if verdict.wrong:
        sys.exit("\n".join(verdict.wrong))


@contextlib.contextmanager
def server(model: str, bundle: str, *options: str) -> Iterator[str]:
    """Runs a server in a process of its own. Yields its address."""
    command = [sys.executable, "-m", "serve.app", model, bundle, "--target", "cpu", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            listening = process.stdout.readline()
            if not listening.startswith("listening on "):
                sys.exit("the server did not start")
            yield listening.split()[-1]
        finally:
            process.terminate()


def metrics_of(url: str) -> dict[str, float]:
    """The metrics of a server, by name and labels."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def report(load: Sequence[Request], seconds: float, found: Mapping[str, float]) -> None:
    """Prints what was served."""
    tokens = sum(len(one.tokens) for one in load)
    first = statistics.quantiles([one.first for one in load], n=20)
    steps, busy = found["serve_steps_total"], found["serve_step_seconds_total"]
    print(
        f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} a second; "
        f"first token after {first[9]:.2f} s (median), {first[-1]:.2f} s (95%)\n"
        f"{steps:.0f} steps of {1e3 * busy / steps:.1f} ms; {found['serve_preemptions_total']:.0f} preemptions\n"
        f"{found['serve_shared_prompt_tokens_total']:.0f} of {found['serve_prompt_tokens_total']:.0f} prompt tokens found in "
        f"the cache, {found['serve_copied_pages_total']:.0f} pages copied"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
