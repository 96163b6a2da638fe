"""A report holds what was predicted, what follows from it, and the names of what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command import ROOT, TINY
from predicted import RATES, kernel, report, stub

from rpac.contract.attention import Attention
from rpac.errors import BatchError, PlanError, SpecError, TargetError
from rpac.files.store import Store
from rpac.predict import Asked, Prediction, Programs, Workload, parse_decode
from rpac.report import Report, Request, gather, page, read_check
from rpac.report.bound import bound_of
from rpac.report.peers import peers_of
from rpac.spec import load_spec

Gathered = Callable[..., Report]


def test_a_batch_of_all_layers_takes_as_long_as_its_layers_and_costs_the_chips_for_that_time(usual: Report) -> None:
    assert [option.label for option in usual.options] == ["tiny on tpu7x", "tiny on v6e"]
    for option in usual.options:
        step = option.step("decode 4x100")
        assert step is not None
        assert step.all_layers_seconds == pytest.approx(10 * RATES[option.target] * 400)
        assert step.tokens_per_second == pytest.approx(4 / step.all_layers_seconds)
    tpu7x, v6e = usual.options
    assert (tpu7x.chips, v6e.chips) == (0.5, 1)
    step = tpu7x.step("decode 4x100")
    assert step is not None
    assert step.dollars_per_million_tokens == pytest.approx(9.0 * 0.5 / 3600 * 10 * 400e-9 / 4 * 1e6)
    assert [step.dollars_per_million_tokens for step in v6e.steps] == [None] * len(v6e.steps)


def test_the_default_batches_are_few_and_quick_ones_need_one_program(gathered: Gathered) -> None:
    assert gathered().batches == ("decode 4x40", "decode 4x100", "prefill 1x16/40", "prefill 1x16/100")
    assert gathered(quick=True).batches == ("decode 4x40", "decode 4x100")
    asked = Asked.of(["2x50"], [], None)
    assert gathered(asked=asked).batches == ("decode 2x50",)


def test_what_nobody_said_is_named(gathered: Gathered, usual: Report) -> None:
    text = "\n".join(gathered().missing)
    for part in ("measured", "not checked", "`--layers N`", "`--price tpu7x=DOLLARS` `--price v6e=DOLLARS`"):
        assert part in text
    assert "--layers" not in "\n".join(usual.missing)
    assert "--price v6e=DOLLARS" in "\n".join(usual.missing)
    step = gathered().options[0].steps[0]
    assert (step.all_layers_seconds, step.tokens_per_second, step.dollars_per_million_tokens) == (None, None, None)


def test_kinds_of_layers_are_counted_apart(gathered: Gathered, tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(TINY.read_text() + "layers: {local: {sliding_window: 32}, global: {}}\n")
    counted = gathered(path, targets=("v6e",), layers={"local": 5, "global": 2}, quick=True)
    (option,) = counted.options
    assert [(layer.name, layer.count) for layer in option.layers] == [("local", 5), ("global", 2)]
    assert option.steps[-1].all_layers_seconds == pytest.approx(7 * RATES["v6e"] * 400)
    assert option.all_caches_bytes == sum((layer.count or 0) * layer.memory.cache_bytes for layer in option.layers)
    half = gathered(path, targets=("v6e",), layers={"local": 5}, quick=True)
    assert half.options[0].steps[-1].all_layers_seconds is None
    assert "--layers global=N" in "\n".join(half.missing)


def test_layers_can_be_those_of_one_of_several_specs(gathered: Gathered, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(TINY.read_text().replace("name: tiny", "name: other"))
    found = gathered(TINY, other, targets=("v6e",), layers={"": 3, "other:": 7}, quick=True)
    assert [option.layers[0].count for option in found.options] == [3, 7]
    text = page(found)
    assert text.count("<h3>decode 4x100</h3>") == 1, "one table for a batch of both"


def test_a_target_or_a_batch_that_cannot_be_predicted_is_named(gathered: Gathered) -> None:
    def one_fails(programs: Programs, workload: Workload) -> Prediction:
        if programs.target == "v6e" or workload.label == "decode 4x40":
            raise PlanError("no tile fits")
        return stub(programs, workload)

    found = gather([TINY], Request(targets=("tpu7x", "v6e"), quick=True), Store(None), predict_one=one_fails)
    assert [option.target for option in found.options] == ["tpu7x"]
    assert "tiny on v6e, decode 4x100: no tile fits" in found.missing
    assert "tiny on tpu7x, decode 4x40: no tile fits" in found.missing
    with pytest.raises(BatchError, match="must be at most max_num_seqs"):
        gathered(asked=Asked.of(["5x40"], [], None))


def test_a_bundle_is_told_by_its_manifest(gathered: Gathered, bundled: Callable[..., Path]) -> None:
    found = gathered(bundled("a"), bundled("b"), targets=("tpu7x",), quick=True)
    assert [subject.what for subject in found.subjects] == ["bundle", "bundle"]
    assert len({subject.name for subject in found.subjects}) == 2, "two bundles of one spec are told apart"
    assert {len(subject.digest or "") for subject in found.subjects} == {64}
    assert found.options[0].layers[0].kernels[0].source == "tpu7x/decode.py"


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"layers": {"local": 2}}, "--layers: found 'local'; must be N, .* such as tiny:N"),
        ({"layers": {"other:": 2}}, "--layers: found 'other:'"),
        ({"prices": {"v5e": 1.0}}, "--price: found v5e; must be a target of this report: tpu7x, v6e"),
    ],
)
def test_what_is_said_of_nothing_is_refused(gathered: Gathered, asked: dict[str, dict[str, float]], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        gathered(**asked)


def test_a_batch_that_the_cache_is_too_small_for_is_named_once(gathered: Gathered, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(TINY.read_text().replace("serving:\n", "serving:\n  num_pages: 32\n"))
    found = gathered(path, asked=Asked.of(["4x100", "4x140"], [], None))
    assert [line for line in found.missing if "num_pages" in line] == [
        "tiny: decode 4x140 needs 36 pages, and the cache has 32 (`num_pages`). Its time is that with enough pages."
    ]


def test_a_spec_that_is_given_twice_is_reported_once(gathered: Gathered) -> None:
    found = gathered(TINY, TINY, targets=("v6e",), quick=True)
    assert [option.label for option in found.options] == ["tiny on v6e"]


def test_an_interrupt_ends_a_report(gathered: Gathered) -> None:
    def interrupted(programs: Programs, workload: Workload) -> Prediction:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather([TINY], Request(targets=("tpu7x",), quick=True), Store(None), predict_one=interrupted)


def test_a_spec_without_a_tpu_is_refused(gathered: Gathered, tmp_path: Path) -> None:
    path = tmp_path / "cpu.yaml"
    path.write_text(TINY.read_text().replace("[tpu7x, v6e, v5p, v5e, cpu]", "[cpu]"))
    with pytest.raises(TargetError, match="found no TPU target, only cpu"):
        gathered(path, targets=())


def checked(path: Path, spec_hash: str) -> Path:
    run = {"source": "tpu7x/decode.py", "targets": ["tpu7x", "v6e"], "error": 1e-3, "tolerance": 2e-2, "cache_ok": True,
           "races": [], "notes": []}  # fmt: skip
    runs = [run, {**run, "targets": ["v6e"], "error": None}]
    compiled = [
        {"target": "tpu7x", "programs": 5, "message": ""},
        {"target": "v6e", "programs": 0, "message": "refused"},
    ]
    data = {"spec": "tiny", "spec_hash": spec_hash, "seed": 7, "results": runs, "compiled": compiled, "ok": False}
    path.write_text(json.dumps(data))
    return path


def test_a_check_is_summed_up_for_each_target(gathered: Gathered, tmp_path: Path) -> None:
    check = read_check(checked(tmp_path / "check.json", load_spec(TINY).hash))
    found = gathered(checks=(check,), quick=True)
    assert found.subjects[0].check == check
    assert "not checked" not in "\n".join(found.missing)
    tpu7x, v6e = check.targets
    assert (tpu7x.runs, tpu7x.failed, tpu7x.worst_error, tpu7x.compiled) == (1, 0, 1e-3, 5)
    assert (v6e.runs, v6e.failed, v6e.worst_error, v6e.compiled, v6e.message) == (2, 1, 1e-3, None, "refused")


def test_a_check_of_another_spec_is_refused(gathered: Gathered, tmp_path: Path) -> None:
    check = read_check(checked(tmp_path / "check.json", "0" * 64))
    with pytest.raises(SpecError, match="found a check of the spec with hash 000000000000"):
        gathered(checks=(check,))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": 3}', '{"results": [{}], "compiled": []}', "[" * 100_000])
def test_a_file_that_is_no_check_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "check.json"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"check\.json: found .*must be what `rpac check --json` wrote"):
        read_check(path)
    with pytest.raises(SpecError, match="No such file"):
        read_check(tmp_path / "none.json")


@pytest.mark.parametrize(
    "compute, dma, mxu, name",
    [
        (0.5, 0.95, 0.9, "HBM"),
        (0.95, 0.95, 0.9, "balanced"),
        (0.95, 0.5, 0.9, "MXU"),
        (0.95, 0.5, 0.3, "issue"),
        (0.95, 0.5, None, "issue"),
        (0.5, 0.6, 0.9, "latency"),
    ],
)
def test_what_limits_a_batch_is_the_part_that_is_always_busy(
    compute: float, dma: float, mxu: float | None, name: str
) -> None:
    assert bound_of(report("tpu7x", 1e-4, kernel(1e-4, compute, dma, mxu))).name == name


def test_peers_are_those_of_exactly_this_batch() -> None:
    llama = load_spec(ROOT / "specs" / "llama3-8b.yaml").model
    found = peers_of(llama, 128, "tpu7x", parse_decode("64x1024"))
    assert {"RPA v3, best", "JAX v2"} <= {peer.name for peer in found}
    assert [peer.seconds for peer in found] == sorted(peer.seconds for peer in found)
    assert not {"rpac", "rpac, separate"} & {peer.name for peer in found}
    other = Attention(**{**vars(llama), "soft_cap": 50.0})
    for model, page_size, text in ((other, 128, "64x1024"), (llama, 64, "64x1024"), (llama, 128, "63x1024")):
        assert peers_of(model, page_size, "tpu7x", parse_decode(text)) == ()
    assert peers_of(llama, 128, "tpu7x", Workload("ragged", (1, 1), (5, 9))) == ()


def test_the_json_says_what_its_fields_mean(usual: Report) -> None:
    data = json.loads(json.dumps(usual.to_json()))
    timing = data["options"][0]["layers"][0]["timings"][0]
    assert {"seconds", "mbu", "mfu"} <= timing.keys() & data["definitions"].keys()
