"""Lowers one variant in this process. Imported only where JAX may be: in a worker, or in a test."""

from __future__ import annotations

import contextlib
import linecache
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax import export
from jax.experimental import topologies

from rpac.contract.arrays import index_of
from rpac.contract.mesh import ONE_DEVICE
from rpac.contract.program import Lowered, Source
from rpac.devices.chip import PLATFORMS, chip, is_tpu, topology_of
from rpac.devices.client import build_string
from rpac.devices.jax_compat import target_mesh
from rpac.devices.placement import on_mesh
from rpac.devices.toolchain import JAX_FLAGS
from rpac.errors import CompileError
from rpac.lower.task import Task

Program = Callable[..., tuple[jax.Array, ...]]

_COLLECTIVE = re.compile(r"\b(all-(reduce|gather|to-all)|collective-(permute|broadcast)|reduce-scatter)(-start)?\(")


def load_program(source: Source) -> Program:
    """The program of a generated source. Its file name is relative: it goes into error messages and nowhere else."""
    filename = f"<{source.path}>"
    module = types.ModuleType(source.path.removesuffix(".py").replace("/", "."))
    exec(
        compile(source.text, filename, "exec", dont_inherit=True), module.__dict__
    )  # not this file's __future__ imports
    linecache.cache[filename] = (len(source.text), None, source.text.splitlines(keepends=True), filename)
    program: Program = module.__dict__["ragged_paged_attention"]
    return program


def lower(task: Task, toolchain: Mapping[str, str]) -> Lowered:
    """Exports a variant and compiles it for its target. Raises CompileError, naming the tile, the need and the limit."""
    set_flags()
    with _reported(task):
        return _lower_tpu(task, toolchain) if is_tpu(task.target) else _lower_portable(task, toolchain)


def compile_only(task: Task) -> None:
    """Compiles a TPU variant as `lower` does, on one device of its mesh, for what the compiler writes down meanwhile.

    Raises CompileError.
    """
    set_flags()
    with _reported(task):
        _compiled(_OnTopology(replace(task, mesh=ONE_DEVICE)))


def lowered_text(task: Task) -> str:
    """What a task's program is lowered to, as text: the same for programs that differ in names and comments alone."""
    set_flags()
    if not is_tpu(task.target):
        jitted, shapes = _program(replace(task, mesh=ONE_DEVICE))
        return str(jitted.trace(*shapes).lower(lowering_platforms=(PLATFORMS[task.target],)).as_text())
    program = _OnTopology(replace(task, mesh=ONE_DEVICE))
    with program.context:
        return str(program.jitted.trace(*program.shapes).lower(lowering_platforms=("tpu",)).as_text())


def compile_for_cpu(task: Task, data: bytes) -> tuple[bytes, str]:
    """An exported program of the cpu target as an executable for the CPU of this machine, and the build of XLA that made it."""
    exported = export.deserialize(bytearray(data))
    compiled = _as_program(exported.call, task).lower(*exported.in_avals).compile()
    return compiled.runtime_executable().serialize(), build_string(jax.local_devices(backend="cpu")[0].client)


def set_flags() -> None:
    """Sets what makes an export and an executable the same in every folder."""
    for name, value in JAX_FLAGS.items():
        jax.config.update(name, int(value) if value.isdigit() else value)


def _as_program(function: Callable[..., Any], task: Task) -> Any:
    # An executable has no argument list but its own: without keep_unused, those it ignores would be missing from it.
    return jax.jit(function, donate_argnums=index_of(task.args, "kv_cache"), keep_unused=True)


def _program(task: Task, devices: Sequence[Any] = ()) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """A task's program, jitted, and its arguments: on `devices`, or on any."""
    program, shardings = on_mesh(load_program(task.source), task.mesh, task.args, task.results, devices)
    whole = [task.mesh.whole(dims) for dims in task.args]
    shapes = [
        jax.ShapeDtypeStruct(dims.shape, dims.dtype, sharding=sharding)
        for dims, sharding in zip(whole, shardings, strict=True)
    ]
    return _as_program(program, task), shapes


