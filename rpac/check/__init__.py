"""Generated kernels against the oracle: the TPU interpreter with its race detector, in memory poisoned with NaN."""

from rpac.check.report import CheckReport, CompileResult, Result
from rpac.check.run import check_source, check_spec
from rpac.check.trials import Trial, trials_of

__all__ = ["CheckReport", "CompileResult", "Result", "Trial", "check_source", "check_spec", "trials_of"]
