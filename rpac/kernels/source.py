"""`KernelPlan` + templates -> source text: pure, byte-reproducible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from rpac.contract.program import Source
from rpac.devices.chip import is_tpu
from rpac.kernels.assemble import Kernel, assembled
from rpac.kernels.blocks import decode_blocks
from rpac.kernels.header import header
from rpac.kernels.latent import latent_blocks, latent_shared_context, latent_waves
from rpac.kernels.portable import portable_text
from rpac.kernels.query_blocks import query_blocks
from rpac.kernels.shared import shared_context
from rpac.kernels.slots import environment
from rpac.kernels.waves import decode_waves
from rpac.plan import KernelPlan
from rpac.plan.recipe import Recipe
from rpac.spec import Spec

View = Callable[[Spec, KernelPlan, Recipe], Kernel]
# What a kernel shows, by its skeleton and the kind of attention.
_DECODE: Final[Mapping[tuple[str, str], View]] = {
    ("blocks", "grouped"): decode_blocks,
    ("waves", "grouped"): decode_waves,
    ("waves", "latent"): latent_waves,
}
_BLOCK: Final[Mapping[str, View]] = {"query_blocks": query_blocks, "latent": latent_blocks}


def render(spec: Spec, plan: KernelPlan) -> Source:
    """The source of one plan."""
    text = _pallas_text(spec, plan) if is_tpu(plan.target) else portable_text(spec, plan)
    return Source(plan.path, text.rstrip("\n") + "\n")


def _pallas_text(spec: Spec, plan: KernelPlan) -> str:
    shared = shared_context if spec.model.rope_dim is None else latent_shared_context
    context = header(spec, plan) | shared(spec, plan, plan.recipe)
    return assembled(environment("pallas_tpu"), context, [view(spec, plan, plan.recipe) for view in _views(spec, plan)])


def _views(spec: Spec, plan: KernelPlan) -> Iterator[View]:
    """Those of the kernels of a program, in their order."""
    if plan.recipe.decode is not None:
        yield _DECODE[plan.recipe.decode.skeleton, "grouped" if spec.model.rope_dim is None else "latent"]
    if plan.recipe.block is not None:
        yield _BLOCK[plan.recipe.block.skeleton]
