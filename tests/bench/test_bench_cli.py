"""`rpac bench` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import rpac

from rpac.bench.result import read


def test_json_is_all_that_stdout_holds_and_the_file_is_the_same(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    arguments = ("bench", small, "--calls", 4, "--kind", "decode", "--seed", 5, "-o", out)
    done = rpac(*arguments, "--json", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert done.stdout == out.read_text()
    found = read(out)
    assert found.complete
    (one,) = found.entries
    assert (one.program, one.label, one.seed) == ("decode/8", "decode 4x32", 5)
    assert one.timing.spread.count * one.timing.calls_each == 4
    assert one.check is not None
    assert found.stream_bandwidth > 1e8
    assert json.loads(done.stdout)["entries"][0]["timing"]["spread"]["count"] == one.timing.spread.count
    assert [line.split("s  ")[1].split(": ")[0] for line in done.stderr.splitlines()] == [
        "making 1 programs ready on cpu:0", "decode/8, decode 4x32", "decode/8, decode 4x32"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Missing argument 'BUNDLE'"),
        (("none.rpac",), 4, "none.rpac"),
        (("none.rpac", "--decode", "4"), 2, "--decode: found '4'; must be SEQUENCESxCONTEXT"),
        (("none.rpac", "--calls", "0"), 2, "Invalid value for '--calls'"),
        (("none.rpac", "-o", "notes.txt"), 5, "notes.txt: found a file that this command did not make"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = rpac("bench", *arguments, cache=tmp_path / "cache", cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
