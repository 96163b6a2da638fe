"""What a server keeps beside the engine: page tables, and the choice of what runs in each step. No jax here.

scheduler = Scheduler(engine.limits)
scheduler.add(prompt, max_new_tokens)
while (step := scheduler.step()) is not None:
    ...  # copy the pages of step.copies, then the model on step.token_ids, step.positions and step.batch
    scheduler.commit(step, next_tokens)
"""

from rpac.serving.pool import PagePool
from rpac.serving.scheduler import Scheduler, Step
from rpac.serving.split import query_positions, split_budget
from rpac.serving.tables import PageTables

__all__ = ["PagePool", "PageTables", "Scheduler", "Step", "query_positions", "split_budget"]
