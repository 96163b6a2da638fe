"""Loading finds what was built for the device, and compiles nothing that it was not asked to."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from calls import BATCHES, BUILT, arrays, batch_of, call, compiles, metadata, python

from rpac.bundle import write_bundle
from rpac.contract.program import Variant
from rpac.devices.client import build_string
from rpac.engine import Engine, load
from rpac.errors import TargetError
from rpac.spec import Spec


def test_after_warm_no_call_compiles(engine: Engine) -> None:
    calls = [(batch_of(q_lens), tokens) for q_lens, (_, tokens), _ in BATCHES]
    calls.append((batch_of([1]), 32))
    for _, tokens in calls:  # what makes the arrays may compile
        arrays(engine, tokens)
    engine.warm()
    with compiles() as seen:
        for (batch, tokens), put in itertools.product(calls, (np.asarray, jax.device_put)):
            engine(*arrays(engine, tokens), *map(put, metadata(batch)))
    assert seen == []
    assert set(engine.counts) == BUILT


def test_warm_can_be_told_what_to_make_ready(bundle: Path) -> None:
    engine = load(bundle, target="cpu")
    with compiles() as seen:
        engine.warm([Variant("decode", 8)])
    assert sum("backend_compile" in event for event in seen) == 1


def test_loading_compiles_nothing_and_executables_never_do(bundle: Path, native_bundle: Path) -> None:
    with compiles() as seen:
        load(bundle, target="cpu")
        load(native_bundle, target="cpu").warm()
    assert seen == []


def test_no_kernel_source_is_needed_or_run(bundle: Path) -> None:
    sources = list((bundle / "source").rglob("*.py"))
    assert sources
    assert all("SystemExit" in source.read_text() for source in sources)  # running one would end this process
    shutil.rmtree(bundle / "source")
    out, _ = call(load(bundle, target="cpu"), [1])
    assert np.all(np.asarray(out, np.float32) == 3)


def test_a_loaded_engine_needs_its_bundle_no_more(bundle: Path) -> None:
    engine = load(bundle, target="cpu")
    shutil.rmtree(bundle)
    call(engine, [1])


def test_the_target_is_found_by_the_exact_device_kind(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    tpu = [dataclasses.replace(one, target="v6e", device_kind="TPU v6 lite") for one in programs]
    write_bundle(tmp_path / "tiny.rpac", tiny, [*tpu, *programs])
    assert load(tmp_path / "tiny.rpac").target == "cpu"
    assert load(tmp_path / "tiny.rpac", target="cpu").device.platform == "cpu"


def test_falling_back_to_the_portable_program_is_asked_for_and_logged(
    tmp_path: Path, tiny: Spec, native_programs: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tiny.rpac"
    toolchain = {"cpu_build": "another build"}
    write_bundle(path, tiny, [dataclasses.replace(one, toolchain=toolchain) for one in native_programs])
    with caplog.at_level(logging.WARNING, "rpac"):
        engine = load(path, target="cpu", allow_compile=True)
    found = build_string(jax.devices()[0].client)
    assert f"was compiled for 'another build'; this process has {found!r}; must be the same;" in caplog.text
    assert "compiling its portable programs (allow_compile)" in caplog.text
    out, _ = call(engine, [1])
    assert np.all(np.asarray(out, np.float32) == 3)


def test_an_executable_is_placed_on_the_device_asked_for(bundle: Path, native_bundle: Path) -> None:
    code = """
