"""What a bench found, as the file that it leaves: `bench.json`, which docs/bench.md describes field by field."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from rpac.bench.batches import Case
from rpac.bench.time import Spread
from rpac.contract.kind import Kind
from rpac.contract.program import Variant
from rpac.errors import BatchError
from rpac.files.publish import publish_file, refuse_foreign_file
from rpac.predict import Workload

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = "rpac bench"
SCHEMA = 1
Method = Literal["profiler", "fences"]


@dataclass(frozen=True)
class Timing:
    """Seconds of a call, once for each time taken; each is the mean of `calls_each` calls in a row.

    `method`: of the device, by the profiler, or of the host between two fences, and then `why` there was no device time.
    `operations`: mean seconds of each operation in a call, where the profiler says them.
    """

    method: Method
    seconds: tuple[float, ...]
    calls_each: int = 1
    why: str = ""
    operations: Mapping[str, float] = field(default_factory=dict)

    @property
    def spread(self) -> Spread:
        return Spread.of(self.seconds)


@dataclass(frozen=True)
class Predicted:
    """What `rpac predict` says of the same batch on the same program, in seconds: the whole call, its kernels together, and each
    of these by its name; and the constants that it rests on.
    """

    seconds: float
    kernel_seconds: float
    kernels: Mapping[str, float]
    compiler: str
    model: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """One program on one batch. `check` is None where it was skipped; `predicted` is None where `not_predicted` says why."""

    layer: str
    kind: str
    tokens: int
    label: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    seed: int
    tier: str
    needed_bytes: int
    needed_flops: int
    check: Mapping[str, Any] | None
    timing: Timing
    predicted: Predicted | None = None
    not_predicted: str = ""

    @property
    def case(self) -> Case:
        """The program and the batch, for `batches.batch_of`."""
        workload = Workload(self.label, self.q_lens, self.kv_lens)
        return Case(self.layer, Variant(cast(Kind, self.kind), self.tokens), workload)

    @property
    def program(self) -> str:
        return f"{self.layer} {self.case.variant}".strip()


@dataclass(frozen=True)
class Bench:
    """A run. `bundle`: its name, digest, spec hash, target and the toolchain that built it. `machine`: see machine.py.

    `started`: UTC, ISO 8601. `cases` is how many entries the run was to have, and `complete` whether it has them all.
    `stream_bandwidth`: bytes per second that the device reached, as `stream.stream_bandwidth` measures it.
    """

    rpac: str
    started: str
    bundle: Mapping[str, Any]
    machine: Mapping[str, Any]
    stream_bandwidth: float
    cases: int
    complete: bool
    entries: tuple[Entry, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the spread of each timing beside its times."""
        return {"format": FORMAT, "schema": SCHEMA, **asdict(self), "entries": [_entry(one) for one in self.entries]}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1, sort_keys=True, allow_nan=False) + "\n"


def write(bench: Bench, path: str | os.PathLike[str]) -> None:
    """Publishes the file whole. Raises OutputError, and then what was there is as it was."""
    publish_file(path, bench.to_json().encode(), is_bench)


def check_output(path: Path) -> None:
    """Raises OutputError where `write` would not replace what is there, before anything is timed for it."""
    refuse_foreign_file(path, is_bench)


def is_bench(path: Path) -> bool:
    """Whether a file is one that a bench wrote, of any schema."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


def read(path: str | os.PathLike[str]) -> Bench:
    """The bench in a file. Raises BatchError where it is none, or of another schema."""
    try:
        data = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BatchError(f"{os.fspath(path)}: cannot be read ({error}); give a file that `rpac bench` wrote") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BatchError(f'{os.fspath(path)}: found no "format": "{FORMAT}"; give a file that `rpac bench` wrote')
    if data.get("schema") != SCHEMA:
        raise BatchError(
            f"{os.fspath(path)}: found schema {data.get('schema')!r}; must be {SCHEMA}; read it with the rpac that wrote it "
            f"({data.get('rpac')}), or time the bundle again"
        )
    try:
        return Bench(**{**_fields(Bench, data), "entries": tuple(map(_read_entry, data["entries"]))})
    except (KeyError, TypeError, AttributeError) as error:
        raise BatchError(
            f"{os.fspath(path)}: its fields are not those of schema {SCHEMA} ({type(error).__name__}: {error}); give the file "
            "as `rpac bench` wrote it"
        ) from error


def _entry(one: Entry) -> dict[str, Any]:
    data = asdict(one)
    data["timing"]["spread"] = asdict(one.timing.spread)
    return data


def _read_entry(data: Mapping[str, Any]) -> Entry:
    timing = _fields(Timing, data["timing"])
    lists = {name: tuple(data[name]) for name in ("q_lens", "kv_lens")}
    predicted = data["predicted"]
    return Entry(
        **{
            **_fields(Entry, data),
            **lists,
            "timing": Timing(**{**timing, "seconds": tuple(timing["seconds"])}),
            "predicted": None if predicted is None else Predicted(**_fields(Predicted, predicted)),
        }
    )


def _fields(of: type[DataclassInstance], data: Mapping[str, Any]) -> dict[str, Any]:
    """What `data` has for the fields of a dataclass; what a later version added is left out."""
    return {one.name: data[one.name] for one in fields(of)}
