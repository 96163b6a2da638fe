"""`rpac keygen`, `rpac sign` and `rpac verify`: keys, signed statements about a bundle, and whether they hold."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from rpac.bundle import Manifest, digest, verify_bundle
from rpac.cli.common import command, json_option, print_json, tuned_folder, tuned_of, tuned_option
from rpac.cli.terminal import table
from rpac.rebuild import require_same_kernels
from rpac.trust import Attestation, Policy, Verdict, load_policy, verdict
from rpac.trust.evidence import bench, demo, mutations, predictions, tests
from rpac.trust.keys import PRIVATE, PUBLIC, generate, policy_lines, read_private, read_public
from rpac.trust.predicates import BENCH, DEMO, PREDICTION, PROVENANCE, TESTS, time_text
from rpac.trust.provenance import LOCAL_BUILDER, provenance
from rpac.trust.sign import folder_of
from rpac.trust.sign import sign as sign_bundle

HEADER = ("attestation", "key", "signed", "age", "counts")
file_type = click.Path(path_type=Path)
key_option = click.option(
    "--key", "key", metavar="FILE", type=file_type, required=True, help="Private key, as `rpac keygen` makes it."
)


@command("keygen")
@click.option(
    "-o", "--out", metavar="NAME", type=file_type, default=Path("rpac"), show_default=True,
    help="Writes NAME.key, which is secret, and NAME.pub.",
)  # fmt: skip
def keygen_command(out: Path) -> None:
    """Make an ed25519 key to sign bundles with, and print the lines of a policy that trust it."""
    key = generate(out)
    click.echo(policy_lines(out.name, key), nl=False)
    click.echo(f"{out}{PRIVATE} signs: keep it secret. {out}{PUBLIC} verifies.", err=True)


@command("sign")
@click.argument("bundle")
@key_option
@click.option("--check", metavar="FILE", type=file_type, help="Also sign what `rpac check SPEC --json` wrote.")
@click.option("--predict", metavar="FILE", type=file_type, help="Also sign what `rpac predict BUNDLE --json` wrote.")
@click.option("--bench", "bench_file", metavar="FILE", type=file_type, help="Also sign what `rpac bench BUNDLE` wrote.")
@click.option(
    "--mutations", "mutations_file", metavar="FILE", type=file_type,
    help="With --check: how many planted bugs it catches, as `make mutations` found.",
)  # fmt: skip
@click.option("--demo", "demo_file", metavar="FILE", type=file_type, help="Also sign what `make demo` wrote.")
@click.option(
    "--no-provenance", is_flag=True, help="Sign only the files given, on a machine that did not build the bundle."
)
@click.option(
    "--builder", metavar="URI", default=LOCAL_BUILDER, show_default=True, help="Name of what built, in the provenance."
)
@click.option(
    "--countersign", metavar="FILE", multiple=True, type=file_type,
    help="Public key whose attestations get a signature of the new key too; repeat for several.",
)  # fmt: skip
@tuned_option
@json_option
def sign_command(
    bundle: str,
    key: Path,
    check: Path | None,
    predict: Path | None,
    bench_file: Path | None,
    mutations_file: Path | None,
    demo_file: Path | None,
    no_provenance: bool,
    builder: str,
    countersign: tuple[Path, ...],
    tuned_in: Path | None,
    as_json: bool,
) -> None:
    """Sign statements about BUNDLE, a folder, into BUNDLE.intoto.jsonl beside it.

    They are its provenance (spec, flags, packages, templates), and the results that are given, each of which must be of this
    bundle's kernels. Statements that are there already stay, unless they are of the same kind and by the same key.
    """
    folder = folder_of(bundle)
    signer, others = read_private(key), [read_public(path) for path in countersign]
    manifest = verify_bundle(folder)
    made: dict[str, Mapping[str, Any]] = {}
    if not no_provenance:
        user = (tuned_folder() if tuned_in is None else tuned_in) if str(tuned_in) != "none" else None
        made[PROVENANCE] = provenance(bundle, manifest, builder, user if user is not None and user.is_dir() else None)
    if not no_provenance or mutations_file is not None:
        require_same_kernels(folder, manifest, tuned_of(tuned_in))
    if check is not None:
        made[TESTS] = tests(check, manifest, None if mutations_file is None else mutations(mutations_file))
    elif mutations_file is not None:
        raise click.UsageError("--mutations is part of the statement of a check; give --check too")
    for kind, path, read in ((PREDICTION, predict, predictions), (BENCH, bench_file, bench), (DEMO, demo_file, demo)):
        if path is not None:
            made[kind] = read(path, manifest)
    if not made and not others:
        raise click.UsageError("found nothing to sign; give --check, --predict, --bench, --demo or --countersign")
    signed = sign_bundle(folder, manifest, made, signer, countersign=others)
    if as_json:
        print_json(
            {
                "file": str(signed.path), "key_id": signer.public_key.keyid, "digest": digest(manifest),
                "signed": signed.written, "kept": signed.kept, "dropped": signed.dropped,
            }
        )  # fmt: skip
        return
    for kind in signed.dropped:
        click.echo(f"dropped: a {kind} of another bundle", err=True)
    click.echo(f"signed with {signer.public_key.keyid}: {', '.join(signed.written) or 'none'}")
    if signed.kept:
        click.echo(f"kept: {', '.join(signed.kept)}")
    click.echo(f"{signed.path}: {len(signed.written) + len(signed.kept)} attestations of {digest(manifest)}")


@command("verify")
@click.argument("bundle")
@click.option("--key", metavar="FILE", type=file_type, help="Public key that must have signed.")
@click.option("--policy", "policy_file", metavar="FILE", type=file_type, help="Trust policy that must hold.")
@json_option
def verify_command(bundle: str, key: Path | None, policy_file: Path | None, as_json: bool) -> None:
    """Verify every byte of BUNDLE, a path or a URL, and the attestations beside it.

    With both a key and a policy, the key counts as one more of the policy's.
    """
    policy = policy_of(key, policy_file)
    found, manifest = verified(bundle, policy)
    if as_json:
        print_json(
            {
                "path": bundle, "name": manifest.name, "digest": digest(manifest), "policy": policy.place,
                "attestations": [_facts(one) for one in found.attestations],
            }
        )  # fmt: skip
        return
    now = datetime.now(UTC)
    click.echo(table(HEADER, [_row(one, now) for one in found.attestations]))
    click.echo(f"{manifest.name}  digest {digest(manifest)}, every hash and signature matches, as {policy.place} asks")


def policy_of(key: Path | None, policy_file: Path | None) -> Policy:
    """What the options ask. Raises a usage error without any of them, TrustError for files that cannot be used."""
    if policy_file is not None:
        policy = load_policy(policy_file)
        return policy if key is None else policy.with_key(key)
    if key is None:
        raise click.UsageError(
            "found neither --key nor --policy; give the public key that must have signed, or a policy"
        )
    return Policy.of_key(key)


def verified(bundle: str, policy: Policy) -> tuple[Verdict, Manifest]:
    """The attestations of a bundle of which every byte is verified. Raises BundleError."""
    kept: list[Verdict] = []
    manifest = verify_bundle(bundle, approve=lambda *found: kept.append(verdict(policy, *found)))
    return kept[-1], manifest


def _row(one: Attestation, now: datetime) -> tuple[str, ...]:
    age = "-" if one.signed is None else f"{max(0, (now - one.signed).days)} days"
    signed = "-" if one.signed is None else time_text(one.signed)
    return (one.kind, ", ".join(one.keys) or "-", signed, age, f"no: {one.untrusted}" if one.untrusted else "yes")


def _facts(one: Attestation) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "predicate_type": one.predicate_type,
        "predicate": one.predicate,
        "keys": one.keys,
        "signed": None if one.signed is None else time_text(one.signed),
        "untrusted": one.untrusted,
    }
