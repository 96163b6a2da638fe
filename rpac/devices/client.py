"""The runtime behind a JAX client, by the build that an executable depends on."""

from __future__ import annotations

from typing import Any

from jaxlib import version as jaxlib

from rpac.devices.host import cpu_name


def build_string(client: Any) -> str:
    """The build of the runtime behind a client, as an executable depends on it: on TPU, libtpu's date and change; on cpu,
    jaxlib's version and the CPU.

    A client at serving time and the compile-only one of a topology name themselves differently in the lines before.
    """
    if client.platform == "cpu":
        return f"jaxlib {jaxlib.__version__} on {cpu_name()}"
    return str(client.platform_version).splitlines()[-1]
