"""Lowers one variant in this process. Imported only where JAX may be: in a worker, or in a test."""

from __future__ import annotations

import contextlib
import linecache
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax import export
from jax.experimental import topologies

from rpac.chip import Chip, chip, is_tpu
from rpac.compat import target_mesh
from rpac.errors import CompileError
from rpac.layout import index_of
from rpac.lower.lowered import Lowered, Task
from rpac.render import Source
from rpac.runtime import build_string
from rpac.toolchain import JAX_FLAGS

Program = Callable[..., tuple[jax.Array, ...]]


def load_program(source: Source) -> Program:
    """The program of a generated source. Its file name is relative: it goes into error messages and nowhere else."""
    filename = f"<{source.path}>"
    module = types.ModuleType(source.path.removesuffix(".py").replace("/", "."))
    exec(compile(source.text, filename, "exec"), module.__dict__)
    linecache.cache[filename] = (len(source.text), None, source.text.splitlines(keepends=True), filename)
    program: Program = module.__dict__["ragged_paged_attention"]
    return program


def lower(task: Task, toolchain: Mapping[str, str]) -> Lowered:
    """Exports a variant and compiles it for its target. Raises CompileError, naming the tile, the need and the limit."""
    jitted = _jitted(task)
    with _reported(task):
        if is_tpu(task.target):
            return _lower_tpu(task, toolchain, jitted, chip(task.target))
        return _lower_cpu(task, toolchain, jitted)


def compile_only(task: Task) -> None:
    """Compiles a TPU variant as `lower` does, for what the compiler writes down meanwhile. Raises CompileError."""
    jitted = _jitted(task)
    with _reported(task):
        _compiled(task, jitted, chip(task.target))


def _jitted(task: Task) -> Any:
    for name, value in JAX_FLAGS.items():
        jax.config.update(name, int(value) if value.isdigit() else value)
    # An executable has no argument list but its own: without keep_unused, those it ignores would be missing from it.
    return jax.jit(load_program(task.source), donate_argnums=index_of(task.args, "kv_cache"), keep_unused=True)


def _compiled(task: Task, jitted: Any, device: Chip) -> tuple[Any, jax.Device]:
    first = topologies.get_topology_desc(device.topology, "tpu").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(first)
    shapes = [jax.ShapeDtypeStruct(dims.shape, dims.dtype, sharding=sharding) for dims in task.args]
    with target_mesh(device.device_kind):
        return jitted.trace(*shapes).lower(lowering_platforms=("tpu",)).compile(), first


def _shapes(task: Task) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(dims.shape, dims.dtype) for dims in task.args]


def _lower_cpu(task: Task, toolchain: Mapping[str, str], jitted: Any) -> Lowered:
    exported = export.export(jitted, platforms=("cpu",))(*_shapes(task))
    facts = {"device_kind": "cpu", "topology": None, "flags": {}, "aliases": {"kv_cache": 1}, "memory": {}}
    return _lowered(task, toolchain, exported, None, **facts)


def _lower_tpu(task: Task, toolchain: Mapping[str, str], jitted: Any, device: Chip) -> Lowered:
    with target_mesh(device.device_kind):
        exported = export.export(jitted, platforms=("tpu",))(*_shapes(task))
    compiled, first = _compiled(task, jitted, device)
    memory = compiled.memory_analysis()
    return _lowered(
        task,
        {**toolchain, "libtpu_build": build_string(first.client)},
        exported,
        compiled.runtime_executable().serialize(),
        device_kind=device.device_kind,
        topology=device.topology,
        flags={"vmem_limit_bytes": str(task.plan["vmem_limit"])},
        aliases=_aliases(task, compiled.as_text(), memory),
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
    data = bytes(exported.serialize(vjp_order=0))
    return Lowered(
        task.target, task.kind, task.tokens, task.source, task.plan, data, executable, toolchain=toolchain, **facts
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
