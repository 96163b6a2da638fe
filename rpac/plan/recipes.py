"""The recipe of a plan, for callers from before it was a field of the plan."""

from rpac.plan.kernel_plan import KernelPlan
from rpac.plan.recipe import Recipe
from rpac.spec import Spec


def recipe_of(spec: Spec, plan: KernelPlan) -> Recipe:
    """The recipe of a plan."""
    return plan.recipe
