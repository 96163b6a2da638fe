"""What a kernel of a call gets for its scalars, and which kernels run: by the operations of XLA around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from rpac.errors import ScheduleError
from rpac.schedule.hlo import Operation, parse_module
from rpac.schedule.memory import Words
from rpac.schedule.sequence import run

KERNEL = 'custom_call_target="tpu_custom_call", operand_layout_constraints={}'
Ran = list[tuple[str, dict[int, list[int | None]]]]


def ran(text: str, parameters: Mapping[int, Sequence[int]], written: Mapping[str, Mapping[int, Words]] = {}) -> Ran:
    """The kernels that run, with their operands; `written`: what each leaves in its results."""
    found: Ran = []

    def kernel(operation: Operation, operands: dict[int, Words]) -> Mapping[int, Words]:
        found.append((operation.name, {index: list(words) for index, words in operands.items()}))
        return written.get(operation.name, {})

    run(parse_module(text), parameters, kernel, lambda operation, operands: found.append((operation.name, {})))
    return found


def entry(*lines: str) -> str:
    return "ENTRY %main (a: s32[4]) -> s32[4] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def computation(name: str, *lines: str) -> str:
    return f"%{name} (p: s32[4]) -> s32[4] {{\n" + "".join(f"  {line}\n" for line in lines) + "}\n\n"


def operand(*lines: str, given: Mapping[int, Sequence[int]] | None = None) -> list[int | None] | None:
    """The operand of a kernel, `%x` of the lines; `%p` is the parameter."""
    text = entry(
        "%p = s32[4]{0:T(128)} parameter(5)",
        *lines,
        f"ROOT %k = f32[4]{{0:T(128)}} custom-call(%x), {KERNEL}",
    )
    kernels = [operands for name, operands in ran(text, {5: [1, 2, 3, 4]} if given is None else given) if name == "k"]
    return kernels[0].get(0)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["%x = s32[4]{0:T(128)} copy(%p)"], [1, 2, 3, 4]),
        (["%one = s32[] constant(-1)", "%x = s32[3]{0:T(128)} broadcast(%one), dimensions={}"], [-1, -1, -1]),
        (["%x = s32[2]{0:T(128)} constant({7, 8})"], [7, 8]),
        (["%x = s32[2]{0:T(128)} slice(%p), slice={[1:4:2]}"], [2, 4]),
        (
            [
                "%q = s32[4]{0} multiply(%p, %p)",
                "%r = s32[4]{0} subtract(%q, %p)",
                "%x = s32[4]{0:T(128)} maximum(%r, %p)",
            ],
            [1, 2, 6, 12],
        ),
        (
            [
                "%i = s32[4]{0} iota(), iota_dimension=0",
                "%n = s32[] constant(2)",
                "%b = s32[4]{0} broadcast(%n), dimensions={}",
                "%c = pred[4]{0} compare(%i, %b), direction=LT",
                "%x = s32[4]{0:T(128)} select(%c, %p, %b)",
            ],
            [1, 2, 2, 2],
        ),
        (["%big = s32[] constant(2147483647)", "%w = s32[4]{0} broadcast(%big), dimensions={}",
          "%x = s32[4]{0:T(128)} add(%p, %w)"], [-(2**31), -(2**31) + 1, -(2**31) + 2, -(2**31) + 3]),
        (["%z = s32[] constant(0)", "%x = s32[7]{0:T(128)} pad(%p, %z), padding=1_2"], [0, 1, 2, 3, 4, 0, 0]),
        (["%t = s32[2]{0} slice(%p), slice={[0:2]}", "%x = s32[6]{0:T(128)} concatenate(%t, %p), dimensions={0}"],
         [1, 2, 1, 2, 3, 4]),
        (["%s = s32[] constant(9)", "%x = s32[2]{0:T(128)} dynamic-slice(%p, %s), dynamic_slice_sizes={2}"], [3, 4]),
        (["%s = (s32[4]{0}, s32[4]{0}, u32[]) copy-start(%p)", "%x = s32[4]{0:T(128)} copy-done(%s)"], [1, 2, 3, 4]),
        (["%t = (f32[4]{0}, s32[4]{0}) tuple(%p, %p)", "%x = s32[4]{0:T(128)} get-tuple-element(%t), index=1"],
         [1, 2, 3, 4]),
        (
            [
                "%i = s32[3]{0} constant({3, 0, 9})",
                "%x = s32[3]{0:T(128)} gather(%p, %i), offset_dims={}, collapsed_slice_dims={0}, start_index_map={0}, "
                "index_vector_dim=1, slice_sizes={1}",
            ],
            [4, 1, 4],
        ),
        # Not followed: a product of matrices, arithmetic on a float, an operation of another kind.
        (["%x = s32[4]{0:T(128)} dot(%p, %p)"], None),
        (["%f = f32[4]{0} convert(%p)", "%x = s32[4]{0:T(128)} convert(%f)"], None),
        (['%x = s32[4]{0:T(128)} custom-call(%p), custom_call_target="Other"'], None),
    ],
)  # fmt: skip
def test_scalars_follow_through_the_operations_of_xla(lines: list[str], expected: list[int] | None) -> None:
    assert operand(*lines) == expected


def test_a_parameter_that_is_not_given_leaves_the_operand_out() -> None:
    assert operand("%x = s32[4]{0:T(128)} copy(%p)", given={}) is None


def test_a_fusion_is_followed_into_its_computation() -> None:
    text = computation("inside", "%a = s32[4]{0} parameter(0)", "ROOT %b = s32[4]{0} negate(%a)") + entry(
        "%p = s32[4]{0:T(128)} parameter(0)",
        "%f = s32[4]{0:T(128)} fusion(%p), kind=kLoop, calls=%inside",
        f"ROOT %k = f32[4]{{0}} custom-call(%f), {KERNEL}",
    )
    assert ran(text, {0: [1, 2, 3, 4]}) == [("f", {}), ("k", {0: [-1, -2, -3, -4]})]


def test_a_sort_follows_its_own_comparison_and_keeps_the_order_of_equals() -> None:
    text = computation(
        "more",
        "%a = s32[] parameter(0)",
        "%b = s32[] parameter(1)",
        "%c = s32[] parameter(2)",
        "%d = s32[] parameter(3)",
        "ROOT %e = pred[] compare(%a, %b), direction=GT",
    ) + entry(
        "%p = s32[4]{0:T(128)} parameter(0)",
        "%i = s32[4]{0} iota(), iota_dimension=0",
        "%s = (s32[4]{0}, s32[4]{0:T(128)}) sort(%p, %i), dimensions={0}, is_stable=true, to_apply=%more",
        "%x = s32[4]{0:T(128)} get-tuple-element(%s), index=1",
        f"ROOT %k = f32[4]{{0}} custom-call(%x), {KERNEL}",
    )
    assert ran(text, {0: [5, 9, 5, 7]})[-1] == ("k", {0: [1, 3, 0, 2]})


def test_a_bitcast_takes_elements_by_their_place_in_memory() -> None:
    """Rows of a tiled table are cut into tiles of 8 x 128: the words of its first tile come first."""
    table = list(range(8 * 256))
    text = entry(
        "%p = s32[2048]{0:T(1024)} parameter(0)",
        "%r = s32[8,256]{1,0:T(8,128)} reshape(%p)",
        "%x = s32[2048]{0:T(1024)} bitcast(%r)",
        f"ROOT %k = f32[4]{{0}} custom-call(%x), {KERNEL}",
    )
    words = ran(text, {0: table})[-1][1][0]
    assert words[:130] == [*range(128), 256, 257] and words[1024:1026] == [128, 129]


def test_a_tiled_table_is_given_to_a_kernel_as_it_lies_in_memory() -> None:
    words = operand("%r = s32[2,2]{1,0:T(8,128)} reshape(%p)", "%x = s32[2,2]{1,0:T(8,128)} copy(%r)")
    assert words == [1, 2, *[0] * 126, 3, 4, *[0] * (7 * 128 - 2)]
    assert operand("%x = s32[1,4]{1,0:T(1,128)} reshape(%p)") == [1, 2, 3, 4]


def test_a_tiled_table_can_be_an_argument_of_the_call() -> None:
    """Its elements are given in the order of their indices, however XLA lays it out."""
    table = list(range(8 * 256))
    text = entry(
        "%x = s32[8,256]{1,0:T(8,128)} parameter(0)",
        f"ROOT %k = f32[4]{{0}} custom-call(%x), {KERNEL}",
    )
    words = ran(text, {0: table})[-1][1][0]
    assert words[:130] == [*range(128), 256, 257] and words[1024:1026] == [128, 129]


def test_what_a_kernel_writes_by_scalars_reaches_the_next_through_xla() -> None:
    text = entry(
        "%p = s32[4]{0:T(128)} parameter(0)",
        f"%first = (s32[4]{{0:T(128)}}, f32[4]{{0}}) custom-call(%p), {KERNEL}",
        "%table = s32[4]{0:T(128)} get-tuple-element(%first), index=0",
        "%more = s32[4]{0:T(128)} add(%table, %p)",
        f"ROOT %k = f32[4]{{0}} custom-call(%more), {KERNEL}",
    )
    found = ran(text, {0: [1, 2, 3, 4]}, {"first": {0: [10, None, 30, 40]}})
    assert found[-1] == ("k", {0: [11, None, 33, 44]})


def conditional(predicate: str, branches: str) -> str:
    def branch(name: str) -> str:
        kernel = f"ROOT %kernel_{name} = s32[4]{{0:T(128)}} custom-call(%of_{name}), {KERNEL}"
        return computation(name, f"%of_{name} = s32[4]{{0:T(128)}} parameter(0)", kernel)

    return (
        branch("left")
        + branch("right")
        + entry(
            "%p = s32[4]{0:T(128)} parameter(0)",
            "%q = s32[4]{0:T(128)} negate(%p)",
            "%first = s32[1]{0} slice(%p), slice={[0:1]}",
            "%index = s32[] reshape(%first)",
            "%zero = s32[] constant(0)",
            "%zeros = s32[1]{0} broadcast(%zero), dimensions={}",
            "%some = pred[1]{0:T(512)(128)(4,1)} compare(%first, %zeros), direction=GT",
            "%is = pred[]{:T(512)} bitcast(%some)",
            "%unknown = pred[] rng(%zero), distribution=rng_uniform",
            f"ROOT %c = s32[4]{{0}} conditional(%{predicate}, %p, %q), {branches}",
        )
    )


@pytest.mark.parametrize(
    ("predicate", "branches", "first", "expected"),
    [
        ("is", "true_computation=%left, false_computation=%right", 1, ("kernel_left", [1, 2, 3, 4])),
        ("is", "true_computation=%left, false_computation=%right", 0, ("kernel_right", [0, -2, -3, -4])),
        ("index", "branch_computations={%left, %right}", 0, ("kernel_left", [0, 2, 3, 4])),
        ("index", "branch_computations={%left, %right}", 1, ("kernel_right", [-1, -2, -3, -4])),
        ("index", "branch_computations={%left, %right}", 7, ("kernel_right", [-7, -2, -3, -4])),
        ("index", "branch_computations={%left, %right}", -7, ("kernel_right", [7, -2, -3, -4])),
    ],
)
def test_only_the_branch_that_is_taken_runs(
    predicate: str, branches: str, first: int, expected: tuple[str, list[int]]
) -> None:
    found = ran(conditional(predicate, branches), {0: [first, 2, 3, 4]})
    assert found[-1] == (expected[0], {0: expected[1]})
    assert sum(name.startswith("kernel") for name, _ in found) == 1


def test_a_conditional_whose_branch_is_not_known_is_refused_and_named() -> None:
    text = conditional("unknown", "true_computation=%left, false_computation=%right")
    with pytest.raises(ScheduleError, match="%c: which of its kernels run depends on %unknown, a rng, whose value"):
        ran(text, {0: [1, 2, 3, 4]})


def loop(bound: str) -> str:
    state = "(s32[], s32[4]{0:T(128)})"
    return (
        computation(
            "goes_on",
            f"%s = {state} parameter(0)",
            "%i = s32[] get-tuple-element(%s), index=0",
            "%w = s32[4]{0:T(128)} get-tuple-element(%s), index=1",
            "%l = s32[1]{0} slice(%w), slice={[3:4]}",
            f"%bound = s32[] {bound}",
            "ROOT %more = pred[] compare(%i, %bound), direction=LT",
        )
        + computation(
            "body",
            f"%t = {state} parameter(0)",
            "%j = s32[] get-tuple-element(%t), index=0",
            "%one = s32[] constant(1)",
            "%next = s32[] add(%j, %one)",
            "%v = s32[4]{0:T(128)} get-tuple-element(%t), index=1",
            f"%k = s32[4]{{0:T(128)}} custom-call(%v), {KERNEL}",
            f"ROOT %u = {state} tuple(%next, %k)",
        )
        + entry(
            "%p = s32[4]{0:T(128)} parameter(0)",
            "%zero = s32[] constant(0)",
            f"%start = {state} tuple(%zero, %p)",
            f"ROOT %w1 = {state} while(%start), condition=%goes_on, body=%body",
        )
    )


def test_a_loop_runs_its_kernels_as_often_as_its_condition_says() -> None:
    assert [name for name, _ in ran(loop("constant(3)"), {0: [1, 2, 3, 4]})].count("k") == 3
    assert "k" not in [name for name, _ in ran(loop("constant(0)"), {0: [1, 2, 3, 4]})]


def test_a_loop_can_depend_on_what_its_kernels_write() -> None:
    found = ran(loop("reshape(%l)"), {0: [0, 0, 0, 5]}, {"k": {0: [7, 0, 0, 2]}})
    assert [operands for name, operands in found if name == "k"] == [{0: [0, 0, 0, 5]}, {0: [7, 0, 0, 2]}]


def test_a_loop_whose_iterations_are_not_known_is_refused() -> None:
    with pytest.raises(ScheduleError, match="%w1: how often this loop runs its kernels follows neither"):
        ran(loop("rng(%i), distribution=rng_uniform"), {0: [1, 2, 3, 4]})
    with pytest.raises(ScheduleError, match="how often"):  # the kernel writes its words by vectors
        ran(loop("reshape(%l)"), {0: [0, 0, 0, 5]})


def test_a_loop_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpac.schedule.sequence._MOST_ITERATIONS", 100)
    with pytest.raises(ScheduleError, match="still runs after 100 iterations"):
        ran(loop("constant(1000)"), {0: [1, 2, 3, 4]})


def test_a_kernel_inside_of_another_kind_of_operation_is_refused() -> None:
    text = computation(
        "inner", "%a = s32[4]{0} parameter(0)", f"ROOT %k = s32[4]{{0}} custom-call(%a), {KERNEL}"
    ) + entry("%p = s32[4]{0} parameter(0)", "ROOT %m = s32[4]{0} map(%p), to_apply=%inner")
    with pytest.raises(ScheduleError, match="%m: a kernel runs inside of a map; it cannot be timed"):
        ran(text, {})


def test_a_conditional_without_kernels_is_one_operation_of_xla() -> None:
    text = conditional("unknown", "true_computation=%left, false_computation=%right").replace("tpu_custom_call", "x")
    assert ("c", {}) in ran(text, {})
