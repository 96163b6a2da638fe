"""Latent attention from a spec to answers: built, loaded, called in every way, its canaries run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command import rpac

from rpac.check.deployment import serve_check
from rpac.contract.program import Variant
from rpac.engine import Engine, load
from rpac.errors import BatchError
from rpac.oracle.canary import ProbeCall, make_call
from rpac.oracle.expected import expected
from rpac.oracle.tolerance import attention_error

SPEC = """\
name: latent
model:
  attention: latent
  q_heads: 16
  kv_lora_rank: 128
  rope_dim: 64
  q_dtype: float32
  kv_dtype: float32
  sm_scale: 0.1
serving:
  page_size: 16
  max_model_len: 48
  max_num_tokens: 8
  token_buckets: [8]
  max_num_seqs: 4
  prefill_chunk: 4
  context_lens: [32]
  num_pages: 12
targets: [cpu]
"""
ROWS = {"decode": ([1, 1], [20, 0]), "prefill": ([4, 4], [9, 0]), "mixed": ([1, 5], [17, 3])}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent")
    spec = folder / "latent.yaml"
    spec.write_text(SPEC)
    done = rpac("build", spec, "-o", folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "latent.rpac"


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return load(bundle, target="cpu")


def arguments(engine: Engine, kind: Any) -> tuple[dict[str, Any], ProbeCall]:
    """A call's arguments by name, the cache still on the host."""
    dims = engine.programs[Variant(kind, 8)].args
    call = make_call(kind, dims, engine.limits, engine.kv_layout, *ROWS[kind], seed=3)
    shapes = {one.name: one for one in dims}
    cache = np.zeros(shapes["kv_cache"].shape, shapes["kv_cache"].dtype)
    cache[call.pages] = call.held
    batch = call.batch
    names = ("kv_lens", "page_indices", "cu_q_lens", "distribution")
    return {**call.by_token, "kv_cache": cache, **{name: getattr(batch, name) for name in names}}, call


def on_device(engine: Engine, given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "kv_cache": jax.device_put(given["kv_cache"], engine.device)}


@pytest.mark.parametrize("kind", ROWS)
def test_every_way_to_call_it_gives_the_oracles_answer(engine: Engine, kind: str) -> None:
    given, call = arguments(engine, kind)
    want, pages, _ = expected(call, engine.model, engine.kv_layout)
    live = call.batch.num_tokens
    for run in (engine, jax.jit(engine.traced), jax.jit(engine.program(kind, 8))):  # type: ignore[arg-type]
        out, cache = run(*on_device(engine, given).values())
        assert attention_error(np.asarray(out)[:live], want[:live])[0] < 1e-5
        np.testing.assert_array_equal(np.asarray(cache)[call.pages], pages)
    out, _ = engine(**on_device(engine, given))
    assert attention_error(np.asarray(out)[:live], want[:live])[0] < 1e-5


def test_a_missing_argument_is_named(engine: Engine) -> None:
    given, _ = arguments(engine, "decode")
    del given["new_rope"]
    with pytest.raises(BatchError, match=r"new_rope is not given; must be float32\[8, 64\]; pass it by name"):
        engine(**on_device(engine, given))


def test_what_is_more_than_it_takes_is_refused(engine: Engine) -> None:
    given, _ = arguments(engine, "decode")
    with pytest.raises(BatchError, match="found 10 arguments; must be queries, queries_rope, new_kv, new_rope, kv"):
        engine(*on_device(engine, given).values(), 1)


def test_it_passes_the_check_before_traffic(bundle: Path) -> None:
    report = serve_check(bundle, "cpu", seed=1)
    assert report.exit_code == 0, report.steps
