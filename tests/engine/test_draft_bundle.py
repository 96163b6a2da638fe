"""A bundle whose decode rows are drafts in a tree: built, loaded, its canaries run, called by name, refused elsewhere."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from command import rpac

from rpac.bundle import read_manifest
from rpac.check.deployment import serve_check
from rpac.contract.program import Variant
from rpac.engine import Engine, load
from rpac.errors import BatchError
from rpac.oracle.canary import make_call
from rpac.oracle.expected import expected
from rpac.oracle.tolerance import attention_error

SMALL = Path(__file__).with_name("small.yaml")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drafts")
    spec = folder / "drafts.yaml"
    text = SMALL.read_text().replace("max_num_seqs: 4", "max_num_seqs: 2\n  decode_len: 3\n  tree_mask: true")
    spec.write_text(text)
    done = rpac("build", spec, "-o", folder, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder / "small.rpac"


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return load(bundle, target="cpu")


def test_the_manifest_says_how_long_decode_rows_are_and_what_programs_take(bundle: Path, small: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.limits.decode_len == 3
    rows = manifest.limits.max_num_seqs
    assert all(program.args[-1] == ("tree", (rows, 3), "int32") for program in manifest.targets["cpu"].programs)
    assert "decode_len" not in read_manifest(small).limits.as_dict()


def test_it_serves(bundle: Path) -> None:
    report = serve_check(bundle, "cpu", seed=1)
    assert [step for step in report.steps if not step.ok] == []


@pytest.mark.parametrize("kind", ["decode", "mixed"])
def test_a_tree_by_name_reaches_the_program(engine: Engine, kind: str) -> None:
    rows = {"decode": ([3, 3], [15, 0]), "mixed": ([3, 4], [16, 3])}[kind]
    args = engine.programs[Variant(kind, 8)].args  # type: ignore[arg-type]
    call = make_call(kind, args, engine.limits, engine.kv_layout, *rows, seed=3)  # type: ignore[arg-type]
    cache = np.zeros(args[3].shape, args[3].dtype)
    cache[call.pages] = call.held
    batch = call.batch
    assert batch.kind == kind
    given = [*call.by_token.values(), jax.device_put(cache, engine.device)]
    given += [batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution]
    want = expected(call, engine.model, engine.kv_layout)[0][: batch.num_tokens]
    for run in (jax.jit(engine.traced), engine):
        with pytest.raises(BatchError, match=r"^tree is not given; must be int32\[\d, 3\], .*`tree_mask:`"):
            run(*given)
        out, _ = run(*given, **call.extra)
        assert attention_error(np.asarray(out)[: len(want)], want)[0] < 1e-5
