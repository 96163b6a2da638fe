"""`rpac plan`: prints the tiles, the memory budgets and the recipe of each kernel before anything compiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click

from rpac.build import chosen_targets
from rpac.cli.common import command, json_option, print_json, spec_argument, target_option, tuned_of, tuned_option
from rpac.cli.terminal import table
from rpac.contract.units import size
from rpac.errors import PlanError
from rpac.plan import KernelPlan, plan_spec
from rpac.plan.cache_memory import CacheMemory, padding_bytes, padding_reason, page_bytes
from rpac.plan.words import decisions, tiles_in_words
from rpac.spec import Spec, load_spec

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
MEMORY_HEADER = (
    "target",
    "programs",
    "heads / KV heads on a device",
    "page",
    "padding",
    "num_pages",
    "cache of a layer",
    "of HBM",
    "usable",
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
    memory = [(CacheMemory.of(part, target), count) for part, target, count in _counted(spec, plans)]
    if as_json:
        print_json(
            {
                "spec": spec.name,
                "spec_hash": spec.hash,
                "plans": [one.as_dict() for one in plans],
                "memory": [{**one.as_dict(), "programs": programs} for one, programs in memory],
                "refused": refused,
            }
        )
    elif plans:
        click.echo(table(HEADER, [_row(one) for one in plans]))
        click.echo(f"\n{table(MEMORY_HEADER, [_memory_row(*one) for one in memory])}")
        for line in _memory_notes(spec):
            click.echo(line)
        for text, paths in _recipes(plans).items():
            click.echo(f"\n{', '.join(paths)}:\n{text}")
    if refused:
        raise PlanError("\n".join(refused.values()))


def _counted(spec: Spec, plans: Sequence[KernelPlan]) -> Iterator[tuple[Spec, str, int]]:
    """Each kind of layer on each target that has plans, and how many programs those make."""
    for part in spec.parts:
        for target in dict.fromkeys(one.target for one in plans):
            folder = "/".join(filter(None, (target, part.layer)))
            count = sum(len(one.tokens) for one in plans if one.path.rpartition("/")[0] == folder)
            if count:
                yield part, target, count


def _memory_row(one: CacheMemory, programs: int) -> tuple[str, ...]:
    share = "-" if one.usable_hbm_bytes is None else f"{one.cache_bytes / one.usable_hbm_bytes:.1%}"
    usable = "-" if one.usable_hbm_bytes is None else size(one.usable_hbm_bytes)
    return (
        "/".join(filter(None, (one.target, one.layer))),
        str(programs),
        f"{one.q_heads} / {one.kv_heads}",
        size(one.page_bytes),
        f"{one.padding_bytes / one.page_bytes:.0%}",
        str(one.num_pages),
        size(one.cache_bytes),
        share,
        usable,
    )


def _memory_notes(spec: Spec) -> Iterator[str]:
    """What the numbers do not say."""
    yield "\nThe cache is that of one layer: each layer of a model has one, and its weights need room too."
    for part in spec.parts:
        if padding_bytes(part):
            layer = f"layers.{part.layer}: " if part.layer else ""
            share = padding_bytes(part) / page_bytes(part)
            yield f"{layer}{share:.0%} of the cache is padding, because {padding_reason(part)}."


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
    return (
        one.path,
        " ".join(map(str, one.tokens)),
        tiles_in_words(one.decode),
        tiles_in_words(one.block),
        *budgets,
        one.origin,
    )
