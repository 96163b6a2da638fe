"""`bench.json`: its format, and what is said of files that are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rpac.bench.result import Bench, Entry, Predicted, Timing, check_output, read, write
from rpac.errors import BatchError, OutputError

GOLDEN = Path(__file__).parent / "golden.json"

BENCH = Bench(
    rpac="0.1.0",
    started="2026-01-02T03:04:05+00:00",
    bundle={"name": "tiny", "digest": "d1", "spec_hash": "5e", "target": "tpu7x", "toolchain": {"jax": "0.10.2"}},
    machine={"device_kind": "TPU7x", "platform": "tpu", "clocks_mhz": {}, "host_cores": 208},
    stream_bandwidth=3.1e12,
    cases=3,
    complete=False,
    entries=(
        Entry(
            layer="", kind="decode", tokens=8, label="decode 2x40", q_lens=(1, 1), kv_lens=(40, 40), seed=7,
            tier="executable", needed_bytes=88064, needed_flops=81920,
            check={"error": 0.002, "tolerance": 0.0078125, "rows": (0, 1)},
            timing=Timing("profiler", (5e-06, 7e-06, 6e-06), operations={"rpa_decode.1": 5.5e-06}),
            predicted=Predicted(4.5e-06, 4.25e-06, {"rpa_decode.1": 4.25e-06}, "0.0.42.1", {"clock_hz": 1.77e9}),
        ),
        Entry(
            layer="local", kind="mixed", tokens=32, label="mixed 1x6/40", q_lens=(6,), kv_lens=(40,), seed=7,
            tier="portable", needed_bytes=100, needed_flops=200, check=None,
            timing=Timing("fences", (2e-05,), 4, "the profile has no device with a line of XLA Modules"),
            not_predicted="the target cpu has no schedule to predict from",
        ),
    ),
)  # fmt: skip


def test_the_format_is_as_it_was() -> None:
    """Whoever reads files of this schema reads this one. New fields may come; a change to one of these is another schema."""
    assert BENCH.to_json() == GOLDEN.read_text()


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(BENCH, tmp_path / "bench.json")
    found = read(tmp_path / "bench.json")
    assert found.to_json() == BENCH.to_json()
    assert found.entries[0].timing == BENCH.entries[0].timing
    assert found.entries[0].predicted == BENCH.entries[0].predicted


def test_fields_that_a_later_version_added_are_passed_over(tmp_path: Path) -> None:
    data = {**BENCH.as_dict(), "weather": "fine"}
    data["entries"][0]["timing"]["mood"] = data["entries"][0]["color"] = "blue"
    (tmp_path / "bench.json").write_text(json.dumps(data))
    assert read(tmp_path / "bench.json").to_json() == BENCH.to_json()


def test_a_file_is_replaced_by_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    write(BENCH, path)
    check_output(path)
    write(replace(BENCH, complete=True), path)
    assert read(path).complete
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["my notes", "[1]", '{"format": "other"}'])
def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    for work in (lambda: check_output(path), lambda: write(BENCH, path)):
        with pytest.raises(
            OutputError, match="found a file that this command did not make; must be absent or an earlier"
        ):
            work()
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, r"found schema 2; must be 1; read it with the rpac that wrote it \(0\.1\.0\)"),
        ({"format": "other"}, 'found no "format": "rpac bench"'),
        ({"entries": [{}]}, r"its fields are not those of schema 1 \(KeyError: 'timing'\)"),
        ({"machine": None, "entries": None}, "its fields are not those of schema 1"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({**BENCH.as_dict(), **change}))
    with pytest.raises(BatchError, match=message):
        read(path)


@pytest.mark.parametrize("text", [None, "", "{", "[" * 100000])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "bench.json").write_text(text)
    with pytest.raises(BatchError, match=r"bench\.json: cannot be read \(.*\); give a file that `rpac bench` wrote"):
        read(tmp_path / "bench.json")
