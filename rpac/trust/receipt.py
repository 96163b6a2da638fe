"""A receipt: what is known of a bundle, from where and how old; and what is not known, which is named and never inferred.

Only statements by trusted keys count. `receipt.schema.json` beside this file describes the data.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

from rpac.bundle.manifest import Manifest, Target, digest
from rpac.devices.chip import chip, is_tpu
from rpac.trust.predicates import BENCH, DEMO, MUTATIONS, PREDICTION, PROVENANCE, SUMMARY, TESTS, failure, time_text
from rpac.trust.verify import Attestation

FORMAT: Final = "rpac receipt"
SCHEMA: Final = 1
MISSING, STALE, FAILED, UNVERIFIED, HOLDS = "missing", "stale", "failed", "unverified", "holds"
NO_KEY: Final = "no key or policy was given"
COMPILERS: Final = ("jax", "jaxlib", "libtpu")


@dataclass(frozen=True)
class Evidence:
    """One statement that a bundle should have, and what became of it; `target` is empty where it is about all of them."""

    kind: str
    target: str
    state: str
    why: str
    found: Attestation | None = None


def receipt(
    place: str,
    manifest: Manifest,
    attestations: Sequence[Attestation],
    policy: str,
    problem: str,
    now: datetime,
    max_age: timedelta,
) -> dict[str, Any]:
    """The receipt as plain data. `policy`: what names the keys that count, empty for none. `problem`: why the attestations cannot
    be used at all, such as a signature that does not match. `max_age`: what is older is stale.
    """
    evidence = [_judged(*wanted, manifest, attestations, now, max_age) for wanted in _wanted(manifest)]
    demo = _judged(
        DEMO, "", manifest, attestations, now, max_age
    )  # says how soon it runs, and is no part of the evidence
    if not policy:
        evidence = [replace(one, why=NO_KEY) if one.state == UNVERIFIED else one for one in evidence]
    held = [one for one in evidence if one.state == HOLDS]
    blockers = [*([problem] if problem else []), *map(_blocker, (one for one in evidence if one.state != HOLDS))]
    if not policy:
        blockers.insert(0, f"{NO_KEY}: no signature was verified")
    unmeasured = [one.target for one in evidence if one.kind == BENCH and one.state in (MISSING, UNVERIFIED)]
    failed = problem or any(one.state == FAILED for one in evidence)
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "bundle": {"place": place, "name": manifest.name, "digest": digest(manifest), "spec_hash": manifest.spec_hash},
        "issued": time_text(now),
        "verdict": "refused" if failed else "incomplete" if blockers else "complete",
        "never_measured_on": unmeasured,
        "signatures": {
            "policy": policy or None,
            "state": _state(policy, problem, attestations),
            "keys": _keys(attestations),
        },
        "coverage": {"percent": round(100 * len(held) / len(evidence)), "holds": len(held), "of": len(evidence)},
        "max_age_days": max_age.days,
        "evidence": [_plain(one, now) for one in evidence],
        "fields": [*_lineage(manifest, evidence, demo, now), *_envelopes(manifest, evidence, now)],
        "blockers": blockers,
    }


def _wanted(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What a bundle should have: kinds of statements, those of times for each target."""
    yield from ((kind, "") for kind in (PROVENANCE, SUMMARY, TESTS))
    for target in dict.fromkeys(one.name for one in manifest.targets.values()):
        if is_tpu(target):
            yield PREDICTION, target
        yield BENCH, target


