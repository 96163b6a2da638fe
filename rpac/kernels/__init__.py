"""Sources from plans and templates."""

from rpac.contract.program import Source
from rpac.kernels.slots import templates_dir
from rpac.kernels.source import render

__all__ = ["Source", "render", "templates_dir"]
