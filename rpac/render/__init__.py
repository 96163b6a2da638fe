"""Sources from plans and templates."""

from rpac.render.source import Source, render, templates_dir

__all__ = ["Source", "render", "templates_dir"]
