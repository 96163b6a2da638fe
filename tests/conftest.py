"""Fixtures for all tests: stand-in programs of the tiny spec, and bundles of it that are built once a run.

A stand-in keeps the contract's signature and donation, and computes almost nothing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from command import ROOT, TINY, rpac

from rpac.bundle import write_bundle
from rpac.contract import arrays as layout
from rpac.spec import Spec, load_spec, parse_spec

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["RPAC_TUNED"] = "none"  # not those of whoever runs the tests

# The same examples on every machine and every run.
hypothesis.settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=150)
hypothesis.settings.load_profile("fixed")

KIND_CODES = {"decode": 1, "prefill": 2, "mixed": 3}
VARIANTS = [("decode", 8), ("decode", 32), ("prefill", 32), ("mixed", 8), ("mixed", 32)]


@dataclass(frozen=True)
class StandInSource:
    path: str
    text: str = "raise SystemExit('a kernel source was run')\n"


@dataclass(frozen=True)
class StandIn:
    """What the lowering of one variant hands on."""

    kind: str
    tokens: int
    source: StandInSource
    exported: bytes
    executable: bytes | None = None
    target: str = "cpu"
    device_kind: str = "cpu"
    topology: str | None = None
    layer: str = ""
    toolchain: dict[str, str] = field(default_factory=lambda: {"jax": "any", "libtpu_build": "none"})
    plan: dict[str, Any] = field(default_factory=lambda: {"tile": [8, 128]})
    flags: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, Any] = field(default_factory=lambda: {"kv_cache": 1})
    memory: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="session")
def tiny() -> Spec:
    """The shipped spec with a page table of 8 pages, so that one fits a line of a test."""
    text = (Path(__file__).parents[1] / "specs" / "tiny.yaml").read_text()
    short = text.replace("max_model_len: 512", "max_model_len: 128")
    assert short != text
    return parse_spec(short, "tiny.yaml")


@pytest.fixture(scope="session")
def programs(tiny: Spec) -> list[StandIn]:
    """All variants of tiny for cpu. A program returns 2 * queries + its kind's code, and writes the first of `kv_lens`
    all over the page that `page_indices` names first."""
    return [stand_in(tiny, kind, tokens) for kind, tokens in VARIANTS]


@pytest.fixture(scope="session")
def native_programs(tiny: Spec) -> list[StandIn]:
    """As `programs`, with executables for this machine's CPU in place of a TPU's."""
    return [stand_in(tiny, kind, tokens, native=True) for kind, tokens in VARIANTS]


@pytest.fixture
def bundle(tmp_path: Path, tiny: Spec, programs: list[StandIn]) -> Path:
    return written(tmp_path, tiny, programs)


@pytest.fixture
def native_bundle(tmp_path: Path, tiny: Spec, native_programs: list[StandIn]) -> Path:
    return written(tmp_path / "native", tiny, native_programs)


def written(folder: Path, spec: Spec, programs: list[StandIn]) -> Path:
    path = folder / "tiny.rpac"
    write_bundle(path, spec, programs)
    return path


@cache
def stand_in(spec: Spec, kind: str, tokens: int, native: bool = False) -> StandIn:
    import jax
    from jax import export

    from rpac.devices.client import build_string

    def program(queries, keys, values, kv_cache, kv_lens, page_indices, cu_q_lens, distribution):  # type: ignore[no-untyped-def]
        return 2 * queries + KIND_CODES[kind], kv_cache.at[page_indices[0]].set(kv_lens[0].astype(kv_cache.dtype))

    # An executable has no argument list but its own: without keep_unused, those it ignores would be missing from it.
    jitted = jax.jit(program, donate_argnums=3, keep_unused=True)
    shapes = [jax.ShapeDtypeStruct(dims.shape, dims.dtype) for dims in layout.arg_specs(spec, tokens)]
    exported = bytes(export.export(jitted, platforms=("cpu",))(*shapes).serialize(vjp_order=0))
    source = StandInSource(f"cpu/{kind}.py")
    if not native:
        return StandIn(kind, tokens, source, exported)
    executable = jitted.lower(*shapes).compile().runtime_executable().serialize()
    toolchain = {"jax": jax.__version__, "libtpu": "0.0.0", "cpu_build": build_string(jax.devices()[0].client)}
    return StandIn(kind, tokens, source, exported, executable, toolchain=toolchain)


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Every file under a folder, with its bytes."""
    return lambda root: {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of this run see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def cache(shared: Path) -> Path:
    """The cache that `built` fills."""
    return shared / "rpac-cache"


@pytest.fixture(scope="session")
def built(shared: Path, cache: Path) -> Callable[[str], Path]:
    """`built(target)` is the bundle of tiny for one target."""

    def build(target: str) -> Path:
        out = shared / "rpac-built" / target
        out.mkdir(parents=True, exist_ok=True)
        with (out / "once").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (out / "tiny.rpac").exists():
                done = rpac("build", TINY, "--target", target, "-o", out, cache=cache)
                assert done.returncode == 0, done.stderr
        return out / "tiny.rpac"

    return build


@pytest.fixture(scope="session")
def small(shared: Path) -> Path:
    """The bundle of small.yaml, built once a run through the command line, however many test processes ask."""
    folder = shared / "rpac-small"
    folder.mkdir(exist_ok=True)
    with (folder / "once").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "small.rpac").exists():
            done = rpac("build", ROOT / "tests" / "engine" / "small.yaml", "-o", folder, cache=folder / "cache")
            assert done.returncode == 0, done.stderr
    return folder / "small.rpac"


@pytest.fixture(scope="session")
def dumps(shared: Path) -> Path:
    """Where schedules are kept, for all test processes of this run."""
    return shared / "rpac-dumps"


@pytest.fixture
def bundled(tmp_path: Path) -> Callable[..., Path]:
    """`bundled()` writes a bundle of tiny for tpu7x; a prediction compiles its sources, so its blobs are stand-ins."""
    from rpac.build import sources_of
    from rpac.contract.program import Lowered
    from rpac.devices.chip import chip
    from rpac.devices.toolchain import toolchain
    from rpac.lower import tasks_of

    def write(name: str = "a", spec: Spec | None = None, **made_by: str) -> Path:
        spec = spec or load_spec(TINY)
        device = chip("tpu7x")
        lowered = [
            Lowered(
                task.target, task.kind, task.tokens, task.source, task.plan, exported=b"stand-in", executable=None,
                device_kind=device.device_kind, topology=device.topology, toolchain={**toolchain(), **made_by},
                flags={}, aliases={"kv_cache": 1}, memory={},
            )
            for task in tasks_of(spec, sources_of(spec, ["tpu7x"]))
        ]  # fmt: skip
        path = tmp_path / name / "tiny.rpac"
        write_bundle(path, replace(spec, targets=("tpu7x",)), lowered)
        return path

    return write
