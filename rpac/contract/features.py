"""The features of attention, a row each.

The spec format, plans, kernel headers, manifests, adapters and docs/support.md read this table. A feature is off at its
default: then no kernel shows a trace of it, and neither a spec's meaning nor a manifest mentions it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from rpac.contract.attention import KV_SCALES, QUANTIZERS, Attention, Serving

MAX_MODEL_LEN: Final = 1 << 20
MAX_DECODE_LEN: Final = 8

Section = Literal["model", "serving"]
Cut = Literal["q_heads", "kv_heads", "replicas", ""]
"""How an axis of an argument is shared out over a mesh: by query heads, KV heads or replicas, or not at all."""


@dataclass(frozen=True)
class Flag:
    """`true` or `false`."""


@dataclass(frozen=True)
class Count:
    """An integer from `low` to `high`; `example` is shown where something else was written."""

    low: int
    high: int
    example: int


@dataclass(frozen=True)
class Number:
    """A float from `low` to `high`."""

    low: float
    high: float


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]


Values = Flag | Count | Number | Choice


@dataclass(frozen=True)
class Argument:
    """An array that programs take after the batch. `cuts` says how each axis is shared out over a mesh.

    `constants` is its shape in the constants of a kernel. `query_rows` names the array over whose rows, one for each query,
    a decode kernel spreads it, with a note; None for an argument that it reads where it needs it. `sample` makes an array of
    small numbers around zero into values that a caller could pass, for checks and canaries.
    """

    name: str
    shape: Callable[[Attention, Serving], tuple[int, ...]]
    dtype: str
    cuts: tuple[Cut, ...]
    spec_lines: str
    constants: str
    query_rows: tuple[str, str] | None = None
    sample: Callable[[Any], Any] = lambda numbers: numbers


@dataclass(frozen=True)
class Feature:
    """One feature: its key in a spec, what the key may be, and what it adds to a program.

    `title` names it in docs/support.md and in errors. `example` are the keys, by section, of a spec that uses it. `words`
    say what the key may be, for docs/support.md; `{0}` is replaced by the values. `off` is the default in words there.
    `not_latent` says why latent attention goes without it. `in_kernel_words` tell the reader of a kernel what it does, with
    `{0}` for the value; empty where something else in the header says it. `servers`: whether the servers that adapters stand
    in for can ask for it.
    """

    key: str
    section: Section
    values: Values
    default: Any
    title: str
    words: str
    off: str
    not_latent: str
    example: dict[str, dict[str, object]]
    in_kernel_words: str = ""
    servers: bool = True
    argument: Argument | None = None
    result: str | None = None

    def value(self, model: Attention, serving: Serving) -> Any:
        """What a spec says of it."""
        return getattr(model if self.section == "model" else serving, self.key)

    def used(self, model: Attention, serving: Serving) -> bool:
        """Whether a spec uses it."""
        return bool(self.value(model, serving) != self.default)

    def in_kernel(self, model: Attention, serving: Serving) -> bool:
        """Whether kernels have code for it: `causal` and `update_cache` unless a spec turns them off."""
        value = self.value(model, serving)
        return bool(value) if isinstance(self.values, Flag) else bool(value != self.default)

    @property
    def allowed(self) -> str:
        """What the key may be, in words."""
        match self.values:
            case Flag():
                return self.words.format("true, false")
            case Count(low, high) | Number(low, high):
                return self.words.format(f"{low:g} to {high:g}")
            case Choice(words):
                return self.words.format(", ".join(words))


def _scales_shape(model: Attention, serving: Serving) -> tuple[int, ...]:
    return (2, model.kv_heads) if model.kv_scale == "head" else (2,)


FEATURES: Final[tuple[Feature, ...]] = (
    Feature(
        "soft_cap", "model", Number(1e-3, 1e6), None,
        title="soft cap",
        words="{0}",
        off="none",
        not_latent="no known model caps the scores of latent attention, so its kernels do not",
        example={"model": {"soft_cap": 30.0}},
        in_kernel_words="scores capped at {0} (tanh)",
    ),
    Feature(
        "sliding_window", "model", Count(1, MAX_MODEL_LEN, 1024), None,
        title="sliding window",
        words="1 to max_model_len - 1 tokens",
        off="none",
        not_latent="no known model has windows with latent attention, so its kernels fetch all tokens",
        example={"model": {"sliding_window": 1024}},
        in_kernel_words="a window of {0} tokens, nothing fetched before its page",
    ),
    Feature(
        "attention_chunk", "model", Count(1, MAX_MODEL_LEN, 8192), None,
        title="chunked attention",
        words="a multiple of page_size, below max_model_len",
        off="none",
        not_latent="no known model has chunks with latent attention, so its kernels fetch all tokens",
        example={"model": {"attention_chunk": 1024}},
        servers=False,
    ),
    Feature(
        "sinks", "model", Flag(), False,
        title="sinks",
        words="{0}; true adds an argument `sinks`",
        off="false",
        not_latent="no known model has sinks with latent attention, so its kernels add none",
        example={"model": {"sinks": "true"}},
        in_kernel_words="attention sinks, an argument, in the softmax's sum",
        argument=Argument(
            "sinks",
            lambda model, serving: (model.q_heads,),
            "float32",
            ("q_heads",),
            "model:\n  sinks: true",
            constants="Q_HEADS",
            query_rows=("sink_rows", "sinks, the same in every lane"),
        ),
    ),
    Feature(
        "alibi", "model", Flag(), False,
        title="ALiBi",
        words="{0}; true adds an argument `alibi_slopes`",
        off="false",
        not_latent="no known model has position biases with latent attention, so its kernels add none",
        example={"model": {"alibi": "true"}},
        in_kernel_words="position biases (ALiBi), slopes by head, an argument",
        servers=False,
        argument=Argument(
            "alibi_slopes",
            lambda model, serving: (model.q_heads,),
            "float32",
            ("q_heads",),
            "model:\n  alibi: true",
            constants="Q_HEADS",
            query_rows=("slope_rows", "slopes of position biases, the same in every lane"),
            sample=lambda numbers: abs(numbers) / 8,
        ),
    ),
    Feature(
        "kv_scale", "model", Choice(KV_SCALES), None,
        title="KV scales",
        words="{0}; either adds an argument `kv_scales`",
        off="no scales",
        not_latent="its cache stores values unchanged",
        example={"model": {"kv_dtype": "float8_e5m2", "kv_scale": "tensor"}},
        in_kernel_words="KV scales, an argument",
        argument=Argument(
            "kv_scales",
            _scales_shape,
            "float32",
            ("", "kv_heads"),
            "model:\n  kv_scale: head",
            constants="2, KV_HEADS",
            sample=lambda numbers: 1 + abs(numbers) / 4,
        ),
    ),
    Feature(
        "quantize", "model", Choice(QUANTIZERS), QUANTIZERS[0],
        title="quantization in the kernel",
        words="{0}",
        off=QUANTIZERS[0],
        not_latent="its cache stores values unchanged",
        example={"model": {"kv_dtype": "int8", "kv_scale": "head", "quantize": "kernel"}},
    ),
    Feature(
        "causal", "model", Flag(), True,
        title="non-causal attention",
        words="{0}; with false, each query sees its whole sequence",
        off="true",
        not_latent="no known model looks ahead with latent attention, so its kernels do not",
        example={"model": {"causal": "false"}},
    ),
    Feature(
        "update_cache", "model", Flag(), True,
        title="read-only cache",
        words="{0}; with false, the cache holds the new tokens already, and there are no arguments `keys` and `values`",
        off="true",
        not_latent="no known model with latent attention shares a cache between layers, so its kernels always write it",
        example={"model": {"update_cache": "false"}},
    ),
    Feature(
        "log_sum_exp", "serving", Flag(), False,
        title="log-sum-exp",
        words="{0}; true adds a third result, `lse`",
        off="false",
        not_latent="its kernels do not return it",
        example={"serving": {"log_sum_exp": "true"}},
        result="lse",
    ),
    Feature(
        "decode_len", "serving", Count(1, MAX_DECODE_LEN, 4), 1,
        title="draft tokens",
        words="{0} new tokens for each decode row, at most max_num_tokens / max_num_seqs",
        off="1",
        not_latent="its kernels take one new token of each decode row",
        example={"serving": {"decode_len": 4}},
    ),
    Feature(
        "tree_mask", "serving", Flag(), False,
        title="a tree of draft tokens",
        words="{0}; true adds an argument `tree`: which new tokens of its decode row each new token sees",
        off="false",
        not_latent="its kernels take one new token of each decode row",
        example={"serving": {"decode_len": 4, "tree_mask": "true"}},
        argument=Argument(
            "tree",
            lambda model, serving: (serving.max_num_seqs, serving.decode_len),
            "int32",
            ("replicas",),
            "serving:\n  tree_mask: true\n  decode_len: 4",
            constants="MAX_SEQS * DECODE_LEN",
        ),
    ),
    Feature(
        "bounds_checks", "serving", Flag(), True,
        title="no bounds checks",
        words="{0}; with false, kernels trust the numbers of a batch: a wrong one reads or writes another sequence's pages",
        off="true",
        not_latent="",
        example={"serving": {"bounds_checks": "false"}},
        servers=False,
    ),
)  # fmt: skip

BY_KEY: Final = {feature.key: feature for feature in FEATURES}

ARGUMENTS: Final = tuple(feature.argument for feature in FEATURES if feature.argument is not None)
"""What programs take after the batch where a spec asks for it, in argument order."""

SAMPLES: Final = {one.name: one.sample for one in ARGUMENTS}

RESULTS: Final = tuple(feature.result for feature in FEATURES if feature.result is not None)
"""What programs return after the output and the cache where a spec asks for it."""


def features_of(section: Section) -> tuple[Feature, ...]:
    """The features whose keys stand in a section of a spec."""
    return tuple(feature for feature in FEATURES if feature.section == section)


def features_used(model: Attention, serving: Serving) -> tuple[Feature, ...]:
    """The features that a spec uses, in the order of the table."""
    return tuple(feature for feature in FEATURES if feature.used(model, serving))


def features_in_kernels(model: Attention, serving: Serving) -> tuple[Feature, ...]:
    """The features that kernels have code for, in the order of the table."""
    return tuple(feature for feature in FEATURES if feature.in_kernel(model, serving))
