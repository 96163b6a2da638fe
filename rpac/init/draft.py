"""From a model and a server's flags to a spec that plans: tries page sizes and sequences, and sizes the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rpac.contract.mesh import Mesh
from rpac.devices.chip import chip
from rpac.errors import ModelError, PlanError, Problem, SpecError
from rpac.init.attention import Description, describe
from rpac.init.compose import Composer, Sizes
from rpac.init.config import Found, load_config, refuse, weights_bytes
from rpac.init.layers import Kind
from rpac.init.memory import Budget, weights_of
from rpac.init.servers import Request, Wanted, wanted
from rpac.init.share import check_share
from rpac.init.write import spec_name
from rpac.plan import plan_spec
from rpac.plan.cache_memory import check_hbm, padding_reason, page_bytes
from rpac.plan.tuned import TunedTiles
from rpac.spec import Spec, parse_spec
from rpac.spec.latent import HEADS_STEP
from rpac.spec.latent import MAX_HEADS as MAX_LATENT_HEADS
from rpac.spec.parse import MAX_DEVICES, MAX_GROUP, MAX_SLOTS, PAGE_SIZES

UNKNOWN_SHARE: Final = 0.5  # of the HBM for caches, where the weights are unknown
FILE: Final = "spec.yaml"  # what a spec that nobody sees is called in messages


@dataclass(frozen=True)
class Draft:
    """A spec and what is to say of it."""

    text: str
    spec: Spec
    budget: Budget
    notes: tuple[str, ...]


def make_draft(model_path: Path, request: Request, command: str) -> Draft:
    """A spec for the model at `model_path`, which plans for the chip of the request; `command` is named in its comment.

    Raises ModelError for what rpac has no kernels for, and for flags that exclude each other; PlanError where no page size
    and no number of sequences plans.
    """
    model = describe(load_config(model_path))
    settings = wanted(request, model)
    _check_heads(model, settings, request.per_device)
    composer = Composer(model, request, settings, _name(model_path, model), command)
    sizes, spec = _first_that_plans(composer)
    budget = _budget(composer, spec, weights_bytes(model_path))
    sizes = replace(sizes, num_pages=Found(budget.num_pages, budget.num_pages_why))
    notes = (*composer.notes(sizes), *_padding(spec))
    config = model.config
    first = f"Made by `{command}` from {config.name} ({config.model_type or 'no model_type'})."
    text = composer.document(sizes, (first, *budget.lines(), *notes)).text()
    try:
        spec = parse_spec(text, FILE)
        for part in spec.parts:
            check_hbm(part, chip(request.chip))  # all else is planned, and no tile follows from the number of pages
    except (SpecError, PlanError) as error:
        raise _explained(model, error) from error
    return Draft(text, spec, budget, notes)


def _name(path: Path, model: Description) -> Found:
    given = model.config.get("_name_or_path")
    if path.is_dir():
        return Found(spec_name(path.resolve().name), "the folder's name")
    if given is not None and isinstance(given.value, str) and given.value:
        return Found(spec_name(given.value.rstrip("/").rpartition("/")[2]), given.why)
    if path.name != "config.json":
        return Found(spec_name(path.stem), "the file's name")
    return Found(spec_name(path.resolve().parent.name), "the folder's name")


def _check_heads(model: Description, settings: Wanted, per_device: bool) -> None:
    """Refuses heads that no kernel takes on a device, by the model's key and with the devices that would do."""
    tensor = settings.tensor.value
    several = tensor * settings.data.value > 1
    for kind in model.kinds:
        keys = {**model.keys, **kind.own}
        q_heads = keys["q_heads"]
        if per_device:
            check_share(model, keys, settings.tensor)
        if model.is_latent:
            on_device = q_heads.value // Mesh.of(q_heads.value, 1, tensor, 1).query_parts
            if on_device % HEADS_STEP or on_device > MAX_LATENT_HEADS:
                what = f"a multiple of {HEADS_STEP} query heads, {MAX_LATENT_HEADS} at most, with latent attention"
                fix = "share the heads among other devices, or serve this model without rpac"
                _refuse_key(model, q_heads, f"must leave each device {what}", fix)
            continue
        kv_heads = keys["kv_heads"]
        if _group(q_heads.value, kv_heads.value, tensor) > MAX_GROUP:
            most = MAX_GROUP * kv_heads.value
            devices = [n for n in range(1, MAX_DEVICES + 1) if _group(q_heads.value, kv_heads.value, n) <= MAX_GROUP]
            fix = f"write `--devices {devices[0]}`, which share them" if devices else "serve this model without rpac"
            allowed = f"must be at most {most}, {MAX_GROUP} for each KV head of a device ({kv_heads.why})"
            _refuse_key(model, q_heads, allowed, fix)
        for key in ("q_heads", "kv_heads"):
            if several and not per_device and keys[key].value != model.keys[key].value:
                allowed = f"must be {model.keys[key].value}, as in other layers, where devices share the heads"
                _refuse_key(
                    model,
                    keys[key],
                    allowed,
                    "write `--devices 1` or `--per-device`, or a spec for each kind of layers",
                )


