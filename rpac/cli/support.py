"""`rpac support`: prints what a spec may contain."""

from __future__ import annotations

import click

from rpac.cli.common import command


@command("support")
def support_command() -> None:
    """Print every key of a spec with its values, and which features exclude each other, as Markdown (docs/support.md)."""
    from rpac.spec.support import document

    click.echo(document(), nl=False)
