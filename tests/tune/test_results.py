"""Data files: what a search found, for exactly its case; everything else is refused or left to the rules, in plain sight."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
from command import ROOT, TINY
from standin import Here, rule_of, timed

from rpac.build import sources_of
from rpac.devices.chip import TPU_TARGETS
from rpac.errors import OutputError, PlanError
from rpac.files.store import Store
from rpac.kernels import render
from rpac.plan import plan_spec
from rpac.plan.families import Override, override_of
from rpac.plan.planner import with_tiles
from rpac.plan.tuned import FOLDER, Entry, TunedTiles, key_of, key_text
from rpac.spec import Spec, load_spec
from rpac.tune import Outcome
from rpac.tune.candidates import AXES
from rpac.tune.results import WIDTH, entry_of, merge, text_of
from rpac.tune.search import Climb, search

SPEC = load_spec(TINY)
RULE = rule_of(SPEC, "decode")
SEPARATE = replace(SPEC, serving=replace(SPEC.serving, kv_layout="separate"))
UNPIPELINED = Override(block={"pipelined": False})


def outcome_of(spec: Spec = SPEC, kind: str = "decode", seed: int = 0) -> Outcome:
    """Of a search over tiles alone, which leaves the recipe to the rules."""
    axes = tuple(axis for axis in AXES if not axis.of_recipe)
    return search([Climb(spec, rule_of(spec, kind), seed, axes=axes)], Here(), Store(None), evaluate=timed)[0]


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    """Of a search that chose other tiles than the rules'."""
    found = outcome_of()
    assert found.chosen is not None
    assert found.chosen.label != "rule"
    return found


@pytest.fixture
def folder(tmp_path: Path, outcome: Outcome) -> Path:
    merge(tmp_path / "tuned", "tpu7x", [entry_of(outcome)])
    return tmp_path / "tuned"


def planned(folder: Path, spec: Spec = SPEC) -> Any:
    """The decode plan that a build would make with the files of a folder."""
    plans = plan_spec(spec, "tpu7x", tuned=TunedTiles.of("tpu7x", folder))
    return next(plan for plan in plans if plan.kind == "decode")


# ---- what a build does with it


def test_a_build_uses_the_tiles_that_were_chosen(folder: Path, outcome: Outcome) -> None:
    assert outcome.chosen is not None
    plan = planned(folder)
    assert plan == replace(outcome.chosen.plan, origin=plan.origin)
    assert plan.origin.startswith(
        f"tuned: {outcome.score(outcome.chosen):.3f} of the rule's time, predicted with libtpu 0."
    )


def test_every_other_program_keeps_the_rules_tiles(folder: Path) -> None:
    ruled = plan_spec(SPEC, "tpu7x", tuned=TunedTiles())
    tuned = plan_spec(SPEC, "tpu7x", tuned=TunedTiles.of("tpu7x", folder))
    assert [one for one in tuned if one.kind != "decode"] == [one for one in ruled if one.kind != "decode"]
    assert {one.origin for one in ruled} == {"rule"}
    assert TunedTiles.of("v6e", folder).entries == {}


def test_the_header_and_the_manifests_plan_say_where_the_tiles_come_from(folder: Path) -> None:
    plan = planned(folder)
    assert f"- {plan.origin}\n" in render(SPEC, plan).text
    assert "tuned" not in render(SPEC, RULE).text
    assert (plan.as_dict()["origin"], RULE.as_dict()["origin"]) == (plan.origin, "rule")


