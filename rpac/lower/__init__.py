"""Source -> `jax.export` artifact and TPU executable, in parallel processes, through a content-addressed cache."""

from rpac.contract.program import Lowered
from rpac.lower.cache import Cache
from rpac.lower.pool import add_cpu_executables, lower_all
from rpac.lower.task import Task, tasks_of

__all__ = ["Cache", "Lowered", "Task", "add_cpu_executables", "lower_all", "tasks_of"]
