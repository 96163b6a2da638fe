"""What the cache takes of HBM. A spec knows one layer of a model: how many there are, and their weights, it does not."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from rpac.contract.arrays import LANES, arg_specs, joins_rows, kv_page_shape, kv_rows, nbytes, packing, result_specs
from rpac.devices.chip import Chip, chip, is_tpu
from rpac.errors import PlanError
from rpac.spec import Spec

# What a program takes beside the cache: its arguments and results, as often again for what XLA makes of them on their way, and
# its code and the rest.
COPIES: Final = 2
XLA_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class CacheMemory:
    """Bytes of one layer's cache on one device of a target; those of HBM are None for a target without a chip.

    `padding_bytes` are those of a page that hold zeros. `usable_hbm_bytes`: what is left of HBM to one program by XLA.
    """

    target: str
    layer: str
    q_heads: int
    kv_heads: int
    num_pages: int
    page_bytes: int
    padding_bytes: int
    cache_bytes: int
    hbm_bytes: int | None
    usable_hbm_bytes: int | None

    @classmethod
    def of(cls, spec: Spec, target: str) -> CacheMemory:
        """That of a spec with one kind of layer."""
        device = chip(target) if is_tpu(target) else None
        page = page_bytes(spec)
        return cls(
            target,
            spec.layer,
            spec.model.q_heads,
            spec.model.kv_heads,
            spec.serving.num_pages,
            page,
            padding_bytes(spec),
            spec.serving.num_pages * page,
            None if device is None else device.hbm_bytes,
            None if device is None else device.usable_hbm_bytes,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def page_bytes(spec: Spec) -> int:
    """Bytes of a page of one layer."""
    return nbytes(kv_page_shape(spec), spec.model.kv_dtype)


def padding_bytes(spec: Spec) -> int:
    """Bytes of a page that hold zeros: lanes up to whole registers, and rows up to whole words."""
    model = spec.model
    numbers = 2 * model.kv_heads * model.head_dim if model.rope_dim is None else model.head_dim + model.rope_dim
    return page_bytes(spec) - nbytes((spec.serving.page_size, numbers), model.kv_dtype)


def padding_reason(spec: Spec) -> str:
    """Why a page has padding, and how to have less of it."""
    model, pack = spec.model, packing(spec.model.kv_dtype)
    reasons = []
    if model.rope_dim is not None:
        reasons.append(f"a token's {model.head_dim + model.rope_dim} numbers fill whole rows of {LANES}")
    elif model.head_dim % LANES and not joins_rows(model):
        reasons.append(f"a head's {model.head_dim} numbers fill whole rows of {LANES}")
    if spec.serving.kv_layout == "interleaved" and kv_rows(model) % pack:
        saved = page_bytes(spec) - page_bytes(replace(spec, serving=replace(spec.serving, kv_layout="separate")))
        reasons.append(
            f"a token's rows ({kv_rows(model)} of {model.kv_dtype}) fill whole words of {pack}: `kv_layout: separate` takes "
            f"{saved:,} bytes less a page"
        )
    return ", and ".join(reasons)


def check_hbm(spec: Spec, device: Chip) -> None:
    """Raises PlanError where one layer's cache leaves no room for a program's other arrays; it says what to write."""
    serving = spec.serving
    tokens = serving.token_buckets[-1]
    arrays = [*arg_specs(spec, tokens), *result_specs(spec, tokens)]
    others = COPIES * sum(dims.nbytes for dims in arrays if dims.name != "kv_cache") + XLA_BYTES
    page = page_bytes(spec)
    most = max(device.usable_hbm_bytes - others, 0) // page
    if serving.num_pages <= most:
        return
    layer = f"layers.{spec.layer}: " if spec.layer else ""
    room = (
        f"write `num_pages: {most}` or less"
        if most >= serving.pages_per_seq
        else f"lower max_model_len (now {serving.max_model_len}, {serving.pages_per_seq} pages), or share the heads among "
        "more devices with `parallel`"
    )
    raise PlanError(
        f"{spec.file}: {layer}serving.num_pages: found {serving.num_pages}, so that one layer's cache takes "
        f"{serving.num_pages * page:,} bytes ({page:,} a page); a device of {device.target} has {device.hbm_bytes:,} bytes of "
        f"HBM, {device.usable_hbm_bytes:,} of them for programs, which take {others:,} beside the cache of a layer; {room}. "
        "Every layer of a model has such a cache, and its weights need room too"
    )
