"""The engine runs the one program that a batch needs, counts it, and compiles nothing it was not asked to."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import timeit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rpac
from rpac import runtime
from rpac.batch import Batch, Limits
from rpac.bundle import Variant, write_bundle
from rpac.engine import Count, Engine, load
from rpac.errors import BatchError, SelectionError, TargetError
from rpac.select import select
from rpac.spec import Spec

BUILT = {Variant("decode", 8), Variant("decode", 32), Variant("prefill", 32), Variant("mixed", 8), Variant("mixed", 32)}
LIMITS = Limits(page_size=16, pages_per_seq=8, max_num_seqs=4, num_pages=32, prefill_chunk=16, token_buckets=(8, 32))

# New tokens of each sequence -> the program that must run, and the code that its stand-in adds.
BATCHES = [
    ([1, 1, 1], Variant("decode", 8), 1),
    ([], Variant("decode", 8), 1),
    ([16], Variant("prefill", 32), 2),
    ([16, 16], Variant("prefill", 32), 2),
    ([1, 5], Variant("mixed", 8), 3),
    ([5], Variant("mixed", 8), 3),
    ([1, 16], Variant("mixed", 32), 3),
    ([1, 16, 3], Variant("mixed", 32), 3),
]


def arrays(engine: Engine, tokens: int) -> list[jax.Array]:
    """Queries of ones, and keys, values and a cache of zeros, on the engine's device."""
    dims = engine.programs[Variant("mixed", tokens)].args[:4]
    made = [jnp.ones if one.name == "queries" else jnp.zeros for one in dims]
    return [jax.device_put(make(one.shape, one.dtype), engine.device) for make, one in zip(made, dims, strict=True)]


def batch_of(q_lens: Sequence[int]) -> Batch:
    """Sequences with 2 tokens of context, each on pages of its own from page 5 on."""
    tables = [[5 + 4 * row, 6 + 4 * row] for row in range(len(q_lens))]
    return Batch.build(LIMITS, q_lens, [2] * len(q_lens), tables)


def metadata(batch: Batch) -> list[Any]:
    return [batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution]


def call(engine: Engine, q_lens: Sequence[int], **options: Any) -> tuple[jax.Array, jax.Array]:
    batch = batch_of(q_lens)
    return engine(*arrays(engine, batch.tokens), *metadata(batch), **options)


@contextmanager
def compiles() -> Iterator[list[str]]:
    """What JAX traces, lowers or compiles meanwhile."""
    seen: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def python(code: str, *args: str, **env: str) -> Any:
    """The JSON that a fresh process prints last."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **env}
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(params=["portable", "executable"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Both tiers; this machine's CPU client stands in for a TPU's."""
    return load(request.getfixturevalue("bundle" if request.param == "portable" else "native_bundle"), target="cpu")


@pytest.mark.parametrize(("q_lens", "variant", "code"), BATCHES, ids=str)
def test_each_batch_runs_the_program_that_it_needs(
    engine: Engine, q_lens: list[int], variant: Variant, code: int
) -> None:
    out, kv_cache = call(engine, q_lens)
    assert out.shape == (variant.tokens, 4, 128)
    assert np.all(np.asarray(out, np.float32) == 2 + code)
    page = batch_of(q_lens).page_indices[0]
    assert np.all(np.asarray(kv_cache[page], np.float32) == batch_of(q_lens).kv_lens[0])
    assert list(engine.counts) == [variant]


def test_the_cache_is_donated_and_goes_through_many_calls(engine: Engine) -> None:
    queries, keys, values, cache = arrays(engine, 8)
    for length in range(1, 5):
        batch = Batch.build(LIMITS, [1], [length], [[length]])
        donated = cache
        _, cache = engine(queries, keys, values, donated, *metadata(batch))
        assert donated.is_deleted()
    assert not queries.is_deleted()
    assert [int(cache[page, 0, 0, 0, 0]) for page in range(6)] == [0, 2, 3, 4, 5, 0]


def test_the_donated_cache_is_not_copied(engine: Engine) -> None:
    queries, keys, values, cache = arrays(engine, 8)
    address = cache.unsafe_buffer_pointer()
    _, cache = engine(queries, keys, values, cache, *metadata(batch_of([1])))
    assert cache.unsafe_buffer_pointer() == address


