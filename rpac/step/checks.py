"""Refuses a step that would not serve well: from what was traced, and from what the compiler made of it."""

from __future__ import annotations

import re
from typing import Any, Final

from rpac.contract.step import StepArray
from rpac.contract.units import size
from rpac.devices.chip import chip, is_tpu
from rpac.errors import CompileError
from rpac.step.function import place_of
from rpac.step.jaxprs import constants, follow_caches, host_calls
from rpac.step.program import Step

MAX_CONSTANTS: Final = 1 << 20
"""Bytes of constants that a step may hold: tables, not parameters. They are in every executable, and in its HBM."""

LEAST_COPY: Final = 1 << 20
"""Bytes of a parameter of which it is worth to say that it is copied."""

_COPIED: Final = re.compile(r' copy\([^\n]*op_name="leaves\[(\d+)\]"')
_ALIASES: Final = re.compile(r"input_output_alias=\{(.*?)\}, entry")
_ALIAS: Final = re.compile(r"\{(\d*)\}: \((\d+), \{\}")
_ENTRY: Final = re.compile(r"^ENTRY .*?^\}", re.MULTILINE | re.DOTALL)
_NAME: Final = re.compile(r'op_name="([^"]*)"')


def check_traced(step: Step) -> None:
    """Raises CompileError for a step that holds parameters as constants, waits for the host, mixes up its caches, or whose
    arguments do not fit HBM.
    """
    label, where = step.task.label, place_of(step.function)
    traced = step.traced.jaxpr
    for name, place in host_calls(traced.jaxpr):
        raise CompileError(
            f"{label}: {place} calls the host ({name}); must not: each call waits for Python, and a bundle cannot hold it; "
            "return what you want to see among the outputs"
        )
    held = constants(traced)
    total = sum(one.nbytes for one in held)
    if total > MAX_CONSTANTS:
        named = "; ".join(map(str, held[:3]))
        raise CompileError(
            f"{label}: {where} holds {total:,} bytes of constants: {named}; must hold at most {MAX_CONSTANTS:,}: arrays that the "
            "function finds outside of its arguments become part of every executable; pass them in params or as an extra "
            "argument"
        )
    returned = follow_caches(traced.jaxpr, step.donated).returned
    for index, root in enumerate(returned):
        if root not in (None, index):
            raise CompileError(
                f"{label}: {where} returns {step.caches[root or 0].name} in the place of {step.caches[index].name}; must return "
                "each cache in its own place, or the compiler copies them; append what attend returns in the order of the caches"
            )
    check_memory(step, {})


def check_compiled(step: Step, compiled: Any, memory: dict[str, int]) -> None:
    """Raises CompileError where the compiled step copies a cache, does not update each in place, or does not fit HBM."""
    label, where = step.task.label, place_of(step.function)
    text = compiled.as_text()
    entry = _ENTRY.search(text)
    taken = len(set(re.findall(r" parameter\((\d+)\)", entry[0]))) if entry else 0
    if taken != len(step.arguments):
        raise CompileError(
            f"{label}: the compiled step takes {taken} arrays; must take {len(step.arguments)}, those that it was given; report "
            "this as a bug of rpac"
        )
    aliases = _ALIASES.search(text)
    pairs = {int(result or 0): int(argument) for result, argument in _ALIAS.findall(aliases[1])} if aliases else {}
    readers = follow_caches(step.traced.jaxpr.jaxpr, step.donated).readers
    for index, argument in enumerate(step.donated):
        cache = step.caches[index]
        also = "; ".join(place for root, place in readers if root == index)
        reads = f"; it is also read at {also}" if also else ""
        if pairs.get(index) != argument:
            raise CompileError(
                f"{label}: {where}: the compiled step does not update {cache.name} in place{reads}; must return what attend "
                "returned for it, and nothing else may need the old one"
            )
        copy = _copy_of(cache, step, text)
        if copy:
            raise CompileError(
                f"{label}: {where}: the compiled step copies an array of the size of {cache.name} ({copy}), "
                f"{size(cache.nbytes_of_device(step.task.mesh))}{reads}; must copy no cache; pass each cache to attend once, use "
                "the one that it returns, and see docs/serving.md, Many layers without a copy"
            )
    check_memory(step, memory)


def _copy_of(cache: StepArray, step: Step, text: str) -> str:
    """The compiler's name of an operation that copies an array of a cache's shape; empty where there is none."""
    if is_tpu(step.task.target) and cache.nbytes_of_device(step.task.mesh) <= chip(step.task.target).vmem_bytes:
        return ""  # the compiler may keep so small a cache in VMEM for a while
    dims = ",".join(map(str, cache.part(step.task.mesh)))
    found = re.search(rf"= \(?\w+\[{dims}\]\S* (?:copy|copy-start)\(.*", text)
    if found is None:
        return ""
    name = _NAME.search(found[0])
    return name[1] if name else found[0].split("(")[0].strip("= ")


def copied_params(step: Step, compiled: Any) -> list[StepArray]:
    """The parameters that the compiled step copies whole in every call: the compiler wants them in another layout than the one
    that arrays of their shape have.
    """
    held, entry = step.described.params_arrays, _ENTRY.search(compiled.as_text())
    # Of the entry alone: a copy inside of a fusion is how the fusion reads its operand.
    found = sorted({int(index) for index in _COPIED.findall(entry[0])}) if entry else []
    return [held[index] for index in found if index < len(held) and held[index].nbytes >= LEAST_COPY]


def check_memory(step: Step, memory: dict[str, int]) -> None:
    """Raises CompileError where a step needs more HBM than a device has: its arguments and outputs, and what `memory` has of the
    compiled step.
    """
    mesh, outputs = step.task.mesh, step.signature.outputs  # which raises for outputs that a bundle cannot hold
    if not is_tpu(step.task.target):
        return
    device = chip(step.task.target)
    needs = {
        "parameters": sum(one.nbytes_of_device(mesh) for one in step.described.params_arrays),
        "caches": sum(one.nbytes_of_device(mesh) for one in step.caches),
        "temporaries": memory.get("temp_bytes", 0),
        "outputs": sum(one.nbytes_of_device(mesh) for one in outputs),
        "code": memory.get("code_bytes", 0),
    }
    if sum(needs.values()) <= device.usable_hbm_bytes:
        return
    most = max(needs, key=lambda name: needs[name])
    fixes = {
        "caches": f"lower serving.num_pages (a page of all caches has {_page_bytes(step):,} bytes)",
        "parameters": "spread them over more devices with `parallel`, or store them in fewer bits",
        "temporaries": "lower the largest of serving.token_buckets",
    }
    raise CompileError(
        f"{step.task.label}: {place_of(step.function)}: needs {', '.join(f'{name} {size(n)}' for name, n in needs.items() if n)} "
        f"on each device; must fit the {size(device.usable_hbm_bytes)} that a program may use of HBM on {step.task.target}; "
        f"{fixes.get(most, fixes['temporaries'])}"
    )


def _page_bytes(step: Step) -> int:
    return sum(one.nbytes_of_device(step.task.mesh) // max(one.part(step.task.mesh)[0], 1) for one in step.caches)