def test_the_packages_own_files_are_what_a_build_reads(
    folder: Path, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpac.plan.tuned.FOLDER", folder)
    assert planned(folder) in [plan for plan, _ in sources_of(SPEC, ["tpu7x"])]


CHANGES: dict[str, Callable[[Spec], Spec]] = {
    "heads": lambda spec: replace(spec, model=replace(spec.model, q_heads=8)),
    "KV heads": lambda spec: replace(spec, model=replace(spec.model, kv_heads=4)),
    "head_dim": lambda spec: replace(spec, model=replace(spec.model, head_dim=256)),
    "dtypes": lambda spec: replace(spec, model=replace(spec.model, q_dtype="float32", kv_dtype="float32")),
    "page_size": lambda spec: replace(spec, serving=replace(spec.serving, page_size=32)),
    "pages_per_seq": lambda spec: replace(spec, serving=replace(spec.serving, max_model_len=1024)),
    "max_num_seqs": lambda spec: replace(spec, serving=replace(spec.serving, max_num_seqs=5)),
    "prefill_chunk": lambda spec: replace(spec, serving=replace(spec.serving, prefill_chunk=32)),
    "a far bucket": lambda spec: replace(spec, serving=replace(spec.serving, token_buckets=(4,))),
    "far lengths": lambda spec: replace(spec, serving=replace(spec.serving, context_lens=(40, 1024))),
}
NEAR: dict[str, dict[str, Any]] = {
    "buckets": {"token_buckets": (16, 32)},
    "a larger bucket": {"token_buckets": (8, 128)},
    "shorter lengths": {"context_lens": (20, 100)},
    "longer lengths": {"context_lens": (40, 200)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_no_entry_is_for_another_case(folder: Path, change: Callable[[Spec], Spec]) -> None:
    assert planned(folder, change(SPEC)).origin == "rule"


@pytest.mark.parametrize("changes", NEAR.values(), ids=list(NEAR))
def test_a_case_of_near_buckets_and_lengths_borrows_the_tiles_and_says_so(
    folder: Path, outcome: Outcome, changes: dict[str, Any]
) -> None:
    spec = replace(SPEC, serving=replace(SPEC.serving, **changes))
    plan, rule = planned(folder, spec), rule_of(spec, "decode")
    assert outcome.chosen is not None
    assert plan.origin.startswith("interpolated from token buckets 8 32, lengths 32 128; there tuned: ")
    assert plan.decode == replace(outcome.chosen.plan.decode, max_rows=rule.decode.max_rows)
    assert f"- {plan.origin}\n" in render(spec, plan).text


def test_the_nearest_entry_is_borrowed_from(folder: Path, outcome: Outcome) -> None:
    """Of two, whichever was written first."""
    longer = replace(SPEC, serving=replace(SPEC.serving, context_lens=(40, 400)))
    merge(folder, "tpu7x", [entry_of(outcome_of(longer))])
    assert (
        "lengths 32 512;"
        in planned(folder, replace(SPEC, serving=replace(SPEC.serving, context_lens=(70, 500)))).origin
    )
    assert (
        "lengths 32 128;"
        in planned(folder, replace(SPEC, serving=replace(SPEC.serving, context_lens=(20, 100)))).origin
    )


def test_borrowed_tiles_that_do_not_suit_a_case_leave_it_to_the_rule_and_say_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpac.plan.planner.is_legal", lambda *args: False)
    spec = replace(SPEC, serving=replace(SPEC.serving, **NEAR["buckets"]))
    assert planned(folder, spec) == replace(
        rule_of(spec, "decode"), origin="rule: the nearest tuned tiles do not fit this case"
    )


@pytest.mark.parametrize(
    "changes",
    [{"num_pages": 999}, {"context_lens": (33, 128)}, {"context_lens": (40, 50, 100)}],
    ids=["num_pages", "lengths of the same class", "a length between"],
)
def test_what_tiles_do_not_turn_on_is_no_part_of_a_case(folder: Path, changes: dict[str, Any]) -> None:
    spec = replace(SPEC, name="other", serving=replace(SPEC.serving, **changes))
    assert planned(folder, spec).origin.startswith("tuned: ")


@pytest.fixture
def prefill_folder(tmp_path: Path) -> Path:
    """With an entry whose recipe is not the rule's."""
    outcome = outcome_of(SEPARATE, "prefill")
    assert outcome.chosen is not None
    rule, plan = outcome.rule, with_tiles(SEPARATE, outcome.rule, None, outcome.rule.block, UNPIPELINED)  # type: ignore[arg-type]
    assert plan is not None
    assert plan.recipe != rule.recipe
    chosen = replace(outcome, chosen=replace(outcome.chosen, plan=plan))
    merge(tmp_path / "tuned", "tpu7x", [entry_of(chosen)])
    return tmp_path / "tuned"


def prefill_plan(folder: Path, spec: Spec = SEPARATE) -> Any:
    plans = plan_spec(spec, "tpu7x", tuned=TunedTiles.of("tpu7x", folder))
    return next(plan for plan in plans if plan.kind == "prefill")


def test_an_entry_may_hold_decisions_that_are_not_the_rules(prefill_folder: Path) -> None:
    assert json.loads((prefill_folder / "tpu7x.json").read_text())["entries"][0]["recipe"] == UNPIPELINED.as_dict()
    plan = prefill_plan(prefill_folder)
    assert plan.origin.startswith("tuned: ")
    assert override_of(SEPARATE, plan) == UNPIPELINED
    near = prefill_plan(prefill_folder, replace(SEPARATE, serving=replace(SEPARATE.serving, context_lens=(20, 100))))
    assert near.origin.startswith("interpolated ")
    assert override_of(SEPARATE, near) == UNPIPELINED


def test_an_entry_of_the_rules_recipe_does_not_name_it(folder: Path) -> None:
    assert "recipe" not in json.loads((folder / "tpu7x.json").read_text())["entries"][0]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"block": {"pipelined": "yes"}}, "recipe: pipelined: found 'yes'; with these tiles it must be"),
        ({"block": {"sums": "vector"}}, "recipe: found block: {'sums': 'vector'}; must be some of"),
        ({"prefill": {}}, "recipe: found prefill: {}; must be some of"),
    ],
)
def test_decisions_that_the_tiles_do_not_allow_are_refused(
    prefill_folder: Path, recipe: dict[str, Any], message: str
) -> None:
    damaged(prefill_folder, lambda data: data["entries"][0].update(recipe=recipe))
    with pytest.raises(PlanError, match=rf"entries\[0\]: not the tiles of these kernels: {re.escape(message)}"):
        prefill_plan(prefill_folder)


