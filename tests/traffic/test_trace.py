"""A trace is read whole or refused by the line that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpac.errors import BatchError
from rpac.traffic.trace import Workload, read_trace


def test_a_trace_is_a_batch_a_line(tmp_path: Path) -> None:
    path = tmp_path / "day.jsonl"
    path.write_text('{"q_lens": [1, 5], "kv_lens": [40, 5]}\n\n{"kv_lens": [7], "q_lens": [7], "time": 3.5}\n')
    first, second = read_trace(path)
    assert first == Workload("day.jsonl:1", (1, 5), (40, 5))
    assert second == Workload("day.jsonl:3", (7,), (7,))


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        "[" * 100_000,
        "{}",
        '{"q_lens": [1]}',
        '{"q_lens": 1, "kv_lens": 1}',
        '{"q_lens": [1], "kv_lens": [1, 2]}',
        '{"q_lens": [], "kv_lens": []}',
        '{"q_lens": [2], "kv_lens": [1]}',
        '{"q_lens": [0], "kv_lens": [1]}',
        '{"q_lens": [1.0], "kv_lens": [1]}',
        '{"q_lens": [true], "kv_lens": [1]}',
        '{"q_lens": "1", "kv_lens": "1"}',
    ],
)
def test_a_line_that_is_no_batch_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"q_lens": [1], "kv_lens": [1]}\n' + line + "\n")
    with pytest.raises(BatchError, match=r"bad\.jsonl:2: must be .*as many integers in both.*; found"):
        read_trace(path)


@pytest.mark.parametrize(("content", "message"), [(b"\n \n", "holds no batch"), (b"\xff", "cannot be read")])
def test_a_file_without_batches_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(BatchError, match=message):
        read_trace(path)
    with pytest.raises(BatchError, match="cannot be read"):
        read_trace(tmp_path / "absent.jsonl")
