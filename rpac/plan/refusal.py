"""What to write where no tiles of a spec fit a target: found by planning specs with other values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from rpac.contract.attention import Attention
from rpac.contract.mesh import Mesh
from rpac.errors import PlanError
from rpac.spec import Spec
from rpac.spec.parse import LEAST_APART, MAX_DEVICES, MAX_GROUP, PAGE_SIZES

Plans = Callable[[Spec], object]


class NoTilesError(PlanError):
    """No tiles fit VMEM. The message says what was looked for, and not yet what to write."""


def advice(spec: Spec, plans: Plans) -> str:
    """What to write instead, as little different as can be. `plans` raises PlanError where a spec does not plan."""
    whole = spec.whole or spec
    for suggestion, other in _candidates(whole):
        try:
            plans(other)
        except PlanError:
            continue
        return f"write {suggestion}"
    return "no page_size, max_num_seqs or parallel.tensor makes it fit: leave this target out of targets"


def _candidates(spec: Spec) -> Iterator[tuple[str, Spec]]:
    yield from _smaller_pages(spec)
    yield from _fewer_sequences(spec)
    yield from _more_devices(spec)
    for devices, shared in _more_devices(spec):
        for pages, other in _smaller_pages(shared):
            yield f"{devices} and {pages}", other


def _smaller_pages(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """The cache has as many tokens as before."""
    serving = spec.serving
    least = LEAST_APART[spec.model.kv_dtype] if serving.kv_layout != "interleaved" else PAGE_SIZES[0]
    for size in reversed(PAGE_SIZES):
        if least <= size < serving.page_size:
            pages = serving.num_pages * serving.page_size // size
            suggestion = f"`page_size: {size}`"
            if serving.num_pages != serving.max_num_seqs * serving.pages_per_seq:  # it was not left out
                suggestion += f" and `num_pages: {pages}`, which is as many tokens"
            yield suggestion, replace(spec, serving=replace(serving, page_size=size, num_pages=pages))


def _fewer_sequences(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """Down to a quarter: with fewer, another way out is nearer."""
    for part in (2, 4):
        seqs = spec.serving.max_num_seqs // part
        if seqs:
            yield f"`max_num_seqs: {seqs}`", replace(spec, serving=replace(spec.serving, max_num_seqs=seqs))


def _more_devices(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """Devices that share the KV heads evenly; of latent attention there is one, and of layers of different heads no mesh."""
    mesh, model = spec.mesh, spec.model
    heads = {(layer.q_heads, layer.kv_heads) for _, layer in spec.layers} | {(model.q_heads, model.kv_heads)}
    if model.rope_dim is not None or len(heads) > 1:
        return
    q_heads, kv_heads = model.q_heads * mesh.query_parts, model.kv_heads * mesh.kv
    for tensor in range(mesh.kv * mesh.copy + 1, MAX_DEVICES // mesh.data + 1):
        if kv_heads % tensor == 0 and q_heads // kv_heads <= MAX_GROUP:
            shared = Mesh.of(q_heads, kv_heads, tensor, mesh.data)

            def part(model: Attention, tensor: int = tensor) -> Attention:
                return replace(model, q_heads=q_heads // tensor, kv_heads=kv_heads // tensor)

            layers = tuple((name, part(layer)) for name, layer in spec.layers)
            data = f", data: {mesh.data}" if mesh.data > 1 else ""
            suggestion = f"`parallel: {{tensor: {tensor}{data}}}`"
            yield suggestion, replace(spec, model=part(model), layers=layers, mesh=shared)
