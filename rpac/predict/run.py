"""Predicts batches on programs, and writes down what a prediction rests on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rpac.batch import Batch
from rpac.batch.select import select
from rpac.contract.arrays import BITS, ArrayDims, index_of
from rpac.contract.attention import Attention
from rpac.contract.program import Source, Variant
from rpac.errors import OutputError
from rpac.files.publish import listing, publish
from rpac.predict.programs import Programs
from rpac.schedule import CallReport, Work, attention_work
from rpac.schedule.memory import Words, words_of
from rpac.traffic.trace import Workload

OPERANDS = "operands.json"


@dataclass(frozen=True)
class Prediction:
    """One batch on the program that it selects. `source`: the kernel's. `schedules`: sha256 of each kernel's schedule by name."""

    name: str
    workload: Workload
    variant: Variant
    report: CallReport
    source: Source | None = None
    schedules: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report's fields at the top, so that `seconds`, `mbu` and the rest are where one looks."""
        batch = {
            "label": self.workload.label,
            "q_lens": list(self.workload.q_lens),
            "kv_lens": list(self.workload.kv_lens),
        }
        source = None if self.source is None else {"path": self.source.path, "sha256": self.source.sha256}
        of_kernels = {"source": source, "schedules": dict(self.schedules)}
        return {"name": self.name, "program": str(self.variant), "batch": batch, **of_kernels, **self.report.to_json()}


def predict(programs: Programs, workload: Workload) -> Prediction:
    """Raises BatchError or SelectionError for a batch that the programs do not take, ScheduleError from the walk."""
    batch, variant = _selected(programs, workload)
    return predict_on(programs, variant, batch, workload)


def predict_on(programs: Programs, variant: Variant, batch: Batch, workload: Workload) -> Prediction:
    """The prediction for a program that need not be the one that the batch selects. `batch` is the metadata of `workload`.

    Raises ScheduleError from the walk.
    """
    call = programs.call(variant)
    report = call.predict(_scalars(programs, variant, batch), needed_work(programs.model, workload))
    schedules = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in call.dump.schedules.items()}
    return Prediction(programs.name, workload, variant, report, programs.tasks[variant].source, schedules)


def needed_work(model: Attention, workload: Workload) -> Work:
    """The bytes and flops that a batch needs, whatever computes it."""
    return attention_work(
        workload.kv_lens,
        workload.q_lens,
        model.q_heads,
        model.kv_heads,
        model.head_dim,
        BITS[model.q_dtype] // 8,
        BITS[model.kv_dtype] // 8,
        model.sliding_window,
        model.causal,
        model.rope_dim,
        model.attention_chunk,
        model.update_cache,
    )


def check_emit(folder: Path) -> None:
    """Raises OutputError where `emit` would not replace what is at `folder`, before anything is compiled for it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise OutputError(f"--emit {folder}: found a file; must be a folder; name another one")
    others = _others(folder)
    if others:
        found = listing(others)
        raise OutputError(
            f"--emit {folder}: found other files there: {found}; must be a folder that is absent, empty, or holds what an "
            f"earlier --emit wrote and nothing else, because it is replaced; write --emit {folder / 'schedules'}"
        )


def emit(programs: Programs, workload: Workload, folder: Path) -> list[str]:
    """Writes each kernel's schedule as the compiler left it, and its scalar operands; returns the files' names.

    `operands.json`: {"NAME.txt": {"0": [int32, ...], ...}}. Raises OutputError, and then nothing is there; otherwise as
    `predict`.
    """
    batch, variant = _selected(programs, workload)
    call = programs.call(variant)
    operands = call.operands(_scalars(programs, variant, batch))
    with publish(folder, lambda path: not _others(path)) as stage:
        for name in operands:
            stage.write(f"{name}.txt", call.dump.schedules[name].encode())
        values = {f"{name}.txt": {str(index): list(row) for index, row in of.items()} for name, of in operands.items()}
        stage.write(OPERANDS, json.dumps(values, sort_keys=True).encode())
    return [*(f"{name}.txt" for name in operands), OPERANDS]


def scalars_of(batch: Batch, args: Sequence[ArrayDims]) -> dict[int, Words]:
    """A batch's metadata by parameter number of a program with arguments `args`.

    Where the batch has more pages than the program's cache, sequences share some: that changes no time, and page ids that the
    cache does not have would.
    """
    pages = args[index_of(args, "kv_cache")].shape[0]
    arrays = {
        "kv_lens": batch.kv_lens,
        "page_indices": batch.page_indices % pages,
        "cu_q_lens": batch.cu_q_lens,
        "distribution": batch.distribution,
    }
    return {index_of(args, name): words_of(array) for name, array in arrays.items()}


def _others(folder: Path) -> list[str]:
    """The names in a folder that are not those of an earlier output; all of them where there was none."""
    names = {path.name for path in folder.iterdir()}
    try:
        written = {OPERANDS, *json.loads((folder / OPERANDS).read_bytes())}
    except (OSError, ValueError, RecursionError, TypeError):
        return sorted(names)
    return sorted(names - written)


def _selected(programs: Programs, workload: Workload) -> tuple[Batch, Variant]:
    batch = workload.batch(programs.limits)
    return batch, select(programs.tasks, programs.limits, batch.tokens, batch.distribution)


def _scalars(programs: Programs, variant: Variant, batch: Batch) -> dict[int, Words]:
    """What a program is given of a batch, by parameter number."""
    scalars = scalars_of(batch, programs.tasks[variant].args)
    names = [dims.name for dims in programs.tasks[variant].args]
    if "tree" in names:
        # Of drafts in a row, as the needed flops are counted too: what a tree says does not change what a kernel does.
        chain = [(2 << token) - 1 for token in range(batch.limits.decode_len)]
        scalars[names.index("tree")] = chain * batch.limits.max_num_seqs
    return scalars
