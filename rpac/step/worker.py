"""Lowers and compiles one step in this process. Imported only where JAX may be: in a worker, or in a test."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from jax import export

from rpac.contract.step import LoweredStep
from rpac.devices.chip import chip, is_tpu
from rpac.devices.client import build_string
from rpac.errors import CompileError, RpacError
from rpac.lower.worker import set_flags
from rpac.step.function import describe, load_function
from rpac.step.program import Step
from rpac.step.task import StepTask


def step_of(task: StepTask, on_topology: bool | None = None) -> Step | None:
    """The step of a task, which nothing has traced yet; None where the user's function wants no such step.

    `on_topology`: on devices of the target's smallest topology; by default where the target is a TPU. Raises CompileError.
    """
    set_flags()
    function, arrays = load_function(task.function, task.folder)
    described = describe(task, arrays)
    if described is None:
        return None
    return Step(task, function, described, is_tpu(task.target) if on_topology is None else on_topology)


def compile_step(step: Step) -> Any:
    """The step compiled for its target. Raises CompileError with what the compiler says."""
    with reported(step.task.label), step.context():
        return step.lower().compile()


def lower_step(task: StepTask, tools: Mapping[str, str]) -> LoweredStep | None:
    """Exports a step, and compiles it where its target is a TPU; None where the user's function wants no such step.

    Raises CompileError with the place in the user's code.
    """
    step = step_of(task)
    if step is None:
        return None
    with reported(task.label):
        text = step.lower().as_text()
        executable, memory, tools = None, {}, dict(tools)
        if is_tpu(task.target):
            compiled = compile_step(step)
            executable = compiled.runtime_executable().serialize()
            memory = memory_of(compiled)
            tools["libtpu_build"] = build_string(step.devices[0].client)
        return LoweredStep(
            target=task.target,
            kind=task.kind,
            tokens=task.tokens,
            function=task.function,
            model=step.described.model,
            signature=step.signature,
            exported=exported(step),
            executable=executable,
            lowered_sha256=hashlib.sha256(text.encode()).hexdigest(),
            device_kind=chip(task.target).device_kind if is_tpu(task.target) else task.target,
            topology=step.topology,
            toolchain=tools,
            memory=memory,
        )


def exported(step: Step) -> bytes:
    """The step's portable form. Of one device it names none: it is for any."""
    portable = step
    if step.topology is not None and step.task.mesh.devices == 1:
        portable = Step(step.task, step.function, step.described, on_topology=False)
    with portable.context():
        made = export.export(portable.jitted, platforms=(portable.platform,))(*portable.shapes)
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
        raise CompileError(f"{label}: {type(error).__name__} from the compiler:\n  {detail}") from error
