"""`rpac show-config`: what rpac finds on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping

import click

from rpac._version import __version__
from rpac.cli.common import command, json_option, print_json, tuned_folder
from rpac.cli.terminal import table
from rpac.devices.host import cpu_name
from rpac.devices.toolchain import SETTINGS
from rpac.errors import RpacError
from rpac.files.store import Store, default_cache_dir
from rpac.schedule import check_compiler

PACKAGES = ("jax", "jaxlib", "libtpu", "flatbuffers", "numpy", "ml_dtypes", "jinja2", "pyyaml", "click")
OPTIONAL = {"matplotlib": "plot", "distributed": "tune", "fsspec": "remote", "prometheus_client": "metrics"}
DEVICES_TIMEOUT_S = 60
# In a process of its own: JAX may hang or crash where a driver is broken, and it takes a TPU for itself.
DEVICES = """
from rpac.devices.backends import skip_absent_tpu
skip_absent_tpu()
import jax
for device in jax.devices():
    print(f"{device}: {device.device_kind}")
"""

Probe = Callable[[], str]


@command("show-config")
@json_option
def show_config_command(as_json: bool) -> None:
    """Print versions, devices, folders and settings, for a report of a problem. Always exits with 0."""
    facts = {name: _guarded(probe) for name, probe in probes().items()}
    if as_json:
        print_json(facts)
    else:
        click.echo(table(("what", "found"), list(facts.items())))


def probes() -> Mapping[str, Probe]:
    """What is looked for, by name; a probe that fails is reported as such."""
    return {
        "rpac": lambda: __version__,
        "python": lambda: f"{platform.python_version()}, {sys.executable}",
        "system": lambda: f"{platform.platform()}, {os.cpu_count()} cores",
        "CPU": cpu_name,
        **{name: _version_of(name) for name in PACKAGES},
        **{f"{name} (rpac[{extra}])": _version_of(name) for name, extra in OPTIONAL.items()},
        "schedules": _schedules,
        "devices": _devices,
        "cache": _cache,
        "tuned tiles": _tuned,
        "settings": _settings,
    }


def _guarded(probe: Probe) -> str:
    """What a probe found, or why it failed. Whatever is broken here, the other lines are what the report is about."""
    try:
        return probe()
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _version_of(name: str) -> Probe:
    def found() -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return found


def _schedules() -> str:
    libtpu = importlib.metadata.version("libtpu")
    try:
        check_compiler(libtpu)
    except RpacError:
        return f"those of libtpu {libtpu} are not verified: `rpac predict` needs --any-compiler"
    return f"those of libtpu {libtpu} are verified: `rpac predict` and `rpac tune` can read them"


def _devices() -> str:
    command = [sys.executable, "-c", DEVICES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEVICES_TIMEOUT_S, check=False)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode == 0:
        return ", ".join(lines)
    return f"failed: {lines[-1] if lines else f'exit code {done.returncode}'}"


def _cache() -> str:
    folder = default_cache_dir()
    problem = Store(folder).problem
    return f"{folder}" if problem is None else f"not used: {problem}"


def _tuned() -> str:
    folder = tuned_folder()
    files = [] if folder is None else sorted(path.name for path in folder.glob("*.json"))
    return "the package's" + (f", and over them {folder} ({', '.join(files)})" if files else "")


def _settings() -> str:
    names = sorted(name for name in os.environ if name.startswith((*SETTINGS, "RPAC_")))
    return ", ".join(f"{name}={os.environ[name]}" for name in names) or "none"
