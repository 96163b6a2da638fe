"""What a spec makes programs take beside the batch, and return beside the output and the cache: in every way to call them.

Arguments go by name, and are refused with the fix. Parts of an attention, each a row of a batch, are merged to the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command import rpac

from rpac.batch import Batch
from rpac.bundle import read_manifest
from rpac.check.deployment import serve_check
from rpac.contract.program import Variant
from rpac.engine import Engine, load
from rpac.errors import BatchError
from rpac.oracle.attention import attention_with_lse
from rpac.oracle.canary import make_call
from rpac.oracle.expected import oracle_options
from rpac.oracle.tolerance import attention_error
from rpac.serving.merge import merge

SMALL = Path(__file__).with_name("small.yaml")
SINKS = np.array([1.5, -0.5], np.float32)
ROWS = {"decode": ([1, 1], [20, 0]), "prefill": ([4, 4], [9, 0]), "mixed": ([1, 5], [17, 3])}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sinks")
    spec = folder / "sinks.yaml"
    text = SMALL.read_text().replace("  kv_dtype", "  sinks: true\n  kv_dtype")
    spec.write_text(text.replace("  page_size", "  log_sum_exp: true\n  page_size"))
    done = rpac("build", spec, "-o", folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "small.rpac"


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return load(bundle, target="cpu")


def call_of(engine: Engine, kind: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    """A call's arguments but for sinks, and the oracle's output and lse with some."""
    args = engine.programs[Variant(kind, 8)].args
    made = make_call(kind, args, engine.limits, engine.kv_layout, *ROWS[kind], seed=3)
    cache = np.zeros(args[3].shape, args[3].dtype)
    cache[made.pages] = made.held
    batch = made.batch
    given = [*made.by_token.values(), cache, *metadata(batch)]
    options = oracle_options(engine.model, engine.kv_layout)

    def want(sinks: Any) -> Any:
        out, _, lse = attention_with_lse(*given[:3], cache, *given[4:], sinks=sinks, **options)
        return out[: batch.num_tokens], lse[: batch.num_tokens]

    return [*given[:3], jax.device_put(cache, engine.device), *given[4:]], want


def metadata(batch: Batch) -> list[Any]:
    return [batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution]


def error(out: Any, lse: Any, want: Any) -> float:
    count = len(want[0])
    return max(attention_error(np.asarray(out)[:count], want[0])[0], abs(np.asarray(lse)[:count] - want[1]).max())


@pytest.mark.parametrize("kind", ROWS)
def test_an_argument_by_name_reaches_the_program(engine: Engine, kind: str) -> None:
    given, want = call_of(engine, kind)
    program = engine.program(kind, 8)  # type: ignore[arg-type]
    for run in (engine, jax.jit(engine.traced), jax.jit(program)):
        out, _, lse = run(*given[:3], given[3] + 0, *given[4:], sinks=SINKS)
        assert error(out, lse, want(SINKS)) < 1e-5
    out, _, lse = engine(*given, sinks=np.full_like(SINKS, -np.inf))
    assert error(out, lse, want(None)) < 1e-5


def test_the_manifest_says_what_programs_take(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.model.sinks
    for program in manifest.targets["cpu"].programs:
        assert program.args[-1] == ("sinks", (2,), "float32")
        assert program.results[-1] == ("lse", (8, 2), "float32")


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
        BatchError,
        match=f"^sink is not an argument of this bundle's programs, which take {takes}, sinks; leave it out$",
    ):
        engine(*given, sinks=SINKS, sink=SINKS)
    without = load(small, target="cpu")
    with pytest.raises(BatchError, match=f"which take {takes}; leave it out, or build with\nmodel:\n  sinks: true$"):
        without(*given, sinks=SINKS)
    without(*given, sinks=None)


def test_traced_leaves_nan_in_every_result_but_the_cache_where_the_distribution_is_none(engine: Engine) -> None:
    given, _ = call_of(engine, "decode")
    given[7] = np.array([3, 2, 1], np.int32)
    out, cache, lse = jax.jit(engine.traced)(*given, sinks=SINKS)
    assert np.isnan(out).all() and np.isnan(lse).all()
    np.testing.assert_array_equal(cache, given[3])


@pytest.mark.parametrize("cut", [1, 7, 16, 30])
def test_a_sequence_decoded_in_parts_is_the_sequence(engine: Engine, cut: int) -> None:
    """Its first `cut` tokens are one row and the rest another, on pages of their own; the first has no sink."""
    rng = np.random.default_rng(cut)
    page, length = engine.limits.page_size, 31
    k, v = rng.standard_normal((2, length, 1, 128)).astype(np.float32)
    query = rng.standard_normal((2, 128)).astype(np.float32)

    def decode(parts: list[slice], sinks: Any) -> tuple[Any, Any]:
        """Each part as a row whose new token is its last: the same query for all."""
        dims = {one.name: one for one in engine.programs[Variant("decode", 8)].args}
        queries, keys, values, cache = (np.zeros(dims[name].shape, np.float32) for name in list(dims)[:4])
        rows = cache.reshape(len(cache), page, 2, 128)
        tables = [[4 * row + i for i in range(3)] for row in range(len(parts))]
        for row, part in enumerate(parts):
            for at, (key, value) in enumerate(zip(k[part], v[part], strict=True)):
                rows[tables[row][at // page], at % page] = key[0], value[0]
            queries[row], keys[row], values[row] = query, k[part][-1], v[part][-1]
        lengths = [len(k[part]) for part in parts]
        tables = [table[: -(-count // page)] for table, count in zip(tables, lengths, strict=True)]
        batch = Batch.build(engine.limits, [1] * len(parts), [count - 1 for count in lengths], tables)
        given = queries, keys, values, jax.device_put(cache, engine.device), *metadata(batch)
        out, _, lse = engine(*given, sinks=sinks)
        return out, lse

    whole, whole_lse = decode([slice(0, length)], SINKS)
    out, lse = decode([slice(0, cut), slice(cut, length)], np.full_like(SINKS, -np.inf))
    with_sinks = decode([slice(0, cut), slice(cut, length)], SINKS)
    merged, merged_lse = merge([(out[0], lse[0]), (with_sinks[0][1], with_sinks[1][1])])
    np.testing.assert_allclose(merged, whole[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(merged_lse, whole_lse[0], rtol=1e-5, atol=1e-5)
