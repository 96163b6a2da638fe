"""What a command prints in a terminal, and that pipes and files get plain text."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
from command import RPAC, TINY, environment, rpac

from rpac.errors import SpecError

ESCAPE = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")


def in_terminal(*args: object, cache: Path, columns: int = 80, **env: str) -> tuple[int, str]:
    """The exit code of a command whose output goes to a terminal, and all that it prints there."""
    reader, writer = pty.openpty()
    variables = environment(cache, {"COLUMNS": str(columns), "TERM": "xterm-256color", **env})
    process = subprocess.Popen(
        [*RPAC, *map(str, args)], stdin=writer, stdout=writer, stderr=writer, env=variables, close_fds=True
    )
    os.close(writer)
    output = b""
    while True:
        try:
            part = os.read(reader, 1 << 16)
        except OSError:  # Linux says so where the other end is closed
            break
        if not part:
            break
        output += part
    os.close(reader)
    return process.wait(), output.decode()


@pytest.mark.parametrize("columns", [60, 100])
def test_a_table_fits_the_terminal_and_loses_nothing(columns: int, tmp_path: Path) -> None:
    code, text = in_terminal("specs", cache=tmp_path, columns=columns)
    assert code == 0
    assert "\x1b[1m" in text  # the header is bold
    lines = ESCAPE.sub("", text).splitlines()
    assert max(map(len, lines)) <= columns
    plain = rpac("specs", cache=tmp_path).stdout
    for text_of in (plain, "".join(lines)):
        assert "tiny" in text_of
    letters = ("".join(sorted(re.sub(r"[\s─-]", "", one))) for one in (plain, "".join(lines)))
    assert len(set(letters)) == 1


def test_no_color_is_kept(tmp_path: Path) -> None:
    _, text = in_terminal("specs", cache=tmp_path, NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*3\d", text)


def test_a_build_shows_a_bar_and_gives_the_cursor_back(tmp_path: Path) -> None:
    code, text = in_terminal("build", TINY, "--target", "cpu", "-o", tmp_path / "out", cache=tmp_path / "cache")
    assert code == 0
    assert "5/5" in ESCAPE.sub("", text)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0
    assert re.search(r"cpu decode t8: \w+", ESCAPE.sub("", text))


def test_a_build_that_fails_gives_the_cursor_back(tmp_path: Path) -> None:
    code, text = in_terminal("build", tmp_path / "none.yaml", cache=tmp_path)
    assert code == SpecError.exit_code
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")


def test_a_pipe_gets_plain_text(tmp_path: Path) -> None:
    done = rpac("specs", cache=tmp_path, env={"TERM": "xterm-256color", "COLUMNS": "40"})
    assert "\x1b" not in done.stdout + done.stderr
