"""A receipt names what is known with its source and age, and what is missing as missing."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner
from signing import NOW, TESTED, PolicyFile, Sign

from rpac.batch import Limits
from rpac.bundle import Manifest, Program, Target, Variant
from rpac.cli import main
from rpac.contract.arrays import ArrayDims
from rpac.contract.attention import Attention
from rpac.contract.program import Content
from rpac.trust import Attestation, receipt
from rpac.trust.predicates import BENCH, DEMO, PREDICTION, PROVENANCE, SUMMARY, TESTS, TYPES

GOLDEN = Path(__file__).with_name("receipt.json")
SCHEMA = json.loads(Path(receipt.__file__).with_name("receipt.schema.json").read_text())
TOOLS = {"python": "3.11.7", "rpac": "0.1.0", "jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.41"}
TIME = {
    "target": "tpu7x",
    "program": "decode/8",
    "compiler": "0.0.41",
    "batch": {"label": "decode 4x40"},
    "seconds": 4e-6,
}


def content(letter: str) -> Content:
    return Content(letter * 64, 10)


def manifest() -> Manifest:
    cache = ArrayDims("kv_cache", (64, 16, 2, 2, 128), "bfloat16")
    program = Program(
        Variant("decode", 8), "tpu7x/decode.py", {}, (cache,), (), content("a"), content("b"), None, {}, {},
        {"temp_bytes": 4096, "code_bytes": 1}, None,
    )  # fmt: skip
    return Manifest(
        "tiny", "5" * 64, Attention(4, 2, 128, "bfloat16", "bfloat16", 0.1), "interleaved", Limits(16, 8, 4, 64, 16, (8,)),
        {"tpu7x": Target("tpu7x", "TPU7x", "v7x:1x1", TOOLS, (program,))},
        {"spec.yaml": content("c"), "source/tpu7x/decode.py": content("d")},
    )  # fmt: skip


def stated(kind: str, predicate: dict[str, Any], days: int = 1, **more: Any) -> Attestation:
    return Attestation(1, kind, TYPES[kind], predicate, ("ci",), NOW - timedelta(days=days), **more)


def everything() -> dict[str, Attestation]:
    spread = {"spread": {"median": 5e-6}}
    entry = {"kind": "decode", "tokens": 8, "label": "decode 4x40", "timing": spread}
    return {
        PROVENANCE: stated(PROVENANCE, {"runDetails": {"builder": {"id": "https://ci.example/7"}}}, 3),
        SUMMARY: stated(SUMMARY, {"verificationResult": "PASSED", "verifier": {"version": TOOLS}}, 2),
        TESTS: stated(
            TESTS,
            {
                **TESTED,
                "rpac_batches": ["one", "two"],
                "rpac_worstErrors": {"tpu7x/decode.py": 1e-3},
                "rpac_mutations": {"caught": 451, "of": 452, "missed": ["x"]},
            },
        ),
        DEMO: stated(DEMO, {"results": {"seconds": 41.5}}),
        PREDICTION: stated(PREDICTION, {"predictions": [TIME]}),
        BENCH: stated(BENCH, {"results": {"bundle": {"target": "tpu7x"}, "entries": [entry]}}),
    }


def made(found: dict[str, Attestation], policy: str = "policy.yaml", problem: str = "") -> Any:
    data = receipt.receipt(
        "build/tiny.rpac", manifest(), list(found.values()), policy, problem, NOW, timedelta(days=30)
    )
    data = json.loads(json.dumps(data, allow_nan=False))
    jsonschema.validate(data, SCHEMA)
    return data


def fields(data: Any) -> dict[str, Any]:
    return {one["name"]: one for one in data["fields"]}


def states(data: Any) -> dict[str, str]:
    return {one["kind"]: one["state"] for one in data["evidence"]}


def test_the_golden_receipt() -> None:
    """Half of the evidence, one part of it stale. To write the file again, print what `made` returns."""
    found = everything()
    found[PROVENANCE] = replace(found[PROVENANCE], signed=NOW - timedelta(days=31))
    del found[BENCH], found[SUMMARY], found[DEMO]
    del found[TESTS].predicate["rpac_mutations"]  # type: ignore[attr-defined]
    assert made(found) == json.loads(GOLDEN.read_text())


def test_the_schema_is_one_and_refuses_what_it_does_not_know() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**made(everything()), "more": 1}, SCHEMA)


def test_with_everything_it_is_complete() -> None:
    data = made(everything())
    assert (data["verdict"], data["coverage"]["percent"], data["blockers"]) == ("complete", 100, [])
    assert data["never_measured_on"] == []
    known = fields(data)
    assert known["tpu7x: measured"]["value"] == [{"program": "decode/8", "batch": "decode 4x40", "seconds": 5e-6}]
    assert known["tpu7x: predicted"]["value"][0]["seconds"] == 4e-6
    assert (known["mutations caught"]["value"], known["seconds to the first demo"]["value"]) == ("451 of 452", 41.5)
    assert (known["builder"]["value"], known["builder"]["age_days"]) == ("https://ci.example/7", 3)
    assert known["tpu7x: cache bytes of a layer"]["value"] == 64 * 16 * 2 * 2 * 128 * 2


def test_with_nothing_all_is_missing_and_nothing_is_inferred() -> None:
    data = made({})
    assert (data["verdict"], data["coverage"]["percent"]) == ("incomplete", 0)
    assert data["never_measured_on"] == ["tpu7x"]
    assert set(states(data).values()) == {"missing"}
    missing = [name for name, one in fields(data).items() if one["state"] == "missing"]
    assert missing == [
        "builder", "batches checked", "worst error", "mutations caught", "seconds to the first demo", "tpu7x: predicted",
        "tpu7x: measured",
    ]  # fmt: skip
    assert all(fields(data)[name]["value"] is None for name in missing)


def test_what_is_not_trusted_tells_nothing() -> None:
    found = {kind: replace(one, untrusted="the policy has no key with the id ab") for kind, one in everything().items()}
    data = made(found)
    assert set(states(data).values()) == {"unverified"}
    assert fields(data)["tpu7x: measured"]["value"] is None
    assert data["never_measured_on"] == ["tpu7x"]
    assert data["signatures"] == {"policy": "policy.yaml", "state": "unverified", "keys": []}
    assert made(found, policy="")["blockers"][0] == "no key or policy was given: no signature was verified"


@pytest.mark.parametrize(
    ("kind", "predicate", "why"),
    [
        (
            PREDICTION,
            {"predictions": [{**TIME, "compiler": "0.0.40"}]},
            "of libtpu 0.0.40; the bundle was built with 0.0.41",
        ),
        (
            SUMMARY,
            {"verificationResult": "PASSED", "verifier": {"version": {"jax": "0.9"}}},
            "of jax 0.9; the bundle was",
        ),
    ],
)
def test_evidence_of_another_toolchain_is_stale(kind: str, predicate: dict[str, Any], why: str) -> None:
    data = made({**everything(), kind: stated(kind, predicate)})
    assert states(data)[kind] == "stale"
    assert data["verdict"] == "incomplete"
    assert why in data["blockers"][0]


def test_a_check_that_failed_or_a_policy_that_does_not_hold_refuses() -> None:
    data = made({**everything(), TESTS: stated(TESTS, {"result": "FAILED"})})
    assert (data["verdict"], states(data)[TESTS]) == ("refused", "failed")
    data = made({}, problem="its signature is not that of the key ci")
    assert (data["verdict"], data["signatures"]["state"]) == ("refused", "refused")
    assert data["blockers"][0] == "its signature is not that of the key ci"


def test_a_prediction_of_another_target_does_not_count() -> None:
    data = made({**everything(), PREDICTION: stated(PREDICTION, {"predictions": [{**TIME, "target": "v6e"}]})})
    assert states(data)[PREDICTION] == "missing"


def test_the_command(bundle: Path, keys: Path, signed: Sign, policy_file: PolicyFile) -> None:
    def run(*arguments: object) -> Any:
        done = CliRunner().invoke(main, ["receipt", str(bundle), *map(str, arguments)])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    signed(bundle)
    lines = run("--key", keys / "old.pub", "--max-age", 36500).splitlines()
    assert lines[1] == "incomplete: 25% of the evidence holds, 1 of 4"
    assert lines[2] == "never measured on cpu, as far as its evidence says"
    data = json.loads(run("--policy", policy_file("bench: {}"), "--json"))
    jsonschema.validate(data, SCHEMA)
    assert data["verdict"] == "refused"
    assert "found no bench by a key of" in data["blockers"][0]
    assert json.loads(run("--json"))["signatures"]["state"] == "unverified"
    assert CliRunner().invoke(main, ["receipt", str(bundle / "none")]).exit_code == 4
