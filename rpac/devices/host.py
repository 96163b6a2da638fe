"""Names this machine's CPU as far as machine code depends on it. No JAX here."""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
FEATURES = ("flags", "Features")  # as x86 and Arm kernels call them


@functools.cache
def cpu_name() -> str:
    """The CPU's model and a hash of its features: code that was compiled for one runs where both are the same.

    Where no /proc/cpuinfo tells the features, the host's name takes their place.
    """
    try:
        lines = [line.partition(":") for line in CPUINFO.read_text().splitlines()]
    except OSError:
        return f"{platform.machine()} of {platform.node()}"
    facts = {key.strip(): value.strip() for key, _, value in reversed(lines)}  # of the first core
    features = next((facts[name] for name in FEATURES if name in facts), "")
    digest = hashlib.sha256(" ".join(sorted(features.split())).encode()).hexdigest()[:12]
    return f"{facts.get('model name', platform.machine())}, features {digest}"
