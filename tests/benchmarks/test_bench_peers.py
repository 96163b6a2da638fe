"""The comparison with the peers: its batches and its document, without a compile."""

from __future__ import annotations

import importlib


def module(name: str):
    return importlib.import_module(f"peers.{name}")


def result(micros: float, error: str = ""):
    return module("store").Result("tiles", micros * 1e-6, micros * 0.9e-6, 0.5, 0.25, error)


def section(results: dict[str, object]):
    heads, case = module("cases").LLAMA_8B, module("cases").CASES[0]
    by_place = {(name, case.label): one for name, one in results.items()}
    return module("document").Section(heads, "tpu7x", 128, (case,), tuple(results), by_place)


def test_ragged_lengths_are_the_same_on_every_run_and_within_bounds():
    lens = module("cases").ragged(64, 100, 6000)
    assert lens == module("cases").ragged(64, 100, 6000)
    assert len(lens) == 64
    assert 100 <= min(lens) < 1000
    assert 5000 < max(lens) <= 6000


def test_every_peer_of_a_place_is_one():
    known = {one.name for one in module("contenders").CONTENDERS}
    ours = {one.name for one in module("contenders").OURS}
    for heads in module("cases").HEADS:
        assert {name for peers in heads.places.values() for name in peers} <= known
        assert set(heads.ours) <= ours


def test_every_case_fits_its_bucket_and_the_longest_length():
    cases = module("cases")
    for case in (case for heads in cases.HEADS for case in heads.cases):
        assert sum(case.workload.q_lens) <= case.tokens
        assert case.longest <= cases.MAX_MODEL_LEN
        assert len(case.workload.q_lens) <= case.max_seqs


def test_all_peers_get_the_same_lengths_and_pages_from_a_batch(tmp_path):
    cases, contenders, run = module("cases"), module("contenders"), module("run")
    case = next(case for case in cases.CASES if case.kind == "mixed")
    batch = case.workload.batch(run.limits_of(tmp_path, cases.LLAMA_8B, 128, case))
    v3 = contenders.contract_parameters(batch, case)
    v2 = contenders.v2_parameters(batch, case)
    flywheel = contenders.flywheel_parameters(batch, case)
    assert v3[4] == v2[2] == flywheel[8]
    assert v3[5] == v2[3] == flywheel[5]
    assert v3[6] == v2[4] == flywheel[7]
    assert v3[7] == [32, 32, 34]  # a chunk is mixed to RPA v3, which would skip it as prefill
    assert flywheel[4][:34] == [2047] * 32 + [1536] * 2


def test_flywheel_blocks_start_at_a_tile_and_skip_empty_sequences():
    blocks_before = module("contenders").flywheel_blocks_before
    assert blocks_before([0, 1, 2, 2]) == [0, 1, 2, 2]
    assert blocks_before([0, 2048]) == [0, 2]
    assert blocks_before([0, 15, 15 + 1024]) == [0, 1, 3]  # 15 rows before it share its first tile


def test_a_cell_gives_call_kernels_and_share_of_the_peak():
    document, case = module("document"), module("cases").CASES[0]
    assert document.cell(case, result(1234)) == "1,234 / 1,111, 0.50"
    assert document.cell(case, result(0, "no")) == "-"


def test_the_summary_compares_ours_with_the_fastest_peer_that_ran():
    ours = {"rpac": result(100), "rpac, separate": result(80), "rpac, fitted": result(50)}
    found = section({**ours, "a": result(300), "b": result(200), "c": result(1, "no")})
    assert module("document").summary([found])[-1].endswith("| 2.00 / 2.50 / 4.00 (b) |")


def test_the_summary_claims_nothing_where_no_peer_ran():
    found = section({**{one.name: result(100) for one in module("contenders").OURS}, "c": result(1, "no")})
    assert module("document").summary([found])[-1].endswith("| - |")


def test_refusals_name_each_reason_once_with_its_places():
    found = section({"rpac": result(100), "a": result(0, "too large")})
    assert module("document").refusals([found], "not run yet") == [
        "- **a** (32/8 heads, tpu7x, pages of 128: every batch): too large"
    ]


def test_a_reason_is_the_telling_line_without_paths():
    reason = module("run").reason
    trace = "the compile for tpu7x failed (1):\nTraceback\n  File x\nValueError: bad tile in /home/someone/a.py here\n---\nnote"
    assert reason(trace) == "ValueError: bad tile in ... here"
    proto = "failed (1):\n [x='(Ran out of memory in memory space vmem. Used 76.63M of 64.00M vmem. Exceeded"
    assert reason(proto) == "Ran out of memory in memory space vmem. Used 76.63M of 64.00M vmem."


