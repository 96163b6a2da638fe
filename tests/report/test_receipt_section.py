"""The page has the receipt of each bundle, if a key is given; what is missing is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command import TINY

from rpac.bundle import read_manifest
from rpac.report import Report, page
from rpac.trust import Policy
from rpac.trust.keys import generate, read_private
from rpac.trust.sign import sign

Gathered = Callable[..., Report]


@pytest.fixture
def policy(tmp_path: Path, bundle: Path) -> Policy:
    generate(tmp_path / "ci")
    tests = {"result": "PASSED", "rpac_worstErrors": {"cpu/decode.py": 0.0025}, "rpac_mutations": None}
    sign(bundle, read_manifest(bundle), {"test-result": tests}, read_private(tmp_path / "ci.key"))
    return Policy.of_key(tmp_path / "ci.pub")


def test_a_signed_bundle_has_its_receipt_on_the_page(gathered: Gathered, bundle: Path, policy: Policy) -> None:
    report = gathered(bundle, TINY, targets=("v6e",), policy=policy, quick=True)
    signed, unsigned = report.subjects
    assert unsigned.receipt is None
    assert signed.receipt is not None
    assert report.to_json()["subjects"][0]["receipt"]["verdict"] == "incomplete"
    assert "no receipt" not in "\n".join(report.missing)
    text = page(report)
    assert text.count("<h2>Receipt") == 1
    section = text[text.index("<h2>Receipt") :]
    section = section[: section.index("</section>")]
    for part in (
        "<b>incomplete</b>: 25% of the evidence holds, 1 of 4.",
        "Never measured on cpu",
        "Signatures verified by ci, as --key",
        '<th scope="row">test-result</th><td class="name">all</td><td class="name">holds</td>',
        '<th scope="row">worst error</th><td class="name">0.0025</td>',
        '<th scope="row">mutations caught</th><td class="name">missing</td>',
        "<li>provenance missing: no statement</li>",
    ):
        assert part in section, part


def test_without_a_key_the_receipt_is_what_is_missing(gathered: Gathered, bundle: Path) -> None:
    report = gathered(bundle, TINY, targets=("v6e",), quick=True)
    (line,) = [one for one in report.missing if "no receipt" in one]
    assert line.endswith(": no receipt. Sign the bundle with `rpac sign`, then give `--key FILE` or `--policy FILE`.")
    assert "<h2>Receipt" not in page(report)