def test_a_field_that_a_spec_gains_is_part_of_its_case() -> None:
    """Whatever model and serving hold is in the key, or stands for something that is; a feature, where it is used."""
    key = key_of(SPEC, "decode", (8, 32))
    stood_for = {"sm_scale", "max_model_len", "max_num_tokens", "token_buckets", "context_lens", "num_pages"}
    for part in ("model", "serving"):
        settings = getattr(SPEC, part)
        for name in {field.name for field in fields(settings)} - stood_for:
            value = getattr(settings, name)
            changes = {name: value + 1 if type(value) is int else "another"}
            assert key_of(replace(SPEC, **{part: replace(settings, **changes)}), "decode", (8, 32)) != key, name
    required = {field.name for part in (SPEC.model, SPEC.serving) for field in fields(part) if field.default is MISSING}
    assert required - stood_for <= set(key)
    assert key["kv_layout"] == SPEC.serving.kv_layout


def test_tiles_that_no_longer_fit_leave_it_to_the_rule_and_say_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpac.plan.planner.with_tiles", lambda *args: None)
    plan = planned(folder)
    assert plan == replace(RULE, origin="rule: the tuned tiles do not fit VMEM")
    assert f"- {plan.origin}\n" in render(SPEC, plan).text


@pytest.mark.parametrize("target", TPU_TARGETS)
def test_every_entry_that_is_shipped_is_for_these_kernels(target: str) -> None:
    for entry in TunedTiles.of(target).entries.values():
        assert entry.tiles != (None, None)
        assert entry.origin.startswith("tuned: ")


def test_every_file_that_is_shipped_is_of_a_target_in_the_form_that_a_search_writes() -> None:
    for path in FOLDER.glob("*"):
        assert path.stem in TPU_TARGETS
        assert path.read_text() == text_of(path.stem, list(TunedTiles.of(path.stem).entries.values()))


# ---- the file


def test_the_file_holds_what_the_choice_was_held_against(folder: Path, outcome: Outcome) -> None:
    data = json.loads((folder / "tpu7x.json").read_text())
    assert (data["schema"], data["target"], data["device_kind"]) == (2, "tpu7x", "TPU7x")
    (entry,) = data["entries"]
    evidence = entry["evidence"]
    assert len(evidence["tried"]) == len(outcome.tried)
    assert [one["label"] for one in evidence["tried"]] == [one.label for one in outcome.tried]
    scores = {one["label"]: one["score"] for one in evidence["tried"]}
    assert evidence["score"] == scores[evidence["chosen"]] < scores["rule"] == 1
    assert all(len(one["seconds"]) == len(evidence["batches"]) for one in evidence["tried"])
    assert (evidence["seed"], evidence["spec"], evidence["complete"]) == (outcome.seed, "tiny", True)
    assert {"jax", "libtpu", "libtpu_files", "rpac"} <= set(evidence["toolchain"])


def test_the_same_entries_make_the_same_text_in_any_order(outcome: Outcome) -> None:
    entries = [entry_of(outcome), entry_of(outcome_of(kind="prefill")), entry_of(outcome_of(kind="mixed"))]
    text = text_of("tpu7x", entries)
    assert text == text_of("tpu7x", entries[::-1])
    assert text == text_of("tpu7x", [Entry(**{**vars(one), "place": "x"}) for one in entries])
    parsed = json.loads(text)
    assert [one["key"]["kind"] for one in parsed["entries"]] == ["decode", "mixed", "prefill"]
    unbroken = ('"kv_lens"', '"label"')  # a list of numbers, and a text
    lines = [line for line in text.splitlines() if not any(name in line for name in unbroken)]
    assert all(len(line) <= WIDTH or line.endswith("],") for line in lines)


