"""`KernelPlan` + templates -> source text: pure, byte-reproducible."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import jinja2

from rpac.contract.program import Source
from rpac.devices.chip import is_tpu
from rpac.kernels.assemble import Kernel, assembled
from rpac.kernels.blocks import decode_blocks
from rpac.kernels.grouped import grouped_context
from rpac.kernels.header import header
from rpac.kernels.latent import latent_blocks, latent_shared_context, latent_waves
from rpac.kernels.portable import portable_text
from rpac.kernels.query_blocks import query_blocks
from rpac.kernels.shared import shared_context
from rpac.kernels.slots import environment, templates_dir
from rpac.kernels.waves import decode_waves
from rpac.plan import KernelPlan
from rpac.plan.recipe import Recipe
from rpac.spec import Spec

__all__ = ["render", "templates_dir"]

View = Callable[[Spec, KernelPlan, Recipe], Kernel]
# By the skeleton of a recipe, and whether its attention is latent.
_DECODE: Final[Mapping[tuple[str, bool], View]] = {
    ("blocks", False): decode_blocks,
    ("waves", False): decode_waves,
    ("waves", True): latent_waves,
}
_BLOCK: Final[Mapping[tuple[str, bool], View]] = {
    ("query_blocks", False): query_blocks,
    ("latent", True): latent_blocks,
}


def render(spec: Spec, plan: KernelPlan) -> Source:
    """The source of one plan."""
    family = "pallas_tpu" if is_tpu(plan.target) else "xla"
    made = _assembled(spec, plan) if family == "pallas_tpu" else portable_text(spec, plan)
    if made is not None:
        return Source(plan.path, made.rstrip("\n") + "\n")
    text = (
        _environment(family)
        .get_template(f"{plan.kind}.py.jinja")
        .render(header(spec, plan) | grouped_context(spec, plan))
    )
    return Source(plan.path, text.rstrip("\n") + "\n")


def _assembled(spec: Spec, plan: KernelPlan) -> str | None:
    """The source of a plan all of whose kernels have skeletons."""
    recipe, latent = plan.recipe, spec.model.rope_dim is not None
    views: list[View | None] = []
    if recipe.decode is not None:
        views.append(_DECODE.get((recipe.decode.skeleton, latent)))
    if recipe.block is not None:
        views.append(_BLOCK.get((recipe.block.skeleton, latent)))
    if not all(views):
        return None
    shared = latent_shared_context if latent else shared_context
    context: dict[str, Any] = header(spec, plan) | shared(spec, plan, recipe)
    return assembled(environment("pallas_tpu"), context, [view(spec, plan, recipe) for view in views if view])


@functools.cache
def _environment(family: str) -> jinja2.Environment:
    root = templates_dir()
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([root / family, root / "common"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
