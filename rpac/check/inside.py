"""What `rpac.check.isolated` runs in a process of its own: reads one request from stdin, and writes its report line by line."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from rpac.check.isolated import DONE, STARTED
from rpac.check.process import ProcessLimits, confine


def main() -> None:
    request = json.loads(_line())
    confine(ProcessLimits(request["seconds"], request["memory"]))
    report = int(sys.argv[1])

    def say(data: dict[str, Any]) -> None:
        os.write(report, json.dumps(data).encode() + b"\n")

    from rpac.check.deployment import serve_check_verified

    serve_check_verified(
        request["bundle"],
        request["target"],
        seed=request["seed"],
        batches=request["batches"],
        allow_compile=request["allow_compile"],
        expect_digest=request["expect_digest"],
        progress=lambda step: say(asdict(step)),
        starting=lambda name: say({STARTED: name}),
    )
    say({DONE: True})
    os._exit(0)  # no code of the bundle runs after its report, such as at the exit of a runtime


def _line() -> bytes:
    """The first line of stdin, and nothing after it."""
    found = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        found += byte
    return bytes(found)


if __name__ == "__main__":
    main()