def _group(q_heads: int, kv_heads: int, tensor: int) -> int:
    """Query heads for each KV head on one of `tensor` devices."""
    mesh = Mesh.of(q_heads, kv_heads, tensor, 1)
    return (q_heads // mesh.query_parts) // (kv_heads // mesh.kv)


def _refuse_key(model: Description, found: Found, allowed: str, fix: str) -> None:
    refuse(model.config.file, found.key, str(found.value), allowed, fix)


def _first_that_plans(composer: Composer) -> tuple[Sizes, Spec]:
    """The first sizes that plan, as near to the server's as can be."""
    first: SpecError | PlanError | None = None
    for sizes in _tries(composer.settings):
        text = composer.document(sizes).text()
        try:
            return sizes, _planned(text, composer.request.chip)
        except (SpecError, PlanError) as error:
            first = first or error
    assert first is not None
    raise _explained(composer.model, first) from first


def _tries(settings: Wanted) -> Iterator[Sizes]:
    """The server's page size, then larger ones, which some layouts need, then smaller ones, which take less VMEM. Then the
    same with half as many sequences, and so on. What a flag says stays.
    """
    page, seqs = settings.page_size, settings.max_num_seqs
    others = [] if "page_size" in settings.fixed else [
        *(size for size in PAGE_SIZES if size > page.value), *(size for size in reversed(PAGE_SIZES) if size < page.value),
    ]  # fmt: skip
    number = seqs.value
    while number:
        fewer = Found(number, f"{seqs.value} fit VMEM at no page size ({seqs.why})")
        tried = seqs if number == seqs.value else fewer
        yield Sizes(page, tried)
        for size in others:
            yield Sizes(Found(size, f"with {page.value} it does not plan ({page.why})"), tried)
        number = 0 if "max_num_seqs" in settings.fixed else number // 2


def _planned(text: str, target: str) -> Spec:
    """The spec of a text, every kind of whose layers plans. Raises SpecError or PlanError."""
    spec = parse_spec(text, FILE)
    for part in spec.parts:
        plan_spec(part, target, tuned=TunedTiles())
    return spec


def _explained(model: Description, error: SpecError | PlanError) -> SpecError | PlanError:
    """A refusal in the words of the model's file, where it is about the model."""
    file = model.config.file
    if not isinstance(error, SpecError):
        return PlanError(f"{file}: {str(error).removeprefix(f'{FILE}: ')}")
    problem = error.problems[0]
    key = problem.where.rpartition(".")[2]
    of_layers = {name: one for kind in model.kinds for name, one in kind.own.items()}
    found = of_layers.get(key) or model.keys.get(key)
    where = f"{found.key} ({problem.where})" if found is not None and found.key else problem.where
    return ModelError([Problem(file, None, None, where, problem.found, problem.allowed, problem.fix)])


def _budget(composer: Composer, spec: Spec, index: Found | None) -> Budget:
    """The HBM of one device. Raises ModelError where not even one sequence fits beside the weights."""
    settings, serving, target = composer.settings, spec.serving, composer.request.chip
    # Latent attention has a replica on each device, but the rest of the model, most of it experts, is shared by all.
    shares = settings.tensor.value * (settings.data.value if composer.model.is_latent else 1)
    weights, why = weights_of(composer.model, index, shares, settings.q_dtype.value)
    parts = {part.layer: part for part in spec.parts}
    kinds = composer.kinds(serving.max_model_len).items()
    layers = [(parts[name], count) for name, (kind, count) in kinds if _has_cache(kind)]
    page = sum(page_bytes(part) * count for part, count in layers) or page_bytes(spec.parts[0])
    budget = Budget(
        target, chip(target).usable_hbm_bytes, settings.memory, weights, why, serving.page_size, page,
        sum(count for _, count in layers), serving.max_model_len,
    )  # fmt: skip
    if settings.num_pages is not None:
        return replace(budget, num_pages=settings.num_pages.value, num_pages_why=settings.num_pages.why)
    if settings.num_tokens is not None:
        pages = -(-settings.num_tokens.value // serving.page_size)
        return replace(budget, num_pages=pages, num_pages_why=settings.num_tokens.why)
    share, reason = 1.0, "all that fits beside the weights"
    if weights is None:
        share, reason = UNKNOWN_SHARE, "half of what is left of HBM, because the weights are unknown: correct it"
    most = min(int(budget.left * share) // page, MAX_SLOTS // serving.page_size)
    if most < serving.pages_per_seq:
        _refuse_memory(composer, budget, most, serving.pages_per_seq, (weights or 0) * shares)
    return replace(budget, num_pages=most, num_pages_why=reason)


def _has_cache(kind: Kind) -> bool:
    """Whether layers have a cache of their own: not where they read that of other layers."""
    return kind.type == "cross" or "update_cache" not in kind.own


def _refuse_memory(composer: Composer, budget: Budget, pages: int, pages_per_seq: int, weights: int) -> None:
    """Says which length, or how many devices, would do."""
    devices = composer.settings.tensor.value * composer.settings.data.value
    need = pages_per_seq * budget.page_bytes
    enough = [n for n in (2, 4, 8, 16, 32) if n > devices and budget.share - weights // n >= need]
    fixes = [f"write `--devices {enough[0]}`"] if enough else []
    if pages:
        flag = composer.request.server.flag("max_model_len").name
        fixes.append(f"write `{flag} {pages * budget.page_size}` or less")
    weights_words = "unknown" if budget.weights is None else f"{budget.weights:,} bytes on a device"
    found = f"{budget.left:,} bytes of HBM left beside the weights ({weights_words}: {budget.weights_why})"
    allowed = (
        f"must hold one sequence of {budget.max_model_len} tokens, {pages_per_seq} pages of {budget.page_bytes:,} bytes in "
        f"{budget.cached_layers} layers"
    )
    fix = ", or ".join([*fixes, "take a chip with more HBM"])
    refuse(composer.model.config.file, f"HBM of {budget.chip}", found, allowed, fix)


def _padding(spec: Spec) -> Iterator[str]:
    """What of the cache is padding, and how to have less of it."""
    for part in spec.parts:
        reason = padding_reason(part)
        if reason:
            yield f"{f'layers.{part.layer}: ' if part.layer else ''}part of the cache is padding: {reason}."
