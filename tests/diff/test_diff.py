"""What differs between two specs, or a spec and a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner
from command import TINY

from rpac.cli import main
from rpac.diff import Change, difference, side_of

Built = Callable[[str], Path]

# num_pages has no value in the spec: as many as the tokens of all sequences take.
PAGES = (Change("spec", "serving.page_size", "16", "32"), Change("spec", "serving.num_pages", "128", "64"))


@pytest.fixture
def longer(tmp_path: Path) -> Path:
    """The tiny spec with other pages."""
    path = tmp_path / "longer.yaml"
    path.write_text(TINY.read_text().replace("page_size: 16", "page_size: 32"))
    return path


def test_a_spec_does_not_differ_from_itself() -> None:
    found = difference(side_of(TINY, ["cpu", "v6e"]), side_of(TINY, ["cpu", "v6e"]))
    assert not found
    assert found.same_kernels == 7


def test_a_spec_does_not_differ_from_its_bundle(built: Built) -> None:
    assert not difference(side_of(TINY, ["cpu"]), side_of(built("cpu")))


def test_a_key_that_differs_is_named_with_what_follows_from_it(longer: Path) -> None:
    found = difference(side_of(TINY, ["v6e"]), side_of(longer, ["v6e"]))
    assert found.spec == PAGES
    assert {one.what for one in found.plans} >= {"smem_need"}
    changed = {one.path for one in found.kernels}
    assert changed == {f"v6e/{name}.py" for name in ("decode", "prefill", "mixed_t8", "mixed_t32")}
    assert all(one.added == one.removed > 0 and not one.only for one in found.kernels)
    assert found.same_kernels == 0


def test_sources_that_one_side_alone_has(longer: Path) -> None:
    found = difference(side_of(TINY, ["cpu"]), side_of(TINY, ["cpu", "v6e"]))
    assert {one.path.split("/")[0]: one.only for one in found.kernels} == {"v6e": "second"}
    assert found.same_kernels == 3


def test_the_command_prints_tables_json_and_an_exit_code(longer: Path) -> None:
    args = ["diff", str(TINY), str(longer), "--target", "cpu"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0
    assert "serving.page_size  16" in done.output
    assert done.output.endswith("0 kernels are the same, 3 differ\n")
    assert CliRunner().invoke(main, [*args, "--exit-code"]).exit_code == 1
    data = json.loads(CliRunner().invoke(main, [*args, "--json"]).output)
    assert data["spec"] == [asdict(one) for one in PAGES]
    assert data["times"] == []


def test_no_difference_is_said_and_exits_with_0() -> None:
    done = CliRunner().invoke(main, ["diff", str(TINY), str(TINY), "--target", "cpu", "--exit-code"])
    assert (done.exit_code, done.output) == (0, "nothing differs\n")


def test_a_target_that_is_not_there_is_refused(built: Built) -> None:
    done = CliRunner().invoke(main, ["diff", str(TINY), str(built("cpu")), "--target", "v6e"])
    assert done.exit_code == 3
    assert "holds no programs for v6e; it has cpu" in done.output


@pytest.mark.compile
@pytest.mark.once
def test_predicted_times_are_compared(longer: Path) -> None:
    args = ["diff", str(TINY), str(longer), "--target", "v6e", "--time", "v6e", "--json"]
    times = json.loads(CliRunner().invoke(main, args).stdout)["times"]
    assert times
    assert all(seconds > 0 for one in times for seconds in one["seconds"])
