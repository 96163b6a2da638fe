"""Makes the recipe of a plan."""

from __future__ import annotations

from rpac.contract.arrays import joins_rows, packing
from rpac.contract.features import features_in_kernels
from rpac.plan.buffers import splits_rows, splits_words
from rpac.plan.kernel_plan import KernelPlan
from rpac.plan.latent import LatentBlockTiles, LatentDecodeTiles
from rpac.plan.recipe import BlockRecipe, DecodeMask, DecodeRecipe, Read, Recipe, SoftmaxPacing, Write
from rpac.plan.tiles import BlockTiles, DecodeTiles, GroupTiles, exchange_of
from rpac.spec import Spec


def recipe_of(spec: Spec, plan: KernelPlan) -> Recipe:
    """The recipe of a plan."""
    features = tuple(feature.key for feature in features_in_kernels(spec.model, spec.serving))
    decode = block = None
    match plan.decode:
        case LatentDecodeTiles():
            decode = DecodeRecipe("waves", "latent", "latent", "lengths")
        case GroupTiles():
            read: Read = "token_pairs" if plan.decode.halves(spec.model) else "separate"
            decode = DecodeRecipe("waves", read, _write(spec), _decode_mask(spec))
        case DecodeTiles():
            decode = DecodeRecipe("blocks", _read(spec), _write(spec), _decode_mask(spec))
    match plan.block:
        case LatentBlockTiles():
            block = BlockRecipe(
                "latent", "latent", "latent", "rows", None, "compare", "none", 0, False, "vector", False
            )
        case BlockTiles():
            block = _block_recipe(spec, plan.block)
    return Recipe(features, decode, block)


def _block_recipe(spec: Spec, tiles: BlockTiles) -> BlockRecipe:
    model, tie = spec.model, tiles.tie(spec)
    transposed = tiles.turned(spec)
    masks_by_mxu = tiles.masks_by_mxu(model)
    return BlockRecipe(
        "query_blocks",
        _read(spec),
        _write(spec),
        "transposed" if transposed else "rows",
        SoftmaxPacing(tie.slots, tie.tokens, tie.ahead, tie.to) if tie else None,
        "matmul" if masks_by_mxu else "compare" if model.causal else "lengths",
        "transpose" if exchange_of(model) else "strided",
        exchange_of(model),
        tiles.carries(spec),
        "matmul" if transposed or (tiles.spare and not tie) else "vector",
        tiles.own_values(spec),
    )


def _read(spec: Spec) -> Read:
    if spec.serving.kv_layout == "separate":
        return "separate"
    if splits_rows(spec):
        return "split_rows"
    return "split_words" if splits_words(spec) else "strided"


def _write(spec: Spec) -> Write:
    model = spec.model
    if not model.update_cache:
        return "none"
    if spec.serving.kv_layout == "separate":
        return "bytes" if model.quantized else "halves" if packing(model.kv_dtype) > 1 else "words"
    if model.quantized:
        return "packed_bytes"
    if joins_rows(model):
        return "packed_joined"
    return "packed_halves" if packing(model.kv_dtype) > 1 else "packed_words"


def _decode_mask(spec: Spec) -> DecodeMask:
    if spec.serving.tree_mask:
        return "tree"
    return "drafts" if spec.serving.decode_len > 1 else "lengths"
