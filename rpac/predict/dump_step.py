"""Child process: lowers one step, and compiles it for its schedules unless the store has them already.

python -m rpac.predict.dump_step TASK.json FACTS.json STORE LOWERED

FACTS.json is written first: what the step takes, and the key of its schedules in the store. LOWERED is the hash of what a
bundle's step was lowered to, or empty: another step is refused before it is compiled.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rpac.batch import Limits
from rpac.devices.toolchain import prepare, toolchain
from rpac.errors import RpacError
from rpac.files.store import Store
from rpac.lower.task import Task
from rpac.predict.dump_task import DUMP_FLAGS
from rpac.step.task import StepTask


def to_json(task: StepTask) -> str:
    """For another process."""
    programs = {layer: one.to_json() for layer, one in task.programs.items()}
    of_step = {"function": task.function, "folder": task.folder, "file": task.file, "limits": asdict(task.limits)}
    return json.dumps({**of_step, "programs": programs})


def from_json(text: str) -> StepTask:
    """The inverse of `to_json`."""
    data = json.loads(text)
    programs = {layer: Task.from_json(one) for layer, one in data["programs"].items()}
    limits = Limits(**{**data["limits"], "token_buckets": tuple(data["limits"]["token_buckets"])})
    return StepTask(data["function"], data["folder"], data["file"], limits, programs)


def key_of(target: str, lowered: str, tools: dict[str, str]) -> str:
    """The key of a step's schedules: the text that it is lowered to decides them, and the compiler."""
    what = {"result": "step schedules", "format": 1, "target": target, "lowered": lowered, "toolchain": tools}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def main(task_path: str, facts_path: str, store: str, built: str = "") -> None:
    """Exits with 1 and the reason where the step cannot be lowered or compiled."""
    flags = os.environ[DUMP_FLAGS]
    prepare()  # else the user's own settings would schedule something that no build ships
    os.environ[DUMP_FLAGS] = flags
    from rpac.step.worker import compile_step, step_of  # imports JAX, which reads the environment

    task = from_json(Path(task_path).read_text())
    print(f"libtpu {toolchain()['libtpu']}", flush=True)
    try:
        step = step_of(task)
        if step is None:
            sys.exit(f"{task.label}: the model wants no such step; its {task.function}_arrays returns None")
        lowered = hashlib.sha256(step.lower().as_text().encode()).hexdigest()
        if built not in ("", lowered):
            sys.exit(
                f"{task.label}: {task.function} is not the function that the bundle was built with: it is lowered to "
                f"{lowered[:12]}, and the bundle's step to {built[:12]}; run rpac in the folder of that function, or build the "
                "bundle again"
            )
        key = key_of(task.target, lowered, toolchain())
        Path(facts_path).write_text(json.dumps({**_facts(step), "key": key}))
        if not store or Store(Path(store)).read(key) is None:
            compile_step(step)
    except RpacError as error:
        sys.exit(str(error))


def _facts(step: Any) -> dict[str, Any]:
    mesh = step.task.mesh
    return {
        "arguments": [[one.name, list(one.part(mesh)), one.dtype] for one in step.arguments],
        "parameters": len(step.described.params_arrays),
        "cache_layers": list(step.described.cache_layers),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
