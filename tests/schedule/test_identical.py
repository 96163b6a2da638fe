"""Operations that compute the same share the schedule of one; what differs does not."""

from __future__ import annotations

from rpac.schedule.hlo import parse_module
from rpac.schedule.identical import schedule_names

TYPE = "f32[8,128]{1,0:T(8,128)}"
PLACED = 'backend_config={"flag_configs":[],"scoped_memory_configs":[{"memory_space":"1","offset":"%d"}]}'


def computation(name: str, body: str, parameters: tuple[int, int] = (0, 1)) -> str:
    """Of two parameters, whose lines come in the order of `parameters`."""
    lines = [f"  %{name}_p{n} = {TYPE} parameter({n})" for n in parameters]
    return "\n".join([f"%{name} (a: f32[8,128], b: f32[8,128]) -> f32[8,128] {{", *lines, f"  ROOT {body}", "}", ""])


def module(*fusions: tuple[str, str]) -> str:
    """Fusions by name, each with a body in which @ stands for the name of its computation; the first one is scheduled."""
    text = "".join(
        computation(f"c_{name}", f"%{name}_r = {TYPE} {body.replace('@', f'%c_{name}_p')}", (0, 1) if i % 2 else (1, 0))
        for i, (name, body) in enumerate(fusions)
    )
    calls = "".join(
        f'  %{name} = {TYPE} fusion(%x, %y), kind=kLoop, calls=%c_{name}, metadata={{op_name="layer {i} \\" {{"}}, '
        f"{PLACED % i}\n"
        for i, (name, _) in enumerate(fusions)
    )
    entry = (
        f"  %x = {TYPE} parameter(0)\n  %y = {TYPE} parameter(1)\n{calls}  ROOT %t = ({TYPE}) tuple(%{fusions[0][0]})\n"
    )
    return f"{text}\nENTRY %main (x: f32[8,128], y: f32[8,128]) -> (f32[8,128]) {{\n{entry}}}\n"


def named(*fusions: tuple[str, str]) -> dict[str, str]:
    return schedule_names(parse_module(module(*fusions)), {fusions[0][0]})


def test_operations_that_differ_in_names_places_and_metadata_are_the_same() -> None:
    assert named(("one", "add(@0, @1)"), ("two", "add(@0, @1)")) == {"one": "one", "two": "one"}


def test_another_operation_another_order_or_another_attribute_is_not() -> None:
    others = ("subtract(@0, @1)", "add(@1, @0)", "add(@0, @0)", "add(@0, @1), frobnicate=true")
    for other in others:
        assert named(("one", "add(@0, @1)"), ("two", other)) == {"one": "one"}, other
