"""Compares the programs of two checkouts: `python benchmarks/same.py OTHER`, where OTHER is an earlier checkout of rpac.

Both checkouts generate the sources of the shipped specs and of a spec for every feature in every layout. Where two sources
differ, both are lowered with the JAX that is installed, and their lowered text is compared byte for byte: names, comments
and functions do not reach it, so a refactoring of templates that changes no program leaves it as it was. With --schedules
programs that differ are compiled and walked as well, and their predicted times are compared.

Exits with 1 where a program differs, or with --schedules where one became slower.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from rpac.batch import Limits
from rpac.build import sources_of
from rpac.contract.attention import Attention
from rpac.contract.kind import Kind
from rpac.contract.program import HEADER_END, Source, Variant
from rpac.devices.chip import is_tpu
from rpac.devices.toolchain import prepare, toolchain
from rpac.files.store import Store, default_cache_dir
from rpac.lower import Task, tasks_of
from rpac.predict import Workload, predict
from rpac.predict.programs import Programs
from rpac.spec import load_spec
from rpac.spec.support import FEATURES, text_of
from rpac.tune.batches import batches_of, limits_of

ROOT = Path(__file__).resolve().parent.parent
GENERATE = """
import sys
from pathlib import Path
from rpac.build import generate
from rpac.errors import PlanError
from rpac.spec import load_spec
for path in sys.argv[2:]:
    try:
        generate(load_spec(path), Path(sys.argv[1]))
    except PlanError as error:
        print(error, file=sys.stderr)
