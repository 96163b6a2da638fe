"""The picture is drawn where it can be, and what prevents it is said before anything is compiled."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from rpac.contract.program import Variant
from rpac.errors import OutputError
from rpac.predict import Prediction, Workload, check_plot, draw, parse_decode, parse_prefill
from rpac.schedule import CallReport, model_of

pytest.importorskip("matplotlib")
PNG = b"\x89PNG"


def prediction(workload: Workload, kind: str, needed_bytes: int, needed_flops: int, name: str = "tiny") -> Prediction:
    report = CallReport(
        target="tpu7x", compiler="0", compiler_verified=True, seconds=1e-3, kernel_seconds=1e-3, mbu=0.5, mfu=0.1,
        kernel_mbu=0.5, kernel_mfu=0.1, needed_bytes=needed_bytes, needed_flops=needed_flops, moved_bytes=needed_bytes,
        kernels=(), xla=(), model=model_of("tpu7x"),
    )  # fmt: skip
    return Prediction(name, workload, Variant(kind, 8), report)  # type: ignore[arg-type]


DECODES = [prediction(parse_decode(f"4x{n}"), "decode", n * 10**6, n) for n in (64, 128, 4096)]
PREFILLS = [prediction(parse_prefill(f"1x16/{n}"), "prefill", n, n * 10**9) for n in (64, 128)]
TRACE = [prediction(Workload(f"day.jsonl:{n}", (1, n), (90, n)), "mixed", n, n * 10**9) for n in (8, 16)]


def panels(path: Path, monkeypatch: pytest.MonkeyPatch, predictions: list[Prediction]) -> dict[str, list[str]]:
    """Title of each panel -> the labels in its legend."""
    from matplotlib import pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    draw(predictions, path)
    (figure,) = drawn
    monkeypatch.undo()
    plt.close(figure)
    return {ax.get_title(): [text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes}


def test_memory_bound_batches_are_drawn_by_mbu_and_the_others_by_mfu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [dataclasses.replace(one, name="other") for one in DECODES]
    path = tmp_path / "out.png"
    found = panels(path, monkeypatch, [*DECODES, *PREFILLS, *TRACE, *others])
    assert found == {
        "MBU of the whole call, predicted for tpu7x": [
            "tiny, decode 4 x 1", "other, decode 4 x 1", "roofline (nominal peaks)"
        ],
        "MFU of the whole call, predicted for tpu7x": [
            "tiny, prefill 1 x 16", "tiny, day.jsonl", "roofline (nominal peaks)"
        ],
    }  # fmt: skip
    assert path.read_bytes().startswith(PNG)


def test_batches_that_differ_in_more_than_their_context_are_lines_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = panels(tmp_path / "a.svg", monkeypatch, [*DECODES, prediction(parse_decode("2x64"), "decode", 10**6, 1)])
    ((*labels, _),) = found.values()
    assert labels == ["tiny, decode 4 x 1", "tiny, decode 2 x 1"]


def test_lines_of_several_targets_say_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [dataclasses.replace(one, report=dataclasses.replace(one.report, target="v6e")) for one in DECODES]
    assert panels(tmp_path / "a.svg", monkeypatch, [*DECODES, *others]) == {
        "MBU of the whole call, predicted for tpu7x, v6e": [
            "tiny on tpu7x, decode 4 x 1", "tiny on v6e, decode 4 x 1", "roofline (nominal peaks)"
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"), [("out.xyz", "must end in .png, .pdf, .svg"), ("absent/out.png", "is no folder")]
)
def test_a_picture_that_cannot_be_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(OutputError, match=message):
        check_plot(tmp_path / name)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "out.png").mkdir()
    with pytest.raises(OutputError, match=r"out\.png: cannot be written"):
        draw(DECODES, tmp_path / "out.png")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OutputError, match=r"install rpac\[plot\]"):
        check_plot(tmp_path / "out.png")