class _OnTopology:
    """A task's program on devices of its target's smallest topology."""

    def __init__(self, task: Task) -> None:
        self.chip = chip(task.target)
        self.topology = topology_of(task.target, task.mesh.devices)
        self.devices = topologies.get_topology_desc(self.topology, "tpu").devices
        self.jitted, self.shapes = _program(task, self.devices)
        # A mesh of devices says by itself for which kind Pallas lowers.
        self.context = target_mesh(self.chip.device_kind) if task.mesh.devices == 1 else contextlib.nullcontext()


def _compiled(program: _OnTopology) -> Any:
    with program.context:
        return program.jitted.trace(*program.shapes).lower(lowering_platforms=("tpu",)).compile()


def _lower_portable(task: Task, toolchain: Mapping[str, str]) -> Lowered:
    jitted, shapes = _program(task)
    exported = export.export(jitted, platforms=(PLATFORMS[task.target],))(*shapes)
    facts = {"device_kind": task.target, "topology": None, "flags": {}, "aliases": {"kv_cache": 1}, "memory": {}}
    return _lowered(task, toolchain, exported, None, **facts)


def _lower_tpu(task: Task, toolchain: Mapping[str, str]) -> Lowered:
    program = _OnTopology(task)
    # Of one device the export names none: it is for any.
    jitted, shapes = _program(task) if task.mesh.devices == 1 else (program.jitted, program.shapes)
    with program.context:
        exported = export.export(jitted, platforms=("tpu",))(*shapes)
    compiled = _compiled(program)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    collective = _COLLECTIVE.search(text)
    if collective is not None:
        raise CompileError(f"{task.label}: devices wait for each other in the compiled program ({collective[0]}...)")
    return _lowered(
        task,
        {**toolchain, "libtpu_build": build_string(program.devices[0].client)},
        exported,
        compiled.runtime_executable().serialize(),
        device_kind=program.chip.device_kind,
        topology=program.topology,
        flags={"vmem_limit_bytes": str(task.plan["vmem_limit"])},
        aliases=_aliases(task, text, memory),
        memory={"temp_bytes": memory.temp_size_in_bytes, "code_bytes": memory.generated_code_size_in_bytes},
    )


def _aliases(task: Task, text: str, memory: Any) -> dict[str, int]:
    """Proves that the cache is updated in place. Raises CompileError where the compiled program copies it."""
    index = index_of(task.args, "kv_cache")
    cache = task.args[index]
    if memory.alias_size_in_bytes < cache.nbytes or memory.temp_size_in_bytes >= cache.nbytes:
        raise CompileError(
            f"{task.label}: the compiled program does not update the cache in place ({memory.alias_size_in_bytes:,} bytes "
            f"aliased and {memory.temp_size_in_bytes:,} temporary, for a cache of {cache.nbytes:,})"
        )
    if not re.search(rf"input_output_alias=\{{.*\{{1\}}: \({index},", text):
        raise CompileError(f"{task.label}: argument {index} of the compiled program is not the memory of its result 1")
    return {"kv_cache": 1}


def _lowered(
    task: Task, toolchain: Mapping[str, str], exported: export.Exported, executable: bytes | None, **facts: Any
) -> Lowered:
    return Lowered(
        task.target,
        task.kind,
        task.tokens,
        task.source,
        task.plan,
        bytes(exported.serialize(vjp_order=0)),
        executable,
        toolchain=toolchain,
        layer=task.layer,
        **facts,
    )


@contextlib.contextmanager
def _reported(task: Task) -> Iterator[None]:
    """Turns what JAX and the compiler raise into CompileError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CompileError:
        raise
    except Exception as error:
        message = str(error).strip()
        lines = message.splitlines() or [type(error).__name__]
        if re.search(r"vmem", message, re.IGNORECASE) and re.search(
            r"exceed|exhaust|out of memory", message, re.IGNORECASE
        ):
            plan = task.plan
            tiles = "; ".join(f"{name} {plan[name]}" for name in ("decode", "block") if plan[name])
            raise CompileError(
                f"{task.label}: the compiler ran out of VMEM with tiles {tiles}: counted need {plan['vmem_need']:,} bytes, "
                f"limit {plan['vmem_limit']:,}, the core has {plan['vmem_bytes']:,}; the compiler says: {lines[0]}; "
                f"lower serving.page_size or serving.max_num_seqs"
            ) from error
        detail = "\n  ".join(lines[:12])
        raise CompileError(f"{task.label}: {type(error).__name__} from the compiler:\n  {detail}") from error
