"""The same for the TPUs, which need none to be there: what is exported, what is compiled, and that it is reproducible.

These also run on the newest jax, so they go no deeper than the public ways in and `lower_all`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from command import ROOT, TINY, rpac

from rpac.build import sources_of
from rpac.bundle import read_manifest, verify_bundle
from rpac.contract.program import Lowered, Program
from rpac.devices.chip import TPU_TARGETS, chip
from rpac.errors import CompileError
from rpac.kernels import render
from rpac.lower import Cache, Task, lower_all, tasks_of
from rpac.plan import DecodeWaves, plan_spec
from rpac.spec import Spec, load_spec, parse_spec

pytestmark = pytest.mark.compile

Tree = Callable[[Path], dict[str, bytes]]
Built = Callable[[str], Path]

MAX_EXPORTED = 600_000  # a wave of tiles is unrolled
MAX_EXECUTABLE = 3_000_000
NAMES = {"rpa_decode", "rpa_prefill", "rpa_mixed"}
KERNELS = {"decode": {"rpa_decode"}, "prefill": {"rpa_prefill"}, "mixed": {"rpa_decode", "rpa_mixed"}}


def blob(bundle: Path, program: Program, tier: str) -> bytes:
    return (bundle / "blobs" / getattr(program, tier).sha256).read_bytes()


def kernels_in(text: str) -> set[str]:
    return {name for name in NAMES if re.search(rf"\b{name}\b", text)}


def lowered(spec: Spec, target: str, kind: str, tokens: int) -> Lowered:
    """One variant of a spec, lowered as a build does."""
    tasks = tasks_of(spec, sources_of(spec, [target]))
    (result,) = lower_all([task for task in tasks if (task.kind, task.tokens) == (kind, tokens)], Cache(None), 1)
    return result


@pytest.mark.parametrize("target", TPU_TARGETS)
def test_every_variant_is_there_in_both_tiers_and_small(target: str, built: Built) -> None:
    manifest = verify_bundle(built(target))
    (found,) = manifest.targets.values()
    device = chip(target)
    assert (found.name, found.device_kind, found.topology) == (target, device.device_kind, device.topology)
    assert "cl/" in found.toolchain["libtpu_build"]
    assert sorted(map(str, (program.variant for program in found.programs))) == [
        "decode/32", "decode/8", "mixed/32", "mixed/8", "prefill/32"
    ]  # fmt: skip
    for program in found.programs:
        assert 0 < program.exported.size <= MAX_EXPORTED, program.variant
        assert program.executable is not None, program.variant
        assert 0 < program.executable.size <= MAX_EXECUTABLE, program.variant


@pytest.mark.parametrize("target", TPU_TARGETS)
def test_a_program_holds_the_kernels_that_it_needs_and_no_other(target: str, built: Built) -> None:
    from jax import export

    bundle = built(target)
    (found,) = read_manifest(bundle).targets.values()
    for program in found.programs:
        needed = KERNELS[program.variant.kind]
        module = export.deserialize(bytearray(blob(bundle, program, "exported"))).mlir_module()
        assert kernels_in(module) == needed, program.variant
        assert kernels_in(blob(bundle, program, "executable").decode("latin-1")) == needed, program.variant


@pytest.mark.parametrize("target", TPU_TARGETS)
def test_the_cache_is_updated_in_place(target: str, built: Built) -> None:
    """In the export and in what was compiled of it, with no copy of the cache among the temporaries."""
    from jax import export

    bundle = built(target)
    (found,) = read_manifest(bundle).targets.values()
    for program in found.programs:
        exported = export.deserialize(bytearray(blob(bundle, program, "exported")))
        assert exported.platforms == ("tpu",)
        fourth = exported.mlir_module().split("%arg3: ", 1)[1].split("%arg4: ", 1)[0]
        assert "tf.aliasing_output = 1" in fourth, program.variant
        assert program.aliases == {"kv_cache": 1}
        assert program.memory["temp_bytes"] < program.args[3].nbytes
        shapes = [tuple(aval.shape) for aval in exported.in_avals]
        assert shapes == [dims.shape for dims in program.args]  # none was dropped as unused


@pytest.mark.parametrize("target", TPU_TARGETS)
def test_nothing_of_this_machine_is_in_a_bundle(target: str, built: Built, tree: Tree) -> None:
    bundle = built(target)
    places = {str(ROOT), str(Path.home()), str(bundle.parent), str(Path(pytest.__file__).parents[1])}
    for name, data in tree(bundle).items():
        assert [place for place in places if place.encode() in data] == [], name


@pytest.mark.once
def test_two_builds_in_two_folders_with_two_empty_caches_are_byte_identical(
    built: Built, cache: Path, tmp_path: Path, tree: Tree
) -> None:
    built("v6e"), built("cpu")
    one = rpac("build", TINY, "--target", "v6e", "--target", "cpu", "-o", tmp_path / "one", cache=cache)
    assert one.returncode == 0, one.stderr
    assert "compiled" not in one.stderr  # it is of the cold builds above
    other = rpac(
        "build", TINY, "--target", "cpu", "--target", "v6e", "-o", "a/deeper/other", "--jobs", 1,
        cache=tmp_path / "cache",
        cwd=tmp_path,
        env={
            "PYTHONHASHSEED": "3",
            "TZ": "Pacific/Auckland",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "LIBTPU_INIT_ARGS": "--xla_tpu_enable_async_collective_fusion=false",
        },
    )  # fmt: skip
    assert other.returncode == 0, other.stderr
    assert "cached" not in other.stderr
    assert tree(tmp_path / "one") == tree(tmp_path / "a" / "deeper" / "other")


def test_the_decode_program_of_a_real_model_compiles_for_tpu7x() -> None:
    result = lowered(load_spec(ROOT / "specs" / "llama3-8b.yaml"), "tpu7x", "decode", 64)
    assert len(result.exported) <= MAX_EXPORTED
    assert result.executable is not None
    assert len(result.executable) <= MAX_EXECUTABLE
    assert (result.device_kind, result.topology) == ("TPU7x", "tpu7x:2x2x1")


def test_a_program_for_eight_devices_compiles_without_a_word_between_them() -> None:
    """That is proved when it is lowered, and that the part of the cache on each device is updated in place."""
    heads = TINY.read_text().replace("q_heads: 4", "q_heads: 16").replace("kv_heads: 2", "kv_heads: 4")
    spec = parse_spec(heads + "parallel: {tensor: 8}\n", "tiny.yaml")
    result = lowered(spec, "v6e", "mixed", 8)
    assert result.topology == "v6e:2x4"
    assert result.executable is not None
    assert kernels_in(result.executable.decode("latin-1")) == KERNELS["mixed"]


def test_the_largest_page_table_that_a_plan_has_in_smem_compiles() -> None:
    """One sequence more has its page table in HBM, and this is not too many for SMEM."""
    most = next(seqs for seqs in range(256, 0, -1) if fits_smem(seqs))
    assert 100 < most < 256
    result = lowered(with_seqs(most), "v5e", "mixed", 256)
    assert result.executable is not None


def with_seqs(seqs: int) -> Spec:
    """Tiny with page tables of 2048 pages each."""
    text = TINY.read_text()
    values = {"max_model_len": "32768", "max_num_tokens": "256", "token_buckets": "[256]", "max_num_seqs": f"{seqs}"}
    for name, value in {**values, "prefill_chunk": "16\n  num_pages: 4096"}.items():
        text, count = re.subn(rf"\b{name}: .*", f"{name}: {value}", text)
        assert count == 1, name
    return parse_spec(text, "long.yaml")


def fits_smem(seqs: int) -> bool:
    return all(plan.recipe.page_table == "smem" for plan in plan_spec(with_seqs(seqs), "v5e"))


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_running_out_of_vmem_names_the_tiles_the_need_and_the_limit(kind: str) -> None:
    """A plan whose limit is a quarter of its need, as if the count of what a kernel takes were wrong."""
    spec = load_spec(TINY)
    plan = next(plan for plan in plan_spec(spec, "v6e") if plan.kind == kind)
    plan = dataclasses.replace(plan, vmem_limit=plan.vmem_need // 4)
    (task, *_) = tasks_of(spec, [(plan, render(spec, plan))])
    with pytest.raises(CompileError) as raised:
        lower_all([task], Cache(None), 1)
    tiles = plan.decode or plan.block
    assert tiles is not None
    message = str(raised.value)
    assert message.startswith(f"v6e {kind} t{task.tokens}: the compiler ran out of VMEM with tiles ")
    size = "tile" if isinstance(tiles, DecodeWaves) else "block"
    assert f"'{size}': {getattr(tiles, size)}" in message
    assert f"counted need {plan.vmem_need:,} bytes, limit {plan.vmem_limit:,}, the core has 134,217,728" in message
    assert "lower serving.page_size or serving.max_num_seqs" in message
    assert raised.value.exit_code == 3


def test_a_kernel_that_mosaic_refuses_is_a_compile_error() -> None:
    source = "def ragged_paged_attention(queries, keys, values, kv_cache, *_):\n"
    source += "    import jax\n    from jax.experimental import pallas as pl\n"
    source += "    def kernel(q, o):\n        o[...] = jax.numpy.sort(q[...], axis=0)\n"
    source += "    return pl.pallas_call(kernel, out_shape=queries)(queries), kv_cache\n"
    task = with_source(source)
    with pytest.raises(CompileError, match=rf"^{task.label}: \w+ from the compiler:\n  \S"):
        lower_all([task], Cache(None), 1)


def test_a_program_that_copies_the_cache_is_refused() -> None:
    source = "def ragged_paged_attention(queries, keys, values, kv_cache, *_):\n"
    source += "    import jax.numpy as jnp\n    return queries, jnp.sort(kv_cache, axis=0)\n"
    with pytest.raises(CompileError, match="does not update the cache in place"):
        lower_all([with_source(source)], Cache(None), 1)


def with_source(text: str) -> Task:
    """Tiny's smallest decode program for v6e, of another source."""
    spec = load_spec(TINY)
    task = next(task for task in tasks_of(spec, sources_of(spec, ["v6e"])) if (task.kind, task.tokens) == ("decode", 8))
    return dataclasses.replace(task, source=dataclasses.replace(task.source, text=text))