"""
SLOWER = 1.002  # of a predicted time: what is less is noise of the scheduler


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="rpac-same-") as name:
        folder = Path(name)
        specs = [path for path in _specs(folder) if fnmatch.fnmatch(path.stem, options.spec)]
        for checkout, side in ((options.other, "there"), (ROOT, "here")):
            _generate(checkout, folder / side, specs)
        pairs = list(_pairs(folder, specs, options))
    differing = [pair for pair in pairs if _body(pair.task.source.text) != _body(pair.other)]
    print(f"{len(pairs)} programs, {len(pairs) - len(differing)} with the same source", flush=True)
    jobs = list(_distinct(differing))
    changed = 0
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for pair, verdict in zip(jobs, pool.map(_compare, jobs), strict=True):
            changed += verdict.startswith("differs")
            if verdict != "same" or options.verbose:
                print(f"{pair.task.source.path} t{pair.task.tokens}: {verdict}", flush=True)
    print(f"{len(jobs)} of other sources lowered: {len(jobs) - changed} the same, {changed} differ")
    sys.exit(changed > 0)


@dataclass(frozen=True)
class Pair:
    """A program of this checkout, the source that the other makes of it, and the batches it is timed on, if it is."""

    task: Task
    other: str
    model: Attention
    limits: Limits
    batches: tuple[Workload, ...]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="an earlier checkout")
    parser.add_argument("--spec", default="*", help="names of specs, as a pattern: llama3-8b, with-separate-*, ...")
    parser.add_argument("--target", default="*", help="a target, as a pattern")
    parser.add_argument("--kind", default="*", help="decode, prefill or mixed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--schedules", action="store_true", help="compare predicted times where programs differ")
    parser.add_argument("--verbose", action="store_true", help="name the programs that are the same too")
    return parser.parse_args()


def _specs(folder: Path) -> Iterator[Path]:
    """The shipped specs, and one for each feature in each layout, written to `folder`."""
    yield from sorted((ROOT / "specs").glob("*.yaml"))
    base = {"serving": {"page_size": 64, "token_buckets": "[64, 256]"}, "targets": "[tpu7x, v5e, cpu]"}
    for layout in ("interleaved", "separate"):
        for title, keys in FEATURES.items():
            if title in ("separate K and V", "pages of 512"):
                continue
            latent = title == "latent attention"
            if latent and layout == "separate":
                continue
            text = text_of({}, keys, {"serving": {"token_buckets": "[64, 256]"}}, _as_section(layout, latent))
            text = text.replace("targets: [tpu7x, v6e, v5p, v5e, cpu, gpu]", f"targets: {base['targets']}")
            name = f"with-{layout}-{title.replace(' ', '-').replace('_', '-').lower()}"
            path = folder / f"{name}.yaml"
            path.write_text(text.replace("name: a\n", f"name: {name}\n"))
            try:
                load_spec(path)
            except Exception:  # an impossible pair
                path.unlink()
                continue
            yield path


def _as_section(layout: str, latent: bool) -> dict[str, dict[str, object]]:
    return {} if latent else {"serving": {"kv_layout": layout}}


def _generate(checkout: Path, folder: Path, specs: list[Path]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    folder.mkdir()
    command = [sys.executable, "-c", GENERATE, str(folder), *map(str, specs)]
    subprocess.run(command, env=environment, cwd=checkout, check=True)


def _pairs(folder: Path, specs: list[Path], options: argparse.Namespace) -> Iterator[Pair]:
    """Every program of this checkout that is wanted."""
    for path in specs:
        spec = load_spec(path)
        for part in spec.parts:
            targets = [target for target in spec.targets if fnmatch.fnmatch(target, options.target)]
            sources = [one for one in sources_of(part, targets) if fnmatch.fnmatch(one[0].kind, options.kind)]
            plans = {source.path: plan for plan, source in sources}
            for task in tasks_of(part, sources):
                plan, other = plans[task.source.path], folder / "there" / spec.name / task.source.path
                if not other.is_file():
                    print(f"{spec.name}/{task.source.path}: only here")
                    continue
                source = Source(f"{spec.name}/{task.source.path}", task.source.text)
                timed = options.schedules and is_tpu(task.target) and task.tokens == plan.tokens[-1]
                batches = batches_of(part, plan, 0) if timed else ()
                task = replace(task, source=source)
                yield Pair(task, other.read_text(), part.model, limits_of(part, plan), batches)


def _distinct(pairs: list[Pair]) -> Iterator[Pair]:
    """Each pair of sources once for each of its shapes: targets often share a source."""
    seen = set()
    for pair in pairs:
        target = pair.task.target if pair.batches else is_tpu(pair.task.target)
        key = (_body(pair.task.source.text), _body(pair.other), pair.task.args, target)
        if key not in seen:
            seen.add(key)
            yield pair


def _body(text: str) -> str:
    return text.split(HEADER_END, 1)[1]


def _compare(pair: Pair) -> str:
    task = pair.task
    before, after = (_fingerprint(task, text) for text in (pair.other, task.source.text))
    if before == after:
        return "same"
    if not pair.batches:
        return f"differs: {before[:40]}, now {after[:80]}"
    old, new = (_seconds(pair, text) for text in (pair.other, task.source.text))
    return f"{'differs' if new > old * SLOWER else 'other'}: {old * 1e6:.1f} us, now {new * 1e6:.1f}"


def _fingerprint(task: Task, text: str) -> str:
    """sha256 of what a source is lowered to; kept for the next comparison."""
    key = repr((_body(text), task.args, task.target if is_tpu(task.target) else "cpu", toolchain()["jax"]))
    kept = default_cache_dir() / "same" / hashlib.sha256(key.encode()).hexdigest()
    if kept.is_file():
        return kept.read_text()
    prepare()
    from rpac.lower import worker  # JAX comes with it

    try:
        lowered = worker.lowered_text(replace(task, source=Source(task.source.path, text)))
    except Exception as error:
        return f"cannot be lowered: {type(error).__name__}: {error}"
    found = hashlib.sha256(lowered.encode()).hexdigest()
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(found)
    return found


def _seconds(pair: Pair, text: str) -> float:
    """The predicted seconds of all batches together."""
    task = replace(pair.task, source=Source(pair.task.source.path, text))
    variant = Variant(cast(Kind, task.kind), task.tokens)
    store = Store(default_cache_dir())
    found = Programs("same", task.target, pair.model, pair.limits, (), {variant: task}, store, lambda line: None)
    return sum(predict(found, batch).report.seconds for batch in pair.batches)


if __name__ == "__main__":
    main()
