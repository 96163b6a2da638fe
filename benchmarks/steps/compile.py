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
from rpac.step.checks import check_compiled, check_traced
from rpac.step.worker import exported, memory_of, step_of


def main(spec_file: str, function: str, target: str, kind: str, tokens: str, num_pages: str = "") -> None:
    spec = load_spec(spec_file)
    if num_pages:
        spec = replace(spec, serving=replace(spec.serving, num_pages=int(num_pages)))
    tasks = [one for one in all_tasks(spec, [target]) if (one.kind, one.tokens) == (kind, int(tokens))]
    [task] = steps_of(spec, tasks, f"models:{function}", str(Path(__file__).parent))
    step = step_of(task)
    assert step is not None
    start = time.perf_counter()
    check_traced(step)
    lowered = step.lower()
    seconds = [time.perf_counter() - start]
    start = time.perf_counter()
    with step.context():
        compiled = lowered.compile()
    seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    memory = memory_of(compiled)
    check_compiled(step, compiled, memory)
    seconds.append(time.perf_counter() - start)
    executable = compiled.runtime_executable().serialize()
    sizes = [size(n) for n in (len(executable), len(exported(step)), memory["temp_bytes"], memory["argument_bytes"])]
    devices = task.mesh.devices
    times = [f"{one:.1f}" for one in seconds]
    print(
        "|", " | ".join([f"{spec.name}, {function}", f"{target} x {devices}", f"{kind}/{tokens}", *times, *sizes]), "|"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