def test_results_survive_a_rerun_and_unfinished_ones_do_not(tmp_path):
    store = module("store").Store(tmp_path / "results.json", tmp_path)
    assert store.results.get("name", "key") is None
    store.results.keep("name", "key", result(5))
    again = module("store").Store(tmp_path / "results.json", tmp_path)
    assert again.results.get("name", "key") == result(5)
    assert not list(tmp_path.rglob("*.part"))


def test_results_that_nobody_asks_for_are_dropped(tmp_path):
    store = module("store").Store(tmp_path / "results.json", tmp_path)
    for key in ("a", "b"):
        store.results.keep(key, "key", result(5))
    again = module("store").Store(tmp_path / "results.json", tmp_path)
    again.results.get("a", "key")
    again.results.drop_unasked()
    kept = module("store").Store(tmp_path / "results.json", tmp_path)
    assert (kept.results.get("a", "key"), kept.results.get("b", "key")) == (result(5), None)


def test_a_result_of_an_earlier_kernel_is_shown_with_a_mark(tmp_path):
    store = module("store").Store(tmp_path / "results.json", tmp_path)
    store.results.keep("name", "key of then", result(1234))
    found = store.results.get("name", "key of now")
    assert found.earlier
    assert module("document").cell(module("cases").CASES[0], found) == "1,234 / 1,111, 0.50 *"


def test_cells_that_nobody_ran_are_named_apart_from_refusals():
    document = module("document")
    found = section({"rpac": result(100), "a": result(0, "not run yet"), "b": result(0, "too large")})
    assert document.not_run([found], "not run yet") == ["- 32/8 heads, tpu7x, pages of 128: a"]
    none = section({"a": result(0, "not run yet")})
    assert document.not_run([none], "not run yet") == ["- 32/8 heads, tpu7x, pages of 128: everything"]
    assert document.refusals([found], "not run yet") == [
        "- **b** (32/8 heads, tpu7x, pages of 128: every batch): too large"
    ]


def test_every_shard_has_a_spec_and_work(tmp_path):
    run = module("run")
    for heads in module("cases").HEADS:
        for (_, page), case in ((place, heads.cases[0]) for place in heads.places):
            assert run.limits_of(tmp_path, heads, page, case).page_size == page
            assert run.work_of(heads, case).bytes > 0


def test_what_others_measured_stands_beside_the_batch_that_it_is_of():
    cases, document = module("cases"), module("document")
    for one in cases.MEASURED:
        heads = next(heads for heads in cases.HEADS if heads.label == one.heads)
        case = next(case for case in heads.cases if case.label == one.case)
        names = (*heads.ours, *heads.places[one.place])
        results = {(name, case.label): result(100) for name in names}
        found = document.Section(heads, *one.place, (case,), names, results)
        lines = document.shards([found], cases.MEASURED)
        assert any(one.peer in line and f"{one.seconds * 1e6:,.0f} us" in line for line in lines)


def test_kernels_of_batched_rpas_design_are_compiled_in_one_place_with_blocks_for_the_batch():
    cases, contenders, environment = module("cases"), module("contenders"), module("environment")
    decode, prefill = (next(case for case in cases.CASES if case.kind == kind) for kind in ("decode", "prefill"))
    peers = {one.name: one for one in contenders.CONTENDERS}
    for name, choices in (("batched_rpa", 2), ("tokamax", 2), ("stacked_rpa", 1)):
        assert "one target" in peers[name].compiles(cases.LLAMA_8B, ("v6e", 128), decode)
        for case, mode in ((decode, "decode"), (prefill, "prefill")):
            found = peers[name].compiles(cases.LLAMA_8B, ("tpu7x", 128), case)
            assert len(found) == choices and found[0].choice == "its own" and "blocks" not in found[0].request
            assert all(list(one.request["blocks"]) == [mode] for one in found[1:])
            assert {one.environment for one in found} <= set(environment.ENVIRONMENTS)


def test_tokamaxs_points_are_whole_batches_of_their_shapes():
    points = importlib.import_module("published_tokamax").POINTS
    assert len({point.label for point in points}) == len(points)
    for point in points:
        request, parameters = point.shape.request, point.shape.parameters
        assert parameters[6][-1] == request["tokens"]
        assert len(parameters[5]) == request["pages"] == request["max_seqs"] * request["max_model_len"] // 256
        assert set(parameters[5]) == set(range(request["pages"]))
        assert parameters[7][2] == len(parameters[4]) == request["max_seqs"]
        assert all(len(blocks) == 5 for blocks in request["blocks"].values())


def test_the_report_ships_what_the_comparison_found():
    written = importlib.import_module("report_peers")
    assert written.OUTPUT.read_text() == written.text(), "run `make report-peers`"
