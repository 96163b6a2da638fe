"""`rpac pack`: makes a wheel of a bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from rpac.bundle import Place
from rpac.bundle.wheel import is_wheel, wheel_of
from rpac.cli.common import PLACE, command, json_option, print_json
from rpac.contract.units import size
from rpac.files.publish import publish_file


@command()
@click.argument("bundle", type=PLACE)
@click.option(
    "-o", "folder", metavar="FOLDER", type=click.Path(path_type=Path), default="dist", show_default=True,
    help="Folder for the wheel.",
)  # fmt: skip
@click.option("--name", default="", help="What package:NAME calls it. Default: the bundle's own name.")
@click.option(
    "--version", default="", help="Version of the package. Default: 0.0.0+ and a part of the bundle's digest."
)
@json_option
def pack(bundle: Place, folder: Path, name: str, version: str, as_json: bool) -> None:
    """Make an installable wheel of BUNDLE for rpac.load("package:NAME").

    Every byte of the bundle is verified. The same bundle, name and version make the same wheel.
    """
    wheel = wheel_of(bundle, name, version)
    path = folder / wheel.file
    publish_file(path, wheel.data, is_wheel)
    if as_json:
        facts = {key: value for key, value in asdict(wheel).items() if key != "data"}
        print_json({**facts, "path": str(path), "size": len(wheel.data)})
        return
    click.echo(f"{path}: {size(len(wheel.data))}, {wheel.distribution} {wheel.version}")
    click.echo(f'install it with pip, then rpac.load("package:{wheel.name}")', err=True)
