"""Searches tiles for the cases of a spec, with the schedule walker as the judge; results are data in `rpac/tuned/`.

candidates.py, batches.py -> jobs.py (check_task.py) -> search.py (over executors.py) -> results.py, run.py
"""

from rpac.tune.executors import Pool, local_processes, on_cluster
from rpac.tune.jobs import Check, Job, Measure, Result
from rpac.tune.run import Report, tune
from rpac.tune.search import Outcome

__all__ = ["Check", "Job", "Measure", "Outcome", "Pool", "Report", "Result", "local_processes", "on_cluster", "tune"]
