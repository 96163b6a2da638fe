"""Runs batches on compiled calls, ours and the peers', through what is kept of earlier runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from kept import digest, walker_digest

from peers import environment
from peers.cases import MAX_MODEL_LEN, PREFILL_CHUNK, PREFILL_TOKENS, Case, Heads, Place
from peers.contenders import Compile, Contender, Ours, Parameters
from peers.store import HERE, TOOK_TOO_LONG, Result, Store
from rpac.batch import Batch, Limits
from rpac.batch.select import select
from rpac.devices.toolchain import toolchain
from rpac.errors import PlanError, ScheduleError
from rpac.files.store import Store as ProgramStore
from rpac.files.store import default_cache_dir
from rpac.predict import Programs, predict_on, programs_of
from rpac.schedule import Call, Work, attention_work
from rpac.schedule.report import KernelOperands
from rpac.spec import load_spec

QUERY_BYTES = 2
KEPT_CALLS = 8  # read schedules in memory: as many as a sweep has choices
ROOT = HERE.parents[1]
EXPECTED_LENS: tuple[int, ...] = (1024, 4096)
NOT_RUN = "not run yet"


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def work_of(heads: Heads, case: Case) -> Work:
    """What the attention of a batch needs, whoever computes it."""
    return attention_work(
        case.workload.kv_lens,
        case.workload.q_lens,
        heads.q_heads,
        heads.kv_heads,
        heads.head_dim,
        QUERY_BYTES,
        heads.kv_bytes,
        heads.sliding_window,
        rope_dim=heads.rope_dim,
    )


def spec_of(
    folder: Path,
    heads: Heads,
    page_size: int,
    case: Case,
    prefill_chunk: int = PREFILL_CHUNK,
    kv_layout: str = "interleaved",
) -> Path:
    """A spec for the cases that are compiled like `case`, written under `folder`."""
    text = (HERE / "spec.yaml.in").read_text()
    fields = {
        "about": heads.about,
        "model": heads.model(),
        "page_size": page_size,
        "max_model_len": MAX_MODEL_LEN,
        "prefill_tokens": PREFILL_TOKENS,
        "decode_tokens": case.tokens if case.kind == "decode" else case.max_seqs,
        "max_seqs": case.max_seqs,
        "prefill_chunk": prefill_chunk,
        "context_lens": list(EXPECTED_LENS),
        "layout": "" if heads.rope_dim is not None else f"  kv_layout: {kv_layout}\n",
    }
    name = re.sub(r"\W", "-", heads.label)
    path = folder / "specs" / f"{name}-page{page_size}-seqs{case.max_seqs}-chunk{prefill_chunk}-{kv_layout}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format(**fields))
    return path


def limits_of(folder: Path, heads: Heads, page_size: int, case: Case) -> Limits:
    """What every call of a case is compiled for."""
    return Limits.of(load_spec(spec_of(folder, heads, page_size, case)))


def name_of(heads: Heads, place: Place, who: str, case: Case, choice: str) -> str:
    """What a result is kept under."""
    return " | ".join([heads.label, place[0], str(place[1]), who, case.label, choice])


class Bench:
    """Answers from `results` and `folder` where it can; compiles and walks where it may."""

    def __init__(self, results: Path, folder: Path, pythons: dict[str, str]) -> None:
        self.folder = folder
        self.store = Store(results, folder)
        self._pythons = dict(pythons)
        self._walker = walker_digest()
        self._call = lru_cache(maxsize=KEPT_CALLS)(self._make_call)
        self._programs = cache(self._make_programs)

    def peer(self, contender: Contender, heads: Heads, place: Place, case: Case, may_run: bool) -> Result:
        """The best of a peer's choices for a batch; a refusal where none of them ran."""
        compiles = contender.compiles(heads, place, case)
        if isinstance(compiles, str):
            return Result("", error=compiles)
        batch = case.workload.batch(limits_of(self.folder, heads, place[1], case))
        results = [self._of_compile(contender, one, heads, place, batch, case, may_run) for one in compiles]
        ran = [result for result in results if not result.error]
        if ran:
            return min(ran, key=lambda result: result.seconds)
        return next((result for result in results if result.error == NOT_RUN), results[0])

    def _of_compile(
        self, contender: Contender, one: Compile, heads: Heads, place: Place, batch: Batch, case: Case, may_run: bool
    ) -> Result:
        script = "".join((HERE / name).read_text() for name in ("abstract_tpu.py", one.script))
        if "stand_ins" in script:
            script += (HERE / "stand_ins.py").read_text()
        request = json.dumps(one.request, sort_keys=True)
        compiled = digest(script, request, self._packages(one.environment))
        parameters = contender.parameters(batch, case)
        name = name_of(heads, place, contender.name, case, one.choice)
        key = digest(compiled, sorted(parameters.items()), self._walker)
        kept = self.store.results.get(name, key)
        if not may_run or (kept is not None and not kept.earlier):
            return kept or Result(one.choice, error=NOT_RUN)
        progress(name)
        try:
            call = self._call(compiled, one.environment, one.script, request, place[0])
            traced = self._traced(one, request, parameters) if one.follow else ()
            report = call.predict(parameters, work_of(heads, case), traced)
            result = Result(one.choice, report.seconds, report.kernel_seconds, report.mbu or 0.0, report.mfu or 0.0)
        except ScheduleError as error:
            result = Result(one.choice, error=reason(str(error)))
            if TOOK_TOO_LONG in str(error):
                return result
        self.store.results.keep(name, key, result)
        return result

    def _make_call(
        self, compiled: str, environment_name: environment.Environment, script: str, request: str, target: str
    ) -> Call:
        command = [self._python(environment_name), str(HERE / script), request]
        return Call(self.store.dump(compiled, command, target), any_compiler=True)

    def _traced(self, one: Compile, request: str, parameters: Parameters) -> tuple[KernelOperands, ...]:
        """The scalars that a call computes for its kernels, as its own script computes them."""
        command = [self._python(one.environment), str(HERE / one.script), request, json.dumps(parameters)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise ScheduleError(f"the scalars of the kernels could not be computed:\n{done.stderr[-3000:]}")
        return tuple(
            KernelOperands(
                kernel["name"],
                tuple(map(tuple, kernel["shapes"])),
                {int(index): np.array(values) for index, values in kernel["known"].items()},
            )
            for kernel in json.loads(done.stdout.splitlines()[-1])
        )

    def ours(self, variety: Ours, heads: Heads, place: Place, case: Case, may_run: bool) -> Result:
        """Ours, from a spec for all batches, or from one whose chunk is this batch's."""
        chunk = case.longest_chunk if variety.fitted and case.kind == "prefill" else PREFILL_CHUNK
        path = spec_of(self.folder, heads, place[1], case, chunk, variety.kv_layout)
        try:
            programs = self._programs(path, place[0])
        except PlanError as error:
            return Result("", error=reason(str(error)))
        batch = case.workload.batch(programs.limits)
        variant = select(programs.tasks, programs.limits, batch.tokens, batch.distribution)
        task = programs.tasks[variant]
        name = name_of(heads, place, variety.name, case, str(variant))
        key = digest(task.key(toolchain(), "dump"), case.workload.q_lens, case.workload.kv_lens, self._walker)
        kept = self.store.results.get(name, key)
        if not may_run or (kept is not None and not kept.earlier):
            return kept or Result(str(variant), error=NOT_RUN)
        progress(name)
        try:
            report = predict_on(programs, variant, batch, case.workload).report
            result = Result(str(variant), report.seconds, report.kernel_seconds, report.mbu or 0.0, report.mfu or 0.0)
        except ScheduleError as error:
            result = Result(str(variant), error=reason(str(error)))
        self.store.results.keep(name, key, result)
        return result

    def _make_programs(self, path: Path, target: str) -> Programs:
        return programs_of(path, target, ProgramStore(default_cache_dir()), progress)

    def _packages(self, name: environment.Environment) -> list[str]:
        compiler, packages = environment.ENVIRONMENTS[name]
        return [*compiler, *packages]

    def _python(self, name: environment.Environment) -> str:
        if name not in self._pythons:
            compiler, packages = environment.ENVIRONMENTS[name]
            progress(f"making the peers' environment {name}: {' '.join((*compiler, *packages))}")
            self._pythons[name] = environment.ensure(self.folder.parent / f"peers-{name}", compiler, packages)
        return self._pythons[name]


def reason(text: str) -> str:
    """The one line of an error that says why, without paths of this machine."""
    short = re.search(r"Ran out of memory in memory space \w+\. Used [^.]+\.\w+ of [^.]+\.\w+ \w+\.", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b|E\d{4}:", line)]
    line = short[0] if short else telling[-1] if telling else lines[0]
    return re.sub(r"(/[\w.\-<>]+){2,}", "...", line)[:300]
