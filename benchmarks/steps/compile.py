"""How long a whole step takes to compile here, and what comes out.

python -m benchmarks.steps.compile SPEC FUNCTION TARGET KIND TOKENS [NUM_PAGES], such as
specs/llama3-8b.yaml llama3_8b tpu7x decode 64. Prints a row of the table in docs/steps.md.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from rpac.devices.toolchain import prepare

if __name__ == "__main__":
    prepare()  # before JAX is imported

from rpac.build import all_tasks
from rpac.contract.units import size
from rpac.spec import load_spec
from rpac.step import steps_of
from rpac.step.checks import check_compiled, check_traced, copied_params
from rpac.step.worker import exported, memory_of, step_of


class Clock:
    """Seconds within it: on the wall, and of all this process's threads on CPUs, which other work on the machine changes less."""

    def __enter__(self) -> Clock:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def main(spec_file: str, function: str, target: str, kind: str, tokens: str, num_pages: str = "") -> None:
    spec = load_spec(spec_file)
    if num_pages:
        spec = replace(spec, serving=replace(spec.serving, num_pages=int(num_pages)))
    tasks = [one for one in all_tasks(spec, [target]) if (one.kind, one.tokens) == (kind, int(tokens))]
    [task] = steps_of(spec, tasks, f"models:{function}", str(Path(__file__).parent))
    step = step_of(task)
    assert step is not None
    with Clock() as lowering:
        check_traced(step)
        lowered = step.lower()
    with Clock() as compiling, step.context():
        compiled = lowered.compile()
    with Clock() as checking:
        memory = memory_of(compiled)
        check_compiled(step, compiled, memory)
    executable = compiled.runtime_executable().serialize()
    sizes = [size(n) for n in (len(executable), len(exported(step)), memory["temp_bytes"], memory["argument_bytes"])]
    devices = task.mesh.devices
    times = [f"{one.wall:.1f}" for one in (lowering, compiling, checking)] + [f"{compiling.cpu:.1f}"]
    copied = ", ".join(one.name for one in copied_params(step, compiled)) or "none"
    print(
        "|",
        " | ".join([f"{spec.name}, {function}", f"{target} x {devices}", f"{kind}/{tokens}", *times, *sizes, copied]),
        "|",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
