"""The header of every source: what it is, and what was decided before it was written."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, Final

from rpac.contract.arrays import LANES, latent_lanes
from rpac.contract.attention import Attention
from rpac.contract.features import FEATURES
from rpac.devices.chip import is_tpu
from rpac.kernels.literals import prose
from rpac.plan import BlockTiles, DecodeBlocks, DecodeWaves, KernelPlan, LatentBlockTiles
from rpac.plan.buffers import UPDATE_LOOKAHEAD
from rpac.plan.kernel_plan import RULE
from rpac.plan.words import decisions
from rpac.spec import Spec

WIDTH: Final = 118  # of a line, without its bullet


def header(spec: Spec, plan: KernelPlan) -> dict[str, Any]:
    """What the header of every source says.

    It does not name the spec's file, so that a file of another name makes the same sources.
    """
    of_layer = f", {spec.layer} layers" if spec.layer else ""
    return {
        "title": prose(f"Ragged paged attention of {spec.name}{of_layer}: {plan.kind} batches on {plan.target}."),
        "spec_hash": spec.hash,
        "command": prose(f"rpac build SPEC --target {plan.target}"),
        "specialized": _specialized(spec, plan),
    }


def _specialized(spec: Spec, plan: KernelPlan) -> list[str]:
    """What a reader should know was decided before this source was written, and why."""
    model, serving = spec.model, spec.serving
    lines = [
        f"{model.q_heads} query heads over {model.kv_heads} KV heads, head_dim {model.head_dim}, "
        f"queries {model.q_dtype}, KV {model.kv_dtype}: constants",
        *_draft_lines(spec),
        f"pages of {serving.page_size} tokens, {serving.pages_per_seq} a sequence, up to {serving.max_num_seqs} sequences",
        f"token buckets that use it: {', '.join(map(str, plan.tokens))}",
        _features(spec),
        *_quantization(model),
    ]
    if model.rope_dim is not None:
        lines = [*_latent_lines(model), *lines[1:3], "causal, cache updated"]
    if spec.mesh.devices > 1:
        lines.insert(1, f"these are one device's part of {spec.mesh.devices}: {spec.mesh}")
    if serving.kv_layout == "separate":
        lines.append("separate K and V in the cache, pages of [2, KV heads, tokens, head_dim] (kv_layout separate)")
    if plan.kind != "mixed":
        lines.append(f"only {plan.kind} batches: the other kernels are not in this program")
    lines += _tile_lines(plan)
    lines += [str(one) for one in decisions(plan.recipe, plan.kind) if one.name != "features"]
    lines = [_wrapped(prose(line)) for line in lines]
    if plan.origin != RULE:
        lines.append(prose(plan.origin))
    if is_tpu(plan.target):
        lines.append(
            f"VMEM: {plan.vmem_need:,} bytes counted, {plan.vmem_limit:,} allowed, {plan.vmem_bytes:,} available"
        )
    return lines


def _wrapped(line: str) -> str:
    """A line of the header, on several lines of text where it is long."""
    return textwrap.fill(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _tile_lines(plan: KernelPlan) -> Iterator[str]:
    """The tiles of each kernel, and what decides them."""
    match plan.decode:
        case DecodeBlocks() as tiles:
            yield (
                f"decode: blocks of {tiles.block} tokens, as long as the expected lengths and the registers for scores allow; "
                f"{tiles.buffers} buffers, so that {tiles.buffers - 1} blocks in flight hide the latency of DMAs"
            )
        case DecodeWaves() as tiles:
            yield (
                f"decode: tiles of {tiles.tile} tokens, no longer than the expected lengths; waves of {tiles.tiles_per_wave}, so "
                f"that one fills the other's waits; fetched {tiles.lookahead} waves ahead, which hides the latency of DMAs"
            )
    lookahead = getattr(plan.block, "update_lookahead", UPDATE_LOOKAHEAD)
    if lookahead < UPDATE_LOOKAHEAD:
        yield (
            f"the cache's update fetches new tokens {lookahead} pages ahead instead of {UPDATE_LOOKAHEAD}: pages are so "
            "large that no more fit VMEM"
        )
    match plan.block:
        case BlockTiles() as block:
            yield (
                f"{plan.kind}: blocks of {block.q_block} queries against {block.block} fetched tokens ({block.buffers} "
                f"buffers); computes {block.step_rows} query rows of a head against {block.tile} tokens at once"
            )
        case LatentBlockTiles() as block:
            yield (
                f"{plan.kind}: blocks of {block.q_block} queries with all their heads against {block.block} fetched tokens "
                f"({block.buffers} buffers); computes {block.step_rows} query rows at once"
            )


def _features(spec: Spec) -> str:
    """What a query sees, and which features are in the code or are not."""
    model = spec.model
    told = [feature for feature in FEATURES if feature.in_kernel_words]
    used = [one.in_kernel_words.format(one.value(model, spec.serving)) for one in told if one.used(model, spec.serving)]
    *names, last = [one.title for one in told if not one.used(model, spec.serving)] or [""]
    unused = f"{', '.join(names)} or {last}" if names else last
    order = "causal" if model.causal else "not causal: each query sees all of its sequence"
    if model.attention_chunk:
        order += f" inside its own chunk of {model.attention_chunk} tokens, nothing fetched before it"
    given = [f"{order}, {'cache updated' if model.update_cache else 'read-only cache'}", *used]
    return "; ".join([*given, *([f"no {unused} in the spec: none is in the code"] if unused else [])])


def _quantization(model: Attention) -> list[str]:
    if not model.quantized:
        return []
    scales = {
        None: "no scales",
        "tensor": "a scale of K and one of V",
        "head": "a scale of K and of V for each KV head",
    }
    by = "this program" if model.quantize == "kernel" else "the caller"
    return [f"KV of 8 bits, {scales[model.kv_scale]}; {by} quantizes new keys and values"]


def _draft_lines(spec: Spec) -> list[str]:
    """What a reader should know before a source of decode rows with several new tokens."""
    if spec.serving.decode_len == 1:
        return []
    tree = spec.serving.tree_mask
    seen = "each sees those that `tree` says, an argument" if tree else "each sees those before it"
    return [f"decode rows of {spec.serving.decode_len} new tokens, the last accepted one and drafts; {seen}"]


def _latent_lines(model: Attention) -> list[str]:
    """What the sizes of latent attention are."""
    return [
        f"latent attention, absorbed: {model.q_heads} query heads over one latent vector of {model.head_dim} and one rotary "
        f"key of {model.rope_dim} a token, {model.q_dtype}: constants",
        f"cache rows of {latent_lanes(model)} lanes, {latent_lanes(model) // LANES} registers' width: latent vector, "
        "rotary key, padding",
    ]
