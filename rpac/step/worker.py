"""Lowers and compiles one step in this process. Imported only where JAX may be: in a worker, or in a test."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Final

import jax
from jax import export

from rpac.contract.step import LoweredStep
from rpac.contract.units import size
from rpac.devices.chip import chip, is_tpu
from rpac.devices.client import build_string
from rpac.engine.custom_calls import COMPILED_AWAY, outside_calls
from rpac.errors import CompileError, RpacError
from rpac.files.store import Store
from rpac.lower.worker import set_flags
from rpac.step.checks import check_compiled, check_traced, copied_params
from rpac.step.function import describe, load_function, place_of
from rpac.step.program import Step
from rpac.step.task import StepTask

FACTS: Final = "facts.json"
FORMAT: Final = 1  # of what is kept of a step
_NO_ROOM: Final = re.compile(
    r"(exhausted|exceed|out of memory).*\bhbm\b|\bhbm\b.*(exhausted|exceed|out of memory)", re.I
)


def step_of(task: StepTask, on_topology: bool | None = None) -> Step | None:
    """The step of a task, which nothing has traced yet; None where the user's function wants no such step.

    `on_topology`: on devices of the target's smallest topology; by default where the target is a TPU. Raises CompileError.
    """
    set_flags()
    function, arrays = load_function(task)
    described = describe(task, arrays)
    if described is None:
        return None
    return Step(task, function, described, is_tpu(task.target) if on_topology is None else on_topology)


def compile_step(step: Step) -> Any:
    """The step compiled for its target. Raises CompileError with what the compiler says."""
    with reported(step.task.label), step.context():
        return step.lower().compile()


def checked_functions(tasks: Sequence[StepTask]) -> list[bool]:
    """Which of these steps the user's function wants. Traces the first: what fails there fails before anything is compiled.

    Raises SpecError or CompileError, also where the steps do not take the same parameters and caches.
    """
    steps = [step_of(task, on_topology=False) for task in tasks]
    wanted = [step for step in steps if step is not None]
    if not wanted:
        raise CompileError(
            f"step {tasks[0].function}: the function that describes its arrays returns None for every kind and token bucket; "
            "must describe one or more"
        )
    first = wanted[0]
    for step in wanted[1:]:
        if step.described.model != first.described.model:
            pairs = zip_longest(first.described.params_arrays, step.described.params_arrays)
            other = next((pair for pair in pairs if pair[0] != pair[1]), ("its caches", "others"))
            raise CompileError(
                f"step {tasks[0].function}: {first.task.label} takes {other[0]}, and {step.task.label} {other[1]}; all steps "
                "must take the same parameters and caches, because a server has them once"
            )
    with reported(first.task.label):
        check_traced(first)
    return [step is not None for step in steps]


def lower_step(
    task: StepTask, tools: Mapping[str, str], store: Store, this_cpu: bool = False
) -> tuple[LoweredStep, bool]:
    """A step, exported, and compiled where its target is a TPU, or with `this_cpu` the CPU of this machine; and whether all of it
    was made before of the same lowered text, and comes from `store`. An executable for one CPU is never kept there.

    Raises CompileError with the place in the user's code.
    """
    step = step_of(task)
    assert step is not None  # `checked_functions` leaves those out
    with reported(task.label):
        check_traced(step)
        signature, lowered = step.signature, step.lower()
        # With the names of scopes and functions, which the compiler writes into what it makes.
        text = hashlib.sha256(lowered.as_text(debug_info=True).encode()).hexdigest()
        key = _key(step, text, tools)
        files, cached = store.read(key), True
        if files is None:
            files, cached = _files(step, lowered), False
            store.write(key, files)
        facts = json.loads(files[FACTS])
        executable, toolchain = files.get("executable"), {**tools, **facts["toolchain"]}
        if this_cpu and task.target == "cpu":
            (executable, facts["memory"], facts["notes"]), cached = _compiled(step, lowered), False
            toolchain["cpu_build"] = build_string(jax.local_devices(backend="cpu")[0].client)
        made = LoweredStep(
            target=task.target,
            kind=task.kind,
            tokens=task.tokens,
            function=task.function,
            model=step.described.model,
            signature=signature,
            exported=files["exported"],
            executable=executable,
            lowered_sha256=text,
            device_kind=chip(task.target).device_kind if is_tpu(task.target) else task.target,
            topology=step.topology,
            toolchain=toolchain,
            memory=facts["memory"],
            notes=tuple(facts["notes"]),
        )
        return made, cached


def _key(step: Step, text: str, tools: Mapping[str, str]) -> str:
    """sha256 over everything that decides what a step becomes. The lowered text has the rest: the user's function may be written
    in another way, or take its constants from elsewhere."""
    arrays = [(one.name, one.cuts) for one in step.arguments]
    what = ("step", FORMAT, step.task.target, step.topology, step.task.mesh.as_dict(), text, arrays, dict(tools))
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _files(step: Step, lowered: Any) -> dict[str, bytes]:
    """What is kept of a step."""
    files, facts = {"exported": exported(step)}, dict[str, Any](memory={}, toolchain={}, notes=[])
    if is_tpu(step.task.target):
        files["executable"], facts["memory"], facts["notes"] = _compiled(step, lowered)
        facts["toolchain"] = {"libtpu_build": build_string(step.devices[0].client)}
    return {**files, FACTS: json.dumps(facts, sort_keys=True).encode()}


def _compiled(step: Step, lowered: Any) -> tuple[bytes, dict[str, int], list[str]]:
    """The executable of a lowered step, checked, its memory, and what its author may want to change."""
    with step.context():
        compiled = lowered.compile()
    memory = memory_of(compiled)
    check_compiled(step, compiled, memory)
    notes = [
        f"{one} is copied in every call, {size(one.nbytes_of_device(step.task.mesh))} on each device: the compiler wants it in "
        "another layout; make its last axis a multiple of 128, or store it transposed"
        for one in copied_params(step, compiled)
    ]
    return compiled.runtime_executable().serialize(), memory, notes


def exported(step: Step) -> bytes:
    """The step's portable form. Of one device it names none: it is for any. Raises CompileError for one that no server takes."""
    portable = step
    if step.topology is not None and step.task.mesh.devices == 1:
        portable = Step(step.task, step.function, step.described, on_topology=False)
    with portable.context():
        made = export.export(portable.jitted, platforms=(portable.platform,))(*portable.shapes)
    allowed, found = outside_calls(made)
    found -= COMPILED_AWAY
    if found:
        named = f"only {', '.join(sorted(allowed))}" if allowed else "nothing"
        raise CompileError(
            f"{step.task.label}: {place_of(step.function)} calls {', '.join(sorted(found))} outside of the compiler; must call "
            f"{named} there, because a server refuses a bundle that calls other functions of its process; compute it in "
            "another way, or before the step"
        )
    return bytes(made.serialize(vjp_order=0))


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes on each device, as the compiler counts them."""
    found = compiled.memory_analysis()
    return {
        "argument_bytes": found.argument_size_in_bytes,
        "output_bytes": found.output_size_in_bytes,
        "alias_bytes": found.alias_size_in_bytes,
        "temp_bytes": found.temp_size_in_bytes,
        "code_bytes": found.generated_code_size_in_bytes,
    }


@contextlib.contextmanager
def reported(label: str) -> Iterator[None]:
    """Turns what JAX and the compiler raise into CompileError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except RpacError:
        raise
    except Exception as error:
        detail = "\n  ".join(str(error).strip().splitlines()[:12])
        if _NO_ROOM.search(detail.splitlines()[0] if detail else ""):
            raise CompileError(
                f"{label}: the step does not fit HBM, by the compiler:\n  {detail}\nlower serving.num_pages or the largest of "
                "serving.token_buckets, or spread the model over more devices with `parallel`"
            ) from error
        raise CompileError(f"{label}: {type(error).__name__} from the compiler:\n  {detail}") from error
