"""docs/support.md is what the rules of the spec format say, and leaves no key out."""

from __future__ import annotations

import pytest
from command import ROOT

from rpac.spec import TARGETS, parse_spec
from rpac.spec import parse as rules
from rpac.spec.support import FEATURES, document, text_of


def test_the_document_is_made_from_the_code() -> None:
    assert (ROOT / "docs" / "support.md").read_text() == document(), "run `make support` and commit it"


def test_every_key_has_a_row() -> None:
    text = document()
    keys = {"model": rules.MODEL_KEYS, "serving": rules.SERVING_KEYS, "parallel": rules.PARALLEL_KEYS}
    for section, names in keys.items():
        for name in names:
            assert f"| {section}.{name} " in text


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_is_accepted_for_every_target(name: str) -> None:
    assert parse_spec(text_of(FEATURES[name]), "spec.yaml").targets == TARGETS