def test_a_cache_in_another_layout_is_refused_by_the_name_of_the_layout(
    tmp_path: Path, tiny: Spec, programs: list[Any], bundle: Path
) -> None:
    separate = dataclasses.replace(tiny, serving=dataclasses.replace(tiny.serving, kv_layout="separate"))
    write_bundle(tmp_path / "separate.rpac", separate, programs)
    engine, other = load(tmp_path / "separate.rpac", target="cpu"), load(bundle, target="cpu")
    assert (engine.kv_layout, other.kv_layout) == ("separate", "interleaved")
    message = re.escape(
        "kv_cache is bfloat16[32, 16, 2, 2, 128]; must be bfloat16[32, 2, 2, 16, 128], kv_layout separate; "
    )
    with pytest.raises(BatchError, match=message):
        engine(*arrays(other, 8), *metadata(batch_of([1])))


def test_counts_add_up(engine: Engine) -> None:
    assert engine.counts == {}
    for q_lens in ([1, 1, 1], [1], [1, 5], [16, 16]):
        call(engine, q_lens)
    assert engine.counts == {
        Variant("decode", 8): Count(calls=2, rows=4, tokens=4, padding=12),
        Variant("mixed", 8): Count(calls=1, rows=2, tokens=6, padding=2),
        Variant("prefill", 32): Count(calls=1, rows=2, tokens=32, padding=0),
    }


def test_calls_from_many_threads_are_all_counted(engine: Engine) -> None:
    def work() -> None:
        for _ in range(10):
            call(engine, [1, 1])

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.counts == {Variant("decode", 8): Count(calls=60, rows=120, tokens=120, padding=360)}


@pytest.mark.parametrize("where", ["device", "host"])
def test_arguments_may_lie_on_the_host_or_the_device(engine: Engine, where: str) -> None:
    queries, keys, values, cache = arrays(engine, 8)
    put = jnp.asarray if where == "device" else np.asarray
    rest = [put(array) for array in metadata(batch_of([1]))]
    out, _ = engine(put(queries), put(keys), put(values), cache, *rest)
    assert np.all(np.asarray(out, np.float32) == 3)


def test_validation_of_values_can_be_left_to_the_caller(engine: Engine) -> None:
    batch = batch_of([1, 1])
    wrong = batch.kv_lens * 1000
    with pytest.raises(BatchError, match="kv_lens"):
        engine(*arrays(engine, 8), wrong, *metadata(batch)[1:])
    engine(*arrays(engine, 8), wrong, *metadata(batch)[1:], validate=False)


def test_a_caller_may_pad_to_a_larger_bucket(engine: Engine) -> None:
    out, _ = engine(*arrays(engine, 32), *metadata(batch_of([1])))
    assert out.shape[0] == 32
    assert engine.counts == {Variant("decode", 32): Count(calls=1, rows=1, tokens=1, padding=31)}


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
    toolchain = {"libtpu": "0.0.1", "libtpu_build": "another build"}
    write_bundle(path, tiny, [dataclasses.replace(one, toolchain=toolchain) for one in native_programs])
    with caplog.at_level(logging.WARNING, "rpac"):
        engine = load(path, target="cpu", allow_compile=True)
    assert "was compiled by libtpu build 'another build'; this process has 'cpu'; must be the same;" in caplog.text
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


class StandInTpu:
    """A TPU as far as an engine looks at one; its client keeps what it is handed."""

    device_kind = "TPU v6 lite"
    platform = "tpu"
    id = 3

    def __init__(self, build: str) -> None:
        self.platform_version = f"PJRT C API\nTFRT TPU v6 lite\n{build}"
        self.handed: list[Any] = []

    @property
    def client(self) -> StandInTpu:
        return self

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
        def __init__(self, version: str) -> None:
            self.platform_version = version

    built = "Built on Jun 17 2026 11:08:48 (1781719728) cl/933746096"
    for version in (f"PJRT C API\nTFRT TPU v6 lite\n{built}", f"TFRT TPU v6 lite\n{built}"):
        assert runtime.build_string(Client(version)) == built


