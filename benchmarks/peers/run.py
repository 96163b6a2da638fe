"""Runs batches on compiled calls, ours and the peers', through what is kept of earlier runs."""

from __future__ import annotations

import json
import re
import sys
from functools import cache, lru_cache
from pathlib import Path

from peers import environment
from peers.cases import (
    DECODE_TOKENS,
    HEAD_DIM,
    KV_HEADS,
    MAX_MODEL_LEN,
    MAX_SEQS,
    PREFILL_CHUNK,
    PREFILL_TOKENS,
    Q_HEADS,
    Case,
)
from peers.contenders import Compile, Contender, Ours
from peers.store import HERE, TOOK_TOO_LONG, Result, Store, digest, walker_digest
from rpac.batch import Batch, Limits
from rpac.batch.select import select
from rpac.devices.toolchain import toolchain
from rpac.errors import PlanError, ScheduleError
from rpac.files.store import Store as ProgramStore
from rpac.files.store import default_cache_dir
from rpac.predict import Programs, predict, programs_of
from rpac.schedule import Call, Work, attention_work
from rpac.spec import load_spec

BFLOAT16_BYTES = 2
KEPT_CALLS = 8  # read schedules in memory: as many as a sweep has choices
EXPECTED_LENS: tuple[int, ...] = (1024, 4096)
NOT_RUN = "not run yet"


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def work_of(case: Case) -> Work:
    """What the attention of a batch needs, whoever computes it."""
    lens = case.workload.kv_lens, case.workload.q_lens
    return attention_work(*lens, Q_HEADS, KV_HEADS, HEAD_DIM, BFLOAT16_BYTES, BFLOAT16_BYTES)


def spec_of(folder: Path, page_size: int, prefill_chunk: int = PREFILL_CHUNK, kv_layout: str = "interleaved") -> Path:
    """A spec for the cases, written under `folder`."""
    text = (HERE / "spec.yaml.in").read_text()
    fields = {
        "q_heads": Q_HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "page_size": page_size,
        "max_model_len": MAX_MODEL_LEN,
        "prefill_tokens": PREFILL_TOKENS,
        "decode_tokens": DECODE_TOKENS,
        "max_seqs": MAX_SEQS,
        "prefill_chunk": prefill_chunk,
        "context_lens": list(EXPECTED_LENS),
        "kv_layout": kv_layout,
    }
    path = folder / "specs" / f"page{page_size}-chunk{prefill_chunk}-{kv_layout}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format(**fields))
    return path


def limits_of(folder: Path, page_size: int) -> Limits:
    """What every call here is compiled for."""
    return Limits.of(load_spec(spec_of(folder, page_size)))


class Bench:
    """Answers from `results` and `folder` where it can; compiles and walks where it may."""

    def __init__(self, results: Path, folder: Path, pythons: dict[str, str]) -> None:
        self.folder = folder
        self.store = Store(results, folder)
        self._pythons = dict(pythons)
        self._walker = walker_digest()
        self._call = lru_cache(maxsize=KEPT_CALLS)(self._make_call)
        self._programs = cache(self._make_programs)

    def peer(self, contender: Contender, target: str, page_size: int, case: Case, may_run: bool) -> Result:
        """The best of a peer's choices for a batch; a refusal where none of them ran."""
        compiles = contender.compiles(target, page_size, case)
        if isinstance(compiles, str):
            return Result("", error=compiles)
        batch = case.workload.batch(limits_of(self.folder, page_size))
        results = [self._of_compile(contender, one, batch, case, may_run) for one in compiles]
        ran = [result for result in results if not result.error]
        if ran:
            return min(ran, key=lambda result: result.seconds)
        return next((result for result in results if result.error == NOT_RUN), results[0])

    def _of_compile(self, contender: Contender, one: Compile, batch: Batch, case: Case, may_run: bool) -> Result:
        script = "".join((HERE / name).read_text() for name in ("abstract_tpu.py", one.script))
        request = json.dumps(one.request, sort_keys=True)
        compiled = digest(script, request, self._packages(one.environment))
        parameters = contender.parameters(batch, case)
        key = digest(compiled, sorted(parameters.items()), self._walker, one.choice)
        kept = self.store.result(key)
        if kept is not None or not may_run:
            return kept or Result(one.choice, error=NOT_RUN)
        target = one.request["target"]
        progress(f"{contender.name} {target} page {one.request['page_size']}, {case.label}, {one.choice}")
        try:
            call = self._call(compiled, one.environment, one.script, request, target)
            report = call.predict(parameters, work_of(case))
            result = Result(one.choice, report.seconds, report.kernel_seconds, report.mbu or 0.0, report.mfu or 0.0)
        except ScheduleError as error:
            result = Result(one.choice, error=reason(str(error)))
            if TOOK_TOO_LONG in str(error):
                return result
        self.store.keep_result(key, result)
        return result

    def _make_call(
        self, compiled: str, environment_name: environment.Environment, script: str, request: str, target: str
    ) -> Call:
        command = [self._python(environment_name), str(HERE / script), request]
        return Call(self.store.dump(compiled, command, target), any_compiler=True)

    def ours(self, variety: Ours, target: str, page_size: int, case: Case, may_run: bool) -> Result:
        """Ours, from a spec for all batches, or from one whose chunk is this batch's."""
        chunk = case.longest_chunk if variety.fitted and case.kind == "prefill" else PREFILL_CHUNK
        try:
            programs = self._programs(page_size, chunk, variety.kv_layout, target)
        except PlanError as error:
            return Result("", error=reason(str(error)))
        batch = case.workload.batch(programs.limits)
        variant = select(programs.tasks, programs.limits, batch.tokens, batch.distribution)
        task = programs.tasks[variant]
        key = digest(task.key(toolchain(), "dump"), case.workload.q_lens, case.workload.kv_lens, self._walker)
        kept = self.store.result(key)
        if kept is not None or not may_run:
            return kept or Result(str(variant), error=NOT_RUN)
        progress(f"{variety.name} {target} page {page_size}, {case.label}, {variant}")
        try:
            report = predict(programs, case.workload).report
            result = Result(str(variant), report.seconds, report.kernel_seconds, report.mbu or 0.0, report.mfu or 0.0)
        except ScheduleError as error:
            result = Result(str(variant), error=reason(str(error)))
        self.store.keep_result(key, result)
        return result

    def _make_programs(self, page_size: int, chunk: int, kv_layout: str, target: str) -> Programs:
        path = spec_of(self.folder, page_size, chunk, kv_layout)
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
