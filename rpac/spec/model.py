"""What a valid spec is: frozen data, with the values that follow from it. No YAML here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from typing import Any

TARGETS = ("tpu7x", "v6e", "v5p", "v5e", "cpu")
KV_LAYOUTS = ("interleaved", "separate")  # the first is the default; `rpac.layout` says what they are
MIN_DEFAULT_BUCKET = 16
_ALWAYS_MEANT = ("kv_layout",)  # a key with a default that hashes have held from the start


@dataclass(frozen=True)
class Model:
    """The attention of one model shard; heads are counted in the shard.

    `soft_cap`: scores become cap * tanh(score / cap). `sliding_window`: a query sees that many tokens, itself the last of
    them. `sinks`: each query head has a logit of its own, an argument of every program, that takes part in the softmax
    and has no value; it is neither scaled nor capped.
    `causal`: a query sees tokens up to its own; else all of its sequence.
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
    causal: bool = True

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.q_heads // self.kv_heads


@dataclass(frozen=True)
class Serving:
    """How the model is served; lengths and buckets in tokens, `num_pages` in pages of one layer's cache.

    `log_sum_exp`: programs return the logarithm of each softmax's denominator too, so that parts of an attention can be merged.
    """

    page_size: int
    max_model_len: int
    max_num_tokens: int
    token_buckets: tuple[int, ...]
    max_num_seqs: int
    prefill_chunk: int
    context_lens: tuple[int, ...]
    num_pages: int
    kv_layout: str = KV_LAYOUTS[0]
    log_sum_exp: bool = False

    @property
    def pages_per_seq(self) -> int:
        return self.max_model_len // self.page_size


@dataclass(frozen=True)
class Spec:
    """A valid spec. `source` is the text as given and `file` its name: neither takes part in equality or `hash`."""

    name: str
    model: Model
    serving: Serving
    targets: tuple[str, ...]
    source: str = field(compare=False, repr=False)
    file: str = field(compare=False)

    def meaning(self) -> dict[str, Any]:
        """The spec as plain data; comments and layout of the file are gone.

        Sizes that were left out are filled in; a feature that is not used is not there, so that a spec means the same
        after others were added.
        """
        return {
            "name": self.name,
            "model": plain(self.model),
            "serving": plain(self.serving),
            "targets": list(self.targets),
        }

    @cached_property
    def hash(self) -> str:
        """sha256 of the meaning, 64 hex digits: equal for files that differ only in comments or written defaults."""
        text = json.dumps(self.meaning(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def plain(part: Model | Serving) -> dict[str, Any]:
    """One part of a spec as plain data, without features at their default."""
    values = {one.name: (getattr(part, one.name), one.default) for one in fields(part)}
    return {
        name: value
        for name, (value, default) in values.items()
        if default is MISSING or name in _ALWAYS_MEANT or value != default
    }


def default_token_buckets(max_num_tokens: int) -> tuple[int, ...]:
    """Powers of two from 16 below `max_num_tokens`, then `max_num_tokens` itself."""
    buckets = []
    bucket = MIN_DEFAULT_BUCKET
    while bucket < max_num_tokens:
        buckets.append(bucket)
        bucket *= 2
    return (*buckets, max_num_tokens)
