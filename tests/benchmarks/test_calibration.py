"""The calibration: its batches, what it keeps, its page, and the files of `rpac bench`, without a compile."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest

from rpac.schedule import model_of

ROOT = Path(__file__).parents[2]


def module(name: str):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def points():
    return (*module("published").POINTS, *module("published_sglang").points())


def test_the_page_is_what_the_results_say(points):
    results = module("calibration.results").read([model_of(target) for target in ("tpu7x", "v6e")])
    text = module("calibration.page").document(points, results)
    assert (ROOT / "docs" / "calibration.md").read_text() == text


def test_every_target_has_points_in_its_fit_and_more_that_are_held_out(points):
    for target in module("calibration.fit").GRIDS:
        of_target = [point for point in points if point.target == target]
        fitted = sum(point.fit for point in of_target)
        assert 2 <= fitted < len(of_target) / 2


def test_the_fitted_constants_are_those_of_the_model():
    for target, found in module("calibration.results").read([model_of("tpu7x"), model_of("v6e")]).items():
        best, model = found.fits[0], model_of(target)
        assert (best.clock_hz, best.latency_s, best.setup_s) == pytest.approx(
            (model.clock_hz, model.latency_s, model.setup_s)
        )


def test_a_cost_of_a_dma_makes_the_held_out_points_of_v6e_better():
    with_cost, without = module("calibration.results").read([model_of("v6e")])["v6e"].fits
    assert without.setup_s == 0 < with_cost.setup_s
    assert with_cost.error < without.error
    assert with_cost.held_out < without.held_out


def test_decode_batches_are_drawn_as_published():
    lens = module("published_sglang").decode_lens(128)
    assert lens[:4] == (1221, 1043, 1208, 1218)
    assert (len(lens), sum(lens), min(lens), max(lens)) == (128, 200_092, 1031, 2048)


def test_results_of_other_constants_are_refused():
    results = module("calibration.results")
    other = dataclasses.replace(model_of("v6e"), latency_s=9e-6)
    with pytest.raises(
        results.StaleError, match=r"no results with the constants of v6e; run calibrate\.py --target v6e"
    ):
        results.read([other])


def test_results_of_other_tiles_are_refused(points):
    results = module("calibration.results")
    found = results.read([model_of("v6e")])["v6e"]
    point = next(point for point in points if point.target == "v6e")
    config = dataclasses.replace(point.configs[0], decode_tiles=(1, 512, 1, 512))
    with pytest.raises(results.StaleError, match="no result of these tiles"):
        found.row(dataclasses.replace(point, configs=(config,)))


def bench_file(folder: Path, **changes: object) -> Path:
    """The file of a bench of two entries, with some of its fields changed."""
    data = json.loads((ROOT / "tests" / "bench" / "golden.json").read_text())
    path = folder / "bench.json"
    path.write_text(json.dumps({**data, "entries": data["entries"][:2]} | changes))
    return path


def test_entries_of_a_bench_are_points_with_errors(tmp_path):
    call, kernel, unpredicted = module("calibration.bench").read(bench_file(tmp_path))
    assert (call.label, call.measured, call.predicted) == ("decode/8, decode 2x40", 6e-6, 4.5e-6)
    assert call.error == pytest.approx(-0.25)
    assert (kernel.label, kernel.error) == ("decode/8, decode 2x40: rpa_decode.1", pytest.approx(4.25 / 5.5 - 1))
    assert (unpredicted.label, unpredicted.error) == ("local mixed/32, mixed 1x6/40", None)
    lines = module("calibration.page").bench_table((call, kernel, unpredicted))
    assert lines[2] == "| TPU7x, tiny d1, decode/8, decode 2x40 | 6.0 | 4.5 | -25.0% | profiler | no |"
    assert lines[4].endswith("| - | - | fences; the target cpu has no schedule to predict from | no |")


def test_a_bench_that_was_predicted_with_other_constants_says_so(tmp_path):
    bench = {"name": "tiny", "digest": "0", "target": "v6e"}
    call, *_ = module("calibration.bench").read(bench_file(tmp_path, bundle=bench))
    assert call.note == "predicted with clock_hz 1.77e+09"


@pytest.mark.parametrize("change", [{"schema": 2}, {"format": "other"}, {"entries": None}, {"machine": {}}])
def test_a_file_that_is_no_bench_is_refused(tmp_path, change):
    path = bench_file(tmp_path, **change)
    with pytest.raises(SystemExit, match="not a file that rpac bench wrote"):
        module("calibration.bench").read(path)


def test_a_bench_is_printed_beside_the_points_and_changes_no_page(tmp_path, monkeypatch, capsys):
    calibrate = module("calibrate")
    monkeypatch.setattr(calibrate, "PAGE", tmp_path / "calibration.md")
    monkeypatch.setattr(sys, "argv", ["calibrate.py", "--bench", str(bench_file(tmp_path))])
    calibrate.main()
    printed = capsys.readouterr().out.splitlines()
    assert sum("held out" in line or "in the fit" in line for line in printed) > 60
    assert any(line.startswith("| TPU7x, tiny d1") for line in printed)
    assert not calibrate.PAGE.exists()
