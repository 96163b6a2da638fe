"""A bundle for a server is built with the toolchain that the server pins, or the build says what to install."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
from command import TINY, rpac

from rpac.bundle import describe, is_bundle, stage_bundle
from rpac.devices.servers import TESTED, server
from rpac.devices.toolchain import PACKAGES, toolchain
from rpac.errors import TargetError
from rpac.files.publish import publish
from rpac.spec import Spec


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, list[str]]]:
    """Version and requirements of packages that are as if they were installed here."""
    packages: dict[str, tuple[str, list[str]]] = {}

    def found(name: str) -> tuple[str, list[str]]:
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(importlib.metadata, "version", lambda name: found(name)[0])
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: found(name)[1])
    return packages


@pytest.mark.parametrize("text", ["vllm==0.32.0", "vllm-tpu==0.32.0", " tpu-inference == 0.32.0 "])
def test_a_tested_server_has_its_pins(text: str) -> None:
    found = server(text)
    assert tuple(found.pins) == PACKAGES
    assert found.pins == {"jax": "0.11.2", "jaxlib": "0.11.2", "libtpu": "0.0.48"}
    assert str(found) in ("vllm==0.32.0", "tpu-inference==0.32.0")
    found.require({**found.pins, "python": "3.12.1"})


def test_another_toolchain_is_refused_with_the_command_that_installs_the_servers() -> None:
    with pytest.raises(TargetError) as raised:
        server("vllm==0.32.0").require({"jax": "0.11.2", "jaxlib": "0.10.2", "libtpu": "0.0.44"})
    message = str(raised.value)
    assert message.startswith("found jaxlib 0.10.2, libtpu 0.0.44; must be jax==0.11.2")
    assert message.endswith("\n  python -m pip install jax==0.11.2 jaxlib==0.11.2 libtpu==0.0.48")


@pytest.mark.parametrize("text", ["vllm", "vllm==", "triton==1", "jax==0.11.2"])
def test_what_names_no_server_is_refused(text: str) -> None:
    with pytest.raises(TargetError, match=r"must be one of vllm==VERSION, tpu-inference==VERSION, sglang-jax==VERSION"):
        server(text)


def test_a_server_whose_jax_is_too_old_is_refused() -> None:
    with pytest.raises(TargetError, match=r"sglang-jax==0\.0\.2 asks for jax 0\.8; .* leave --for out"):
        server("sglang-jax==0.0.2")


def test_a_version_that_is_installed_here_says_its_pins_itself(installed: dict[str, tuple[str, list[str]]]) -> None:
    with pytest.raises(TargetError, match=r"found vllm==0\.40\.0, whose pins are not known; must be vllm==0\.32\.0"):
        server("vllm==0.40.0")
    installed["vllm-tpu"] = "0.40.0", ["six>=1.16", "tpu-inference==0.40.0", 'zentorch==2.14; extra == "zen"']
    installed["tpu-inference"] = "0.40.0", ["jax[tpu]==0.12.0", "jaxlib (==0.12.0)", "libtpu==0.0.49.1", "flax>=0.12"]
    assert server("vllm==0.40.0").pins == {"jax": "0.12.0", "jaxlib": "0.12.0", "libtpu": "0.0.49.1"}
    installed["sglang-jax"] = "0.1.0", ["jax[tpu]~=0.11.1"]
    with pytest.raises(TargetError, match=r"sglang-jax==0\.1\.0, whose pins are not known"):
        server("sglang-jax==0.1.0")


def test_a_manifest_names_the_server_that_a_bundle_was_built_for(
    tmp_path: Path, tiny: Spec, programs: list[Any]
) -> None:
    with publish(tmp_path / "tiny.rpac", is_bundle) as stage:
        stage_bundle(stage, tiny, programs, server=str(server("vllm==0.32.0")))
    assert describe(tmp_path / "tiny.rpac")["server"] == "vllm==0.32.0"
    assert "built for vllm==0.32.0\n" in rpac("inspect", tmp_path / "tiny.rpac", cache=tmp_path).stdout


def test_the_command_refuses_and_the_manifest_records(tmp_path: Path) -> None:
    pins = TESTED["vllm", "0.32.0"]
    here = {name: toolchain()[name] for name in PACKAGES}
    done = rpac("build", TINY, "--target", "cpu", "-o", tmp_path, "--for", "vllm==0.32.0", cache=tmp_path / "cache")
    if here == pins:
        assert done.returncode == 0, done.stderr
        assert describe(tmp_path / "tiny.rpac")["server"] == "vllm==0.32.0"
    else:
        assert done.returncode == TargetError.exit_code
        assert "python -m pip install jax==0.11.2 jaxlib==0.11.2 libtpu==0.0.48" in done.stderr
        assert not (tmp_path / "tiny.rpac").exists()
