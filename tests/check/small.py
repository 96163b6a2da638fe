"""Specs and plans that are small enough for the interpreter, and whose kernels still do everything that large ones do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mutation import retiled

from rpac.contract.attention import Attention
from rpac.devices.chip import chip
from rpac.plan import BlockTiles, DecodeBlocks, DecodeWaves, KernelPlan, decode_blocks, plan_spec
from rpac.plan.families import Override
from rpac.plan.planner import with_tiles
from rpac.plan.recipe import KvMatmul
from rpac.spec import Spec, load_spec

TINY = load_spec(Path(__file__).parents[2] / "specs" / "tiny.yaml")
# More sequences than a kernel has buffers for their outputs and their new tokens, and chunks of more pages than it has
# buffers for those under update, so that the buffers are used again.
INTERLEAVED = replace(TINY, serving=replace(TINY.serving, max_num_seqs=6, max_num_tokens=64, token_buckets=(8, 64)))
# Larger pages: the interpreter takes seconds to compile a decode kernel that fetches many.
SEPARATE = replace(INTERLEAVED, serving=replace(INTERLEAVED.serving, kv_layout="separate", page_size=64))
SPECS = {"interleaved": INTERLEAVED, "separate": SEPARATE}
SERVED = ("log_sum_exp", "decode_len", "tree_mask")  # features that are fields of `serving`
# Scores are of the size of 1, so that a cap of 2 is felt. A window longer than a tile, and no multiple of a page.
ALL_FEATURES: dict[str, Any] = {"soft_cap": 2.0, "sliding_window": 150, "sinks": True, "log_sum_exp": True}
LONG_CHUNKS: dict[str, Any] = {"attention_chunk": 320}  # more than a block
LONG_WINDOW: dict[str, Any] = {**ALL_FEATURES, "sliding_window": 300}
# Sequences of several tiles of 256, and a page table that is no multiple of one.
SEVERAL_TILES = {"max_model_len": 1088, "context_lens": (300,), "num_pages": 120}

SMALL_WAVES = {"tile": 128, "tiles_per_wave": 2, "lookahead": 2, "write_buffers": 4, "starts_early": True}

# Sequences whose tiles take several iterations: the last queries see whole tiles beyond the first block.
_ITERATED = replace(
    TINY,
    name="iterated",
    model=Attention(16, 4, 128, "bfloat16", "bfloat16", 128**-0.5),
    serving=replace(
        TINY.serving,
        page_size=128,
        max_model_len=1664,
        max_num_tokens=256,
        token_buckets=(256,),
        max_num_seqs=6,
        prefill_chunk=64,
        context_lens=(100, 1000),
    ),
)
ITERATED = {layout: replace(_ITERATED, serving=replace(_ITERATED.serving, kv_layout=layout)) for layout in SPECS}
# Chunks so long that a step can have rows for a transposed matmul.
TRANSPOSED = {
    layout: replace(spec, serving=replace(spec.serving, prefill_chunk=128)) for layout, spec in ITERATED.items()
}
# Heads that fill a wide MXU. The last queries see whole tiles in two blocks.
PACED = replace(
    TINY,
    name="paced",
    model=Attention(8, 1, 256, "bfloat16", "bfloat16", 256**-0.5),
    serving=replace(
        TINY.serving,
        kv_layout="separate",
        page_size=128,
        max_model_len=3328,
        max_num_tokens=256,
        token_buckets=(256,),
        max_num_seqs=2,
        prefill_chunk=128,
        context_lens=(2000,),
    ),
)


def featured(spec: Spec, features: dict[str, Any], name: str = "featured") -> Spec:
    """A spec with features of the model, and of how it is served."""
    served = {key: value for key, value in features.items() if key in SERVED}
    model = {key: value for key, value in features.items() if key not in SERVED}
    return replace(spec, name=name, model=replace(spec.model, **model), serving=replace(spec.serving, **served))


def drafting(layout: str, decode_len: int, tree: bool = False, **features: Any) -> Spec:
    """A spec whose decode rows have `decode_len` new tokens, with or without a tree of them."""
    return featured(SPECS[layout], {**features, "decode_len": decode_len, "tree_mask": tree}, "drafting")


def pairing(**features: Any) -> Spec:
    """A spec whose decode kernel puts two tokens into each row of a matmul: head_dim 64, separate K and V."""
    spec = featured(SEPARATE, {"head_dim": 64, "q_heads": 8, "kv_heads": 2, **features}, "pairing")
    return replace(spec, serving=replace(spec.serving, **SEVERAL_TILES))


def eight_bits(kv_dtype: str, **features: Any) -> Spec:
    """A spec with an 8-bit cache, separate K and V."""
    of_cache = {"kv_dtype": kv_dtype, "kv_scale": "head", "quantize": "kernel"}
    return featured(SEPARATE, {**of_cache, **features}, "eight-bits")


def latent(q_heads: int = 16, rank: int = 128, rope_dim: int = 64, dtype: str = "bfloat16", **serving: Any) -> Spec:
    """A spec of latent attention."""
    model = Attention(q_heads, 1, rank, dtype, dtype, 0.1, rope_dim=rope_dim)
    return replace(TINY, name="latent", model=model, serving=replace(TINY.serving, kv_layout="latent", **serving))


def staged() -> Spec:
    """A spec of latent attention whose tiles go through stages, with sequences of a whole wave and more."""
    lens: dict[str, Any] = {"page_size": 64, "max_model_len": 1024, "context_lens": (512, 1024)}
    return latent(**lens, max_num_seqs=3, max_num_tokens=16, token_buckets=(16,))


def plan_of(spec: Spec, kind: str, target: str = "tpu7x") -> KernelPlan:
    """The plan for the smallest bucket of a kind."""
    return next(plan for plan in plan_spec(spec, target) if plan.kind == kind)


def _with_small_decode(spec: Spec, plan: KernelPlan) -> KernelPlan:
    """The plan with small tiles of its decode kernel, if it has one."""
    if isinstance(plan.decode, DecodeBlocks):
        return retiled(spec, plan, decode={"block": 128, "buffers": 4})
    if isinstance(plan.decode, DecodeWaves):
        return retiled(spec, plan, decode=SMALL_WAVES)
    return plan


def small_plan(spec: Spec, kind: str) -> KernelPlan:
    """A plan for the largest bucket with tiles so small that a full table is several blocks of several tiles."""
    plan = next(plan for plan in reversed(plan_spec(spec, "tpu7x")) if plan.kind == kind)
    plan = _with_small_decode(spec, plan)
    if isinstance(plan.block, BlockTiles):
        tiles = {"q_block": 16, "step_rows": 16 * spec.model.group, "block": 256, "tile": 128}
        if spec is INTERLEAVED:  # else whole registers
            tiles["merge_tokens"] = 4
        plan = retiled(spec, plan, block=tiles)
    return plan


def blocks_plan(spec: Spec) -> KernelPlan:
    """That of `small_plan` for decode batches, by blocks of one sequence, which the rule takes for other heads than these."""
    plan = small_plan(spec, "decode")
    blocks = next(decode_blocks.choices(spec, chip("tpu7x"), plan.tokens[-1]))
    found = with_tiles(spec, plan, replace(blocks, block=128, buffers=4), None)
    assert found is not None
    return found


def iterated_plan(spec: Spec, kind: str) -> KernelPlan:
    """A chunk is two query blocks, these two steps a head, a tile two iterations and two diagonal blocks, a block two tiles."""
    plan = _with_small_decode(spec, plan_of(spec, kind))
    assert isinstance(plan.block, BlockTiles)
    tiles = {"q_block": 32, "step_rows": 64, "heads": 2, "diagonal_heads": 2, "block": 1024, "tile": 512}
    return retiled(spec, plan, block=tiles)


def transposed_plan(spec: Spec, kind: str) -> KernelPlan:
    """That of `iterated_plan`, with query blocks so long that scores are transposed."""
    plan = retiled(spec, iterated_plan(spec, kind), block={"q_block": 64, "step_rows": 128})
    assert plan.recipe.block is not None
    assert plan.recipe.block.scores == "transposed"
    return plan


def eight_bits_plan(spec: Spec, kv_matmul: KvMatmul = "int8_parts", target: str = "v6e") -> KernelPlan:
    """A decode kernel of small waves, so that a row has several and their buffers are used again."""
    plan = plan_of(spec, "decode", target)
    assert plan.recipe.decode is not None
    wanted = {} if plan.recipe.decode.kv_matmul == kv_matmul else {"kv_matmul": kv_matmul}
    return retiled(spec, plan, decode=SMALL_WAVES, override=Override(decode=wanted))


def pairs_plan(spec: Spec, target: str = "tpu7x", kind: str = "decode") -> KernelPlan:
    """Token pairs in waves of two tiles: a row has several waves, and their buffers are used again."""
    plan = plan_of(spec, kind, target)
    assert isinstance(plan.decode, DecodeWaves)
    plan = retiled(spec, plan, decode={"tile": 256, "tiles_per_wave": 2, "lookahead": 2})
    assert plan.recipe.decode is not None
    assert plan.recipe.decode.read == "token_pairs"
    return plan
