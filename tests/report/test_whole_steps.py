"""A report tells the time of a model's whole step where it is asked for, and names it as missing where it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from command import TINY

from rpac.errors import ScheduleError
from rpac.files.store import Store
from rpac.predict import parse_decode
from rpac.report import Report, Request, page
from rpac.report.facts import WholeStep
from rpac.report.request import givens_of
from rpac.report.whole_steps import whole_steps

Gathered = Callable[..., Report]


def test_a_whole_step_is_a_row_of_its_own_section(usual: Report) -> None:
    assert "<h2>Whole steps</h2>" not in page(usual)
    step = WholeStep(
        "decode 4x100", "decode/8", "my:step", 2e-3, 1234.0, 0.61, 0.07, {"attention": 0.3, "calls": 0.001}, 0.02
    )
    first, *others = usual.options
    told = replace(usual, options=(replace(first, whole_steps=(step,)), *others))
    text = page(told)
    section = text.partition("<h2>Whole steps</h2>")[2].partition("</section>")[0]
    for part in ("decode 4x100", "1,234", "0.61", "attention 30%", "2% timed by bytes", "my:step, decode/8"):
        assert part in section
    assert "calls" not in section
    assert told.to_json()["options"][0]["whole_steps"][0]["seconds"] == 2e-3


def test_a_spec_that_names_a_step_and_no_option_for_it_is_missing_its_time(gathered: Gathered, tmp_path: Path) -> None:
    path = tmp_path / "stepped.yaml"
    path.write_text(TINY.read_text() + "step: my_model:step\n")
    missing = gathered(path, targets=("v6e",), quick=True).missing
    assert any("my_model:step" in line and "`--step`" in line for line in missing)


def test_a_step_that_cannot_be_predicted_is_named_once(tmp_path: Path) -> None:
    def fails(*_: Any) -> Any:
        raise ScheduleError("no such function")

    request = Request(targets=("tpu7x",), step="my_model:step")
    [given] = givens_of([TINY], request)
    batches = [parse_decode("4x40"), parse_decode("4x100")]
    found, missing = whole_steps(given, "tpu7x", batches, request, Store(None), lambda line: None, fails)
    assert found == ()
    assert missing == ("tiny on tpu7x, whole step, decode 4x40: no such function",)
