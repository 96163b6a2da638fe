"""Which backends JAX looks for: not for a TPU on a machine that has none."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax._src import hardware_utils, xla_bridge

_DEVICE_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*")


def skip_absent_tpu() -> None:
    """Keeps JAX from loading libtpu where there is no TPU: that takes up to a quarter of a minute, and prints what sounds
    like a failure. rpac has libtpu installed on every machine, to compile with.

    Does nothing where JAX has its backends already, and where the user chose them (JAX_PLATFORMS, `jax_platforms`).
    """
    chosen = "JAX_PLATFORMS" in os.environ or "JAX_FORCE_TPU_INIT" in os.environ or jax.config.jax_platforms
    if chosen or xla_bridge.backends_are_initialized() or _has_tpu():
        return
    # Of JAX's private parts; without it the TPU would be looked for, as before.
    getattr(xla_bridge, "_backend_factories", {}).pop("tpu", None)


def _has_tpu() -> bool:
    """Whether a chip is on the PCI bus, as JAX itself looks for it, or has a device file."""
    chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    return chips > 0 or any(True for pattern in _DEVICE_FILES for _ in Path("/").glob(pattern[1:]))
