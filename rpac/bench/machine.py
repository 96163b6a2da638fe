"""What a time was measured on: device, driver, libraries and host, as far as they say."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax

from rpac.devices.client import build_string
from rpac.devices.host import CPUINFO, cpu_name

PACKAGES = ("jax", "libtpu", "numpy")  # and what else begins with these: jaxlib, the plugins of CUDA
_NVIDIA = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
_TIMEOUT_S = 10


def machine(device: jax.Device, devices: int) -> dict[str, Any]:
    """The facts of `device`, one of the `devices` that a program runs on, and of its host, as plain data.

    `clocks_mhz` is what is known now, and empty on TPU, where nothing reports a clock.
    """
    nvidia = _nvidia() if device.platform == "gpu" else {}
    return {
        "device_kind": device.device_kind,
        "platform": device.platform,
        "platform_version": str(device.client.platform_version),
        "build": build_string(device.client),
        "driver": nvidia.pop("driver_version", None),
        "devices": devices,
        "devices_of_host": jax.local_device_count(device.platform),
        "memory_bytes": _memory(device),
        "clocks_mhz": nvidia or (_cpu_clock() if device.platform == "cpu" else {}),
        "host": cpu_name(),
        "host_cores": os.cpu_count(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """The versions of what is installed of JAX and what it stands on, by name."""
    names = {found.name: found.version for found in importlib.metadata.distributions() if found.name}
    return {name: names[name] for name in sorted(names) if name.lower().startswith(PACKAGES)}


def _memory(device: jax.Device) -> int | None:
    try:
        return int((device.memory_stats() or {})["bytes_limit"])
    except (KeyError, jax.errors.JaxRuntimeError):
        return None


def _nvidia() -> dict[str, str]:
    """What `nvidia-smi` says of the first GPU; nothing where it is not installed or does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return {}
    try:
        done = subprocess.run(
            [command, f"--query-gpu={','.join(_NVIDIA)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.partition("\n")[0].split(",")
    return {name: value.strip() for name, value in zip(_NVIDIA, values, strict=False)}


def _cpu_clock() -> dict[str, str]:
    try:
        lines = Path(CPUINFO).read_text().splitlines()
    except OSError:
        return {}
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("cpu MHz")]
    return {"cpu": max(found, key=float)} if found else {}
