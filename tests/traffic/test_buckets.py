"""The buckets found are the best there are, and their padding is counted as it is served."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from rpac.batch import Limits
from rpac.cli import main
from rpac.errors import BatchError
from rpac.spec import load_spec
from rpac.traffic.buckets import Traffic, best_buckets, choices, choose, judge
from rpac.traffic.trace import Workload

TINY = Path(__file__).parents[2] / "specs" / "tiny.yaml"  # buckets 8 and 32, a prefill chunk of 16, five targets
SPEC = load_spec(TINY)


def batch(*q_lens: int) -> Workload:
    return Workload("day.jsonl:1", q_lens, tuple(q + 10 for q in q_lens))


def rows_of(buckets: Sequence[int], tokens: Sequence[int]) -> int:
    """As the engine pads: the smallest bucket that holds the batch."""
    limits = Limits(16, 8, 4, 32, 16, tuple(buckets))
    return sum(limits.bucket(size) for size in tokens)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=12), st.integers(0, 20), st.integers(1, 7))
def test_no_set_of_as_many_buckets_pads_less(tokens: list[int], above: int, most: int) -> None:
    largest = max(tokens) + above
    found = best_buckets(np.array(tokens), largest, most)
    assert [len(buckets) for buckets in found] == list(range(1, len(found) + 1))
    for buckets in found:
        assert buckets[-1] == largest
        assert all(bucket % 8 == 0 for bucket in buckets[:-1])
        others = itertools.combinations(range(8, largest, 8), len(buckets) - 1)
        assert rows_of(buckets, tokens) == min(rows_of((*other, largest), tokens) for other in others)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=12))
def test_with_a_bucket_for_every_size_only_parts_of_tiles_are_padding(tokens: list[int]) -> None:
    last = best_buckets(np.array(tokens), 96, 64)[-1]
    assert rows_of(last, tokens) == sum(-(-size // 8) * 8 for size in tokens)
    assert len(last) == len({-(-size // 8) for size in tokens} | {12})


def test_padding_is_counted_for_each_kind() -> None:
    traffic = Traffic.of([batch(1, 1), batch(1, 1, 1, 1), batch(16), batch(1, 5), batch(20)], SPEC)
    found = judge(traffic, SPEC, (8, 32))
    assert found.padding_of == {"decode": 1 - 6 / 16, "prefill": 1 - 16 / 32, "mixed": 1 - 26 / 40}
    assert found.padding == 1 - 48 / 88
    assert judge(Traffic.of([batch(1)], SPEC), SPEC, (8, 32)).padding_of == {
        "decode": 1 - 1 / 8, "prefill": None, "mixed": None
    }  # fmt: skip


def test_programs_are_those_that_a_build_makes() -> None:
    traffic = Traffic.of([batch(1)], SPEC)
    assert judge(traffic, SPEC, (8, 32)).programs == 5 * 5  # no prefill in a bucket of 8, for a chunk has 16
    assert judge(traffic, None, (8, 32)).programs == 2 * 3
    assert judge(traffic, SPEC, (16, 32)).seconds > judge(traffic, SPEC, (32,)).seconds


def test_the_fewest_buckets_that_pad_little_enough_are_chosen() -> None:
    traffic = Traffic.of([batch(1)] * 8 + [batch(16)] * 2, SPEC)
    found = choices(traffic, SPEC, 5)
    assert [one.buckets for one in found] == [(32,), (8, 32), (8, 16, 32)]
    padded = [one.padding for one in found]
    assert padded == sorted(padded, reverse=True)
    assert [choose(found, share) for share in (1.0, padded[1], padded[1] - 0.01, 0.0)] == [*found, None]


@pytest.mark.parametrize(
    ("workload", "spec", "message"),
    [
        (batch(16, 17), SPEC, f"has 33 new tokens; must be at most 32, max_num_tokens of {TINY}; split the batch, or"),
        (batch(10**30), None, "new tokens; must be at most 1048576, max_num_tokens of any spec; split the batch"),
    ],
)
def test_a_batch_that_no_bucket_may_hold_is_named(workload: Workload, spec: Any, message: str) -> None:
    with pytest.raises(BatchError) as raised:
        Traffic.of([batch(1), workload], spec)
    assert str(raised.value).startswith("day.jsonl:1: has ")
    assert message in str(raised.value)


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["buckets", *map(str, args)])


def trace(path: Path, *batches: Sequence[int]) -> Path:
    lines = [json.dumps({"q_lens": list(q_lens), "kv_lens": [q + 10 for q in q_lens]}) for q_lens in batches]
    path.write_text("\n".join(lines))
    return path


def test_the_command_marks_its_choice_and_prints_the_lines_of_a_spec(tmp_path: Path) -> None:
    path = trace(tmp_path / "day.jsonl", *[[1]] * 9, [16], [16, 8])
    done = run(path, "--spec", TINY, "--padding", 0.6)
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines()]
    assert ["*", "3", "8", "16", "32", "59.2%"] in [row[:6] for row in rows]
    assert ["now", "2", "8", "32", "64.0%"] in [row[:5] for row in rows]
    assert done.output.endswith("serving:\n  max_num_tokens: 32\n  token_buckets: [8, 16, 32]\n")


def test_where_nothing_pads_little_enough_the_command_says_so(tmp_path: Path) -> None:
    done = run(trace(tmp_path / "day.jsonl", [1], [1]), "--padding", 0.01)
    assert done.exit_code == 0
    assert "No set of up to 1 buckets pads 1% or less; the largest would be:" in done.output
    assert "  token_buckets: [8]" in done.output


def test_json_holds_what_the_table_does(tmp_path: Path) -> None:
    path = trace(tmp_path / "day.jsonl", [1], [16, 8])
    found = json.loads(run(path, "--spec", TINY, "--padding", 0.3, "--json").output)
    assert (found["batches"], found["tokens"]) == (2, 25)
    assert [one["token_buckets"] for one in found["choices"]] == [[32], [8, 32], [8, 24, 32]]
    chosen = found["choices"][found["chosen"]]
    assert chosen["token_buckets"] == [8, 24, 32]
    assert chosen["padding"] == 1 - 25 / 32
    assert found["now"]["token_buckets"] == [8, 32]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"q_lens": [40], "kv_lens": [40]}', "BatchError: day.jsonl:2: has 40 new tokens; must be at most 32"),
        ('{"q_lens": [4]}', "day.jsonl:2: must be {"),
    ],
)
def test_what_is_wrong_with_a_trace_ends_the_command_with_2(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "day.jsonl"
    path.write_text('{"q_lens": [1], "kv_lens": [1]}\n' + line)
    done = run(path, "--spec", TINY)
    assert done.exit_code == 2
    assert message in done.output