def test_a_later_search_replaces_its_own_entry_and_keeps_the_others(folder: Path) -> None:
    merge(folder, "v6e", [])
    merge(folder, "tpu7x", [entry_of(outcome_of(kind="prefill"))])
    before = TunedTiles.of("tpu7x", folder).entries
    assert len(before) == 2
    again = outcome_of(seed=99)
    merge(folder, "tpu7x", [entry_of(again)])
    after = TunedTiles.of("tpu7x", folder).entries
    assert set(after) == set(before)
    changed = [key for key in after if after[key].evidence != before[key].evidence]
    assert changed == [key_text(key_of(SPEC, "decode", RULE.tokens))]
    assert after[changed[0]].evidence["seed"] == 99
    assert sorted(path.name for path in folder.iterdir()) == ["tpu7x.json", "v6e.json"]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path, outcome: Outcome) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OutputError, match="that this command did not make"):
        merge(tmp_path, "tpu7x", [entry_of(outcome)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def damaged(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tpu7x.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another schema": (lambda data: data.update(schema=1), "schema: found 1; must be 2"),
    "another target": (lambda data: data.update(target="v6e"), "target: found 'v6e'; must be 'tpu7x'"),
    "a field more": (lambda data: data.update(more=1), "file: found device_kind, entries, more, schema, target; must be"),
    "no list": (lambda data: data.update(entries={}), "entries: must be a list"),
    "no entry": (lambda data: data["entries"].append(1), r"entries\[1\]: found 1; must be an object with key, tiles, evid"),
    "twice": (lambda data: data["entries"].append(data["entries"][0]), "entries: two have one key"),
    "no key": (lambda data: data["entries"][0].update(key=[]), r"entries\[0\]\.key: found \[\]; must be an object"),
    "no tiles": (lambda data: data["entries"][0].update(tiles={}), r"entries\[0\]\.tiles: found ; must be an object with"),
    "no evidence": (lambda data: data["entries"][0]["evidence"].pop("tried"), r"entries\[0\]\.evidence: found .*tried"),
    "no recipe": (lambda data: data["entries"][0].update(recipe=[]), r"entries\[0\]\.recipe: found \[\]; must be an object"),
    "no score": (lambda data: data["entries"][0]["evidence"].update(score=-1.0), r"entries\[0\]\.evidence\.score: found -1\.0"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=list(DAMAGES))
def test_a_file_that_is_none_is_refused_by_name_and_place(
    folder: Path, outcome: Outcome, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    damaged(folder, change)
    text = (folder / "tpu7x.json").read_text()
    with pytest.raises(PlanError, match=rf"tpu7x\.json: {message}.*; restore it, or remove it and run rpac tune again"):
        planned(folder)
    with pytest.raises(PlanError):
        merge(folder, "tpu7x", [entry_of(outcome)])
    assert (folder / "tpu7x.json").read_text() == text


@pytest.mark.parametrize("content", ["", "[]", "nonsense", "[" * 100_000, "{}"])
def test_a_file_of_anything_else_is_refused(folder: Path, content: str) -> None:
    (folder / "tpu7x.json").write_text(content)
    with pytest.raises(PlanError, match=r"tpu7x\.json: "):
        TunedTiles.of("tpu7x", folder)


TILES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a field that the kernels do not have": (lambda tiles: tiles["decode"].update(warp=1), "must have the fields"),
    "a field less": (lambda tiles: tiles["decode"].popitem(), "must have the fields"),
    "no number": (
        lambda tiles: tiles["decode"].update(write_buffers="4"),
        "write_buffers: found '4'; must be int, above 0",
    ),
    "zero": (lambda tiles: tiles["decode"].update(write_buffers=0), "write_buffers: found 0; must be int, above 0"),
    "a list": (
        lambda tiles: tiles["decode"].update(write_buffers=[4]),
        r"write_buffers: found \[4\]; must be int, above 0",
    ),
    "none": (
        lambda tiles: tiles.update(decode=None),
        r"tiles\.decode: must be null for prefill batches, and only there",
    ),
    "a tile of half a page": (
        lambda tiles: tiles["decode"].update(tile=SPEC.serving.page_size // 2),
        "they do not go together for this case",
    ),
}


@pytest.mark.parametrize(("change", "message"), TILES.values(), ids=list(TILES))
def test_tiles_of_other_kernels_are_refused_where_they_would_be_used(
    folder: Path, outcome: Outcome, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    damaged(folder, lambda data: change(data["entries"][0]["tiles"]))
    with pytest.raises(PlanError, match=rf"tpu7x\.json: entries\[0\]: not the tiles of these kernels: .*{message}"):
        planned(folder)
    other = load_spec(ROOT / "specs" / "llama3-8b.yaml")
    assert planned(folder, other).origin == "rule"
    merge(folder, "tpu7x", [entry_of(outcome)])  # tuned again, all is well
    assert planned(folder).origin.startswith("tuned: ")
