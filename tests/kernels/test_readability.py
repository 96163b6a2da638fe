"""benchmarks/readability.py measures what it says, on small sources."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

SOURCE = '''import jax.numpy as jnp
from jax import lax

TILE = 128


class DecodeKernel:
    kv_lens: Ref  # int32[MAX_SEQS]
    q_hbm: Ref

    def run(self):
        def wait(): ...

        pl.when(True)(lambda: wait())
        return helper(self.kv_lens)

    def unused(self):
        def inner(): ...


def decode_kernel(*refs):
    DecodeKernel(*refs).run()


def prefill_kernel(kv_lens, q_hbm):
    def first(): ...

    def second(): ...

    def third(): ...

    def fourth(): ...


def helper(x):
    """1 steps, and 21 steps."""
    y = lax.div(x, 1)
    z = x * 1 + 0
    return jnp.sum(y + z, axis=3).transpose(0, 3, 1, 4) * 16


def again(x):
    y = lax.div(x, 1)
    z = x * 1 + 0
    return jnp.sum(y + z, axis=3).transpose(0, 3, 1, 4) * 16


def ragged_paged_attention(queries):
    queries &= 0xFFFF
    pl.pallas_call(decode_kernel, out_shape=queries)
    return pl.pallas_call(functools.partial(prefill_kernel, 1), out_shape=queries)
'''


@pytest.fixture
def readability(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("readability")


def test_a_source_is_measured(readability: ModuleType) -> None:
    found = readability.measures(SOURCE)
    assert found.longest == 8
    assert found.integers == ("line 39: 16", "line 45: 16"), "axes and masks of bits do not count"
    assert found.refs == ("line 9: q_hbm", "line 25: kv_lens", "line 25: q_hbm")
    assert found.twice == ("line 42: again is helper of line 35 again",)
    assert found.residue == (
        "line 37: lax.div(x, 1)",
        "line 38: x * 1 + 0",
        "line 38: x * 1",
        "line 43: lax.div(x, 1)",
        "line 44: x * 1 + 0",
        "line 44: x * 1",
        "line 36: 1 steps",
    )


def test_closures_are_those_of_the_kernel_that_has_most_and_of_what_it_calls(readability: ModuleType) -> None:
    assert len(readability.measures(SOURCE).closures) == 4
    one = SOURCE.replace("prefill_kernel, 1", "helper, 1")
    assert readability.measures(one).closures == ("wait in run", "lambda in run")


def test_a_program_without_a_kernel_is_one(readability: ModuleType) -> None:
    text = (
        "def ragged_paged_attention(x):\n    def loop(i): ...\n    return other(loop)\n\n\n"
        "def other(f):\n    return lambda: f\n"
    )
    assert readability.measures(text).closures == ("loop in ragged_paged_attention", "lambda in other")


def test_names_defined_twice_and_prefixes_of_constants(readability: ModuleType) -> None:
    text = (
        "def a():\n    x = DECODE_PAGES\n    y = x\n    return y\n\n"
        "def b():\n    x = BLOCK_PAGES\n    y = x\n    return y\n\n"
        "def b():\n    return 1\n"
    )
    twice = readability.measures(text).twice
    assert twice == ("line 6: b is a of line 1 again", "b is defined 2 times in the module")


def test_a_limit_fails(
    readability: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernel.py"
    path.write_text(SOURCE)
    for limit, status in (("8", 0), ("7", 1)):
        monkeypatch.setattr(sys, "argv", ["readability.py", str(path), "--longest", limit])
        with pytest.raises(SystemExit) as stop:
            readability.main()
        assert stop.value.code == status
        assert ("longest 8, the limit is 7" in capsys.readouterr().out) == bool(status)
