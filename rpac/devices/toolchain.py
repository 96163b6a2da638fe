"""Names the toolchain exactly, without loading it, and prepares a process to compile for a TPU that is not there."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import MutableMapping

from rpac._version import __version__
from rpac.errors import TargetError

PACKAGES = ("jax", "jaxlib", "libtpu")

# Names in an export that come from where its source lay would make two builds of one spec differ.
JAX_FLAGS = {
    "jax_hlo_source_file_canonicalization_regex": ".*",
    "jax_traceback_in_locations_limit": "0",
}

# Of JAX, XLA and libtpu: matmul precision, 64-bit mode, compiler flags, another libtpu.
SETTINGS = ("JAX_", "XLA_", "LIBTPU_", "TPU_")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # these two only silence warnings
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # without it a second process dies on libtpu's lock file
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what a compiling process needs, and nothing else of the kind: the user's own settings are no part of a
    cache key, and would change what is built. Must run before JAX is imported there.
    """
    for name in [name for name in environment if name.startswith(SETTINGS)]:
        del environment[name]
    environment.update(ENVIRONMENT)


@functools.cache
def toolchain() -> dict[str, str]:
    """Versions, and for each package a hash of its installed files' hashes: a rebuilt wheel of one version differs.

    Raises TargetError where a package is missing.
    """
    found = {"python": platform.python_version(), "rpac": __version__}
    for name in PACKAGES:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise TargetError(
                f"{name} is not installed; install jax[tpu], which pins the libtpu that matches"
            ) from None
        found[name] = distribution.version
        found[f"{name}_files"] = record_hash(distribution)[:16]
    return found


def record_hash(distribution: importlib.metadata.Distribution) -> str:
    """A hash of the hashes of a package's installed files, 64 hex digits."""
    record = distribution.read_text("RECORD") or ""
    # Byte-compiled files and installer notes differ between machines with the same package.
    files = sorted(line for line in record.splitlines() if ".pyc," not in line and ".dist-info/" not in line)
    return hashlib.sha256("\n".join(files).encode()).hexdigest()
