"""`rpac predict` as a user runs it: what is on stdout, what on stderr, and the exit codes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command import TINY, rpac

from rpac.predict.run import OPERANDS

Bundled = Callable[..., Path]
PREDICT = ("predict", TINY, "--target", "tpu7x")


@pytest.mark.compile
def test_json_of_one_batch_is_a_list_of_one_and_nothing_else_is_on_stdout(dumps: Path, tmp_path: Path) -> None:
    done = rpac(*PREDICT, "--decode", "4x100", "--json", "--emit", tmp_path / "out", cache=dumps)
    assert done.returncode == 0, done.stderr
    (data,) = json.loads(done.stdout)["predictions"]
    assert data["target"] == "tpu7x"
    assert data["seconds"] >= data["kernel_seconds"] > 0
    assert 0 < data["mbu"] < 1
    assert 0 < data["mfu"] < 1
    names = {f"{kernel['name']}.txt" for kernel in data["kernels"]}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, OPERANDS}
    assert json.loads((tmp_path / "out" / OPERANDS).read_text()).keys() == names
    hashes = {f"{name}.txt": sha256 for name, sha256 in data["schedules"].items()}
    assert hashes == {name: hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() for name in names}
    assert data["source"]["path"] == "tpu7x/decode.py"


@pytest.mark.compile
def test_several_batches_are_side_by_side(dumps: Path, tmp_path: Path, bundled: Bundled) -> None:
    trace = tmp_path / "day.jsonl"
    trace.write_text('{"q_lens": [1, 5], "kv_lens": [40, 5]}\n{"q_lens": [3], "kv_lens": [300]}\n')
    arguments = (TINY, bundled("a"), bundled("b"), "--target", "tpu7x", "--mixed", trace)
    done = rpac("predict", *arguments, "--json", cache=dumps)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["predictions"]
    assert len({one["name"] for one in found}) == 3
    assert [one["batch"]["label"] for one in found] == ["day.jsonl:1", "day.jsonl:2"] * 3
    assert len({one["seconds"] for one in found}) == 2

    done = rpac("predict", *arguments, cache=dumps)
    rows = [line for line in done.stdout.splitlines() if line.startswith("day.jsonl:")]
    assert [row.split()[0] for row in rows] == ["day.jsonl:1"] * 3 + ["day.jsonl:2"] * 3
    assert all(row.endswith(" 1.00") for row in rows)


@pytest.mark.compile
def test_several_targets_are_all_answered(dumps: Path, tmp_path: Path) -> None:
    arguments = (*PREDICT, "--target", "v6e", "--target", "tpu7x", "--decode", "4x100")
    done = rpac(*arguments, "--json", cache=dumps)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["predictions"]
    assert [one["target"] for one in found] == ["tpu7x", "v6e"]
    assert found[0]["seconds"] != found[1]["seconds"]

    done = rpac(*arguments, "--plot", tmp_path / "both.svg", cache=dumps)
    header, _, *rows = done.stdout.splitlines()[:4]
    assert header.split()[:2] == ["target", "batch"]
    assert [row.split()[0] for row in rows] == ["tpu7x", "v6e"]
    assert "Predicted for one tpu7x or v6e device." in done.stdout


@pytest.mark.compile
def test_a_report_names_waits_loops_slots_spills_and_definitions(dumps: Path) -> None:
    done = rpac(*PREDICT, "--prefill", "2x16/200", "--detail", cache=dumps)
    for part in (
        "rpa_prefill.1: ", " compute + ", "wait at instruction ", "in the loop at ", "iterations, ", "VALU 0.", "spills: ",
        "XLA copy-start ", "MBU = needed_bytes / ", "MFU = needed_flops / ", "GFLOP; moves ",
    ):  # fmt: skip
        assert part in done.stdout, part


@pytest.mark.compile
def test_a_batch_is_one_line_without_details(dumps: Path) -> None:
    done = rpac(*PREDICT, "--prefill", "2x16/200", cache=dumps)
    assert done.returncode == 0, done.stderr
    _, _, row, empty, definitions = done.stdout.splitlines()
    assert row.startswith("prefill 2x16/200")
    assert empty == ""
    assert definitions.startswith("Predicted for one tpu7x device.")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "Missing argument"),
        ((TINY,), 2, "Missing option '--target'"),
        ((TINY, "--target", "v99"), 2, "'v99' is not one of"),
        ((TINY, "--target", "cpu"), 2, "'cpu' is not one of"),
        (("absent.yaml", "--target", "tpu7x"), 2, "absent.yaml"),
        ((TINY, "--target", "tpu7x", "--decode", "4"), 2, "must be SEQUENCESxCONTEXT"),
        ((TINY, "--target", "tpu7x", "--decode", "5x40"), 2, "at most max_num_seqs (4)"),
        ((TINY, "--target", "tpu7x", "--decode", "4x513"), 2, "build with a larger max_model_len"),
        ((TINY, "--target", "tpu7x", "--prefill", "3x16/64"), 2, "max_num_tokens: 48"),
        ((TINY, "--target", "tpu7x", "--mixed", "absent.jsonl"), 2, "absent.jsonl: cannot be read"),
        ((TINY, "--target", "tpu7x", "--emit", "out"), 2, "give one spec or bundle, one --target and one batch"),
        (
            (TINY, "--target", "tpu7x", "--target", "v6e", "--decode", "1x8", "--emit", "out"),
            2,
            "--emit: found 2 predictions; takes one",
        ),
        (
            (TINY, "--target", "tpu7x", "--decode", "1x8", "--emit", "."),
            5,
            "--emit .: found other files there: a.txt, b.txt, c.txt and 1 more; must be a folder that is absent, empty, or "
            "holds what an earlier --emit wrote and nothing else, because it is replaced; write --emit schedules",
        ),
        ((TINY, "--target", "tpu7x", "--decode", "1x8", "--emit", "a.txt"), 5, "--emit a.txt: found a file"),
        (
            (TINY, "--target", "tpu7x", "--mixed", "a.jsonl", "--mixed", "b.jsonl"),
            2,
            "--mixed is given 2 times; give it once",
        ),
        ((TINY, "--target", "tpu7x", "--decode", "1x8", "--plot", "out.xyz"), 5, "must end in .png"),
    ],
)
def test_what_cannot_be_predicted_says_why(
    arguments: tuple[object, ...], code: int, message: str, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    for name in ("d.txt", "b.txt", "c.txt", "a.txt"):
        (work / name).touch()
    done = rpac("predict", *arguments, cache=tmp_path / "cache", cwd=work)
    assert (done.returncode, done.stdout) == (code, "")
    assert len(list(work.iterdir())) == 4
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "compiling" not in done.stderr  # it is said before the waiting


def test_a_corrupt_bundle_and_one_of_another_compiler_have_their_own_codes(tmp_path: Path, bundled: Bundled) -> None:
    path = bundled("b")
    next((path / "source").rglob("decode.py")).write_text("")
    done = rpac("predict", path, "--target", "tpu7x", cache=tmp_path / "cache")
    assert (done.returncode, done.stdout) == (4, "")
    done = rpac("predict", bundled("c", libtpu="9.9"), "--target", "tpu7x", cache=tmp_path / "cache")
    assert (done.returncode, done.stdout) == (3, "")
    assert "built with libtpu 9.9" in done.stderr
