"""`rpac predict --step`: the time of a model's whole step, from the user's function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command import ROOT, rpac

STEPS = ROOT / "tests" / "step"
PREDICT = ("predict", STEPS / "llama-step.yaml", "--target", "tpu7x", "--decode", "4x32")


@pytest.mark.compile
def test_a_step_is_compiled_once_and_all_of_it_is_timed(dumps: Path) -> None:
    done = rpac(*PREDICT, "--step", "llama_step:step", "--json", cache=dumps, cwd=STEPS)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["predictions"]
    assert found["program"] == "decode/16"
    assert found["tokens_per_second"] == pytest.approx(4 / found["seconds"])
    assert found["tokens_per_second_per_chip"] == pytest.approx(2 * found["tokens_per_second"])
    assert sum(part["seconds"] for part in found["parts"]) == pytest.approx(found["seconds"])
    assert {"attention", "matrix products", "vector work"} <= {part["category"] for part in found["parts"]}
    assert found["by_bytes_seconds"] < 0.2 * found["seconds"]
    assert 0 < found["mbu"] < 1
    assert found["interconnect"] is None

    shown = rpac(*PREDICT, "--step", "llama_step:step", "--detail", cache=dumps, cwd=STEPS)
    assert "matrix products" in shown.stdout.splitlines()[0]
    assert f"{1e3 * found['seconds']:.3f}" in shown.stdout
    assert "rpa_decode" in shown.stdout


@pytest.mark.compile
@pytest.mark.slow
def test_a_scan_over_layers_is_followed_layer_by_layer(dumps: Path) -> None:
    done = rpac(*PREDICT, "--step", "llama_step:scanned", "--json", cache=dumps, cwd=STEPS)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["predictions"]
    [attention] = [one for one in found["operations"] if one["category"] == "attention"]
    assert attention["count"] == 2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--step", "nowhere:step"), 6, "nowhere"),
        (("--step", "llama_step:step", "--plot", "x.png"), 2, "--step goes with neither --emit nor --plot"),
    ],
)
def test_what_cannot_be_predicted_says_why(options: tuple[str, ...], code: int, message: str, dumps: Path) -> None:
    done = rpac(*PREDICT, *options, cache=dumps, cwd=STEPS)
    assert done.returncode == code
    assert message in " ".join(done.stderr.split())


def test_a_bundle_of_another_function_is_refused(bundled: Callable[..., Path], dumps: Path) -> None:
    done = rpac("predict", bundled(), "--target", "tpu7x", "--step", cache=dumps)
    assert done.returncode == 4
    assert "has no steps for tpu7x" in done.stderr


def test_a_spec_that_names_no_function_says_so(dumps: Path) -> None:
    done = rpac(*PREDICT, "--step", cache=dumps)
    assert done.returncode == 2
    assert "step: found no such key; must name your function" in done.stderr
