"""Source -> `jax.export` artifact and TPU executable, in parallel processes, through a content-addressed cache."""

from rpac.lower.cache import Cache
from rpac.lower.lowered import Lowered, Task, tasks_of
from rpac.lower.pool import add_cpu_executables, lower_all

__all__ = ["Cache", "Lowered", "Task", "add_cpu_executables", "lower_all", "tasks_of"]
