"""What compilers write differently: bounds checks, remarks within remarks, versions, scalars that XLA computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from command import TINY

from rpac.contract.program import Variant
from rpac.errors import ScheduleError
from rpac.files.store import Store
from rpac.predict import Programs, parse_decode, programs_of
from rpac.predict.run import scalars_of
from rpac.schedule import Call, Walk
from rpac.schedule.compilers import VERIFIED

from .gather import PAGES, SEQS
from .miniature import run, schedule
from .test_differential import built as built  # a fixture
from .test_fixtures import LENS, TABLE, load

CHECK = (
    "%9 = shalt.err (!%p1_p1) /* BoundsCheck 0 [deref of %s3] for %5 = dma.vmem_to_smem /*vmem=*/%s3, /*smem=*/%s4 /* \n"
    "base_bounds: (1)\n second_minor_factor: 1 */\nhlo: kernel.1\n */"
)


def test_a_remark_that_holds_another_over_several_lines_is_one_remark() -> None:
    lines = ["%p1_p1 = scmp.eq.s32.totalorder 1, 1", CHECK, "%2 = sfence"]
    found = schedule("tpu7x", *lines)
    assert [[i.opcode for i in bundle.instructions] for bundle in found.bundles[1:]] == [["shalt.err"], ["sfence"]]
    first, _, last = (bundle.line for bundle in found.bundles)
    assert last - first == 2 + CHECK.count("\n")  # lines still count
    assert run("tpu7x", *lines).cycles == 3


def test_a_check_that_fails_stops_the_walk() -> None:
    with pytest.raises(ScheduleError, match="a check that the compiler put into the kernel fails for this batch"):
        run("tpu7x", "%p1_p1 = scmp.eq.s32.totalorder 1, 2", CHECK)


@pytest.mark.parametrize("remark", ["core id", "megacore core id :: core id"])
def test_the_walk_is_of_core_0(remark: str) -> None:
    core = f"%s1_s1 = sld [smem:[#allocation0]] /* {remark} */"
    done = run("v5p", core, "%p2_p2 = scmp.ne.s32.totalorder %s1_s1, 0", "%3 = shalt.err (%p2_p2)")
    assert done.cycles == 3


def test_a_compiler_that_is_not_verified_is_refused_unless_asked_for() -> None:
    dump = dataclasses.replace(load("tpu7x"), compiler="0.0.99")
    with pytest.raises(
        ScheduleError, match=r"libtpu 0\.0\.99; its reading is verified for 0\.0\.42\.1, .*any_compiler"
    ):
        Call(dump)
    batch = {LENS: [1] * SEQS, TABLE: list(range(PAGES))}
    assert not Call(dump, any_compiler=True).predict(batch).compiler_verified
    assert Call(dataclasses.replace(dump, compiler=next(iter(VERIFIED)))).predict(batch).compiler_verified


def test_a_scalar_that_xla_computes_is_named_with_its_operation() -> None:
    dump = load("v6e")
    hlo = dump.hlo.replace(
        "custom-call(%args_0_.1, %args_1_.1,", "custom-call(%args_0_.1, %sorted,"
    ).replace("  ROOT %gather.1", "  %sorted = s32[32]{0:T(128)} fusion(%args_1_.1), kind=kLoop\n  ROOT %gather.1")  # fmt: skip
    with pytest.raises(
        ScheduleError, match=r"operand 1 .* is missing; .*not followed from .*: operand 1 is %sorted, a fusion"
    ):
        Call(dataclasses.replace(dump, hlo=hlo)).predict({LENS: [1] * SEQS, TABLE: list(range(PAGES))})


def test_a_parameter_that_was_not_given_is_named() -> None:
    with pytest.raises(ScheduleError, match=r"operand 1 is %args_1_\.1, a parameter"):
        Call(load("v6e")).predict({LENS: [1] * SEQS})


@pytest.mark.compile
def test_a_kernel_with_bounds_checks_walks_as_the_same_without(built: Callable[[str], Programs]) -> None:
    """It makes the same transfers; the checks take bundles."""
    plain = built("tpu7x")
    checked = programs_of(TINY, "tpu7x", Store(None))
    variant = Variant("decode", 8)
    task = plain.tasks[variant]
    text = task.source.text.replace("disable_bounds_checks=True", "disable_bounds_checks=False")
    assert text != task.source.text
    source = dataclasses.replace(task.source, text=text)
    checked = dataclasses.replace(checked, tasks={variant: dataclasses.replace(task, source=source)})
    assert "BoundsCheck" in "".join(checked.call(variant).dump.schedules.values())

    def walked(programs: Programs) -> Walk:
        call = programs.call(variant)
        scalars = scalars_of(parse_decode("3x200").batch(programs.limits), task.args)
        ((name, operands),) = call.operands(scalars).items()
        return call.walk_kernel(name, operands, trace=True)

    one, other = walked(plain), walked(checked)
    assert places(one) == places(other)
    assert one.issued < other.issued


def places(walk: Walk) -> list[tuple[int | None, int, int, bool]]:
    return [(t.operand, t.offset, t.size, t.to_hbm) for t in walk.transfers]
