"""`rpac explain`, `rpac specs`, `rpac show-config`, and specs from standard input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from command import ROOT, TINY, rpac

from rpac.cli import main, show_config

Built = Callable[[str], Path]


def test_a_spec_and_its_bundle_explain_alike(built: Built) -> None:
    batches = ["--decode", "4x20", "--prefill", "1x16/40", "--json"]
    spec, bundle = (CliRunner().invoke(main, ["explain", str(path), *batches]) for path in (TINY, built("cpu")))
    assert spec.exit_code == bundle.exit_code == 0, (spec.output, bundle.output)
    assert spec.output == bundle.output
    found = json.loads(spec.output)["batches"]
    assert [one["program"] for one in found] == ["decode/8", "prefill/32"]


def test_each_kind_of_layers_is_explained() -> None:
    done = CliRunner().invoke(main, ["explain", str(ROOT / "specs" / "gemma3-27b.yaml"), "--decode", "2x100"])
    assert done.exit_code == 0
    assert "decode 2x100, layer local:" in done.output
    assert "decode 2x100, layer global:" in done.output


def test_a_batch_without_a_program_exits_with_2() -> None:
    done = CliRunner().invoke(main, ["explain", str(TINY), "--prefill", "1x50/50"])
    assert done.exit_code == 2
    assert "token_buckets: [8, 32, 50]" in done.output


def test_explain_asks_for_a_batch_and_for_a_target_of_the_bundle(built: Built) -> None:
    done = CliRunner().invoke(main, ["explain", str(TINY)])
    assert done.exit_code == 2
    assert "give at least one of --decode 64x1024" in done.output
    done = CliRunner().invoke(main, ["explain", str(built("cpu")), "--decode", "1x1", "--target", "v6e"])
    assert done.exit_code == 3
    assert "holds no programs for v6e; it has cpu" in done.output


def test_every_shipped_spec_is_listed_and_copied_byte_for_byte(tmp_path: Path) -> None:
    listed = CliRunner().invoke(main, ["specs"]).output
    for path in sorted((ROOT / "specs").glob("*.yaml")):
        assert f"\n{path.stem} " in listed
        copy = tmp_path / path.name
        assert CliRunner().invoke(main, ["specs", path.stem, "-o", str(copy)]).exit_code == 0
        assert copy.read_bytes() == path.read_bytes()


def test_a_copy_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    done = CliRunner().invoke(main, ["specs", "tiny", "-o", str(tmp_path / "mine.yaml")])
    assert done.exit_code == 5
    assert "exists already" in done.output
    assert (tmp_path / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize(("args", "code", "words"), [(["tinny"], 2, "must be one of"), (["-o", "a.yaml"], 2, "NAME")])
def test_specs_refuses_what_it_cannot_copy(args: list[str], code: int, words: str) -> None:
    done = CliRunner().invoke(main, ["specs", *args])
    assert (done.exit_code, words in done.output) == (code, True)


def test_a_spec_from_standard_input_plans_as_its_file(tmp_path: Path) -> None:
    of_file = rpac("plan", TINY, "--target", "v6e", cache=tmp_path)
    of_stdin = rpac("plan", "-", "--target", "v6e", cache=tmp_path, input=TINY.read_text())
    assert of_stdin.stdout == of_file.stdout != ""
    twice = rpac("explain", "-", "--decode", "1x1", cache=tmp_path, input="name: [")
    assert twice.returncode == 2
    assert "SpecError: <stdin>:1:" in twice.stderr


def test_show_config_reports_what_fails_and_exits_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise OSError("no such thing")

    monkeypatch.setattr(show_config, "cpu_name", broken)
    monkeypatch.setattr(show_config, "DEVICES", "raise SystemExit('no driver')")
    done = CliRunner().invoke(main, ["show-config", "--json"])
    assert done.exit_code == 0
    facts = json.loads(done.output)
    assert facts["CPU"] == "failed: OSError: no such thing"
    assert facts["devices"] == "failed: no driver"
    assert facts["rpac"]


def test_show_config_names_the_devices() -> None:
    facts = json.loads(CliRunner().invoke(main, ["show-config", "--json"]).output)
    assert "cpu" in facts["devices"]