def test_select_is_total() -> None:
    """Over every distribution of up to max_num_seqs sequences and every number of rows."""
    chosen = set()
    for (i, j, k), tokens in itertools.product(itertools.product(range(5), repeat=3), range(34)):
        if not i <= j <= k:
            with pytest.raises(BatchError, match=r"must be 0 <= i <= j <= k"):
                select(BUILT, LIMITS, tokens, (i, j, k))
        elif tokens in LIMITS.token_buckets and (tokens == 32 or not (i == 0 < j == k)):
            variant = select(BUILT, LIMITS, tokens, (i, j, k))
            assert variant in BUILT
            assert variant.tokens == tokens
            chosen.add(variant)
        else:
            with pytest.raises(SelectionError, match="or build with\nserving:\n  "):
                select(BUILT, LIMITS, tokens, (i, j, k))
    assert chosen == BUILT


@pytest.mark.parametrize(
    ("tokens", "distribution", "text"),
    [
        (
            24,
            (2, 2, 2),
            "has 24 query rows; the token buckets built are 8, 32; pad queries, keys and values to one of them, "
            "or build with\nserving:\n  max_num_tokens: 32\n  token_buckets: [8, 24, 32]",
        ),
        (96, (0, 0, 2), "max_num_tokens: 96\n  token_buckets: [8, 32, 96]"),
        (8, (5, 5, 5), "max_num_seqs is 4; split the batch, or build with\nserving:\n  max_num_seqs: 5"),
        (8, (0, 1, 1), "pad to a larger bucket, or build with\nserving:\n  prefill_chunk: 8"),
    ],
)
def test_what_was_not_built_is_refused_with_the_lines_that_add_it(
    tokens: int, distribution: tuple[int, int, int], text: str
) -> None:
    with pytest.raises(SelectionError) as raised:
        select(BUILT, LIMITS, tokens, distribution)
    assert text in str(raised.value)


def test_a_program_that_a_bundle_lacks_is_never_substituted() -> None:
    with pytest.raises(SelectionError, match="needs the program decode/8; this bundle holds mixed/8; build the spec"):
        select({Variant("mixed", 8)}, LIMITS, 8, (1, 1, 1))


def test_selection_takes_under_20_microseconds(bundle: Path) -> None:
    engine = load(bundle, target="cpu")
    distribution = batch_of([1, 16, 3]).distribution
    best = min(timeit.repeat(lambda: engine.select(32, distribution), number=500, repeat=20)) / 500
    assert best < 20e-6


def test_the_public_names_are_these_and_all_there() -> None:
    assert rpac.__all__ == [
        "Batch", "BatchError", "BundleError", "CheckError", "CompileError", "Count", "Engine", "Limits",
        "OutOfPagesError", "OutputError", "PageError", "PlanError", "Problem", "RpacError", "ScheduleError",
        "SelectionError", "SpecError", "TargetError", "Variant", "load",
    ]  # fmt: skip
    assert all(getattr(rpac, name) is not None for name in rpac.__all__)
    assert set(rpac.__all__) <= set(dir(rpac))
    with pytest.raises(AttributeError, match="module 'rpac' has no attribute 'lod'"):
        rpac.lod  # noqa: B018


def test_importing_rpac_imports_nothing_else() -> None:
    code = "import json, sys; import rpac; print(json.dumps(sorted(sys.modules)))"
    modules = python(code)
    assert [name for name in modules if name.startswith("rpac")] == ["rpac", "rpac.errors"]
    assert not {"jax", "numpy", "yaml", "jinja2", "click", "libtpu"} & set(modules)


def test_serving_needs_neither_the_compiler_nor_its_dependencies(bundle: Path) -> None:
    code = """
import json, sys
for name in ("yaml", "jinja2", "click", "libtpu", "hypothesis", "pytest"):
    sys.modules[name] = None  # importing it raises, also where jax probes for it
import jax.numpy as jnp, rpac
engine = rpac.load(sys.argv[1], target="cpu")
batch = rpac.Batch.build(engine.limits, [1], [2], [[5]])
made = [jnp.ones(a.shape, a.dtype) for a in engine.programs[engine.select(8, batch.distribution)].args[:4]]
out, _ = engine(*made, batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.distribution)
print(json.dumps([float(out[0, 0, 0]), sorted(name for name in sys.modules if name.startswith("rpac."))]))
"""
    value, modules = python(code, str(bundle))
    assert value == 3
    roots = {name.split(".")[1] for name in modules}
    assert roots <= {"batch", "bundle", "engine", "errors", "layout", "publish", "runtime", "select", "compat"}
