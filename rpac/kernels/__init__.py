"""Sources from plans and templates."""

from rpac.contract.program import Source
from rpac.kernels.source import render, templates_dir

__all__ = ["Source", "render", "templates_dir"]
