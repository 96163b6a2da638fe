"""The config.json of real models: each gives a spec that plans, with these lines, or a refusal that names the key."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rpac.devices.chip import TPU_TARGETS
from rpac.errors import ModelError
from rpac.init.attention import describe
from rpac.init.config import load_config
from rpac.init.draft import Draft, make_draft
from rpac.init.memory import parameters
from rpac.init.servers import SERVERS, Request
from rpac.plan import plan_spec
from rpac.plan.tuned import TunedTiles
from rpac.spec import parse_spec

ROWS: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text())
ROW_KEYS = {"id", "config", "flags", "model", "layers", "refused", "billions"}
CHIP = "tpu7x"
DTYPES = ("q_dtype", "kv_dtype")
HEADINGS = ("model", "layers", "serving", "parallel")  # lines without a comment


def rows(refused: bool) -> list[Any]:
    return [pytest.param(row, id=row["id"]) for row in ROWS if ("refused" in row) == refused]


def saved(row: Mapping[str, Any], folder: Path) -> Path:
    path = folder / "model"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(row["config"]))
    return path


def draft(row: Mapping[str, Any], folder: Path, chip: str = CHIP) -> Draft:
    given = (
        dict(zip(words[::2], map(int, words[1::2]), strict=True))
        if (words := shlex.split(row.get("flags", "")))
        else {}
    )
    devices = given.pop("--devices", None)
    server = SERVERS["vllm"]
    flags = {flag.key: given.pop(flag.name) for flag in server.flags if flag.name in given}
    assert not given
    return make_draft(saved(row, folder), Request(server, chip, devices, flags), "rpac init model")


@pytest.mark.parametrize("row", rows(refused=False))
def test_a_model_gives_a_spec_that_plans_and_says_why(row: Mapping[str, Any], tmp_path: Path) -> None:
    made = draft(row, tmp_path)
    spec = parse_spec(made.text, "spec.yaml")
    for part in spec.parts:
        largest = replace(part.serving, token_buckets=part.serving.token_buckets[-1:])
        assert plan_spec(replace(part, serving=largest), CHIP, tuned=TunedTiles())
    lines = yaml.safe_load(made.text)
    model = {key: value for key, value in lines["model"].items() if key not in DTYPES}
    assert model == pytest.approx(row["model"])
    assert lines.get("layers", {}) == row.get("layers", {})
    body = [line for line in made.text.splitlines() if not line.startswith("#")]
    assert [line for line in body if "  # " not in line] == [f"{name}:" for name in HEADINGS if name in lines]


@pytest.mark.parametrize("row", rows(refused=True))
def test_a_model_is_refused_by_its_own_key(row: Mapping[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError) as raised:
        draft(row, tmp_path)
    [problem] = raised.value.problems
    key, missing = row["refused"]
    assert problem.where.split(" ")[0] == key
    assert missing in f"{problem.allowed}; {problem.fix}"
    assert problem.file.endswith("config.json")


@pytest.mark.slow
@pytest.mark.parametrize("chip", TPU_TARGETS)
@pytest.mark.parametrize("row", rows(refused=False))
def test_a_model_plans_on_every_chip(row: Mapping[str, Any], chip: str, tmp_path: Path) -> None:
    try:
        made = draft(row, tmp_path, chip)
    except ModelError as error:  # of a chip with little memory
        assert str(error).partition(": ")[2].startswith("HBM of ")
        return
    for part in made.spec.parts:
        for target in (chip, "cpu"):
            assert {plan.kind for plan in plan_spec(part, target, tuned=TunedTiles())} >= {"decode", "mixed"}


@pytest.mark.parametrize("row", [pytest.param(row, id=row["id"]) for row in ROWS if "billions" in row])
def test_parameters_are_counted(row: Mapping[str, Any], tmp_path: Path) -> None:
    count = parameters(describe(load_config(saved(row, tmp_path))))
    assert count is not None
    assert count / 1e9 == pytest.approx(row["billions"], rel=0.02)


def test_the_table_is_of_many_models_and_has_no_other_keys() -> None:
    assert len({row["id"].partition(" ")[0] for row in ROWS}) >= 60
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    assert all(set(row) <= ROW_KEYS for row in ROWS)
