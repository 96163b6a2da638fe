"""Attention over K and V heads of a config.json: scale, soft cap, position biases, direction."""

from __future__ import annotations

from collections.abc import Iterator

from rpac.init.config import Config, Found
from rpac.init.families import Family
from rpac.init.heads import padded, read_head_dim, read_kv_heads, read_q_heads
from rpac.init.layers import Layers
from rpac.init.names import SCALE, SOFT_CAP, WINDOW
from rpac.spec.parse import HEAD_DIMS


def read_grouped(config: Config, family: Family, layers: Layers, notes: list[str]) -> Iterator[tuple[str, Found]]:
    """Attention over K and V heads."""
    q_heads = read_q_heads(config)
    yield "q_heads", q_heads
    yield "kv_heads", read_kv_heads(config, q_heads)
    head_dim = read_head_dim(config, q_heads.value)
    length = head_dim
    value_dim = config.integer("v_head_dim", low=0)
    if value_dim is not None and value_dim.value > length.value:
        length = value_dim.made(value_dim.value, f"{value_dim.why}, the longer of keys and values")
    rows = padded(config, length, HEAD_DIMS, "head_dim")
    if rows is not length:
        what = f"head_dim is {length.value}, and rpac has kernels for {rows.value}"
        notes.append(f"{what}: pad queries, keys and values with zeros.")
    yield "head_dim", rows
    scale = _scale(config, family, head_dim.value)
    if scale.value != rows.value**-0.5:
        yield "sm_scale", scale
    by_layer = config.flag("scale_attn_by_inverse_layer_idx")
    if by_layer is not None and by_layer.value:
        notes.append(f"{by_layer.why}: the caller divides the queries of layer i by i + 1.")
    cap = config.number(*SOFT_CAP)
    if cap is not None:
        yield "soft_cap", cap
    alibi = _alibi(config, family)
    if alibi is not None:
        yield "alibi", alibi
    if not _is_causal(config, family, notes):
        why = f"{config.name}: bidirectional attention"
        if family.encoder:
            why = f"its class, {config.model_type}, is an encoder"
        for kind in layers.kinds:
            if kind.type == "sliding":
                allowed = "must be left out of a model that sees ahead: rpac's windows look back from a query"
                config.refuse(WINDOW, allowed, "serve this model without rpac")
        yield "causal", Found(False, f"{why}: a token sees its whole sequence")


def _scale(config: Config, family: Family, head_dim: int) -> Found:
    if family.sm_scale is not None:
        return Found(family.sm_scale, f"model_type {config.model_type}: {family.scale_why}")
    scalar = config.number("query_pre_attn_scalar")
    if scalar is not None:
        return scalar.made(scalar.value**-0.5, f"{scalar.why} ** -0.5")
    given = config.number(*SCALE)
    if given is not None:
        return given.made(float(given.value))
    by_dim = config.flag("scale_qk_dot_by_d", "mup_scale_qk_dot_by_d")
    if by_dim is not None and by_dim.value:
        return by_dim.made(1.0 / head_dim, f"{by_dim.why}: 1 / head_dim")
    weights = config.flag("scale_attn_weights")
    if weights is not None and not weights.value:
        return weights.made(1.0)
    times = "" if family.scale_dims == 1.0 else f" * {family.scale_dims:g}"
    return Found((head_dim * family.scale_dims) ** -0.5, f"({head_dim}{times}) ** -0.5, head_dim before padding")


def _alibi(config: Config, family: Family) -> Found | None:
    flag = config.flag("alibi", "attn_config.alibi")
    if flag is not None:
        return flag if flag.value else None
    kind = config.get("position_embedding_type")
    if kind is not None and kind.value == "alibi":
        return kind.made(True)
    if family.alibi_unless is not None:
        key, value = family.alibi_unless
        found = config.get(key)
        if found is not None and found.value != value:
            why = f"model_type {config.model_type}: all but the one with {key} {value} have ALiBi; {found.why}"
            return found.made(True, why)
    return None


def _is_causal(config: Config, family: Family, notes: list[str]) -> bool:
    both = config.get("use_bidirectional_attention")
    if both is not None and both.value is True:
        return False
    if both is not None and isinstance(both.value, str):
        notes.append(f"{both.why}: tokens of an image see each other in the model, and in rpac only those before them.")
    if not family.encoder:
        return True
    decoder = config.flag("is_decoder")
    return decoder is not None and decoder.value
