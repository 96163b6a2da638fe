"""Builds the plans of a spec: which programs there are, the tiles and the recipe of each, and whether they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, TypeAlias, TypeVar

from rpac.contract.arrays import align, kv_page_shape, nbytes
from rpac.contract.kind import Kind
from rpac.devices.chip import Chip, chip, is_tpu
from rpac.errors import PlanError
from rpac.plan import portable
from rpac.plan.cache_memory import check_hbm
from rpac.plan.decode_blocks import DecodeBlocks
from rpac.plan.decode_waves import DecodeWaves
from rpac.plan.families import (
    RULES,
    Override,
    Tiles,
    block_choices,
    decode_choices,
    is_legal,
    make_recipe,
    smem_need,
    vmem_need,
)
from rpac.plan.kernel_plan import RULE, KernelPlan
from rpac.plan.latent import LatentBlockTiles
from rpac.plan.page_table import smem_usable
from rpac.plan.prefill import MIN_Q_BLOCK, BlockTiles
from rpac.plan.recipe import Recipe
from rpac.plan.refusal import NoTilesError, advice
from rpac.plan.sizes import MIB, copy_sizes_of
from rpac.plan.tuned import Entry, TunedTiles
from rpac.spec import Spec

KIND_ORDER: Final[tuple[Kind, ...]] = ("decode", "prefill", "mixed")
VMEM_HEADROOM: Final = 8 * MIB  # above what we count, for values that the compiler spills

AnyDecode: TypeAlias = DecodeBlocks | DecodeWaves | None
FittedTiles = TypeVar("FittedTiles", bound=Tiles)


def kinds_of(spec: Spec, tokens: int) -> tuple[Kind, ...]:
    """The distributions that a token bucket can hold: a prefill-only batch needs room for one chunk."""
    return tuple(kind for kind in KIND_ORDER if kind != "prefill" or tokens >= spec.serving.prefill_chunk)


def plan_spec(spec: Spec, target: str, *, tuned: TunedTiles | None = None) -> tuple[KernelPlan, ...]:
    """The plans of one target: one for every (case, tiles), holding the token buckets that share them.

    A plan has the tiles that `tuned` (the package's own if None) holds for exactly its case, if any. Raises PlanError
    where no tile fits VMEM, or one layer's cache does not fit HBM; it names the need, the limit and what to write.
    """
    try:
        found = _plans_of(spec, target, TunedTiles.of(target) if tuned is None else tuned)
    except NoTilesError as error:
        tpus = dict.fromkeys((target, *filter(is_tpu, spec.targets)))

        def plans(other: Spec) -> list[tuple[KernelPlan, ...]]:
            return [_plans_of(part, tpu, TunedTiles()) for part in other.parts for tpu in tpus]

        raise PlanError(f"{error}; {advice(spec, plans)}") from error
    if is_tpu(target):
        check_hbm(spec, chip(target))
    return found


def _plans_of(spec: Spec, target: str, tuned: TunedTiles) -> tuple[KernelPlan, ...]:
    if spec.layers:
        raise ValueError(f"{spec.name} has several kinds of layers; plan each of its parts")
    device = chip(target) if is_tpu(target) else None
    if device is not None:
        _check_chunk(spec)
    plans: list[KernelPlan] = []
    for kind in KIND_ORDER:
        groups: dict[KernelPlan, list[int]] = {}
        for tokens in spec.serving.token_buckets:
            if kind in kinds_of(spec, tokens):
                plan = _plan_tpu(spec, device, kind, tokens) if device else _plan_xla(spec, target, kind)
                groups.setdefault(plan, []).append(tokens)
        for plan, buckets in groups.items():
            name = kind if len(groups) == 1 else f"{kind}_t{buckets[-1]}"
            plan = replace(plan, tokens=tuple(buckets), path="/".join(filter(None, (target, spec.layer, f"{name}.py"))))
            plans.append(_with_tuned(spec, plan, tuned))
    return tuple(plans)


def _with_tuned(spec: Spec, plan: KernelPlan, tuned: TunedTiles) -> KernelPlan:
    entry = tuned.find(spec, plan)
    if entry is None:
        return _interpolated(spec, plan, tuned.nearest(spec, plan))
    entry_decode, entry_block = entry.tiles
    decode, block = _of_own_loop(plan, entry_decode, entry_block)
    if decode is None and block is None:
        return replace(plan, origin=f"{RULE}: the tuned tiles are of another decode loop")
    try:
        if not _are_legal(spec, plan, decode, block):
            raise ValueError("they do not go together for this case")
        found = with_tiles(spec, plan, decode, block, entry.override)
    except ValueError as error:
        raise entry.stale(error) from error
    if found is None:
        return replace(plan, origin=f"{RULE}: the tuned tiles do not fit VMEM")
    rules = "" if decode is entry_decode else "; decode by the rule, whose loop is another"
    return replace(found, origin=f"{entry.origin}{rules}")


def _of_own_loop(plan: KernelPlan, decode: AnyDecode, block: BlockTiles | None) -> tuple[AnyDecode, BlockTiles | None]:
    """Tuned tiles. Where those of decode are of another loop than the rule's, the rule's in a mixed program, else none."""
    if decode is None or type(decode) is type(plan.decode):
        return decode, block
    own = plan.decode if isinstance(plan.decode, DecodeBlocks | DecodeWaves) else None
    return (None, None) if block is None else (own, block)


def _interpolated(spec: Spec, plan: KernelPlan, entry: Entry | None) -> KernelPlan:
    """The plan with the tiles of the nearest case, as far as its own buckets do not decide them."""
    if entry is None:
        return plan
    decode, block = _of_own_loop(plan, *entry.tiles)
    if decode is None and block is None:
        return plan
    if decode is not None and isinstance(plan.decode, DecodeBlocks | DecodeWaves):
        decode = replace(decode, max_rows=plan.decode.max_rows)
    if block is not None and isinstance(plan.block, BlockTiles):
        sizes = copy_sizes_of(plan.kind, block.q_block, plan.tokens[0])
        block = replace(block, new_tokens=plan.block.new_tokens, copy_sizes=sizes)
    try:
        legal = _are_legal(spec, plan, decode, block)
        found = with_tiles(spec, plan, decode, block, entry.override) if legal else None
    except ValueError:  # the recipe is not for these tiles
        found = None
    if found is None:
        return replace(plan, origin=f"{RULE}: the nearest tuned tiles do not fit this case")
    return replace(found, origin=entry.interpolated)


def _are_legal(spec: Spec, plan: KernelPlan, *kernels: Tiles | None) -> bool:
    """Whether the kernels of a plan work with these tiles."""
    return all(is_legal(spec, plan.kind, plan.tokens, tiles) for tiles in kernels if tiles is not None)


def with_tiles(
    spec: Spec,
    plan: KernelPlan,
    decode: DecodeBlocks | DecodeWaves | None,
    block: BlockTiles | LatentBlockTiles | None,
    override: Override = RULES,
) -> KernelPlan | None:
    """A TPU plan with other tiles, and with the recipe and the budget that follow from them; None where they do not fit.

    Raises ValueError where the override wants what the tiles do not allow.
    """
    device = chip(plan.target)
    recipe = make_recipe(spec, plan.target, plan.kind, decode, block, override)
    need, limit = _vmem_budget(spec, device, recipe, decode, block)
    if need > _vmem_usable(device) - VMEM_HEADROOM:
        return None
    scalars = smem_need(spec, recipe, decode, block)
    if scalars > smem_usable(device):
        return None
    return replace(plan, decode=decode, block=block, recipe=recipe, vmem_need=need, vmem_limit=limit, smem_need=scalars)


def _vmem_budget(spec: Spec, device: Chip, recipe: Recipe, *kernels: Tiles | None) -> tuple[int, int]:
    """Bytes that the larger kernel takes, and those that the compiler is told it may use."""
    need = max(vmem_need(spec, tiles, recipe) for tiles in kernels if tiles is not None)
    return need, min(align(need, VMEM_HEADROOM) + VMEM_HEADROOM, _vmem_usable(device))


def _vmem_usable(device: Chip) -> int:
    return device.vmem_bytes - device.vmem_bytes // 16


def _check_chunk(spec: Spec) -> None:
    chunk = spec.serving.prefill_chunk
    if chunk % MIN_Q_BLOCK:
        raise PlanError(
            f"{spec.file}: serving.prefill_chunk: found {chunk}; a TPU kernel needs a multiple of {MIN_Q_BLOCK}, "
            f"because it works in whole blocks of queries; write {align(chunk, MIN_Q_BLOCK)}"
        )


def _plan_xla(spec: Spec, target: str, kind: str) -> KernelPlan:
    of_decode, of_block = portable.tiles_of(spec, kind)
    decode, block = of_decode if kind != "prefill" else None, of_block if kind != "decode" else None
    return KernelPlan(
        target, kind, (), "", decode, block, 0, 0, 0, 0, 0, make_recipe(spec, target, kind, decode, block)
    )


def _plan_tpu(spec: Spec, device: Chip, kind: str, tokens: int) -> KernelPlan:
    decode = block = None
    if kind != "prefill":
        decode = _fit(
            spec,
            device,
            "decode",
            decode_choices(spec, device, kind, tokens),
            lambda one: make_recipe(spec, device.target, kind, one, None),
        )
    if kind != "decode":
        block = _fit(
            spec,
            device,
            kind,
            block_choices(spec, device, kind, tokens),
            lambda one: make_recipe(spec, device.target, kind, None, one),
        )
    recipe = make_recipe(spec, device.target, kind, decode, block)
    need, limit = _vmem_budget(spec, device, recipe, decode, block)
    return KernelPlan(
        device.target,
        kind,
        (),
        "",
        decode,
        block,
        need,
        limit,
        device.vmem_bytes,
        smem_need(spec, recipe, decode, block),
        device.smem_bytes,
        recipe,
    )


def _fit(
    spec: Spec,
    device: Chip,
    kernel: str,
    choices: Iterator[FittedTiles],
    recipe_of: Callable[[FittedTiles], Recipe],
) -> FittedTiles:
    """The first choice that fits."""
    limit = _vmem_usable(device) - VMEM_HEADROOM
    needs = []
    for tiles in choices:
        recipe = recipe_of(tiles)
        needs.append(vmem_need(spec, tiles, recipe))
        if needs[-1] <= limit and smem_need(spec, recipe, tiles) <= smem_usable(device):
            return tiles
    model, serving = spec.model, spec.serving
    layer = f"layers.{spec.layer}: " if spec.layer else ""
    raise NoTilesError(
        f"{spec.file}: {layer}no {kernel} kernel fits {device.target}: on each device it needs {min(needs):,} bytes of VMEM "
        f"or more, and {limit:,} are usable; found {model.q_heads} query heads over {model.kv_heads} KV heads, page_size "
        f"{serving.page_size} (a page of {nbytes(kv_page_shape(spec), model.kv_dtype):,} bytes) and max_num_seqs "
        f"{serving.max_num_seqs}"
    )
