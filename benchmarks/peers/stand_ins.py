"""Stands in for what tpu-inference's modules import and its kernels do not need (a server's logger, torch, sympy), and for
what an older jax lacks.
"""

from __future__ import annotations

import logging
import sys
import types

from abstract_tpu import bare_package
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


class _Logger(logging.Logger):
    def warning_once(self, *message: object) -> None:
        self.warning(*message)

    info_once = debug_once = warning_once


DEVICE_NAMES = {"tpu7x": "TPU v7", "v6e": "TPU v6e", "v5p": "TPU v5p", "v5e": "TPU v5e"}


def bare_tpu_inference(target: str) -> None:
    """Makes the package's modules importable without vLLM, torch and sympy, and tells them the target."""
    bare_package("tpu_inference")
    logger = types.ModuleType("tpu_inference.logger")
    logger.init_logger = _Logger
    sympy = types.ModuleType("sympy")
    sympy.divisors = lambda n: [d for d in range(1, n + 1) if n % d == 0]
    utils = types.ModuleType("tpu_inference.utils")
    utils.get_device_name = lambda *_: DEVICE_NAMES[target]
    pltpu.reciprocal = pl.reciprocal  # where the jax that tpu-inference pins has it too
    sys.modules.update({"tpu_inference.logger": logger, "tpu_inference.utils": utils, "sympy": sympy})
