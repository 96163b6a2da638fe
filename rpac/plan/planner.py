"""Builds the plans of a spec: which programs there are, the tiles of each, and whether they fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from rpac.contract.arrays import (
    LANES,
    SUBLANES,
    align,
    extra_specs,
    head_lanes,
    kv_row_shape,
    metadata_specs,
    nbytes,
    packing,
)
from rpac.contract.attention import Attention
from rpac.devices.chip import Chip, chip, is_tpu
from rpac.errors import PlanError
from rpac.plan.buffers import RowDims, splits_words, unit_tokens
from rpac.plan.kernel_plan import RULE, KernelPlan
from rpac.plan.latent import LatentBlockTiles, block_choices, decode_choices, xla_tiles
from rpac.plan.legal import MIN_Q_BLOCK, Tiles, is_legal
from rpac.plan.query_rows import head_rows
from rpac.plan.sizes import copy_sizes_of, power_of_two_from, power_of_two_to, step_rows_of
from rpac.plan.tiles import LONG_TILE, MERGE_TOKENS, BlockTiles, DecodeTiles, GroupTiles, XlaTiles
from rpac.plan.tuned import Entry, TunedTiles
from rpac.spec import Spec

KIND_ORDER = ("decode", "prefill", "mixed")
MIB = 1 << 20
IN_FLIGHT_BYTES = 8 * MIB  # more than the HBM delivers within one DMA's latency (5.4 MB on TPU7x)
MIN_BUFFERS, MAX_BUFFERS = 3, 16
SMEM_RESERVE = 64 << 10  # for what the compiler keeps there itself
VMEM_HEADROOM = 8 * MIB  # above what we count, for values that the compiler spills
XLA_DECODE_BLOCK = 128  # these two: fastest of those timed on two CPU cores, by small margins
XLA_STEP_BYTES = MIB
WRITES = 4  # outputs and cache rows of sequences that may still be on their way
GROUP_WRITES = 8  # where a turn may end as many sequences
TILE_BYTES = MIB  # K and V of one tile of a group: long enough that its DMA hides what it costs by itself
TURN_BYTES = 8 * MIB  # of a group: fetched in a few times the DMA's latency
STEPS = {"decode": 6, "mixed": 4}  # tiles in a group: more are little faster, and every one is code
FEW_PAGES, MORE_STEPS = 4, 8  # of a tile; where it has more, their fetches take so long that more tiles pay
Q_BLOCKS = (256, 128, 64, 32, MIN_Q_BLOCK)
STEP_ROWS = 256  # query rows of a flash step: with fewer, pushing K and V into the MXU shows
# Flash steps that are one piece of code, for at its ends units wait; and those on the diagonal.
TURN_STEPS = (32, 16)
# Where code is scarce: a narrow MXU takes twice as much for a product, and splitting words takes much by itself.
FEWER_STEPS = {"prefill": (16, 8), "mixed": (4, 2)}
# Tokens of a flash step. Where a head fills a wide MXU, its vector work must be less for each score: a longer step,
# LONG_TILE, moves the running state less often.
TILE = 512
INT32_BYTES = 4

FittedTiles = TypeVar("FittedTiles", DecodeTiles, GroupTiles, BlockTiles, LatentBlockTiles)


def kinds_of(spec: Spec, tokens: int) -> tuple[str, ...]:
    """The distributions that a token bucket can hold: a prefill-only batch needs room for one chunk."""
    return tuple(kind for kind in KIND_ORDER if kind != "prefill" or tokens >= spec.serving.prefill_chunk)


def plan_spec(spec: Spec, target: str, *, tuned: TunedTiles | None = None) -> tuple[KernelPlan, ...]:
    """The plans of one target: one for every (case, tiles), holding the token buckets that share them.

    A plan has the tiles that `tuned` (the package's own if None) holds for exactly its case, if any. Raises PlanError
    where the page table does not fit SMEM or no tile fits VMEM; it names the need and the limit.
    """
    if spec.layers:
        raise ValueError(f"{spec.name} has several kinds of layers; plan each of its parts")
    tuned = TunedTiles.of(target) if tuned is None else tuned
    device = chip(target) if is_tpu(target) else None
    if device is not None:
        _check_smem(spec, device)
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
    found = with_tiles(spec, plan, *entry.tiles)
    if found is None:
        return replace(plan, origin=f"{RULE}: the tuned tiles do not fit VMEM")
    return replace(found, origin=entry.origin)


def _interpolated(spec: Spec, plan: KernelPlan, entry: Entry | None) -> KernelPlan:
    """The plan with the tiles of the nearest case, as far as its own buckets do not decide them."""
    if entry is None:
        return plan
    decode, block = entry.tiles
    if decode is not None and isinstance(plan.decode, DecodeTiles | GroupTiles):
        decode = replace(decode, loaded=plan.decode.loaded)
    if block is not None and isinstance(plan.block, BlockTiles):
        sizes = copy_sizes_of(plan.kind, block.q_block, plan.tokens[0])
        block = replace(block, new_tokens=plan.block.new_tokens, copy_sizes=sizes)
    legal = all(is_legal(spec, plan, tiles) for tiles in (decode, block) if tiles is not None)
    found = with_tiles(spec, plan, decode, block) if legal else None
    if found is None:
        return replace(plan, origin=f"{RULE}: the nearest tuned tiles do not fit this case")
    return replace(found, origin=entry.interpolated)


def with_tiles(
    spec: Spec, plan: KernelPlan, decode: DecodeTiles | GroupTiles | None, block: BlockTiles | LatentBlockTiles | None
) -> KernelPlan | None:
    """A TPU plan with other tiles and the budget that follows from them, or None where they do not fit."""
    device = chip(plan.target)
    need, limit = _vmem_budget(spec, device, decode, block)
    if need > _vmem_usable(device) - VMEM_HEADROOM:
        return None
    return replace(plan, decode=decode, block=block, vmem_need=need, vmem_limit=limit)


def _vmem_budget(
    spec: Spec, device: Chip, decode: DecodeTiles | GroupTiles | None, block: BlockTiles | LatentBlockTiles | None
) -> tuple[int, int]:
    """Bytes that the larger kernel takes, and those that the compiler is told it may use."""
    need = max(vmem_need(spec, tiles) for tiles in (decode, block) if tiles is not None)
    return need, min(align(need, VMEM_HEADROOM) + VMEM_HEADROOM, _vmem_usable(device))


def smem_need(spec: Spec) -> int:
    """Bytes of the scalars of the batch that kernels keep in SMEM."""
    tree = (dims for dims in extra_specs(spec) if dims.name == "tree")  # of other arguments there is little
    return sum(dims.nbytes for dims in (*metadata_specs(spec.serving), *tree))


def _check_smem(spec: Spec, device: Chip) -> None:
    need, limit = smem_need(spec), device.smem_bytes - SMEM_RESERVE
    if need > limit:
        serving = spec.serving
        drafts = serving.decode_len if serving.tree_mask else 0
        rows = (limit // INT32_BYTES - 4) // (serving.pages_per_seq + 2 + drafts)
        raise PlanError(
            f"{spec.file}: serving: the page table of {serving.max_num_seqs} sequences x {serving.pages_per_seq} pages "
            f"needs {need:,} bytes of SMEM; {device.target} has {device.smem_bytes:,}, {limit:,} of them for it; "
            f"raise page_size (now {serving.page_size}), lower max_model_len, or write max_num_seqs: {rows} or less"
        )


def _check_chunk(spec: Spec) -> None:
    chunk = spec.serving.prefill_chunk
    if chunk % MIN_Q_BLOCK:
        raise PlanError(
            f"{spec.file}: serving.prefill_chunk: found {chunk}; a TPU kernel needs a multiple of {MIN_Q_BLOCK}, "
            f"for it works in whole blocks of queries; write {align(chunk, MIN_Q_BLOCK)}"
        )


def _plan_xla(spec: Spec, target: str, kind: str) -> KernelPlan:
    decode, block = _xla_tiles(spec, kind) if spec.model.rope_dim is None else xla_tiles(spec)
    return KernelPlan(
        target, kind, (), "", decode if kind != "prefill" else None, block if kind != "decode" else None, 0, 0, 0, 0, 0
    )


def _xla_tiles(spec: Spec, kind: str) -> tuple[XlaTiles, XlaTiles]:
    page = spec.serving.page_size
    token_bytes = nbytes((RowDims.of(spec.model).token_rows, LANES), spec.model.kv_dtype)
    size = max(page, XLA_DECODE_BLOCK)
    blocks = min(max(XLA_STEP_BYTES // (size * token_bytes), 1), 16)
    decode = XlaTiles(block=size, blocks=blocks)
    block = XlaTiles(block=max(page, 256), q_block=128) if kind == "prefill" else XlaTiles(max(page, 512), q_block=32)
    return decode, block


def _plan_tpu(spec: Spec, device: Chip, kind: str, tokens: int) -> KernelPlan:
    decode = _plan_decode(spec, device, kind, tokens) if kind != "prefill" else None
    block = _plan_block(spec, device, kind, tokens) if kind != "decode" else None
    need, limit = _vmem_budget(spec, device, decode, block)
    return KernelPlan(
        device.target, kind, (), "", decode, block, need, limit, device.vmem_bytes, smem_need(spec), device.smem_bytes
    )


def _plan_block(spec: Spec, device: Chip, kind: str, tokens: int) -> BlockTiles | LatentBlockTiles:
    if spec.model.rope_dim is not None:
        return _fit(spec, device, block_choices(spec, kind, tokens))
    return _fit(spec, device, _block_choices(spec, device, kind, tokens))


def _plan_decode(spec: Spec, device: Chip, kind: str, tokens: int) -> DecodeTiles | GroupTiles:
    if spec.model.rope_dim is not None:
        return _fit(spec, device, decode_choices(spec, tokens))
    if spec.serving.kv_layout == "separate":
        return _fit(spec, device, _group_choices(spec, kind, tokens))
    return _fit(spec, device, _decode_choices(spec, device, tokens))


def _vmem_usable(device: Chip) -> int:
    return device.vmem_bytes - device.vmem_bytes // 16


def vmem_need(spec: Spec, tiles: Tiles | LatentBlockTiles) -> int:
    """Bytes of VMEM that a kernel with these tiles takes."""
    scratch = tiles.scratch(spec)
    return sum(buffer.vmem_bytes for buffer in scratch) + tiles.temporaries(spec)


def _fit(spec: Spec, device: Chip, choices: Iterator[FittedTiles]) -> FittedTiles:
    """The first choice that fits. The last one is the smallest there is."""
    limit = _vmem_usable(device) - VMEM_HEADROOM
    for tiles in choices:
        if vmem_need(spec, tiles) <= limit:
            return tiles
    scratch = tiles.scratch(spec)
    largest = max(scratch, key=lambda buffer: buffer.vmem_bytes)
    raise PlanError(
        f"{spec.file}: no tile fits {device.target}: the smallest, {tiles}, needs {vmem_need(spec, tiles):,} bytes of VMEM "
        f"and {limit:,} are usable; its largest buffer is {largest.name} {largest.shape} ({largest.note}); "
        f"lower serving.page_size (now {spec.serving.page_size}), serving.max_num_seqs, or the heads of the shard"
    )


def _decode_choices(spec: Spec, device: Chip, tokens: int) -> Iterator[DecodeTiles]:
    """From the tiles that the chip is kept busy with down to the smallest that work."""
    model, serving = spec.model, spec.serving
    token_bytes = nbytes((RowDims.of(model).token_rows, LANES), model.kv_dtype)
    # As long a block as pays, for the chain of MXU, softmax and MXU is paid once a block; but it is computed whole, so no
    # longer than the sequences, and with scores (kv_heads * 8 rows of `block` float32) that do not fill the registers.
    shortest = max(power_of_two_from(min(_reach(spec, serving.decode_len))), LANES)
    more_rows = head_rows(spec) // align(model.group, SUBLANES)  # than with one new token
    block = max(min(power_of_two_to(8192 // model.kv_heads // more_rows), 1024, shortest), serving.page_size, LANES)
    loaded = min(tokens // serving.decode_len, serving.max_num_seqs)
    pair = math.gcd(model.kv_heads, max(device.mxu_size // head_lanes(model), 1))
    while block >= max(serving.page_size, LANES):  # a row of scores is at least one register wide
        most = min(IN_FLIGHT_BYTES // (block * token_bytes) + 2, MAX_BUFFERS)
        for buffers in range(max(most, MIN_BUFFERS), MIN_BUFFERS - 1, -1):
            yield DecodeTiles(block, pair, buffers, WRITES, loaded)
        block //= 2


def _group_choices(spec: Spec, kind: str, tokens: int) -> Iterator[GroupTiles]:
    """Likewise, where K and V lie apart."""
    serving = spec.serving
    token_bytes = nbytes(kv_row_shape(spec.model), spec.model.kv_dtype)
    # A tile is computed whole, so it is no longer than the sequences; a row of its scores is at least a register wide.
    shortest = max(power_of_two_from(min(_reach(spec, serving.decode_len))), LANES)
    tile = max(min(power_of_two_to(TILE_BYTES // token_bytes), shortest), serving.page_size, LANES)
    loaded = min(tokens // serving.decode_len, serving.max_num_seqs)
    while tile >= max(serving.page_size, LANES):
        steps = MORE_STEPS if kind == "decode" and tile > FEW_PAGES * serving.page_size else STEPS[kind]
        step = min(max(TURN_BYTES // (tile * token_bytes), 1), steps)
        while step:
            most = 2 + math.ceil(IN_FLIGHT_BYTES / (step * tile * token_bytes))
            for ahead in range(most, 1, -1):
                yield GroupTiles(tile, step, ahead, GROUP_WRITES, loaded)
            step //= 2
        tile //= 2


def _block_choices(spec: Spec, device: Chip, kind: str, tokens: int) -> Iterator[BlockTiles]:
    """Likewise; a prefill kernel's query block divides the chunk, so that it has no partial block."""
    model, serving = spec.model, spec.serving
    most = max(power_of_two_from(max(_reach(spec, Q_BLOCKS[0]))), LANES)
    new_tokens = min(tokens, serving.page_size)
    merge_tokens = min(max(MERGE_TOKENS, unit_tokens(model)), serving.page_size)
    most_steps = turn_steps(spec, device, kind)
    spare = device.mxu_size > head_lanes(model) and packing(model.kv_dtype) > 1
    long = most_steps == TURN_STEPS and not spare and packing(model.kv_dtype) > 1
    # A long block saves scores that wait for nothing at its start; where words are split, they do at every tile's.
    blocks = (1024, 512, 256, LANES) if splits_words(spec) else (2048, 1024, 512, 256, LANES)
    for tile in (LONG_TILE, TILE) if long and most >= LONG_TILE else (TILE,):
        for q_block in _q_blocks(spec, kind, tokens):
            rows = model.group * q_block
            step_rows = step_rows_of(rows, STEP_ROWS)
            heads, diagonal_heads = (_heads_of(model, rows // step_rows, steps) for steps in most_steps)
            copy_sizes = copy_sizes_of(kind, q_block, tokens)
            for block in blocks:
                if block < tile == LONG_TILE:
                    continue
                block = max(min(block, most), serving.page_size)
                for buffers in (3, 2):
                    tiles = BlockTiles(
                        q_block,
                        block,
                        min(tile, block),
                        step_rows,
                        heads,
                        diagonal_heads,
                        buffers,
                        merge_tokens,
                        new_tokens,
                        copy_sizes,
                        spare,
                    )
                    most_diagonal = turn_steps(spec, device, kind, tiles.turned(spec))[1]
                    yield replace(tiles, diagonal_heads=_heads_of(model, rows // step_rows, most_diagonal))


def _heads_of(model: Attention, steps: int, most: int) -> int:
    """KV heads of a piece of code that may have `most` steps, `steps` of each head."""
    return math.gcd(model.kv_heads, max(most // steps, 1))


def turn_steps(spec: Spec, device: Chip, kind: str, turned: bool = False) -> tuple[int, int]:
    """Flash steps that one piece of a prefill or mixed kernel's code may have, and those on the diagonal.

    `turned`: scores are, so that longer turns on the diagonal do not spill more.
    """
    if device.mxu_size <= LANES or splits_words(spec):
        return FEWER_STEPS[kind]
    return (TURN_STEPS[0], TURN_STEPS[0]) if turned else TURN_STEPS


def _reach(spec: Spec, queries: int) -> tuple[int, ...]:
    """How many tokens `queries` queries in a row see at each of the expected lengths."""
    window = spec.model.sliding_window
    lengths = spec.serving.context_lens
    if spec.model.attention_chunk is not None:
        return tuple(min(length, spec.model.attention_chunk) for length in lengths)
    return lengths if window is None else tuple(min(length, window + queries - 1) for length in lengths)


def _q_blocks(spec: Spec, kind: str, tokens: int) -> Iterator[int]:
    """Query blocks from the largest down; in a mixed batch, where a block is computed whole, none longer than a chunk."""
    for q_block in Q_BLOCKS:
        if q_block > (spec.model.attention_chunk or q_block):
            continue  # a block lies in two chunks at most
        if kind != "prefill":
            yield min(q_block, max(power_of_two_from(min(tokens, spec.serving.prefill_chunk)), MIN_Q_BLOCK))
        elif spec.serving.prefill_chunk % q_block == 0:
            yield q_block