import json, sys, jax, jax.numpy as jnp, rpac
placed = []
for path in sys.argv[1:]:
    engine = rpac.load(path, device=jax.devices()[2])
    batch = rpac.Batch.build(engine.limits, [1], [2], [[5]])
    def call(device):
        made = [jnp.ones(a.shape, a.dtype, device=device) for a in engine.programs[rpac.Variant("decode", 8)].args[:4]]
        return engine(*made, batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
    placed.append([next(iter(array.devices())).id for array in call(jax.devices()[2])])
    try:
        call(jax.devices()[1])
    except rpac.BatchError as error:
        placed.append(str(error).replace('TFRT_CPU_', 'cpu:'))
print(json.dumps(placed))
"""
    wrong = "queries is on cpu:1; must be on cpu:2; move it with jax.device_put"
    flags = "--xla_force_host_platform_device_count=3"
    assert python(code, str(bundle), str(native_bundle), XLA_FLAGS=flags) == [[2, 2], wrong, [2, 2], wrong]


class StandInClient:
    """The client of a TPU: programs go to it, and it tells the process."""

    def __init__(self, tpu: StandInTpu) -> None:
        self.platform = tpu.platform
        self.platform_version = tpu.platform_version
        self.deserialize_executable = tpu.deserialize_executable

    def process_index(self) -> int:
        return StandInTpu.process_index


class StandInTpu:
    """A TPU as far as an engine looks at one; its client keeps what it is handed."""

    device_kind = "TPU v6 lite"
    platform = "tpu"
    id = 3
    process_index = 0

    def __init__(self, build: str) -> None:
        self.platform_version = f"PJRT C API\nTFRT TPU v6 lite\n{build}"
        self.handed: list[Any] = []

    @property
    def client(self) -> StandInClient:
        return StandInClient(self)

    def deserialize_executable(self, *args: Any) -> None:
        self.handed.append(args)


def tpu_programs(programs: list[Any]) -> list[Any]:
    """As a build for v6e hands them on; the executables are bytes that no runtime knows."""
    return [
        dataclasses.replace(
            one,
            target="v6e",
            device_kind="TPU v6 lite",
            topology="v6e:2x2",
            executable=f"{one.kind} {one.tokens}".encode(),
            toolchain={"libtpu": "0.0.42.1", "libtpu_build": "Built on Jun 17 2026 cl/933746096"},
        )
        for one in programs
    ]


def test_a_tpu_is_handed_the_very_bytes_of_its_executable(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    write_bundle(tmp_path / "tiny.rpac", tiny, tpu_programs(programs))
    device: Any = StandInTpu("Built on Jun 17 2026 cl/933746096")
    engine = load(tmp_path / "tiny.rpac", device=device)
    assert device.handed == []
    with compiles() as seen:
        engine.warm([Variant("prefill", 32)])
    assert seen == []
    ((data, devices, options),) = device.handed
    assert data == b"prefill 32"
    assert devices == [device]
    assert "Computation0{3}" in str(options.device_assignment)


def test_an_executable_of_another_build_never_reaches_the_tpu(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    write_bundle(tmp_path / "tiny.rpac", tiny, tpu_programs(programs))
    device: Any = StandInTpu("Built on Oct 22 2026 cl/1004524046")
    with pytest.raises(
        TargetError, match=r"'Built on Jun 17 2026 cl/933746096'; this process has 'Built on Oct 22 2026"
    ):
        load(tmp_path / "tiny.rpac", device=device)
    assert device.handed == []


def test_a_gpu_takes_the_portable_programs_of_its_platform(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    of_gpu = [dataclasses.replace(one, target="gpu", device_kind="gpu") for one in programs]
    write_bundle(tmp_path / "tiny.rpac", tiny, [*programs, *of_gpu])
    device: Any = StandInTpu("any")
    device.platform, device.device_kind = "gpu", "NVIDIA H200"
    assert load(tmp_path / "tiny.rpac", device=device).target == "gpu"
    with pytest.raises(
        TargetError, match=r"'cpu' and device .* of kind 'NVIDIA H200'; the bundle has cpu \(cpu\), gpu"
    ):
        load(tmp_path / "tiny.rpac", target="cpu", device=device)


def test_a_tpu_target_without_an_executable_is_refused(tmp_path: Path, tiny: Spec, programs: list[Any]) -> None:
    odd = [
        dataclasses.replace(one, executable=one.executable if one.kind != "mixed" else None)
        for one in tpu_programs(programs)
    ]
    write_bundle(tmp_path / "tiny.rpac", tiny, odd)
    device: Any = StandInTpu("Built on Jun 17 2026 cl/933746096")
    with pytest.raises(
        TargetError, match="target v6e holds no executable of mixed/8, mixed/32; must hold one of every"
    ):
        load(tmp_path / "tiny.rpac", device=device)


def test_the_build_string_ignores_how_the_client_names_itself() -> None:
    class Client:
        platform = "tpu"

        def __init__(self, version: str) -> None:
            self.platform_version = version

    built = "Built on Jun 17 2026 11:08:48 (1781719728) cl/933746096"
    for version in (f"PJRT C API\nTFRT TPU v6 lite\n{built}", f"TFRT TPU v6 lite\n{built}"):
        assert build_string(Client(version)) == built


DEVICES: dict[str, tuple[dict[str, object], str]] = {
    "a name": ({"device": "cpu"}, "found 'cpu', a str; must be a jax device; pass one of jax.devices(), or pass target='cpu'"),
    "a number": ({"device": 0}, "device: found 0, a int; must be a jax device; pass one of jax.devices()"),
    "names": ({"devices": ["tpu"]}, "devices: found 'tpu', a str; must be a jax device; pass one of jax.devices()"),
    "no list": ({"devices": "cpu"}, "devices: found 'cpu'; must be a list of jax devices, such as jax.devices()"),
    "one device": ({"devices": jax.devices()[0]}, "must be a list of jax devices"),
    "none": ({"devices": []}, "devices: found []; must be one device or more, each once"),
    "twice": ({"devices": jax.devices()[:1] * 2}, "must be one device or more, each once"),
    "both": ({"device": jax.devices()[0], "devices": jax.devices()}, "found both device and devices; must be one of the two"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "text"), DEVICES.values(), ids=DEVICES)
def test_what_is_no_device_is_named(bundle: Path, given: dict[str, object], text: str) -> None:
    with pytest.raises(TargetError) as raised:
        load(bundle, **given)  # type: ignore[arg-type]
    assert text in str(raised.value)


def test_an_engine_and_its_programs_are_told_in_a_line(bundle: Path) -> None:
    engine = load(bundle, target="cpu")
    engine.warm([Variant("decode", 8)])
    shown = repr(engine)
    assert shown.startswith(f"<Engine tiny for cpu on {engine.device}: decode/8, ")
    assert shown.endswith("; 1 of 5 ready>")
    program = repr(engine.programs[Variant("decode", 8)])
    assert program.startswith("<Program decode/8, portable, from cpu/decode.py: (queries: bfloat16[8, 4, 128], ")
    assert "-> (out: bfloat16[8, 4, 128], kv_cache: " in program
