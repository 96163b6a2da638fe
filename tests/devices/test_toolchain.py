"""The toolchain is named exactly and without loading it, and a compiling process takes no setting from its user."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

import rpac
from rpac.devices.toolchain import ENVIRONMENT, PACKAGES, prepare, toolchain
from rpac.errors import TargetError

RECORD = """jax/__init__.py,sha256=aaaa,10
jax/core.py,sha256=bbbb,20
jax/__pycache__/core.cpython-311.pyc,,
jax-1.0.dist-info/INSTALLER,sha256=cccc,4
jax-1.0.dist-info/RECORD,,
"""


class Installed:
    version = "1.0"

    def __init__(self, record: str | None) -> None:
        self._record = record

    def read_text(self, name: str) -> str | None:
        assert name == "RECORD"
        return self._record


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], dict[str, str]]]:
    """The toolchain's name where every package has the RECORD given."""

    def name(record: str | None) -> dict[str, str]:
        monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Installed(record))
        toolchain.cache_clear()
        return toolchain()

    yield name
    toolchain.cache_clear()


def test_it_names_every_package_that_decides_the_result() -> None:
    found = toolchain()
    assert found["python"].split(".")[:2] == list(map(str, sys.version_info[:2]))
    assert found["rpac"] == rpac.__version__
    for name in PACKAGES:
        assert found[name] == importlib.metadata.version(name)
        assert len(found[f"{name}_files"]) == 16
    assert all(isinstance(value, str) for value in found.values())


def test_another_build_of_one_version_is_another_toolchain(named: Callable[[str | None], dict[str, str]]) -> None:
    assert named(RECORD) != named(RECORD.replace("bbbb", "eeee"))
    assert named(RECORD)["jax"] == named(RECORD.replace("bbbb", "eeee"))["jax"]


def test_how_a_package_was_installed_does_not_matter(named: Callable[[str | None], dict[str, str]]) -> None:
    lines = RECORD.splitlines()
    assert named(RECORD) == named("\n".join(reversed([*lines[:2], "jax-1.0.dist-info/REQUESTED,sha256=dddd,0"])))


def test_a_package_without_a_list_of_files_is_still_named(named: Callable[[str | None], dict[str, str]]) -> None:
    assert named(None)["jax"] == "1.0"


def test_a_missing_package_is_a_target_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.distribution

    def without_libtpu(name: str) -> importlib.metadata.Distribution:
        if name == "libtpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", without_libtpu)
    toolchain.cache_clear()
    try:
        with pytest.raises(TargetError, match=r"libtpu is not installed; install jax\[tpu\]") as raised:
            toolchain()
    finally:
        toolchain.cache_clear()
    assert raised.value.exit_code == 3


def test_naming_it_loads_nothing_of_it() -> None:
    code = "import sys; from rpac.devices.toolchain import toolchain; toolchain(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "jaxlib", "libtpu", "numpy"} & set(done.stdout.split())


def test_what_a_user_set_for_jax_and_the_compiler_is_no_part_of_a_build() -> None:
    environment = {
        "PATH": "/bin",
        "RPAC_CACHE": "/cache",
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "tpu",
        "XLA_FLAGS": "--xla_dump_to=/tmp/dump",
        "LIBTPU_INIT_ARGS": "--xla_tpu_scoped_vmem_limit_kib=1",
        "TPU_LIBRARY_PATH": "/another/libtpu.so",
    }
    prepare(environment)
    assert environment == {"PATH": "/bin", "RPAC_CACHE": "/cache", **ENVIRONMENT}