def _judged(
    kind: str, target: str, manifest: Manifest, found: Sequence[Attestation], now: datetime, max_age: timedelta
) -> Evidence:
    of_kind = [one for one in found if one.kind == kind and (not target or target in _targets(one))]
    trusted = [one for one in of_kind if not one.untrusted]
    if not trusted:
        why = of_kind[0].untrusted if of_kind else "no statement"
        return Evidence(kind, target, UNVERIFIED if of_kind else MISSING, why)
    one = max(trusted, key=lambda one: -math.inf if one.signed is None else one.signed.timestamp())
    failed = failure(one.predicate_type, one.predicate)
    if failed:
        return Evidence(kind, target, FAILED, failed, one)
    if one.signed is None:
        return Evidence(kind, target, STALE, "it does not say when it was signed", one)
    if now - one.signed > max_age:
        return Evidence(kind, target, STALE, f"signed {_days(one, now)} days ago, over {max_age.days}", one)
    other = _other_tool(one, manifest)
    return Evidence(kind, target, STALE if other else HOLDS, other, one)


def _targets(one: Attestation) -> set[str]:
    """The targets that times are of."""
    if one.kind == PREDICTION:
        return {str(_at(each, "target")) for each in _rows(_at(one.predicate, "predictions"))}
    return {str(_at(one.predicate, "results", "bundle", "target")).partition(".")[0]}


def _other_tool(one: Attestation, manifest: Manifest) -> str:
    """A tool of which the evidence had another version than the build."""
    claims: list[tuple[str, Mapping[str, Any]]] = []
    if one.kind == PREDICTION:
        claims = [
            (str(_at(each, "target")), {"libtpu": _at(each, "compiler")})
            for each in _rows(_at(one.predicate, "predictions"))
        ]
    elif one.kind == SUMMARY:
        versions = _at(one.predicate, "verifier", "version")
        claims = [
            (target.name, versions if isinstance(versions, Mapping) else {}) for target in manifest.targets.values()
        ]
    for target in manifest.targets.values():
        for name, versions in claims:
            for tool in COMPILERS:
                if name == target.name and tool in versions and versions[tool] != target.toolchain.get(tool):
                    return f"of {tool} {versions[tool]}; the bundle was built with {target.toolchain.get(tool)}"
    return ""


def _lineage(
    manifest: Manifest, evidence: Sequence[Evidence], demo: Evidence, now: datetime
) -> Iterator[dict[str, Any]]:
    made = {
        "spec": manifest.spec_hash,
        "files": {name: content.sha256 for name, content in manifest.files.items()},
        "toolchains": {target.key: dict(target.toolchain) for target in manifest.targets.values()},
    }
    yield _field("lineage", hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest(), "the manifest")
    proof = next(one for one in evidence if one.kind == PROVENANCE)
    builder = None if not _counts(proof) else _of(proof, "runDetails", "builder", "id")
    yield _field("builder", builder, PROVENANCE, proof, now)
    tested = next(one for one in evidence if one.kind == TESTS)
    yield _field("batches checked", len(_rows(_of(tested, "rpac_batches"))) or None, TESTS, tested, now)
    yield _field("worst error", _worst(tested), TESTS, tested, now)
    yield _field("mutations caught", _caught(tested), TESTS, tested, now)
    seconds = _of(demo, "results", "seconds")
    yield _field("seconds to the first demo", seconds if _is_number(seconds) else None, DEMO, demo, now)


def _caught(tested: Evidence) -> str | None:
    caught, of = _of(tested, MUTATIONS, "caught"), _of(tested, MUTATIONS, "of")
    return f"{caught} of {of}" if _is_number(caught) and _is_number(of) else None


def _envelopes(manifest: Manifest, evidence: Sequence[Evidence], now: datetime) -> Iterator[dict[str, Any]]:
    for target in manifest.targets.values():
        of_target = {one.kind: one for one in evidence if one.target == target.name}
        yield _field(f"{target.key}: device", target.device_kind, "the manifest")
        yield _field(f"{target.key}: devices", manifest.mesh.devices, "the manifest")
        if is_tpu(target.name):
            yield _field(f"{target.key}: HBM bytes of a device", chip(target.name).hbm_bytes, "rpac's table of chips")
        yield _field(f"{target.key}: cache bytes of a layer", _cache_bytes(target), "the manifest")
        yield _field(f"{target.key}: temporary bytes of a program", _temporary_bytes(target), "the manifest")
        if PREDICTION in of_target:
            one = of_target[PREDICTION]
            yield _field(f"{target.key}: predicted", _predicted(one, target), PREDICTION, one, now)
        yield _field(f"{target.key}: measured", _measured(of_target[BENCH]), BENCH, of_target[BENCH], now)


