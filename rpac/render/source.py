"""`KernelPlan` + templates -> source text: pure, byte-reproducible. Every number a template shows is worked out here."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import jinja2

import rpac
from rpac.chip import is_tpu
from rpac.plan import KernelPlan
from rpac.render.grouped import grouped_context
from rpac.render.header import header
from rpac.render.latent import latent_context
from rpac.spec import Spec

HEADER_END = '"""\n'


@dataclass(frozen=True)
class Source:
    """One generated module. `path` is relative to the spec's folder in generated/ and to source/ in a bundle."""

    path: str
    text: str

    @functools.cached_property
    def sha256(self) -> str:
        """Of the text, 64 hex digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def body(self) -> str:
        """The text after the header: targets whose plans agree have the same."""
        return self.text.split(HEADER_END, 1)[1]


def templates_dir() -> Path:
    """Where the templates are: in the installed package, or beside it in a checkout."""
    package = Path(rpac.__file__).parent
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
