"""A canary finds a program whose answer is not the oracle's, before it serves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from calls import BUILT, LIMITS, arrays, batch_of, call, metadata

from rpac.bundle import write_bundle
from rpac.contract import arrays as layout
from rpac.contract.program import Variant
from rpac.engine import CanaryRun, Event, ProgramFailed, load
from rpac.engine.probe import _cache, probe
from rpac.errors import BundleError, CheckError
from rpac.files.store import Store
from rpac.oracle import canary
from rpac.oracle.expected import canary_answers, expected
from rpac.oracle.tolerance import TOLERANCE
from rpac.spec import Spec


def test_every_program_gives_the_stored_answer(small: Path) -> None:
    events: list[Event] = []
    engine = load(small, target="cpu", observer=events.append)
    engine.warm(canary=True)
    ran = [event for event in events if isinstance(event, CanaryRun)]
    assert {event.variant for event in ran} == set(engine.programs)
    assert all(0 < event.error < 2**-15 for event in ran)
    assert engine.counts == {}  # canaries are no batches


@pytest.fixture
def answers(tiny: Spec) -> dict[tuple[str, int], bytes]:
    return canary_answers(tiny, BUILT, Store(None))


def test_a_program_that_returns_something_else_is_caught_and_never_run_again(
    tmp_path: Path, tiny: Spec, programs: list[Any], answers: Any
) -> None:
    """The stand-ins, whose results are no attention, stand in for a bad compiler."""
    events: list[Event] = []
    write_bundle(tmp_path / "tiny.rpac", tiny, programs, canaries=answers)
    engine = load(tmp_path / "tiny.rpac", target="cpu", observer=events.append)
    wrong = Variant("decode", 8)
    expected = r"program decode/8 on .*: its canary failed: attention of query head \d at token \d is off by"
    with pytest.raises(CheckError, match=expected) as raised:
        engine.warm([wrong], canary=True)
    assert "the cache's pages do not hold what the batch writes" in str(raised.value)
    assert engine.ready == frozenset()
    queries, keys, values, kv_cache = arrays(engine, 8)
    with pytest.raises(CheckError, match="do not serve with this pair of compiler and runtime"):
        engine(queries, keys, values, kv_cache, *metadata(batch_of([1])))
    assert not kv_cache.is_deleted()
    with pytest.raises(CheckError):
        engine.program("decode", 8)
    assert [event.error for event in events if isinstance(event, ProgramFailed)] == ["CheckError"]


def test_a_program_that_raises_on_its_canary_is_not_run_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: core halted")

    engine = load(small, target="cpu")
    monkeypatch.setattr("rpac.engine.program.load_portable", lambda *_: broken)
    for canary_first in (True, False):
        with pytest.raises(CheckError, match="its canary failed: the runtime raised INTERNAL: core halted; must be"):
            engine.warm([Variant("decode", 8)], canary=canary_first)


def test_zeros_are_named(tiny: Spec, answers: Any) -> None:
    variant = Variant("mixed", 32)
    made = tiny_canary(tiny, variant)
    verdict = canary.judge(made, answers["", *variant], np.zeros(made.queries.shape, np.float32), made.held)
    assert verdict.error == 1
    assert "all that was looked at is zero" in verdict.notes[0]


def test_a_canary_is_held_to_the_dtype_s_tolerance_and_to_every_bit_of_its_pages(tiny: Spec, answers: Any) -> None:
    for variant in BUILT:
        made = tiny_canary(tiny, variant)
        out, pages, _ = expected(made, tiny.model, tiny.serving.kv_layout)
        within, beyond = (out * np.float32(1 + TOLERANCE["bfloat16"] * part) for part in (0.9, 1.1))
        assert canary.judge(made, answers["", *variant], within, pages).notes == ()
        (note,) = canary.judge(made, answers["", *variant], beyond, pages).notes
        assert re.match(r"attention of query head \d at token \d+ is off by 0.0086 of 0.0078", note)
        flipped = pages.copy()
        flipped.view(np.uint8).reshape(-1)[-1] ^= 1
        (note,) = canary.judge(made, answers["", *variant], out, flipped).notes
        assert "the cache's pages" in note


def test_a_canary_looks_at_lse_where_programs_return_it(tiny: Spec) -> None:
    made = tiny_canary(tiny, Variant("mixed", 32))
    out, pages, lse = expected(made, tiny.model, tiny.serving.kv_layout, log_sum_exp=True)
    stored = canary.answer(made, out, pages, lse)
    assert canary.judge(made, stored, out, pages, lse).notes == ()
    (note,) = canary.judge(made, stored, out, pages, lse + np.float32(0.01)).notes
    assert note == "lse is off by 0.01 of 0.0078"
    (note,) = canary.judge(made, stored, out, pages, np.full_like(lse, np.nan)).notes
    assert note == "lse is off by nan of 0.0078"
    for given in (None, lse):
        with pytest.raises(ValueError, match="the answer to other inputs"):
            canary.judge(made, canary.answer(made, out, pages, None if given is lse else lse), out, pages, given)


def tiny_canary(tiny: Spec, variant: Variant) -> canary.ProbeCall:
    return canary.canary(variant.kind, layout.arg_specs(tiny, variant.tokens), LIMITS, tiny.serving.kv_layout)


def test_the_inputs_of_a_canary_are_these_for_ever(tiny: Spec) -> None:
    """Another digest means that bundles built before cannot be checked any more: raise the bundle's schema then."""
    digests = {str(variant): tiny_canary(tiny, variant).digest.hex()[:16] for variant in sorted(BUILT)}
    assert digests == {
        "decode/8": "555259a90c55957b",
        "decode/32": "555259a90c55957b",
        "prefill/32": "f9d4453dc2a7421b",
        "mixed/8": "b85e9f2003053668",
        "mixed/32": "f5736ed8ae786de1",
    }


