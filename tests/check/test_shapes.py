"""Shapes that no shipped spec has: head counts, groups, head_dim and dtypes, in the interpreter, on cpu and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mutation import retiled

from rpac.check import check_source
from rpac.contract.attention import Attention
from rpac.kernels import render
from rpac.lower import Cache, lower_all, tasks_of
from rpac.plan import KIND_ORDER, DecodeWaves, KernelPlan, plan_spec
from rpac.spec import Spec, load_spec

TINY = load_spec(Path(__file__).parents[2] / "specs" / "tiny.yaml")
SEED = 0
SLOW = pytest.mark.slow


def shaped(q_heads: int, kv_heads: int, head_dim: int = 128, dtype: str = "bfloat16", **serving: object) -> Spec:
    """tiny with another model."""
    model = Attention(q_heads, kv_heads, head_dim, dtype, dtype, head_dim**-0.5)
    name = f"{q_heads}-{kv_heads}-{head_dim}-{dtype}"
    return replace(TINY, name=name, model=model, serving=replace(TINY.serving, **serving))


def quantized(spec: Spec, kv_dtype: str, kv_scale: str | None, quantize: str) -> Spec:
    """A spec with KV of 8 bits."""
    model = replace(spec.model, kv_dtype=kv_dtype, kv_scale=kv_scale, quantize=quantize)
    return replace(spec, name=f"{spec.name}-{kv_dtype}-{kv_scale}-{quantize}", model=model)


FEW = [
    shaped(2, 2),  # group 1
    shaped(8, 1),  # group 8, and the fewest rows a token can have
    shaped(4, 2, head_dim=256),
    shaped(4, 2, dtype="float32"),
]
SHAPES = [
    *FEW,
    shaped(16, 1),  # the largest group
    shaped(9, 3),  # heads that fill no register, and no pair
    shaped(8, 8),
    shaped(1, 1, head_dim=256),
    shaped(3, 1, head_dim=256, dtype="float32"),
    shaped(4, 2, page_size=64, prefill_chunk=32),
    shaped(4, 2, page_size=256),
    shaped(4, 2, token_buckets=(1, 32)),
    shaped(5, 1),
    shaped(3, 3),
    shaped(7, 7),
    shaped(14, 2),  # group 7
    shaped(4, 2, page_size=8),
    shaped(4, 2, page_size=512),
]


def separate(q_heads: int, kv_heads: int, head_dim: int = 128, dtype: str = "bfloat16", **serving: object) -> Spec:
    """As `shaped`, with separate K and V. A page table is no multiple of a tile, and longer than the fetch runs ahead."""
    page_size = serving.setdefault("page_size", 64)
    assert isinstance(page_size, int)
    long = {"max_model_len": 1024 + max(page_size, 32), "max_num_seqs": 6}
    return shaped(q_heads, kv_heads, head_dim, dtype, kv_layout="separate", **{**long, **serving})


SEPARATE_FEW = [separate(12, 3)]  # two KV heads share the rows of a product, the third has half of them
SEPARATE = [
    *SEPARATE_FEW,
    separate(3, 1, dtype="float32"),  # rows of a product that are no query's
    separate(1, 1),
    separate(8, 8),  # group 1
    separate(9, 3, page_size=16),
    separate(10, 2),  # group 5
    separate(8, 1),  # a set for each head
    separate(32, 2),  # the largest group
    separate(4, 2, head_dim=256),
    separate(3, 1, head_dim=256, dtype="float32"),
    separate(4, 2, page_size=256, prefill_chunk=32),
    separate(8, 2, page_size=16, token_buckets=(1, 32)),
    separate(4, 2, page_size=16, max_model_len=48, context_lens=(48,)),  # shorter than a tile
    separate(4, 2, max_num_seqs=32),  # more sequences than there are buffers for their new tokens
    separate(4, 2, dtype="float32", page_size=8),
    separate(4, 2, page_size=512, max_model_len=1024),
]

PADDED_FEW = [shaped(6, 3, head_dim=64), shaped(4, 2, head_dim=80)]
SHORT = {"max_model_len": 128, "max_num_seqs": 4, "page_size": 32}
# Rows that are no whole registers, and those that K and V share.
PADDED = [
    *PADDED_FEW,
    shaped(4, 2, head_dim=64, dtype="float32"),
    shaped(1, 1, head_dim=64),  # half of each word is padding
    shaped(16, 4, head_dim=64),  # sorted by exchange
    shaped(4, 2, head_dim=96),
    shaped(4, 2, head_dim=112),
    shaped(4, 2, head_dim=192),
    shaped(4, 2, head_dim=192, dtype="float32"),
    separate(6, 3, head_dim=64, **SHORT),
    separate(16, 4, head_dim=96, **SHORT),
    separate(4, 2, head_dim=64, dtype="float32", **SHORT),
]
EIGHT_BITS_FEW = [quantized(shaped(6, 3), "float8_e4m3fn", "head", "kernel")]
EIGHT_BITS_SEPARATE = quantized(separate(4, 2, **SHORT), "int8", "head", "kernel")
EIGHT_BITS = [
    *EIGHT_BITS_FEW,
    quantized(shaped(4, 2), "float8_e5m2", None, "caller"),
    quantized(shaped(16, 4), "int8", "head", "caller"),
    quantized(shaped(6, 3, head_dim=64), "int8", "tensor", "kernel"),
    quantized(separate(4, 2, head_dim=192, **SHORT), "int8", "head", "kernel"),
    quantized(shaped(4, 2, head_dim=80, dtype="float32"), "float8_e4m3fn", "head", "kernel"),
    EIGHT_BITS_SEPARATE,
    quantized(separate(4, 2, head_dim=64, **SHORT), "float8_e4m3fn", "tensor", "caller"),
    quantized(separate(4, 2, head_dim=80, **SHORT), "float8_e5m2", "head", "kernel"),
]


def of_pieces(make: Callable[..., Spec], q_heads: int, kv_heads: int, **shape: object) -> Spec:
    """With sequences so long that a tile on the diagonal is two pieces."""
    return make(q_heads, kv_heads, page_size=128, max_model_len=1152, context_lens=(100, 500), **shape)


EXCHANGED_FEW = [shaped(16, 4)]
# Queries of several KV heads share a register; all but those of float32 or a wider head are masked by a wide MXU.
EXCHANGED = [
    *EXCHANGED_FEW,
    *(
        of_pieces(make, q_heads, kv_heads, **shape)
        for make in (shaped, separate)
        for q_heads, kv_heads, shape in (
            (16, 8, {}),  # eight heads
            (32, 8, {}),  # four, in two registers
            (16, 2, {}),  # two
            (16, 1, {}),  # one
            (4, 2, {}),  # half a register: sorted by strided loads
            (16, 4, {"dtype": "float32"}),
            (16, 4, {"head_dim": 256}),
        )
    ),
]


def named(spec: Spec) -> str:
    serving = spec.serving
    layout = f"-separate{serving.max_model_len}x{serving.max_num_seqs}" if serving.kv_layout == "separate" else ""
    return f"{spec.name}-page{serving.page_size}-bucket{serving.token_buckets[0]}{layout}"


def params(specs: list[Spec], few: list[Spec]) -> list[object]:
    """Those that are not among the few run with the slow tests."""
    return [pytest.param(spec, marks=[] if spec in few else SLOW, id=named(spec)) for spec in specs]


each_shape = pytest.mark.parametrize("spec", params(SHAPES, FEW))
each_separate_shape = pytest.mark.parametrize("spec", params(SEPARATE, SEPARATE_FEW))
each_exchange = pytest.mark.parametrize("spec", params(EXCHANGED, EXCHANGED_FEW))
each_new_shape = pytest.mark.parametrize("spec", params([*PADDED, *EIGHT_BITS], [PADDED_FEW[0], *EIGHT_BITS_FEW]))
each_portable_shape = pytest.mark.parametrize(
    "spec",
    params([*SHAPES, *SEPARATE, *PADDED, *EIGHT_BITS], [*FEW, SEPARATE_FEW[0], *PADDED_FEW, *EIGHT_BITS_FEW]),
)


def check(
    spec: Spec, target: str, kind: str, changed: Callable[[Spec, KernelPlan], KernelPlan] = lambda spec, plan: plan
) -> None:
    for plan in plan_spec(spec, target):
        if plan.kind == kind:
            plan = changed(spec, plan)
            results = list(check_source(spec, plan, render(spec, plan), seed=SEED, random_batches=1))
            failed = [result for result in results if not result.ok]
            assert results
            assert not failed, f"seed {SEED}"


@pytest.mark.parametrize("kind", [pytest.param("decode", marks=SLOW), pytest.param("prefill", marks=SLOW), "mixed"])
@each_portable_shape
def test_portable_programs_agree_with_the_oracle(spec: Spec, kind: str) -> None:
    check(spec, "cpu", kind)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", [pytest.param("decode", marks=SLOW), "prefill", pytest.param("mixed", marks=SLOW)])
@each_shape
def test_kernels_agree_with_the_oracle_in_the_interpreter(spec: Spec, kind: str) -> None:
    """For the target with the widest MXU, on which decode pairs heads where it can."""
    check(spec, "tpu7x", kind)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["decode", pytest.param("prefill", marks=SLOW), pytest.param("mixed", marks=SLOW)])
@each_new_shape
def test_kernels_of_padded_joined_and_quantized_rows_agree_with_the_oracle_in_the_interpreter(
    spec: Spec, kind: str
) -> None:
    check(spec, "tpu7x", kind)


def few_at_once(spec: Spec, plan: KernelPlan) -> KernelPlan:
    """The plan with groups of two of the shortest tiles: a row has several groups, and their buffers are used again."""
    if isinstance(plan.decode, DecodeWaves):
        plan = retiled(spec, plan, decode={"tiles_per_wave": 2, "lookahead": 2})
    return plan


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["decode", pytest.param("prefill", marks=SLOW), pytest.param("mixed", marks=SLOW)])
@each_separate_shape
def test_kernels_of_separate_k_and_v_agree_with_the_oracle_in_the_interpreter(spec: Spec, kind: str) -> None:
    check(spec, "tpu7x", kind, few_at_once)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["prefill", pytest.param("mixed", marks=SLOW)])
@each_exchange
def test_kernels_that_exchange_rows_agree_with_the_oracle_in_the_interpreter(spec: Spec, kind: str) -> None:
    check(spec, "tpu7x", kind)


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prefill", "mixed"])
@pytest.mark.parametrize("make", [shaped, separate])
def test_kernels_that_exchange_rows_for_a_narrow_mxu_agree_with_the_oracle(
    make: Callable[..., Spec], kind: str
) -> None:
    """It has no lanes to spare for a mask."""
    check(of_pieces(make, 16, 4), "v5e", kind)


@pytest.mark.interpreter
def test_prefill_puts_new_tokens_of_8_bits_into_pages_of_separate_k_and_v() -> None:
    check(EIGHT_BITS_SEPARATE, "tpu7x", "prefill")


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("spec", [SEPARATE_FEW[0], separate(4, 2, page_size=16)], ids=named)
def test_groups_of_as_many_tiles_as_planned_agree_with_the_oracle(spec: Spec) -> None:
    check(spec, "tpu7x", "decode")


@pytest.mark.interpreter
@pytest.mark.slow
@pytest.mark.parametrize("spec", [shaped(4, 2), shaped(9, 3)], ids=lambda spec: spec.name)
def test_decode_kernels_of_a_narrow_mxu_agree_with_the_oracle(spec: Spec) -> None:
    check(spec, "v5p", "decode")


@pytest.mark.compile
@pytest.mark.once
@pytest.mark.parametrize("target", ["tpu7x", *(pytest.param(name, marks=SLOW) for name in ("v6e", "v5p", "v5e"))])
def test_kernels_of_odd_shapes_compile(target: str) -> None:
    """A mixed program has both kernels."""
    specs = [shaped(9, 3), shaped(4, 2, head_dim=256), shaped(3, 1, head_dim=256, dtype="float32")]
    compile_all(specs, target, kinds=("mixed",))


@pytest.mark.compile
@pytest.mark.parametrize("target", [pytest.param("tpu7x", marks=SLOW), "v5e"])
def test_kernels_of_odd_shapes_with_separate_k_and_v_compile(target: str) -> None:
    compile_all([*SEPARATE_FEW, EIGHT_BITS_SEPARATE], target, kinds=("mixed",))


@pytest.mark.compile
@pytest.mark.parametrize("target", ["tpu7x", *(pytest.param(name, marks=SLOW) for name in ("v6e", "v5p", "v5e"))])
def test_kernels_of_padded_joined_and_quantized_rows_compile(target: str) -> None:
    compile_all([PADDED_FEW[0], EIGHT_BITS_FEW[0]], target, kinds=("mixed",))


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("target", ["tpu7x", "v6e", "v5p", "v5e"])
def test_kernels_of_every_shape_compile(target: str) -> None:
    compile_all([*SHAPES, *SEPARATE, *PADDED, *EIGHT_BITS], target)


def compile_all(specs: list[Spec], target: str, kinds: tuple[str, ...] = KIND_ORDER) -> None:
    """One program of each kind, for its largest token bucket."""
    tasks = []
    for spec in specs:
        largest = {plan.kind: plan for plan in plan_spec(spec, target) if plan.kind in kinds}
        tasks += tasks_of(
            spec, [(replace(plan, tokens=plan.tokens[-1:]), render(spec, plan)) for plan in largest.values()]
        )
    assert all(lowered.executable for lowered in lower_all(tasks, Cache(None), jobs=2))
