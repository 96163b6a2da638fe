"""A sound bundle whose programs are for something else than this process has: its device, its JAX, its runtime."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import rpac
from rpac.bundle import write_bundle
from rpac.devices.client import build_string
from rpac.engine import load
from rpac.errors import BundleError, TargetError
from rpac.spec import Spec


def test_an_export_of_other_shapes_than_the_manifest_says(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    swapped = [dataclasses.replace(program, exported=programs[1].exported) for program in programs]
    write_bundle(tmp_path / "tiny.rpac", tiny, swapped)
    with pytest.raises(BundleError, match=r"program decode/8: its export takes and returns bfloat16\[32, 4, 128\]"):
        load(tmp_path / "tiny.rpac", target="cpu").warm()


def future(exported: Any) -> Any:
    return dataclasses.replace(exported, calling_convention_version=10_000)


def for_tpu(exported: Any) -> Any:
    return dataclasses.replace(exported, platforms=("tpu",))


@pytest.mark.parametrize(
    ("change", "text"),
    [(future, "found calling convention 10000; must be"), (for_tpu, "exported for platforms")],
)
def test_an_export_that_jax_cannot_use(
    tmp_path: Path, tiny: Spec, programs: list[Any], change: Callable[[Any], Any], text: str
) -> None:
    from jax import export

    changed = bytes(change(export.deserialize(bytearray(programs[0].exported))).serialize(vjp_order=0))
    write_bundle(tmp_path / "tiny.rpac", tiny, [dataclasses.replace(programs[0], exported=changed)])
    with pytest.raises(
        TargetError, match=rf"program decode/8: jax {jax.__version__} cannot (read|compile) its export .*{text}"
    ) as raised:
        load(tmp_path / "tiny.rpac", target="cpu").warm()
    assert raised.value.exit_code == 3


def test_a_bundle_of_another_target(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    path = tmp_path / "tiny.rpac"
    write_bundle(path, tiny, [dataclasses.replace(one, target="v6e", device_kind="TPU v6 lite") for one in programs])
    for target in (None, "cpu"):
        with pytest.raises(TargetError, match=r"the bundle has v6e \(TPU v6 lite\)") as raised:
            load(path, target=target)
        assert raised.value.exit_code == 3
        assert "of kind 'cpu'" in str(raised.value)


def test_a_target_that_this_device_is_not(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    path = tmp_path / "tiny.rpac"
    tpu = [dataclasses.replace(one, target="v6e", device_kind="TPU v6 lite") for one in programs]
    write_bundle(path, tiny, [*programs, *tpu])
    with pytest.raises(
        TargetError, match=r"found target 'v6e' and device .* of kind 'cpu'; the bundle has cpu \(cpu\), v6e"
    ):
        load(path, target="v6e")


def test_a_target_is_refused_before_its_blobs_are_read(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    path = tmp_path / "tiny.rpac"
    write_bundle(path, tiny, [dataclasses.replace(one, target="v6e", device_kind="TPU v6 lite") for one in programs])
    shutil.rmtree(path / "blobs")
    with pytest.raises(TargetError):
        load(path)


def test_an_executable_for_another_cpu(tmp_path: Path, tiny: Spec, native_programs: list[Any]) -> None:
    path = tmp_path / "tiny.rpac"
    toolchain = {"cpu_build": "jaxlib 0.10.2 on another"}
    write_bundle(path, tiny, [dataclasses.replace(one, toolchain=toolchain) for one in native_programs])
    with pytest.raises(TargetError) as raised:
        load(path, target="cpu")
    assert str(raised.value) == (
        f"{path}: target cpu was compiled for 'jaxlib 0.10.2 on another'; this process has "
        f"{build_string(jax.devices()[0].client)!r}; must be the same; build the bundle on this machine, "
        "or compile its portable programs here with allow_compile=True"
    )
    assert raised.value.exit_code == 3


def test_an_executable_that_the_runtime_does_not_take(tmp_path: Path, tiny: Spec, native_programs: list[Any]) -> None:
    path = tmp_path / "tiny.rpac"
    write_bundle(path, tiny, [dataclasses.replace(one, executable=b"of another runtime") for one in native_programs])
    with pytest.raises(TargetError, match=r"program decode/8: the runtime of .* does not take its executable"):
        load(path, target="cpu").warm([rpac.Variant("decode", 8)])  # all at once refuse in any order
