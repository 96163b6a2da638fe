"""Generated kernels against the oracle: the TPU interpreter with its race detector, in memory poisoned with NaN."""

from rpac.check.batches import Trial, trials_of
from rpac.check.report import CheckReport, CompileResult, Result
from rpac.check.run import check_neighbors, check_source, check_spec

__all__ = [
    "CheckReport",
    "CompileResult",
    "Result",
    "Trial",
    "check_neighbors",
    "check_source",
    "check_spec",
    "trials_of",
]