def _cache_bytes(target: Target) -> int | None:
    return next((one.nbytes for program in target.programs for one in program.args if one.name == "kv_cache"), None)


def _temporary_bytes(target: Target) -> int | None:
    """The most that XLA allocates for one program beside its arguments and results."""
    found = [program.memory["temp_bytes"] for program in target.programs if "temp_bytes" in program.memory]
    return max(found) if len(found) == len(target.programs) else None


def _predicted(one: Evidence, target: Target) -> Any:
    return _times(
        (_at(each, "program"), _at(each, "batch", "label"), _at(each, "seconds"))
        for each in _rows(_of(one, "predictions"))
        if _at(each, "target") == target.name
    )


def _measured(one: Evidence) -> Any:
    """Median seconds of each program and batch, as the file of `rpac bench` has them."""
    return _times(
        (
            f"{_at(each, 'kind')}/{_at(each, 'tokens')}",
            _at(each, "label"),
            _at(each, "timing", "spread", "median"),
        )
        for each in _rows(_of(one, "results", "entries"))
    )


def _times(found: Iterable[tuple[Any, Any, Any]]) -> list[dict[str, Any]] | None:
    """Seconds of a program and a batch each; None where there are none, or where one is no time."""
    rows = [{"program": str(program), "batch": str(batch), "seconds": seconds} for program, batch, seconds in found]
    return rows if rows and all(_is_number(row["seconds"]) for row in rows) else None


def _worst(one: Evidence) -> float | None:
    errors = _of(one, "rpac_worstErrors")
    values = list(errors.values()) if isinstance(errors, Mapping) else []
    return max(values) if values and all(map(_is_number, values)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _of(one: Evidence, *path: str) -> Any:
    """A value of the predicate; None where it is not there, or where the statement does not count."""
    return _at(one.found.predicate, *path) if one.found is not None and _counts(one) else None


def _at(value: Any, *path: str) -> Any:
    """A value in plain data of any form; None where it is not there."""
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _rows(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _counts(one: Evidence) -> bool:
    return one.state in (HOLDS, STALE, FAILED)  # what it says is shown with its state beside it


def _field(
    name: str, value: Any, source: str, of: Evidence | None = None, now: datetime | None = None
) -> dict[str, Any]:
    """A fact with its source; one that nobody stated is missing. What the manifest says has no age: it has no time."""
    state = HOLDS if of is None else of.state
    age = None if of is None or of.found is None or now is None else _days(of.found, now)
    return {
        "name": name,
        "value": value,
        "state": MISSING if value is None else state,
        "source": source,
        "age_days": age,
    }


def _plain(one: Evidence, now: datetime) -> dict[str, Any]:
    found = one.found
    return {
        "kind": one.kind,
        "target": one.target or None,
        "state": one.state,
        "why": one.why,
        "keys": [] if found is None else list(found.keys),
        "signed": None if found is None or found.signed is None else time_text(found.signed),
        "age_days": None if found is None else _days(found, now),
    }


def _days(one: Attestation, now: datetime) -> int | None:
    return None if one.signed is None else max(0, (now - one.signed).days)


def _blocker(one: Evidence) -> str:
    return f"{one.kind}{f' of {one.target}' if one.target else ''} {one.state}: {one.why}"


def _keys(found: Sequence[Attestation]) -> list[str]:
    return sorted({name for one in found if not one.untrusted for name in one.keys})


def _state(policy: str, problem: str, found: Sequence[Attestation]) -> str:
    if problem:
        return "refused"
    if not found:
        return MISSING
    return "verified" if policy and any(not one.untrusted for one in found) else UNVERIFIED
