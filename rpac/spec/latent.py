"""The rules of `model` with `attention: latent`: multi-head latent attention in its absorbed form."""

from __future__ import annotations

from typing import Final

from rpac.contract.attention import DTYPES, QUANTIZED, Attention
from rpac.contract.features import features_of
from rpac.spec.nodes import Section

LATENT_KEYS: Final = ("kv_lora_rank", "rope_dim")  # of latent attention alone
KV_LORA_RANKS: Final = (128, 256, 384, 512)
ROPE_DIMS: Final = (64, 128)
MAX_DIM: Final = 1 << 20
MAX_HEADS: Final = 128  # of one device: a token's queries are one product's rows
HEADS_STEP: Final = 16  # as many share a register

# What the cache of latent attention has no place for, or its kernels no code, and why.
_REFUSED: Final = {
    "kv_heads": "all query heads share one latent vector",
    "head_dim": "a key is kv_lora_rank + rope_dim long, a value kv_lora_rank",
    **{feature.key: feature.not_latent for feature in features_of("model")},
}


def read_latent(section: Section, scales: tuple[float, float], most_heads: int) -> Attention | None:
    """The model of a section that has `attention: latent`; `scales` are the limits of sm_scale."""
    for key, reason in _REFUSED.items():
        if section.has(key):
            section.clash(key, f"must be left out with attention latent: {reason}", "remove it")
    q_heads = section.integer("q_heads", HEADS_STEP, most_heads, 128)
    rank = section.integer("kv_lora_rank", 1, MAX_DIM, 512)
    rope_dim = section.integer("rope_dim", 1, MAX_DIM, 64)
    q_dtype = section.choice("q_dtype", DTYPES)
    no_bytes = f"write {q_dtype or DTYPES[0]}: a latent cache is stored as it is"
    kv_dtype = section.choice("kv_dtype", DTYPES, dict.fromkeys(QUANTIZED, no_bytes))
    # Not from the dims: the model's own scale is by its head_dim before absorption, and some multiply it.
    scale = section.number("sm_scale", *scales) if section.has("sm_scale") else None
    if not section.has("sm_scale"):
        allowed = "must be given with attention latent: it does not follow from kv_lora_rank and rope_dim"
        section.clash(
            "sm_scale", allowed, "add it: (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 of the model", "no such key"
        )

    for key, value, choices in (("kv_lora_rank", rank, KV_LORA_RANKS), ("rope_dim", rope_dim, ROPE_DIMS)):
        if value is not None and value not in choices:
            section.clash(key, f"must be one of {', '.join(map(str, choices))}", _padded(value, choices))
    if q_dtype is not None and kv_dtype is not None and q_dtype != kv_dtype:
        section.clash("kv_dtype", f"must equal q_dtype ({q_dtype}) with attention latent", f"write {q_dtype}")
    if q_heads is None or rank is None or rope_dim is None or q_dtype is None or kv_dtype is None or scale is None:
        return None
    return Attention(q_heads, 1, rank, q_dtype, kv_dtype, scale, rope_dim=rope_dim)


def _padded(value: int, choices: tuple[int, ...]) -> str:
    """What to do about a length that no kernel has: zeros change no score."""
    longer = next((choice for choice in choices if choice > value), None)
    if longer is None:
        return "serve this model without rpac, which has no kernels for longer ones"
    return f"write {longer}, and pad that part of queries and keys with zeros"


def check_device(section: Section, q_heads: int) -> None:
    """Refuses a number of query heads of one device that no kernel takes."""
    if q_heads % HEADS_STEP or q_heads > MAX_HEADS:
        allowed = f"must be a multiple of {HEADS_STEP} query heads, {MAX_HEADS} at most, with attention latent"
        section.clash("q_heads", allowed, "change it, or parallel.tensor", f"{q_heads} on each device")
