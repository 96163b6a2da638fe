"""What is written about planted bugs is what `rpac sign --mutations` takes."""

from __future__ import annotations

from pathlib import Path

import plant_bugs
import pytest
from mutation import Bug, BugSuite

from rpac.trust import evidence


def test_bugs_that_go_unseen_are_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = plant_bugs.all_suites()[0]

    def check_bug(spec: object, plan: object, bug: Bug) -> None:
        assert bug is not suite.bugs[0], "the bug goes unseen"

    def only_one() -> list[BugSuite]:
        return [suite]

    monkeypatch.setattr(plant_bugs, "check_bug", check_bug)
    monkeypatch.setattr(plant_bugs, "all_suites", only_one)
    out = tmp_path / "build" / "mutations.json"
    with pytest.raises(SystemExit) as ended:
        plant_bugs.main(out, ordinary=False)
    assert ended.value.code == 1
    found = evidence.mutations(out)
    assert (found["caught"], found["of"]) == (len(suite.bugs) - 1, len(suite.bugs))
    assert found["missed"] == [f"{suite}: {suite.bugs[0]}"]
