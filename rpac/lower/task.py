"""What goes into a lowering and what comes out. No JAX here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rpac.contract.arrays import ArrayDims, arg_specs, result_specs
from rpac.contract.mesh import ONE_DEVICE, Mesh
from rpac.contract.program import Source
from rpac.devices.chip import is_tpu
from rpac.plan import KernelPlan
from rpac.spec import Spec

FORMAT = 1  # of the cache's entries and of what this package puts in an artifact


@dataclass(frozen=True)
class Task:
    """One variant to lower: a source at one token bucket. `args` are one device's of `mesh`."""

    target: str
    kind: str
    tokens: int
    source: Source
    plan: Mapping[str, Any]
    args: tuple[ArrayDims, ...]
    mesh: Mesh = ONE_DEVICE
    layer: str = ""
    results: tuple[ArrayDims, ...] = ()  # a mesh of several devices needs their names

    @property
    def label(self) -> str:
        return f"{self.target} {self.layer and self.layer + ' '}{self.kind} t{self.tokens}"

    def key(self, toolchain: Mapping[str, str], result: str = "lowered") -> str:
        """sha256 over everything that decides a result of this task, 64 hex digits."""
        what = {
            "format": FORMAT,
            "result": result,
            "target": self.target,
            "kind": self.kind,
            "tokens": self.tokens,
            "source": self.source.text,
            "path": self.source.path,
            "plan": self.plan,
            "args": self.args,
            "toolchain": dict(toolchain),
            "mesh": self.mesh.as_dict(),
            "layer": self.layer,
            "results": self.results,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """For another process."""
        return json.dumps({**asdict(self), "source": [self.source.path, self.source.text]})

    @classmethod
    def from_json(cls, text: str) -> Task:
        """The inverse of `to_json`."""
        data = json.loads(text)
        args, results = (
            tuple(ArrayDims(name, tuple(shape), dtype) for name, shape, dtype in data[part])
            for part in ("args", "results")
        )
        source, mesh = Source(*data["source"]), Mesh(**data["mesh"])
        return cls(**{**data, "source": source, "args": args, "mesh": mesh, "results": results})


def tasks_of(spec: Spec, plans: Sequence[tuple[KernelPlan, Source]]) -> list[Task]:
    """A task for every token bucket of every plan, the longest to compile first, so that no worker ends alone."""
    tasks = [
        Task(
            plan.target,
            plan.kind,
            tokens,
            source,
            plan.as_dict(),
            arg_specs(spec, tokens),
            spec.mesh,
            spec.layer,
            result_specs(spec, tokens),
        )
        for plan, source in plans
        for tokens in plan.tokens
    ]
    return sorted(tasks, key=lambda task: (not is_tpu(task.target), -len(task.source.text), -task.tokens))
