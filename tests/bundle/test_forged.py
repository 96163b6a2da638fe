"""A bundle that verifies and that rpac never made: what it calls, and which one it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from forged import calling

import rpac
from rpac.bundle import describe, write_bundle
from rpac.engine import load
from rpac.engine.custom_calls import refuse_custom_calls
from rpac.errors import BundleError
from rpac.spec import Spec

DECODE = rpac.Variant("decode", 8)


def test_an_export_that_calls_a_function_of_the_process_is_refused(
    tmp_path: Path, tiny: Spec, programs: list[Any]
) -> None:
    forged = dataclasses.replace(programs[0], exported=calling(programs[0].exported))
    write_bundle(tmp_path / "tiny.rpac", tiny, [forged])
    engine = load(tmp_path / "tiny.rpac", target="cpu")
    for use in (lambda: engine.warm([DECODE]), lambda: engine.program("decode", 8)):
        with pytest.raises(
            BundleError, match=r"program decode/8: its export calls lapack_\w+; must call nothing outside"
        ):
            use()


@pytest.mark.parametrize(
    ("platforms", "text", "refused"),
    [
        (("tpu",), '%0 = stablehlo.custom_call @tpu_custom_call(%arg0) {backend_config = "..."}', ""),
        (("cpu",), "%0 = stablehlo.custom_call @tpu_custom_call(%arg0)", "tpu_custom_call"),
        (("cpu", "tpu"), "%0 = stablehlo.custom_call @tpu_custom_call(%arg0)", "tpu_custom_call"),
        (("tpu",), '%0 = stablehlo.custom_call @"xla_ffi_python_cpu_callback"(%arg0)', "xla_ffi_python_cpu_callback"),
        (("cuda",), '"stablehlo.custom_call"(%0) <{call_target_name = "lapack_sgetrf_ffi"}>', "lapack_sgetrf_ffi"),
        (("cpu",), "%0 = stablehlo.add %arg0, %arg1", ""),
        (("tpu",), '%0 = "stablehlo.outfeed"(%arg0, %token) <{outfeed_config = ""}>', "outfeed"),
        (("cpu",), "%0:2 = stablehlo.infeed %token", "infeed"),
    ],
)
def test_what_a_program_may_call_goes_by_its_platforms(platforms: tuple[str, ...], text: str, refused: str) -> None:
    class Stub:
        def __init__(self) -> None:
            self.platforms = platforms

        def mlir_module(self) -> str:
            return text

    exported: Any = Stub()
    if not refused:
        refuse_custom_calls(f"program {DECODE}", exported)
        return
    with pytest.raises(BundleError, match=f"its export calls {refused}; must call"):
        refuse_custom_calls(f"program {DECODE}", exported)


def test_a_bundle_of_another_digest_is_refused_before_anything_of_it_is_used(
    tmp_path: Path, tiny: Spec, programs: list[Any]
) -> None:
    path = tmp_path / "tiny.rpac"
    write_bundle(path, tiny, programs)
    known = describe(path)["digest"]
    assert load(path, target="cpu", expect_digest=known).name == "tiny"
    write_bundle(path, tiny, programs[:2])
    with pytest.raises(BundleError, match=rf"its digest is [0-9a-f]{{64}}; must be {known}, as expect_digest says"):
        load(path, target="cpu", expect_digest=known)
