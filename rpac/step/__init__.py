"""A model's whole forward step: the user's function around a spec's programs, lowered and compiled for a target.

`StepTask` and `steps_of` need no JAX. `rpac.step.worker` does: `step_of` makes the step of a task, `compile_step` compiles it.
"""

from rpac.step.task import StepTask, steps_of

__all__ = ["StepTask", "steps_of"]
