"""Multi-head latent attention (MLA) of a config.json, and YaRN's settings."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rpac.init.config import Config, Found
from rpac.init.heads import padded, read_q_heads
from rpac.init.layers import Layers
from rpac.init.names import LISTS, POSITIONS, WINDOW
from rpac.spec.latent import KV_LORA_RANKS, ROPE_DIMS


def read_latent(config: Config, layers: Layers, notes: list[str]) -> Iterator[tuple[str, Found]]:
    """Multi-head latent attention (MLA) in its absorbed form."""
    for kind in layers.kinds:
        if kind.type != "full":
            config.refuse(
                (*LISTS, *WINDOW), "must be full attention beside kv_lora_rank", "serve this model without rpac"
            )
        for key in kind.own:
            allowed = f"asks for {key} in some layers of latent attention, which rpac's kernels do not have"
            config.refuse("kv_lora_rank", allowed, "serve this model without rpac")
    yield (
        "attention",
        Found("latent", f"{config.name}: {config.where('kv_lora_rank')}: a token's keys and values share a vector"),
    )
    q_heads = read_q_heads(config)
    yield "q_heads", q_heads
    lengths = {}
    for key, name, choices in (
        ("kv_lora_rank", "kv_lora_rank", KV_LORA_RANKS),
        ("rope_dim", "qk_rope_head_dim", ROPE_DIMS),
    ):
        found = config.integer(name)
        if found is None:
            config.refuse(name, "must be given beside kv_lora_rank", "correct the file, or write the spec by hand")
        lengths[key] = found.value
        length = padded(config, found, choices, key)
        if length is not found:
            what = f"{name} is {found.value}, and rpac has kernels for {length.value}"
            notes.append(f"{what}: pad that part of queries and keys with zeros.")
        yield key, length
    nope = config.integer("qk_nope_head_dim")
    if nope is None:
        config.refuse(
            "qk_nope_head_dim", "must be given beside kv_lora_rank", "correct the file, or write the spec by hand"
        )
    scale = (nope.value + lengths["rope_dim"]) ** -0.5
    why = f"(qk_nope_head_dim {nope.value} + qk_rope_head_dim {lengths['rope_dim']}) ** -0.5"
    factor, factor_why = _mscale(config)
    yield "sm_scale", Found(scale * factor * factor, why + factor_why)
    notes.append("Latent attention in its absorbed form: the caller absorbs the up-projections (docs/latent.md).")


def yarn_of(config: Config) -> Config | None:
    """The mapping of YaRN's settings."""
    for name in POSITIONS:
        part = config.part(name)
        kind = None if part is None else part.get("rope_type", "type")
        if part is not None and kind is not None and kind.value in ("yarn", "deepseek_yarn"):
            return part
    return None


def _mscale(config: Config) -> tuple[float, str]:
    """What YaRN multiplies the scale by, squared: 0.1 * mscale_all_dim * ln(factor) + 1 (DeepSeek V2 and V3)."""
    part = yarn_of(config)
    if part is None:
        return 1.0, ""
    of_scale, factor = part.number("mscale_all_dim", low=-1e-9), part.number("factor")
    if of_scale is None or not of_scale.value or factor is None or factor.value <= 1:
        return 1.0, ""
    mscale = 0.1 * of_scale.value * math.log(factor.value) + 1.0
    return mscale, f" * ({mscale:.6g}) ** 2, YaRN's mscale ({of_scale.why}, factor {factor.value:g})"
