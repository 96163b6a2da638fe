"""The compilers whose schedules this package is known to read rightly.

An instruction that is not known is an error whatever the compiler. But a newer one could also give a known instruction
another meaning, which nobody would see; so a version counts only once walks have been held against something else.
"""

from __future__ import annotations

from typing import Final

from rpac.errors import ScheduleError

VERIFIED: Final = {"0.0.42.1": "0.10.2", "0.0.44": "0.11.0", "0.0.48": "0.11.2", "0.0.50.1": "0.12.0.1"}
"""libtpu -> the jax that pins it. The differential test (a walk against the interpreter's run of the same kernel) passed
with the first and the last on every generation, with 0.0.48 on tpu7x; 0.0.44 is the one of the calibration."""


def is_verified(compiler: str) -> bool:
    return compiler in VERIFIED


def check_compiler(compiler: str) -> None:
    """Raises ScheduleError for a libtpu version that is not in VERIFIED."""
    if not is_verified(compiler):
        raise ScheduleError(
            f"the schedule is of libtpu {compiler}; its reading is verified for {', '.join(VERIFIED)}: install jax[tpu] "
            f"of {', '.join(VERIFIED.values())}, or accept what cannot be vouched for with --any-compiler "
            "(any_compiler=True)"
        )
