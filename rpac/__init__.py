"""rpac: ahead-of-time compiled ragged paged attention.

    engine = rpac.load("llama3-8b.rpac")  # the target built for the first device; or target="cpu"
    kv_cache = engine.new_cache()  # the cache of one layer; each call takes it and returns it updated

    batch = rpac.Batch.build(engine.limits, q_lens, context_lens, page_tables)  # sequences in any order
    q, k, v = batch.pack(queries), batch.pack(keys), batch.pack(values)  # lists with one array for each sequence
    out, kv_cache = engine(q, k, v, kv_cache, *batch.metadata)
    outputs = batch.unpack(out)  # one array for each sequence, in your order

`import rpac` imports only the errors. Everything else is imported at first use, so that the command line and tools that
never touch an array start without JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rpac._version import __version__ as __version__
from rpac.errors import (
    BatchError,
    BundleError,
    CheckError,
    CompileError,
    ModelError,
    OutOfPagesError,
    OutputError,
    PageError,
    PlanError,
    Problem,
    RpacError,
    ScheduleError,
    SelectionError,
    SpecError,
    TargetError,
    TrustError,
)

if TYPE_CHECKING:
    from rpac.batch import Batch, Limits
    from rpac.contract.program import Variant
    from rpac.engine import BoundSteps, Count, Engine, StepEngine, load, load_layers, load_steps
    from rpac.serving.alibi import alibi_slopes
    from rpac.serving.merge import merge, merge_across

_LAZY = {
    "Batch": "rpac.batch",
    "BoundSteps": "rpac.engine",
    "Count": "rpac.engine",
    "Engine": "rpac.engine",
    "Limits": "rpac.batch",
    "Variant": "rpac.bundle",
    "load": "rpac.engine",
    "StepEngine": "rpac.engine",
    "load_layers": "rpac.engine",
    "load_steps": "rpac.engine",
    "alibi_slopes": "rpac.serving.alibi",
    "merge": "rpac.serving.merge",
    "merge_across": "rpac.serving.merge",
}

__all__ = [
    "Batch",
    "BatchError",
    "BoundSteps",
    "BundleError",
    "CheckError",
    "CompileError",
    "Count",
    "Engine",
    "Limits",
    "ModelError",
    "OutOfPagesError",
    "OutputError",
    "PageError",
    "PlanError",
    "Problem",
    "RpacError",
    "ScheduleError",
    "SelectionError",
    "SpecError",
    "StepEngine",
    "TargetError",
    "TrustError",
    "Variant",
    "alibi_slopes",
    "load",
    "load_layers",
    "load_steps",
    "merge",
    "merge_across",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rpac' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
