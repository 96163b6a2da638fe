"""Bugs of generated kernels, a module for each family of kernels; each module has `SUITES`, bugs with their kernels.

Bugs are named by what is wrong.
"""

from __future__ import annotations

import importlib
import pkgutil

from mutation import BugSuite


def all_suites() -> list[BugSuite]:
    """The suites of all modules of this package."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return [suite for module in modules for suite in module.SUITES]
