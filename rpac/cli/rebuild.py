"""`rpac rebuild`: proves that a bundle is what its own spec makes."""

from __future__ import annotations

from pathlib import Path

import click

from rpac.bundle import read_manifest
from rpac.cli.build import BuildObserver
from rpac.cli.common import command, jobs_option, json_option, print_json, tuned_of, tuned_option
from rpac.errors import CheckError
from rpac.rebuild import rebuild
from rpac.trust.keys import read_private
from rpac.trust.predicates import SUMMARY
from rpac.trust.sign import folder_of, sign
from rpac.trust.summary import summary


@command("rebuild")
@click.argument("bundle")
@click.option(
    "--key", metavar="FILE", type=click.Path(path_type=Path),
    help="Private key that signs a verification summary beside the bundle, which must be a folder.",
)  # fmt: skip
@click.option(
    "--step",
    metavar="MODULE:FUNCTION",
    default="",
    help="The function of the bundle's whole steps, which is run: from the working directory, or installed.",
)
@jobs_option
@tuned_option
@json_option
def rebuild_command(
    bundle: str, key: Path | None, step: str, jobs: int | None, tuned_in: Path | None, as_json: bool
) -> None:
    """Build BUNDLE, a path or a URL, again from its own spec, and compare every byte.

    The environment must be the one that the bundle was built in. Nothing is taken from a cache.

    \b
    Exit codes: 0 the same bytes, 1 other bytes, and the first difference is printed, 3 another toolchain, 4 corrupt bundle.
    """
    folder, signer = (None, None) if key is None else (folder_of(bundle), read_private(key))
    observer = BuildObserver()
    done = rebuild(bundle, jobs, observer, tuned_of(tuned_in), step)
    made = summary(done.found.manifest, done.found.attestations)
    signed = None
    if not done.difference and folder is not None and signer is not None:
        manifest = read_manifest(folder)
        if manifest != done.found.manifest:
            raise CheckError(f"{bundle}: another bundle took its place while it was rebuilt; rebuild it again")
        signed = sign(folder, manifest, {SUMMARY: made}, signer).path
    if as_json:
        print_json(
            {
                "bundle": bundle, "digest": done.digest, "same": not done.difference, "difference": done.difference,
                "summary": None if done.difference else made, "file": None if signed is None else str(signed),
            }
        )  # fmt: skip
    if done.difference:
        raise CheckError(f"{bundle}: is not what its spec makes here: {done.difference}")
    if not as_json:
        count = f"{len(done.found.files)} files"
        click.echo(f"{bundle}: the same bytes, {count} in {observer.lines.seconds:.1f} s; digest {done.digest}")
        if signed is not None:
            click.echo(f"{signed}: has its verification summary")
