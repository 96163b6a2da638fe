"""What a manifest says of steps, whole forward steps of a model: to plain data, and strictly back from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, cast

from rpac.batch import Limits
from rpac.bundle.schema import SHA256, Node
from rpac.contract.kind import KINDS, Kind
from rpac.contract.mesh import AXES, Mesh
from rpac.contract.program import Variant
from rpac.contract.step import (
    BITS,
    REFERENCE,
    ModelSignature,
    StepArray,
    StepProgram,
    Steps,
    StepSignature,
    Tree,
    builder,
    cuts_fit,
    leaves_of,
)

MAX_STEP_BYTES: Final = 1 << 31
_INT32: Final = 2**31 - 1
_MAX_CACHES: Final = 1 << 16


def steps_data(steps: Steps) -> dict[str, Any]:
    """The steps of one target as plain data."""
    return {
        "function": steps.function,
        "params": _arrays_data(steps.model.params),
        "caches": list(steps.model.caches),
        "caches_tree": steps.model.caches_tree,
        "programs": [
            {
                "kind": one.variant.kind,
                "tokens": one.variant.tokens,
                "extra": _arrays_data(one.signature.extra),
                "outputs": _arrays_data(one.signature.outputs),
                "outputs_tree": one.signature.outputs_tree,
                "exported": one.exported._asdict(),
                "executable": None if one.executable is None else one.executable._asdict(),
                "lowered": one.lowered_sha256,
                "memory": dict(one.memory),
            }
            for one in steps.programs
        ],
    }


def _arrays_data(arrays: tuple[StepArray, ...]) -> list[Any]:
    return [one.as_data() for one in arrays]


def parse_steps(node: Node, layers: Mapping[str, Collection[str]], limits: Limits, mesh: Mesh) -> dict[str, Steps]:
    """The steps of each target by its name. `layers`: the kinds of layers that the manifest has for each target.

    Raises BundleError for anything that `steps_data` does not make.
    """
    found = node.items()
    for name in found:
        if name not in layers:
            raise node.refuse(f"an object whose keys are among the targets {', '.join(layers)}")
    return {name: _steps(one, layers[name], limits, mesh) for name, one in found.items()}


def _steps(node: Node, layers: Collection[str], limits: Limits, mesh: Mesh) -> Steps:
    fields = node.fields("function", "params", "caches", "caches_tree", "programs")
    caches = tuple(one.choice(layers) for one in fields["caches"].elements())
    if not 0 < len(caches) <= _MAX_CACHES:
        raise fields["caches"].refuse("a list of one kind of layer or more")
    programs = tuple(_program(one, limits, mesh) for one in fields["programs"].elements())
    if not programs or len({one.variant for one in programs}) < len(programs):
        raise fields["programs"].refuse("a list with one step or more, each of another kind or token bucket")
    model = ModelSignature(
        _arrays(fields["params"], mesh), caches, _tree(fields["caches_tree"], len(caches), "each cache")
    )
    return Steps(fields["function"].text(REFERENCE, "package.module:function"), model, programs)


def _program(node: Node, limits: Limits, mesh: Mesh) -> StepProgram:
    fields = node.fields(
        "kind", "tokens", "extra", "outputs", "outputs_tree", "exported", "executable", "lowered", "memory"
    )
    tokens = fields["tokens"].integer(1, _INT32)
    if tokens not in limits.token_buckets:
        raise fields["tokens"].refuse(f"one of the token buckets {list(limits.token_buckets)}")
    outputs, executable = _arrays(fields["outputs"], mesh), fields["executable"]
    tree = _tree(fields["outputs_tree"], len(outputs), "each output")
    return StepProgram(
        variant=Variant(cast(Kind, fields["kind"].choice(KINDS)), tokens),
        signature=StepSignature(_arrays(fields["extra"], mesh), outputs, tree),
        exported=fields["exported"].content(MAX_STEP_BYTES),
        executable=None if executable.value is None else executable.content(MAX_STEP_BYTES),
        lowered_sha256=fields["lowered"].text(SHA256, "64 hex digits"),
        memory={name: one.integer(0, 1 << 62) for name, one in fields["memory"].items().items()},
    )


def _tree(node: Node, leaves: int, what: str) -> Tree:
    try:
        builder(node.value)
        found = leaves_of(node.value)
    except (ValueError, RecursionError) as error:
        raise node.refuse("the structure of a tree of dicts, lists, tuples and named tuples") from error
    if sorted(found) != list(range(leaves)):
        raise node.refuse(f"a structure with the numbers 0 to {leaves - 1}, once for {what}")
    return node.value


def _arrays(node: Node, mesh: Mesh) -> tuple[StepArray, ...]:
    return tuple(_array(one, mesh) for one in node.elements())


def _array(node: Node, mesh: Mesh) -> StepArray:
    parts = node.elements()
    if len(parts) != 4:
        raise node.refuse("a name, a dtype, a shape and how it is cut")
    name, dtype, shape, cuts = parts
    name.text(r"[^\n]{1,1000}", "a name")
    dtype.choice(BITS)
    sizes = [size.integer(0, _INT32) for size in shape.elements()]
    cut = [[axis.choice(AXES) for axis in one.elements()] for one in cuts.elements()]
    if not cuts_fit([tuple(one) for one in cut], tuple(sizes), mesh):
        raise cuts.refuse("axes of the mesh, each once, that divide the shape")
    return StepArray.from_data(node.value)
