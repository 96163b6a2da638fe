"""`KernelPlan` + templates -> source text: pure, byte-reproducible. Every number a template shows is worked out here."""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2

from rpac.contract.program import Source
from rpac.devices.chip import is_tpu
from rpac.kernels.grouped import grouped_context
from rpac.kernels.header import header
from rpac.kernels.latent import latent_context
from rpac.plan import KernelPlan
from rpac.spec import Spec


def templates_dir() -> Path:
    """Where the templates are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "templates"
    return installed if installed.is_dir() else package.parent / "templates"


def render(spec: Spec, plan: KernelPlan) -> Source:
    """The source of one plan."""
    family = "pallas_tpu" if is_tpu(plan.target) else "xla"
    latent = spec.model.rope_dim is not None
    name = f"latent_{plan.kind}.py.jinja" if latent else f"{plan.kind}.py.jinja"
    context = latent_context(spec, plan) if latent else grouped_context(spec, plan)
    text = _environment(family).get_template(name).render(header(spec, plan) | context)
    return Source(plan.path, text.rstrip("\n") + "\n")


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
