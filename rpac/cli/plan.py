"""`rpac plan`: prints the tiles, the memory budgets and the recipe of each kernel before anything compiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from rpac.build import chosen_targets
from rpac.cli.common import (
    command,
    json_option,
    print_json,
    size,
    spec_argument,
    table,
    target_option,
    tuned_of,
    tuned_option,
)
from rpac.errors import PlanError
from rpac.plan import BlockTiles, DecodeBlocks, DecodeWaves, KernelPlan, LatentBlockTiles, XlaTiles, plan_spec
from rpac.plan.words import decisions
from rpac.spec import load_spec

HEADER = (
    "source",
    "token buckets",
    "decode",
    "prefill or mixed",
    "VMEM need",
    "limit",
    "of",
    "SMEM need",
    "of",
    "tiles from",
)


@command()
@spec_argument
@target_option
@tuned_option
@json_option
def plan(spec_file: Path, targets: tuple[str, ...], tuned_in: Path | None, as_json: bool) -> None:
    """Print the tiles, the memory budgets and the recipe of every kernel of SPEC.

    Tiles are in tokens. Decode shows block x buffers or, with separate K/V, tiles per wave x tile x waves. Prefill and mixed
    show queries, then tokens fetched / computed at once x buffers. After the table come the decisions that choose the code of
    each program. Where a target is refused, the plans of the others are printed nevertheless.
    """
    spec = load_spec(spec_file)
    tuned = tuned_of(tuned_in)
    plans: list[KernelPlan] = []
    refused: dict[str, str] = {}
    for part in spec.parts:
        for target in chosen_targets(spec, targets):
            try:
                plans += plan_spec(part, target, tuned=tuned(target))
            except PlanError as error:
                refused[target] = "\n".join(filter(None, (refused.get(target), str(error))))
    if as_json:
        print_json(
            {
                "spec": spec.name,
                "spec_hash": spec.hash,
                "plans": [one.as_dict() for one in plans],
                "refused": refused,
            }
        )
    elif plans:
        click.echo(table(HEADER, [_row(one) for one in plans]))
        for text, paths in _recipes(plans).items():
            click.echo(f"\n{', '.join(paths)}:\n{text}")
    if refused:
        raise PlanError("\n".join(refused.values()))


def _recipes(plans: Sequence[KernelPlan]) -> Mapping[str, Sequence[str]]:
    """The recipes in words, each once, with the sources that are made by it."""
    found: dict[str, list[str]] = {}
    for one in plans:
        found.setdefault("\n".join(f"- {decision}" for decision in decisions(one.recipe, one.kind)), []).append(
            one.path
        )
    return found


def _row(one: KernelPlan) -> tuple[str, ...]:
    budgets = [
        size(n) if n else "-" for n in (one.vmem_need, one.vmem_limit, one.vmem_bytes, one.smem_need, one.smem_bytes)
    ]
    return (one.path, " ".join(map(str, one.tokens)), _tiles(one.decode), _tiles(one.block), *budgets, one.origin)


def _tiles(tiles: DecodeBlocks | DecodeWaves | BlockTiles | LatentBlockTiles | XlaTiles | None) -> str:
    match tiles:
        case None:
            return "-"
        case DecodeBlocks():
            return f"{tiles.block} x{tiles.buffers}"
        case DecodeWaves():
            return f"{tiles.tiles_per_wave} x {tiles.tile} x{tiles.wave_buffers}"
        case BlockTiles():
            return f"{tiles.q_block} q, {tiles.block}/{tiles.tile} x{tiles.buffers}"
        case LatentBlockTiles():
            return f"{tiles.q_block} q, {tiles.block} x{tiles.buffers}"
        case XlaTiles():
            return f"{tiles.q_block} q, {tiles.block}" if tiles.q_block > 1 else f"{tiles.block} x{tiles.blocks}"
