"""`rpac inspect`: verifies a bundle and lists its contents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from rpac.bundle import Place, describe, verify_bundle
from rpac.cli.common import PLACE, command, json_option, print_json
from rpac.cli.terminal import table
from rpac.contract.mesh import Mesh
from rpac.contract.step import StepArray
from rpac.contract.units import size

_SHAPE = ("q_heads", "kv_heads", "head_dim", "q_dtype", "kv_dtype", "sm_scale")
STEP_HEADER = ("target", "step", "tokens", "temporaries", "export", "executable")
HEADER = ("target", "device kind", "program", "tokens", "source", "export", "executable")


@command()
@click.argument("bundle", type=PLACE)
@json_option
def inspect(bundle: Place, as_json: bool) -> None:
    """Verify every byte of BUNDLE and list its contents."""
    facts = describe(bundle, verify_bundle(bundle))
    if as_json:
        print_json(facts)
        return
    model, limits = facts["model"], facts["limits"]
    click.echo(f"{facts['name']}  spec {facts['spec_hash'][:16]}  {size(facts['size'])}, every hash matches")
    click.echo(f"digest {facts['digest']}")
    click.echo(
        f"{model['q_heads']}/{model['kv_heads']} heads, head_dim {model['head_dim']}, {model['kv_dtype']}; "
        f"K and V {facts['kv_layout']} in {limits['num_pages']} pages of {limits['page_size']}, "
        f"{limits['pages_per_seq']} for each of {limits['max_num_seqs']} sequences, "
        f"prefill chunks of {limits['prefill_chunk']}"
        + (f", decode rows of {limits['decode_len']} tokens" if "decode_len" in limits else "")
        + _features(model)
    )
    if "mesh" in facts:
        mesh = Mesh(**facts["mesh"])
        click.echo(f"for {mesh.devices} devices ({mesh}); heads, pages and sequences are those of one device")
    if "server" in facts:
        click.echo(f"built for {facts['server']}")
    for name, target in facts["targets"].items():
        tools = ", ".join(f"{key} {value}" for key, value in target["toolchain"].items() if not key.endswith("_files"))
        click.echo(f"{name}: {tools}{_features(target.get('model', {}))}")
    click.echo(table(HEADER, [_row(name, one) for name, one in _programs(facts)]))
    steps = facts.get("steps", {})
    for name, one in steps.items():
        params = sum(StepArray.from_data(array).nbytes for array in one["params"])
        click.echo(
            f"{name} steps of {one['function']}: {len(one['params'])} arrays of parameters, {size(params)}; "
            f"{len(one['caches'])} caches"
        )
    if steps:
        click.echo(table(STEP_HEADER, [_step_row(name, one) for name in steps for one in steps[name]["programs"]]))


def _features(model: Mapping[str, Any]) -> str:
    """The features of attention apart from its shape and dtypes, as the end of a line."""
    found = [f"{key} {json.dumps(value)}" for key, value in model.items() if key not in _SHAPE]
    return f"; {', '.join(found)}" if found else ""


def _programs(facts: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [
        (name, {**one, "device_kind": target["device_kind"]})
        for name, target in facts["targets"].items()
        for one in target["programs"]
    ]


def _row(target: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    return (target, one["device_kind"], one["kind"], str(one["tokens"]), one["source"], *_sizes(one))


def _step_row(target: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    temporary = size(one["memory"]["temp_bytes"]) if one["memory"] else "-"
    return (target, one["kind"], str(one["tokens"]), temporary, *_sizes(one))


def _sizes(one: Mapping[str, Any]) -> list[str]:
    return ["-" if one[tier] is None else size(one[tier]["size"]) for tier in ("exported", "executable")]
