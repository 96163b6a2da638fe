"""Child process: lowers one task as a build does, so that the compiler leaves the schedule of what is shipped.

python -m rpac.predict.dump_task TASK.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from rpac.lower.lowered import Task
from rpac.toolchain import toolchain


def main(path: str) -> None:
    """Compiles the task in `path`; the compiler's dump is the result."""
    from rpac.lower.worker import compile_only

    task = Task.from_json(Path(path).read_text())
    print(f"libtpu {toolchain()['libtpu']}", flush=True)
    compile_only(task)


if __name__ == "__main__":
    main(*sys.argv[1:])
