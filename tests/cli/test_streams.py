"""Where the command line's output goes nowhere, or it is interrupted: a line that says so, a code of its own, no traceback."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from command import RPAC, TINY, environment, rpac

COMMANDS = [("support",), ("-h",), ("plan", "-h"), ("--version",), ("plan", TINY, "--target", "cpu")]


@pytest.mark.parametrize("args", COMMANDS, ids=str)
def test_stdout_on_a_full_device(args: tuple[object, ...], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*RPAC, *map(str, args)], stdout=full, stderr=subprocess.PIPE, text=True, env=environment(tmp_path)
        )
    assert done.returncode == 5
    assert done.stderr == "rpac: OutputError: stdout: cannot be written (No space left on device); free some space\n"


@pytest.mark.parametrize("args", COMMANDS, ids=str)
def test_a_reader_that_went_away(args: tuple[object, ...], tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*RPAC, *map(str, args)], stdout=write, stderr=subprocess.PIPE, text=True, env=environment(tmp_path)
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_errors_that_nobody_reads(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*RPAC, "plan", str(tmp_path / "none.yaml")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=write, text=True, env=environment(tmp_path))
    os.close(write)
    assert (done.returncode, done.stdout) == (141, "")


def test_a_command_that_both_streams_fail(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*RPAC, "support"], stdout=full, stderr=full, env=environment(tmp_path))
    assert done.returncode == 5


def test_usage_errors_are_as_they_were(tmp_path: Path) -> None:
    done = rpac("plan", "--no-such-option", cache=tmp_path)
    assert done.returncode == 2
    assert "No such option" in done.stderr
    assert "Traceback" not in done.stderr
