"""What a valid spec is: frozen data, with the values that follow from it. No YAML here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from rpac.errors import Problem, SpecError
from rpac.mesh import ONE_DEVICE, Mesh

TARGETS = ("tpu7x", "v6e", "v5p", "v5e", "cpu", "gpu")
# What else one may look for among the targets, and what there is to do.
NO_TARGETS = {
    "v4": "leave it out: a v4 chip serves as one device of two cores, which libtpu describes, where there is none, only as two "
    "devices of one, so that no executable made here would load"
}
KV_LAYOUTS = ("interleaved", "separate")  # the first is the default; `rpac.layout` says what they are
QUANTIZED = ("float8_e4m3fn", "float8_e5m2", "int8")  # dtypes of KV alone: each element is a stored code
LATENT_LAYOUT = "latent"  # that of latent attention, which has no other
ATTENTIONS = ("grouped", "latent")  # the first is the default
KV_SCALES = ("tensor", "head")
QUANTIZERS = ("caller", "kernel")  # the first is the default
MIN_DEFAULT_BUCKET = 16
_ALWAYS_MEANT = ("kv_layout",)  # a key with a default that hashes have held from the start


@dataclass(frozen=True)
class Model:
    """The attention of one device's part of a model; heads are counted in it.

    `soft_cap`: scores become cap * tanh(score / cap). `sliding_window`: a query sees that many tokens, itself the last of
    them. `attention_chunk`: a query sees its own chunk of the sequence alone, whose chunks have that many tokens. `sinks`:
    each query head has a logit of its own, an argument of every program, that takes part in the softmax and has no value; it
    is neither scaled nor capped. `update_cache`: new keys and values are arguments, written to the cache; else the cache holds
    them already, as in a layer that shares another's. `causal`: a query sees tokens up to its own; else all of its sequence.

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

    def first_seen(self, position: int) -> int:
        """The first token that the query at `position` of its sequence sees."""
        if self.attention_chunk is not None:
            return position // self.attention_chunk * self.attention_chunk
        return 0 if self.sliding_window is None else max(position + 1 - self.sliding_window, 0)

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
    logarithm of each softmax's denominator too, so that parts of an attention can be merged.
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

    @property
    def pages_per_seq(self) -> int:
        return self.max_model_len // self.page_size


@dataclass(frozen=True)
class Spec:
    """A valid spec. `source` is the text as given and `file` its name: neither takes part in equality or `hash`.

    `model` and `serving` are of one device of `mesh`: with `parallel` in the spec, the text has the heads of all together.
    `layers`: the kinds of attention layers of a model that has several, by name; `parts` are specs of one kind each, which
    know its name and the `whole`.
    """

    name: str
    model: Model
    serving: Serving
    targets: tuple[str, ...]
    source: str = field(compare=False, repr=False)
    file: str = field(compare=False)
    mesh: Mesh = ONE_DEVICE
    layers: tuple[tuple[str, Model], ...] = ()
    layer: str = ""
    whole: Spec | None = field(default=None, compare=False, repr=False)

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
            **({} if self.mesh == ONE_DEVICE else {"mesh": self.mesh.as_dict()}),
            **({"layers": {name: plain(model) for name, model in self.layers}} if self.layers else {}),
        }

    @cached_property
    def parts(self) -> tuple[Spec, ...]:
        """What kernels are made of: a spec for each kind of layer, or this one where there is one kind."""
        if not self.layers:
            return (self,)
        return tuple(replace(self, model=model, layers=(), layer=name, whole=self) for name, model in self.layers)

    def part(self, layer: str) -> Spec:
        """The spec of one kind of layer, by name; of a spec with one kind, itself for the empty name.

        Raises SpecError, naming the kinds, for another.
        """
        for part in self.parts:
            if part.layer == layer:
                return part
        names = ", ".join(part.layer for part in self.parts)
        allowed = f"must be one of {names}" if self.layers else "must be left out: the model has one kind of layer"
        raise SpecError([Problem(self.file, None, None, "layers", f"layer {layer!r}", allowed, "name one of them")])

    @cached_property
    def hash(self) -> str:
        """sha256 of the meaning, 64 hex digits: equal for files that differ only in comments or written defaults.

        That of the whole, in a part.
        """
        if self.whole is not None:
            return self.whole.hash
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
