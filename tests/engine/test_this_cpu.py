"""Executables of the cpu target: built on request for the CPU of this machine, and run by it without compiling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calls import compiles
from command import TINY, rpac

from rpac.bundle import verify_bundle
from rpac.devices import host
from rpac.engine import load

SMALL = Path(__file__).with_name("small.yaml")


def test_a_bundle_for_this_cpu_compiles_nothing_and_answers_like_the_oracle(small: Path, tmp_path: Path) -> None:
    done = rpac("build", SMALL, "--this-cpu", "-o", tmp_path, "--json", cache=small.parent / "cache")
    assert done.returncode == 0, done.stderr
    ends = [line.split(": ")[-1] for line in done.stderr.splitlines()]
    assert [end for end in ends if end in ("cached", "compiled", "compiled for this CPU")] == ["cached"] * 3 + [
        "compiled for this CPU"
    ] * 3
    assert all(variant["executable_bytes"] > 0 for variant in json.loads(done.stdout)["variants"])
    target = verify_bundle(tmp_path / "small.rpac").targets["cpu"]
    assert host.cpu_name() in target.toolchain["cpu_build"]

    engine = load(tmp_path / "small.rpac", target="cpu")
    with compiles() as seen:
        engine.warm()
    assert seen == []
    engine.warm(canary=True)


def test_for_this_cpu_without_the_cpu_target(tmp_path: Path) -> None:
    done = rpac("build", TINY, "--target", "v6e", "--this-cpu", "-o", tmp_path, cache=tmp_path / "cache")
    assert done.returncode == 3
    assert "found --this-cpu without the target cpu; add cpu to targets, or leave --this-cpu out" in done.stderr
    assert not list(tmp_path.glob("*.rpac"))


@pytest.mark.parametrize("missing", [False, True])
def test_a_cpu_has_one_name_whatever_the_order_of_its_features(
    missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(host, "CPUINFO", info)
    if missing:
        assert " of " in host.cpu_name.__wrapped__()
        return
    names = []
    for flags in ("fpu avx2", "avx2 fpu", "fpu"):
        info.write_text(f"processor\t: 0\nmodel name\t: A CPU\ncpu MHz\t\t: {len(names)}\nflags\t\t: {flags}\n\n")
        names.append(host.cpu_name.__wrapped__())
    assert names[0] == names[1] != names[2]
    assert all(name.startswith("A CPU, features ") for name in names)
