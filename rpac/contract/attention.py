"""The attention of a model and how it is served: the one place that says what each feature means. Frozen data."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

KV_LAYOUTS = ("interleaved", "separate")  # the first is the default; `rpac.contract.arrays` says what they are
DTYPES = ("bfloat16", "float32")  # of queries, and of a cache that stores values unchanged
QUANTIZED = ("float8_e4m3fn", "float8_e5m2", "int8")  # dtypes of KV alone: each element is a stored code
KV_DTYPES = (*DTYPES, *QUANTIZED)  # of grouped attention
LATENT_LAYOUT = "latent"  # that of latent attention, which has no other
ATTENTIONS = ("grouped", "latent")  # the first is the default
KV_SCALES = ("tensor", "head")
QUANTIZERS = ("caller", "kernel")  # the first is the default
_ALWAYS_MEANT = ("kv_layout",)  # a key with a default that hashes have held from the start

Positions = TypeVar("Positions", int, NDArray[np.int64])


def first_seen(positions: Positions, sliding_window: int | None, attention_chunk: int | None) -> Positions:
    """The first token that the query at each of `positions` of its sequence sees."""
    if attention_chunk is not None:
        return positions // attention_chunk * attention_chunk
    if sliding_window is None:
        return positions * 0
    start = positions + 1 - sliding_window
    return start * (start > 0)


@dataclass(frozen=True)
class Attention:
    """The attention of one device's part of a model; heads are counted in it.

    `soft_cap`: scores become cap * tanh(score / cap). `sliding_window`: a query sees that many tokens, itself the last of
    them. `attention_chunk`: a query sees its own chunk of the sequence alone, whose chunks have that many tokens. `sinks`:
    each query head has a logit of its own, an argument of every program, that takes part in the softmax and has no value; it
    is neither scaled nor capped. `update_cache`: new keys and values are arguments, written to the cache; else the cache holds
    them already, as in a layer that shares another's. `causal`: a query sees tokens up to its own; else all of its sequence.
    `alibi`: a score gets the slope of its query head, an argument of every program, times the position of the token minus that
    of the query, after the cap.

    An 8-bit `kv_dtype` may have scales, an argument too, for K and V each: one a KV head (`kv_scale` "head") or one
    ("tensor"); a value is what is stored times its scale. `quantize` says who makes 8 bits of new keys and values: the
    caller, or the kernel's program.

    With `rope_dim` it is latent attention in its absorbed form: a token has one latent vector of `head_dim` (kv_lora_rank)
    elements, which is the value and part of the key of all query heads, and a rotary part of the key of `rope_dim`.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    q_dtype: str
    kv_dtype: str
    sm_scale: float
    soft_cap: float | None = None
    sliding_window: int | None = None
    sinks: bool = False
    kv_scale: str | None = None
    quantize: str = QUANTIZERS[0]
    causal: bool = True
    rope_dim: int | None = None
    attention_chunk: int | None = None
    update_cache: bool = True
    alibi: bool = False

    def first_seen(self, position: int) -> int:
        """The first token that the query at `position` of its sequence sees."""
        return first_seen(position, self.sliding_window, self.attention_chunk)

    @property
    def quantized(self) -> bool:
        """Whether K and V are stored in 8 bits."""
        return self.kv_dtype in QUANTIZED

    @property
    def new_dtype(self) -> str:
        """What new keys and values come in."""
        return self.q_dtype if self.quantize == "kernel" else self.kv_dtype

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.q_heads // self.kv_heads

    @property
    def late(self) -> bool:
        """Whether there are queries that do not see their sequence from its start."""
        return self.sliding_window is not None or self.attention_chunk is not None


@dataclass(frozen=True)
class Serving:
    """How the model is served; lengths and buckets in tokens, `num_pages` in pages of one layer's cache.

    `decode_len`: new tokens of every decode row, the last accepted one and the drafts behind it. `tree_mask`: which of them
    each sees is an argument of every program; without it each sees those before it. `log_sum_exp`: programs return the
    logarithm of each softmax's denominator too, so that parts of an attention can be merged. `bounds_checks`: a sequence whose
    lengths or page ids cannot be gets NaN, and nothing that is not its own is read or written.
    """

    page_size: int
    max_model_len: int
    max_num_tokens: int
    token_buckets: tuple[int, ...]
    max_num_seqs: int
    prefill_chunk: int
    context_lens: tuple[int, ...]
    num_pages: int
    kv_layout: str = KV_LAYOUTS[0]  # or LATENT_LAYOUT
    log_sum_exp: bool = False
    decode_len: int = 1
    tree_mask: bool = False
    bounds_checks: bool = True

    @property
    def pages_per_seq(self) -> int:
        return self.max_model_len // self.page_size


def plain(part: Attention | Serving) -> dict[str, Any]:
    """One part of a spec as plain data, without features at their default."""
    values = {one.name: (getattr(part, one.name), one.default) for one in fields(part)}
    return {
        name: value
        for name, (value, default) in values.items()
        if default is MISSING or name in _ALWAYS_MEANT or value != default
    }
