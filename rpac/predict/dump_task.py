"""Child process: lowers one task as a build does, so that the compiler leaves the schedule of what is shipped.

python -m rpac.predict.dump_task TASK.json
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rpac.devices.toolchain import prepare, toolchain
from rpac.errors import RpacError
from rpac.lower.task import Task

DUMP_FLAGS = "LIBTPU_INIT_ARGS"


def main(path: str) -> None:
    """Compiles the task in `path`; the compiler's dump is the result. Exits with 1 and the reason where it cannot."""
    flags = os.environ[DUMP_FLAGS]
    prepare()  # else the user's own settings would schedule something that no build ships
    os.environ[DUMP_FLAGS] = flags
    from rpac.lower.worker import compile_only  # imports JAX, which reads the environment

    task = Task.from_json(Path(path).read_text())
    print(f"libtpu {toolchain()['libtpu']}", flush=True)
    try:
        compile_only(task)
    except RpacError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
