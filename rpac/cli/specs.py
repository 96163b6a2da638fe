"""`rpac specs`: lists the specs that come with rpac, and copies one."""

from __future__ import annotations

from pathlib import Path

import click

from rpac.cli.common import command, json_option, print_json
from rpac.cli.terminal import table
from rpac.spec import Spec, load_spec
from rpac.spec.shipped import copy_spec, shipped_specs

HEADER = ("name", "heads / KV heads", "head_dim", "KV cache", "devices", "layers", "targets")


@command("specs")
@click.argument("name", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write. Default: NAME.yaml here.")
@json_option
def specs_command(name: str | None, output: Path | None, as_json: bool) -> None:
    """List the specs that come with rpac, or copy the spec NAME to a new file, as a start for your own."""
    if name is not None:
        target = output or Path(f"{name}.yaml")
        copy_spec(name, target)
        click.echo(f"{target}: written; edit it, then run `rpac plan {target}`", err=True)
        return
    if output is not None:
        raise click.UsageError("-o needs the NAME of a spec to copy")
    specs = [load_spec(path) for path in shipped_specs().values()]
    if as_json:
        print_json({"specs": [{"name": spec.name, "path": str(shipped_specs()[spec.name])} for spec in specs]})
        return
    click.echo(table(HEADER, [_row(spec) for spec in specs]))


def _row(spec: Spec) -> tuple[str, ...]:
    model, serving = spec.model, spec.serving
    return (
        spec.name,
        f"{model.q_heads} / {model.kv_heads}",
        str(model.head_dim),
        f"{model.kv_dtype}, {serving.kv_layout}",
        str(spec.mesh.devices),
        ", ".join(part.layer for part in spec.parts if part.layer) or "-",
        " ".join(spec.targets),
    )
