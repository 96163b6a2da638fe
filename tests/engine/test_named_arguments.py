"""What a spec makes programs take beside the batch: by name, in every way to call them, and refused with the fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command import rpac

from rpac.accuracy import attention_error
from rpac.answers import oracle_options
from rpac.batch import Batch
from rpac.bundle import Variant, read_manifest
from rpac.canary import make_call
from rpac.engine import Engine, load
from rpac.errors import BatchError
from rpac.reference import ragged_paged_attention
from rpac.serve_check import serve_check

SMALL = Path(__file__).with_name("small.yaml")

SINKS = np.array([1.5, -0.5], np.float32)
ROWS = {"decode": ([1, 1], [20, 0]), "prefill": ([4, 4], [9, 0]), "mixed": ([1, 5], [17, 3])}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sinks")
    spec = folder / "sinks.yaml"
    spec.write_text(SMALL.read_text().replace("  kv_dtype", "  sinks: true\n  kv_dtype"))
    done = rpac("build", spec, "-o", folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "small.rpac"


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return load(bundle, target="cpu")


def call_of(engine: Engine, kind: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    """A call's arguments but for sinks, and the oracle's output with some."""
    args = engine.programs[Variant(kind, 8)].args
    made = make_call(kind, args, engine.limits, engine.kv_layout, *ROWS[kind], seed=3)
    cache = np.zeros(args[3].shape, args[3].dtype)
    cache[made.pages] = made.held
    batch = made.batch
    given = [*made.by_token.values(), cache, *metadata(batch)]
    options = oracle_options(engine.model, engine.kv_layout)

    def want(sinks: Any) -> Any:
        out, _ = ragged_paged_attention(*given[:3], cache, *given[4:], sinks=sinks, **options)
        return out[: batch.num_tokens]

    return [*given[:3], jax.device_put(cache, engine.device), *given[4:]], want


def metadata(batch: Batch) -> list[Any]:
    return [batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution]


def error(out: Any, want: Any) -> float:
    return attention_error(np.asarray(out)[: len(want)], want)[0]


@pytest.mark.parametrize("kind", ROWS)
def test_an_argument_by_name_reaches_the_program(engine: Engine, kind: str) -> None:
    given, want = call_of(engine, kind)
    program = engine.program(kind, 8)  # type: ignore[arg-type]
    for run in (engine, jax.jit(engine.traced), jax.jit(program)):
        out, _ = run(*given[:3], given[3] + 0, *given[4:], sinks=SINKS)
        assert error(out, want(SINKS)) < 1e-5
    out, _ = engine(*given, sinks=np.full_like(SINKS, -np.inf))
    assert error(out, want(None)) < 1e-5


def test_the_manifest_says_what_programs_take(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.model.sinks
    for program in manifest.targets["cpu"].programs:
        assert program.args[-1] == ("sinks", (2,), "float32")


def test_a_bundle_with_sinks_serves(bundle: Path) -> None:
    report = serve_check(bundle, "cpu", seed=1)
    assert [step for step in report.steps if not step.ok] == []


def test_a_missing_argument_is_named_with_its_shape(engine: Engine) -> None:
    given, _ = call_of(engine, "decode")
    for run in (engine, engine.traced, engine.program("decode", 8)):
        with pytest.raises(
            BatchError, match=r"^sinks is not given; must be float32\[2\], .*pass it by name: sinks=\.\.\.$"
        ):
            run(*given)
    with pytest.raises(BatchError, match=r"^sinks is float32\[3\]; must be float32\[2\]"):
        engine(*given, sinks=np.zeros(3, np.float32))
    assert not given[3].is_deleted()


def test_an_unknown_argument_is_refused_with_what_programs_take(engine: Engine, small: Path) -> None:
    given, _ = call_of(engine, "decode")
    takes = "queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution"
    with pytest.raises(
        BatchError, match=f"^sink is no argument of this bundle's programs, which take {takes}, sinks; leave it out$"
    ):
        engine(*given, sinks=SINKS, sink=SINKS)
    without = load(small, target="cpu")
    with pytest.raises(BatchError, match=f"which take {takes}; leave it out, or build with\nmodel:\n  sinks: true$"):
        without(*given, sinks=SINKS)
    without(*given, sinks=None)
