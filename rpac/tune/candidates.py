"""The plans that a search tries: the one place of the tuner that knows the fields of tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from rpac.devices.chip import chip
from rpac.plan import BlockTiles, KernelPlan
from rpac.plan.families import Tiles, is_legal, is_short
from rpac.plan.kernel_plan import RULE
from rpac.plan.planner import with_tiles
from rpac.plan.prefill import STEP_ROWS
from rpac.plan.sizes import copy_sizes_of, step_rows_of
from rpac.spec import Spec


@dataclass(frozen=True)
class Axis:
    """One field of the tiles in `part` of a plan, and the values to try; a search goes along one axis after another.

    `keeps` names a field that changes the other way, so that as many bytes stay in flight.
    """

    part: str
    field: str
    values: tuple[int, ...]
    keeps: str = ""


AXES: Final = (
    Axis("decode", "block", (128, 256, 512, 1024, 2048), keeps="buffers"),
    Axis("decode", "buffers", (3, 4, 6, 8, 12, 16)),
    Axis("decode", "pair", (1, 2, 4)),
    Axis("decode", "tile", (128, 256, 512, 1024), keeps="step"),
    Axis("decode", "step", (2, 4, 6, 8), keeps="ahead"),
    Axis("decode", "ahead", (2, 3, 4, 6)),
    Axis("decode", "writes", (2, 4, 8)),
    Axis("block", "q_block", (16, 32, 64, 128, 256, 512)),
    Axis("block", "block", (128, 256, 512, 1024, 2048)),
    Axis("block", "tile", (128, 256, 512, 1024)),
    Axis("block", "step_rows", (128, 256, 512, 1024)),
    Axis("block", "heads", (1, 2, 4, 8)),
    Axis("block", "diagonal_heads", (1, 2, 4, 8)),
    Axis("block", "buffers", (2, 3, 4)),
)
KEPT_BETWEEN: Final = {
    "buffers": (3, 16),
    "step": (1, 8),
    "ahead": (2, 8),
}  # what a field that `keeps` names may become


def variants(spec: Spec, rule: KernelPlan, plan: KernelPlan, axis: Axis) -> Iterator[tuple[str, KernelPlan]]:
    """The other plans along an axis from `plan` that are legal, short enough and fit VMEM, each with a name that tells it
    from `rule`.
    """
    tiles: Tiles | None = getattr(plan, axis.part)
    if not hasattr(tiles, axis.field):  # of another layout's tiles, or no tiles at all
        return
    assert tiles is not None
    for value in axis.values:
        changed = _changed(spec, plan, tiles, axis, value)
        if changed != tiles and is_legal(spec, plan.kind, plan.tokens, changed):
            parts: dict[str, Any] = {"decode": plan.decode, "block": plan.block, axis.part: changed}
            found = with_tiles(spec, plan, **parts)
            if found is not None and is_short(spec, chip(plan.target), plan.kind, changed, found.recipe):
                yield label_of(rule, found), found


def label_of(rule: KernelPlan, plan: KernelPlan) -> str:
    """What a plan has other than the one that the rules made: `decode.buffers=8`; `rule` where nothing."""
    fields = [(axis, getattr(plan, axis.part), getattr(rule, axis.part)) for axis in AXES]
    differing = [
        f"{axis.part}.{axis.field}={getattr(tiles, axis.field)}"
        for axis, tiles, ruled in fields
        if hasattr(tiles, axis.field) and getattr(tiles, axis.field) != getattr(ruled, axis.field)
    ]
    return " ".join(differing) or RULE


def _changed(spec: Spec, plan: KernelPlan, tiles: Tiles, axis: Axis, value: int) -> Tiles:
    """Tiles with one field changed, and with it those that follow from it."""
    changes: dict[str, Any] = {axis.field: value}
    if axis.keeps:
        least, most = KEPT_BETWEEN[axis.keeps]
        kept = getattr(tiles, axis.keeps) * getattr(tiles, axis.field) // value
        changes[axis.keeps] = min(max(kept, least), most)
    if not isinstance(tiles, BlockTiles):
        return replace(tiles, **changes)
    changed = replace(tiles, **changes)
    most_rows = STEP_ROWS if axis.field == "q_block" else changed.step_rows
    return replace(
        changed,
        tile=min(changed.tile, changed.block),
        step_rows=step_rows_of(spec.model.group * changed.q_block, most_rows),
        copy_sizes=copy_sizes_of(plan.kind, changed.q_block, plan.tokens[0]),
    )
