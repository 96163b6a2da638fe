"""The cpu target beside its peers: decode of 16 sequences of 1K tokens, all in one run on this machine.

    python benchmarks/cpu.py [--json]

Each implementation runs in a process of its own, ejkernel's in an environment of its own, made on the first run under
`.venv-peers/`. Rounds alternate between them, so that whatever else the machine does falls on all alike.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rpac.kernels import render
from rpac.plan import plan_spec
from rpac.spec import Spec, load_spec

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("cpu_worker.py")
PEER_ENVIRONMENT = ROOT / ".venv-peers" / "ejkernel"
EJKERNEL = "ejkernel==0.0.80.3"
# ejkernel goes in without its dependencies: of these it needs only what its import of the XLA kernels touches.
EJKERNEL_IMPORTS = ["jax==0.10.2", "beartype", "chex", "einops", "jaxtyping", "pydantic", "tqdm"]

SEQUENCES = 16
CONTEXT = 1024  # tokens, the new one included
PAGE_SIZES = (128, 16)
ROUNDS = 10
CALLS = 2  # a round
SEED = 0
AGREEMENT = 0.02  # of outputs of about 0.1: bfloat16 rounding, in whichever order each implementation does it

LABELS = {
    "rpac": "rpac, llama3-8b decode",
    "ejkernel": f"{EJKERNEL.replace('==', ' ')}, RPA v3 XLA",
    "gather": "plain gather in jnp, no cache update",
    "copy": "copy of the KV bytes",
}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def peer_python() -> Path:
    """The interpreter of ejkernel's environment, which is made first if it is not there yet."""
    python = PEER_ENVIRONMENT / "bin" / "python"
    done = PEER_ENVIRONMENT / "installed"  # written last, so that half an environment is made again
    wanted = json.dumps([EJKERNEL, *EJKERNEL_IMPORTS])
    if not done.exists() or done.read_text() != wanted:
        progress(f"making {PEER_ENVIRONMENT}")
        venv.create(PEER_ENVIRONMENT, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *EJKERNEL_IMPORTS], check=True, stdout=sys.stderr)
        subprocess.run([*pip, "--no-deps", EJKERNEL], check=True, stdout=sys.stderr)
        done.write_text(wanted)
    return python


def spec_with_pages_of(page_size: int) -> Spec:
    spec = load_spec(ROOT / "specs" / "llama3-8b.yaml")
    return replace(spec, serving=replace(spec.serving, page_size=page_size, kv_layout="interleaved"))  # as the peers'


def config_of(spec: Spec, source: Path) -> dict[str, Any]:
    """What a worker is told: the batch, and the arrays of the spec."""
    return {
        "source": str(source),
        "sequences": SEQUENCES,
        "context": CONTEXT,
        "page_size": spec.serving.page_size,
        "q_heads": spec.model.q_heads,
        "kv_heads": spec.model.kv_heads,
        "head_dim": spec.model.head_dim,
        "tokens": next(bucket for bucket in spec.serving.token_buckets if bucket >= SEQUENCES),
        "max_seqs": spec.serving.max_num_seqs,
        "pages_per_seq": spec.serving.pages_per_seq,
        "seed": SEED,
    }


class Worker:
    """A process that times one implementation on request."""

    def __init__(self, process: subprocess.Popen[str], what: str) -> None:
        self._process = process
        self.what = what
        rows = base64.b64decode(self._answer()["out"])
        self.out = np.frombuffer(rows, np.float32)

    def times(self, calls: int) -> list[float]:
        """Seconds that each of some calls took."""
        assert self._process.stdin is not None
        print(calls, file=self._process.stdin, flush=True)
        times: list[float] = self._answer()
        return times

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker of {self.what} ended with exit code {self._process.wait()}; see above")
        return json.loads(line)


@contextmanager
def worker(python: Path | str, what: str, config: dict[str, Any]) -> Iterator[Worker]:
    command = [str(python), str(WORKER), json.dumps({**config, "what": what})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Worker(process, what)
        finally:
            process.kill()


@dataclass(frozen=True)
class Result:
    """Milliseconds of one implementation, and its median over rpac's."""

    what: str
    page_size: int
    min_ms: float
    median_ms: float
    max_ms: float
    times_rpac: float


def measure(page_size: int, peers: Path, folder: Path) -> list[Result]:
    spec = spec_with_pages_of(page_size)
    (plan,) = [plan for plan in plan_spec(spec, "cpu") if plan.kind == "decode"]
    source = folder / f"decode_page{page_size}.py"
    source.write_text(render(spec, plan).text)
    config = config_of(spec, source)
    with ExitStack() as stack:
        progress(f"page {page_size}: starting {len(LABELS)} workers")
        pythons = {what: peers if what == "ejkernel" else sys.executable for what in LABELS}
        workers = [stack.enter_context(worker(python, what, config)) for what, python in pythons.items()]
        check_agreement(workers)
        times: dict[str, list[float]] = {what: [] for what in LABELS}
        for turn in range(ROUNDS):
            progress(f"page {page_size}: round {turn + 1} of {ROUNDS}")
            for each in workers[turn % len(workers) :] + workers[: turn % len(workers)]:
                times[each.what] += each.times(CALLS)
    rpac_median = statistics.median(times["rpac"])
    return [
        Result(
            what,
            page_size,
            min_ms=min(taken) * 1e3,
            median_ms=statistics.median(taken) * 1e3,
            max_ms=max(taken) * 1e3,
            times_rpac=statistics.median(taken) / rpac_median,
        )
        for what, taken in times.items()
    ]


def check_agreement(workers: list[Worker]) -> None:
    """Raises SystemExit unless all that attend found the same: a wrong kernel's time means nothing."""
    first, *others = [each for each in workers if each.out.size]
    for other in others:
        worst = float(np.abs(other.out - first.out).max())
        if not worst <= AGREEMENT:
            raise SystemExit(f"{other.what} differs from {first.what} by {worst:.3g}; allowed is {AGREEMENT}")


def table(results: list[Result], machine: dict[str, Any]) -> str:
    width = max(map(len, LABELS.values()))
    lines = [
        f"Decode of {SEQUENCES} sequences of {CONTEXT} tokens, 32/8 heads, d128, bfloat16: milliseconds a call,",
        f"measured on this machine, {machine['cores']} cores; {ROUNDS} alternating rounds of {CALLS} calls.",
        "",
        f"{'page':>4}  {'':{width}}  {'min':>7}  {'median':>7}  {'max':>7}  median / rpac's",
    ]
    lines += [
        f"{r.page_size:>4}  {LABELS[r.what]:{width}}  {r.min_ms:7.1f}  {r.median_ms:7.1f}  {r.max_ms:7.1f}  "
        f"{r.times_rpac:15.2f}"
        for r in results
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="results as JSON")
    arguments = parser.parse_args()
    peers = peer_python()
    machine = {"cores": len(os.sched_getaffinity(0)), "load_before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        results = [result for page_size in PAGE_SIZES for result in measure(page_size, peers, Path(folder))]
    if arguments.json:
        print(json.dumps({"machine": machine, "results": [vars(result) for result in results]}, indent=2))
    else:
        print(table(results, machine))


if __name__ == "__main__":
    main()
