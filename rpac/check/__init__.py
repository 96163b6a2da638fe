"""Generated kernels against the oracle: the TPU interpreter with its race detector, in memory poisoned with NaN."""

from rpac.check.batches import CheckBatch, batches_of
from rpac.check.report import CheckReport, CompileResult, Result
from rpac.check.run import check_bad_rows, check_neighbors, check_source, check_spec

__all__ = [
    "CheckBatch",
    "CheckReport",
    "CompileResult",
    "Result",
    "batches_of",
    "check_bad_rows",
    "check_neighbors",
    "check_source",
    "check_spec",
]
