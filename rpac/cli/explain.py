"""`rpac explain`: which program a batch runs on, and why."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from rpac.batch import Limits
from rpac.bundle import Place, names_bundle, read_manifest
from rpac.cli.common import PLACE, batch_options, command, json_option, print_json
from rpac.cli.terminal import table
from rpac.contract.program import Variant
from rpac.errors import BatchError, SelectionError, TargetError
from rpac.plan.planner import kinds_of
from rpac.predict import Asked
from rpac.spec import TARGETS, load_spec
from rpac.traffic.explain import Explanation, explain

HEADER = ("layer", "batch", "sequences", "new tokens", "distribution", "program")


@command("explain")
@click.argument("path", metavar="SPEC|BUNDLE", type=PLACE)
@batch_options
@click.option("--target", type=click.Choice(TARGETS), help="Target of a bundle whose targets hold different programs.")
@json_option
def explain_command(
    path: Place,
    decode: tuple[str, ...],
    prefill: tuple[str, ...],
    mixed: Path | None,
    target: str | None,
    as_json: bool,
) -> None:
    """Print which program of SPEC or BUNDLE each batch runs on, and why. Nothing is compiled or run.

    Exits with 2 where a batch has no program; its line then says which lines of the spec would add one.
    """
    if not (decode or prefill or mixed):
        raise BatchError("found no batch; give at least one of --decode 64x1024, --prefill 4x512/4096 and --mixed FILE")
    asked = Asked.of(decode, prefill, mixed)
    found = [
        (layer, explain(built, limits, one))
        for layer, built, limits in _parts(path, target)
        for one in asked.workloads(limits.decode_len)
    ]
    if as_json:
        print_json({"batches": [{"layer": layer, **one.as_dict()} for layer, one in found]})
    else:
        _print(found)
    if any(one.program is None for _, one in found):
        sys.exit(SelectionError.exit_code)


def _parts(path: Place, target: str | None) -> Iterator[tuple[str, frozenset[Variant], Limits]]:
    """Each kind of layers, with the programs that there are for it and what they take."""
    if not names_bundle(path):
        for part in load_spec(path).parts:
            limits = Limits.of(part)
            built = frozenset(Variant(kind, n) for n in limits.token_buckets for kind in kinds_of(part, n))
            yield part.layer, built, limits
        return
    manifest = read_manifest(path)
    if target is not None and target not in {one.name for one in manifest.targets.values()}:
        raise TargetError(f"{path}: holds no programs for {target}; it has {', '.join(manifest.targets)}")
    layers = dict.fromkeys(one.layer for one in manifest.targets.values())
    for layer in layers:
        of_layer = [one for one in manifest.targets.values() if one.layer == layer and target in (None, one.name)]
        sets = {frozenset(program.variant for program in one.programs) for one in of_layer}
        if len(sets) > 1:
            names = ", ".join(one.name for one in of_layer)
            raise TargetError(f"{path}: its targets ({names}) hold different programs; choose one with --target")
        yield layer, sets.pop(), manifest.limits.of_layers({layer: of_layer[0].model or manifest.model})


def _print(found: list[tuple[str, Explanation]]) -> None:
    has_layers = any(layer for layer, _ in found)
    rows = [(layer, *_row(one))[not has_layers :] for layer, one in found]
    click.echo(table(HEADER[not has_layers :], rows))
    for layer, one in found:
        click.echo(f"\n{one.workload.label}{f', layer {layer}' if layer else ''}:")
        for reason in one.reasons:
            first, *rest = reason.splitlines()
            click.echo("\n".join([f"- {first}", *(f"  {line}" for line in rest)]))


def _row(one: Explanation) -> tuple[str, ...]:
    distribution = "-" if one.distribution is None else ", ".join(map(str, one.distribution))
    program = "none" if one.program is None else str(one.program)
    return one.workload.label, str(len(one.workload.q_lens)), str(one.num_tokens), distribution, program
