"""What users import, and what that imports."""

from __future__ import annotations

from pathlib import Path

import pytest
from calls import python

import rpac


def test_the_public_names_are_these_and_all_there() -> None:
    assert rpac.__all__ == [
        "Batch", "BatchError", "BoundSteps", "BundleError", "CheckError", "CompileError", "Count", "Engine", "Limits",
        "ModelError", "OutOfPagesError", "OutputError", "PageError", "PlanError", "Problem", "RpacError", "ScheduleError",
        "SelectionError", "SpecError", "StepEngine", "TargetError", "TrustError", "Variant", "alibi_slopes", "load",
        "load_layers", "load_steps", "merge", "merge_across",
    ]  # fmt: skip
    assert all(getattr(rpac, name) is not None for name in rpac.__all__)
    assert set(rpac.__all__) <= set(dir(rpac))
    with pytest.raises(AttributeError, match="module 'rpac' has no attribute 'lod'"):
        rpac.lod  # noqa: B018


def test_importing_rpac_imports_nothing_else() -> None:
    code = "import json, sys; import rpac; print(json.dumps(sorted(sys.modules)))"
    modules = python(code)
    assert [name for name in modules if name.startswith("rpac")] == ["rpac", "rpac._version", "rpac.errors"]
    assert not {"jax", "numpy", "yaml", "jinja2", "click", "libtpu"} & set(modules)


def test_serving_needs_neither_the_compiler_nor_its_dependencies(bundle: Path) -> None:
    code = """
import json, sys
for name in ("yaml", "jinja2", "click", "libtpu", "hypothesis", "pytest"):
    sys.modules[name] = None  # importing it raises, also where jax probes for it
import jax.numpy as jnp, rpac
engine = rpac.load(sys.argv[1], target="cpu")
batch = rpac.Batch.build(engine.limits, [1], [2], [[5]])
made = [jnp.ones(a.shape, a.dtype) for a in engine.programs[engine.select(8, batch.distribution)].args[:4]]
out, _ = engine(*made, batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
print(json.dumps([float(out[0, 0, 0]), sorted(name for name in sys.modules if name.startswith("rpac."))]))
"""
    value, modules = python(code, str(bundle))
    assert value == 3
    roots = {name.split(".")[1] for name in modules}
    assert roots <= {"_version", "batch", "bundle", "contract", "devices", "engine", "errors", "files", "oracle"}