def test_a_canary_touches_both_ends_of_the_cache(tiny: Spec) -> None:
    for variant in BUILT:
        pages = tiny_canary(tiny, variant).pages
        assert {0, tiny.serving.num_pages - 1} <= set(pages.tolist())
        assert len(set(pages.tolist())) == len(pages)


def test_a_bundle_without_canaries_says_so(bundle: Path) -> None:
    engine = load(bundle, target="cpu")
    with pytest.raises(BundleError, match=r"program decode/8: the bundle holds no canary; .* build the bundle again"):
        engine.warm([Variant("decode", 8)], canary=True)
    call(engine, [1])


def test_an_answer_to_other_inputs_is_no_answer(tmp_path: Path, tiny: Spec, programs: list[Any], answers: Any) -> None:
    old = {variant: bytes(32) + data[32:] for variant, data in answers.items()}
    write_bundle(tmp_path / "tiny.rpac", tiny, programs, canaries=old)
    with pytest.raises(
        BundleError, match=r"found the answer to other inputs than this rpac makes.*build the bundle again"
    ):
        load(tmp_path / "tiny.rpac", target="cpu").warm([Variant("decode", 8)], canary=True)


def test_a_write_to_a_page_of_no_row_is_found(small: Path) -> None:
    engine = load(small, target="cpu")
    variant = Variant("decode", 8)
    program = engine.programs[variant]
    made = canary.canary(variant.kind, program.args, engine.limits, engine.kv_layout)
    free = next(page for page in range(engine.limits.num_pages) if page not in made.pages)

    def run(args: Any) -> tuple[jax.Array, jax.Array]:
        out, kv_cache = engine(*args)
        return out, kv_cache.at[free, -1].set(1)

    answer = canary.answer(made, *expected(made, engine.model, engine.kv_layout))
    (note,) = probe(run, made, program, engine.placement).against(answer).notes
    assert note == f"1 pages of no row were written, first {free}"


def test_the_cache_of_a_canary_is_all_the_memory_that_it_takes() -> None:
    pages, held = jax.ShapeDtypeStruct((64,), np.int32), jax.ShapeDtypeStruct((64, 16, 2, 2, 128), "bfloat16")
    memory = jax.jit(_cache, static_argnums=3).lower(pages, held, pages, 4096).compile().memory_analysis()
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 8
