"""The plans that a search tries: the one place of the tuner that knows the fields of tiles and the decisions of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from rpac.devices.chip import chip
from rpac.plan import BlockTiles, KernelPlan
from rpac.plan.families import OPTIONS, Tiles, allowed, is_legal, is_short, override_of
from rpac.plan.kernel_plan import RULE
from rpac.plan.planner import with_tiles
from rpac.plan.prefill import STEP_ROWS, heads_of, most_steps
from rpac.plan.recipe import Scores
from rpac.plan.sizes import copy_sizes_of, largest_divisor
from rpac.spec import Spec


@dataclass(frozen=True)
class Axis:
    """One field of the tiles in `part` of a plan, or one decision of their recipe, and the values to try; a search goes along
    one axis after another.

    `keeps` names a field of the tiles that changes the other way, so that as many bytes stay in flight.
    """

    part: str
    field: str
    values: tuple[int | str, ...]
    keeps: str = ""

    @property
    def of_recipe(self) -> bool:
        """Whether it is a decision."""
        return self.field in OPTIONS[self.part]


AXES: Final = (
    Axis("decode", "block", (128, 256, 512, 1024, 2048), keeps="buffers"),
    Axis("decode", "buffers", (3, 4, 6, 8, 12, 16)),
    Axis("decode", "heads_per_matmul", (1, 2, 4)),
    Axis("decode", "tile", (128, 256, 512, 1024), keeps="tiles_per_wave"),
    Axis("decode", "tiles_per_wave", (2, 4, 6, 8), keeps="lookahead"),
    Axis("decode", "lookahead", (2, 3, 4, 6)),
    Axis("decode", "write_buffers", (4, 8, 16)),
    Axis("block", "q_block", (16, 32, 64, 128, 256, 512)),
    Axis("block", "block", (128, 256, 512, 1024, 2048)),
    Axis("block", "tile", (128, 256, 512, 1024)),
    Axis("block", "step_rows", (128, 256, 512, 1024)),
    Axis("block", "heads", (1, 2, 4, 8)),
    Axis("block", "diagonal_heads", (1, 2, 4, 8)),
    Axis("block", "buffers", (2, 3, 4)),
    # The recipe comes last: what is allowed, and what the rule decides, depends on the tiles.
    Axis("decode", "read", ("separate", "token_pairs")),
    Axis("decode", "kv_matmul", ("as_stored", "int8_parts", "converted")),
    Axis("decode", "fetch", ("before", "between")),
    Axis("block", "scores", ("rows", "transposed")),
    Axis("block", "paced", (False, True)),
    Axis("block", "mask", ("compare", "matmul")),
    Axis("block", "pipelined", (False, True)),
)
KEPT_BETWEEN: Final = {
    "buffers": (3, 16),
    "tiles_per_wave": (1, 8),
    "lookahead": (2, 8),
}  # what a field that `keeps` names may become


def variants(spec: Spec, rule: KernelPlan, plan: KernelPlan, axis: Axis) -> Iterator[tuple[str, KernelPlan]]:
    """The other plans along an axis from `plan` that are legal, short enough and fit VMEM, each with a name that tells it
    from `rule`. Decisions that are not the rule's are kept as far as the tiles of a candidate allow them.
    """
    tiles: Tiles | None = getattr(plan, axis.part)
    if tiles is None or not (
        axis.of_recipe or hasattr(tiles, axis.field)
    ):  # of another layout's tiles, or no tiles at all
        return
    override = override_of(spec, plan)
    wanted = getattr(override, axis.part)
    for value in axis.values:
        if axis.of_recipe:
            changed, kept = _fitting(spec, plan, tiles, axis, value), {**wanted, axis.field: value}
        else:
            assert type(value) is int
            changed, kept = _changed(spec, plan, tiles, axis, value), wanted
        if not is_legal(spec, plan.kind, plan.tokens, changed):
            continue
        parts: dict[str, Any] = {"decode": plan.decode, "block": plan.block, axis.part: changed}
        new = replace(override, **{axis.part: allowed(spec, plan.target, changed, kept)})
        found = with_tiles(spec, plan, **parts, override=new)
        if found is None or found == plan or (axis.of_recipe and found.recipe == plan.recipe):
            continue
        if is_short(spec, chip(plan.target), plan.kind, changed, found.recipe):
            yield label_of(spec, rule, found), found


def label_of(spec: Spec, rule: KernelPlan, plan: KernelPlan) -> str:
    """What a plan has other than the one that the rules made: `decode.buffers=8 block.mask=compare`; `rule` where nothing."""
    fields = [(axis, getattr(plan, axis.part), getattr(rule, axis.part)) for axis in AXES if not axis.of_recipe]
    differing = [
        f"{axis.part}.{axis.field}={getattr(tiles, axis.field)}"
        for axis, tiles, ruled in fields
        if hasattr(tiles, axis.field) and getattr(tiles, axis.field) != getattr(ruled, axis.field)
    ]
    decided = [
        f"{part}.{name}={str(value).lower()}"
        for part, wanted in override_of(spec, plan).as_dict().items()
        for name, value in wanted.items()
    ]
    return " ".join([*differing, *decided]) or RULE


def _fitting(spec: Spec, plan: KernelPlan, tiles: Tiles, axis: Axis, value: int | str) -> Tiles:
    """Tiles for another decision: where scores lie in rows, pieces of code on the diagonal are shorter."""
    if not isinstance(tiles, BlockTiles) or axis.field != "scores":
        return tiles
    assert plan.recipe.block is not None
    scores: Scores = "transposed" if value == "transposed" else "rows"
    most = most_steps(chip(plan.target), plan.kind, plan.recipe.block.read, scores)[1]
    fitting = heads_of(spec.model, tiles.steps(spec.model, 1), most)
    return replace(tiles, diagonal_heads=min(tiles.diagonal_heads, fitting))


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
        step_rows=largest_divisor(spec.model.group * changed.q_block, most_rows),
        copy_sizes=copy_sizes_of(plan.kind, changed.q_block, plan.tokens[0]),
    )
