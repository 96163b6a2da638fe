"""What goes into lowering a step. No JAX here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rpac.batch import Limits
from rpac.contract.mesh import Mesh
from rpac.lower import Task
from rpac.spec import Spec


@dataclass(frozen=True)
class StepTask:
    """One step to lower: the user's `function`, as `package.module:name`, around the program of each kind of layer.

    `folder` is where its module is looked for first. `file` is the spec's.
    """

    function: str
    folder: str
    file: str
    limits: Limits
    programs: Mapping[str, Task]

    @property
    def first(self) -> Task:
        return next(iter(self.programs.values()))

    @property
    def target(self) -> str:
        return self.first.target

    @property
    def kind(self) -> str:
        return self.first.kind

    @property
    def tokens(self) -> int:
        return self.first.tokens

    @property
    def mesh(self) -> Mesh:
        return self.first.mesh

    @property
    def label(self) -> str:
        return f"{self.target} step {self.kind} t{self.tokens}"


def steps_of(spec: Spec, tasks: Sequence[Task], function: str, folder: str) -> list[StepTask]:
    """A step for every target, kind and token bucket of a spec's programs, in their order."""
    found: dict[tuple[str, str, int], dict[str, Task]] = {}
    for task in tasks:
        found.setdefault((task.target, task.kind, task.tokens), {})[task.layer] = task
    limits = Limits.of(spec)
    order = [part.layer for part in spec.parts]
    return [
        StepTask(function, folder, spec.file, limits, {layer: programs[layer] for layer in order})
        for programs in found.values()
    ]
