"""One device's share of a model's heads, as servers cut it: they call attention with the heads of one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rpac.init.attention import Description
from rpac.init.config import Found, refuse
from rpac.init.servers import Wanted
from rpac.spec.parse import MAX_DEVICES

HEADS: Final = ("q_heads", "kv_heads")


def share_of(keys: Mapping[str, Found], tensor: Found) -> dict[str, Found]:
    """The keys with the heads of one of the devices that share them; with fewer KV heads than devices, each has one of them."""
    return {key: _share(key, found, tensor.value) if key in HEADS else found for key, found in keys.items()}


def check_share(model: Description, keys: Mapping[str, Found], tensor: Found) -> None:
    """Refuses heads that servers do not share evenly. Raises ModelError with numbers of devices that would do."""
    for key in HEADS:
        if key in keys and not _is_even(key, keys[key].value, tensor.value):
            found = keys[key]
            even = [
                n for n in range(1, MAX_DEVICES + 1) if all(_is_even(k, keys[k].value, n) for k in HEADS if k in keys)
            ]
            allowed = f"must be shared evenly by {tensor.value} devices ({tensor.why}), as servers do"
            fix = f"take {', '.join(map(str, even[:-1]))} or {even[-1]} devices, or leave --per-device out"
            refuse(model.config.file, found.key, str(found.value), allowed, fix)


def share_notes(model: Description, settings: Wanted, adapter: str) -> tuple[str, ...]:
    """Whose share the spec is, and for what."""
    tensor, data = settings.tensor, settings.data
    devices = tensor.value * data.value
    if devices == 1:
        return ()
    heads = " and ".join(
        f"{model.keys[key].value} {name} heads"
        for key, name in zip(HEADS, ("query", "KV"), strict=True)
        if key in model.keys
    )
    over = f"shared by {tensor.value} devices" if tensor.value > 1 else "all on each device"
    replicas = f", in {data.value} replicas" if data.value > 1 else ""
    return (
        f"The share of one of {devices} devices (--per-device): the model has {heads}, {over}{replicas}. All sizes here are "
        f"those of one device. {adapter}.install needs such a bundle.",
    )


def mesh_notes(settings: Wanted, title: str, adapter: str) -> tuple[str, ...]:
    """That a server needs the share of one device in place of a spec for all."""
    devices = settings.tensor.value * settings.data.value
    if devices == 1:
        return ()
    return (
        f"`parallel` is for rpac's own engine, which spreads attention over {devices} devices itself. {title} with "
        f"{adapter}.install needs the share of one device: add --per-device.",
    )


def _share(key: str, found: Found, tensor: int) -> Found:
    if tensor == 1:
        return found
    heads = max(found.value // tensor, 1)
    copies = tensor // found.value if key == "kv_heads" else 1
    copied = f", each on {copies} of them" if copies > 1 else ""
    return found.made(heads, f"{found.why}, over {tensor} devices{copied}")


def _is_even(key: str, heads: int, tensor: int) -> bool:
    return heads % tensor == 0 or (key == "kv_heads" and tensor % heads == 0)
