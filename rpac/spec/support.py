"""docs/support.md, made by the parser itself: every key of a spec with its values, and which features exclude each other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from tabulate import tabulate

from rpac.contract import features
from rpac.contract.attention import DTYPES, KV_DTYPES, KV_LAYOUTS
from rpac.errors import SpecError
from rpac.spec import TARGETS, parse_spec
from rpac.spec import parse as rules
from rpac.spec.latent import KV_LORA_RANKS, ROPE_DIMS
from rpac.spec.model import NO_TARGETS

HEADER = """# What rpac supports

This page is printed by `rpac support`, from the rules of the spec format. A test compares it with them.

## Keys

All keys of a spec, with the values that they can have. A key without a default is required, unless its values name the kind
of attention that it belongs to.
"""

BASE = {
    "name": "a",
    "model": {"q_heads": 8, "kv_heads": 4, "head_dim": 128, "q_dtype": "bfloat16", "kv_dtype": "bfloat16"},
    "serving": {
        "page_size": 64,
        "max_model_len": 4096,
        "max_num_tokens": 256,
        "max_num_seqs": 16,
        "prefill_chunk": 64,
        "context_lens": "[1024]",
    },
    "targets": "[tpu7x, v6e, v5p, v5e, cpu, gpu]",
}

_SHOWN_WITH_DTYPES = ("kv_scale", "quantize")  # with each 8-bit dtype, as nothing else has them

# What is combined with each other, as a spec asks for it: keys by section.
FEATURES: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "separate K and V": {"serving": {"kv_layout": "separate"}},
    "head_dim 64": {"model": {"head_dim": 64}},
    "head_dim 80": {"model": {"head_dim": 80}},
    "head_dim 192": {"model": {"head_dim": 192}},
    "head_dim 256": {"model": {"head_dim": 256}},
    "one KV head": {"model": {"kv_heads": 1}},
    "odd heads": {"model": {"q_heads": 3, "kv_heads": 3}},
    "float32": {"model": {"q_dtype": "float32", "kv_dtype": "float32"}},
    "float8_e4m3fn KV": {"model": {"kv_dtype": "float8_e4m3fn", "kv_scale": "head", "quantize": "kernel"}},
    "float8_e5m2 KV": {"model": {"kv_dtype": "float8_e5m2", "kv_scale": "tensor"}},
    "int8 KV": {"model": {"kv_dtype": "int8", "kv_scale": "head", "quantize": "kernel"}},
    "pages of 8": {"serving": {"page_size": 8}},
    "pages of 512": {"serving": {"page_size": 512}},
    **{feature.title: feature.example for feature in features.FEATURES if feature.key not in _SHOWN_WITH_DTYPES},
    "latent attention": {
        "model": {
            "attention": "latent",
            "q_heads": 16,
            "kv_heads": None,
            "head_dim": None,
            "kv_lora_rank": 512,
            "rope_dim": 64,
            "sm_scale": 0.07,
        }
    },
    "two kinds of layers": {"layers": {"local": "{sliding_window: 512}", "global": "{}"}},
    "tensor parallel": {"parallel": {"tensor": 4}},
    "data parallel": {"parallel": {"data": 2}},
}


def document() -> str:
    """The text of docs/support.md."""
    pairs = [pair for pair in itertools.combinations(FEATURES, 2) if not _keys_of(pair[0]) & _keys_of(pair[1])]
    refused = [(*pair, why) for pair in pairs if (why := _refusal(*pair))]
    return "\n".join(
        [
            HEADER,
            tabulate(_keys(), headers=("key", "values", "default"), tablefmt="github", disable_numparse=True),
            "",
            "## Targets",
            "",
            f"The targets are {', '.join(TARGETS)}. "
            + " ".join(f"{name} is refused: {why.partition(': ')[2]}." for name, why in NO_TARGETS.items()),
            "",
            "## Combinations",
            "",
            f"There are {len(FEATURES)} features: {', '.join(FEATURES)}.",
            "",
            f"Each of them is accepted alone, for every target. {len(pairs)} pairs of them do not need two values for one key. "
            f"All of these pairs are accepted, except the {len(refused)} pairs below. The message is the one that a spec with "
            "both features gets.",
            "",
            tabulate(refused, headers=("feature", "and", "message"), tablefmt="github", disable_numparse=True),
            "",
        ]
    )


def _keys() -> list[tuple[str, str, str]]:
    def either(values: tuple[object, ...]) -> str:
        return ", ".join(map(str, values))

    return [
        ("model.q_heads", f"a multiple of kv_heads; on each device at most {rules.MAX_GROUP} times its kv_heads", ""),
        ("model.kv_heads", f"1 to {rules.MAX_HEADS}", ""),
        ("model.head_dim", either(rules.HEAD_DIMS), ""),
        ("model.q_dtype", either(DTYPES), ""),
        ("model.kv_dtype", either(KV_DTYPES), ""),
        ("model.sm_scale", f"{rules.SM_SCALES[0]:g} to {rules.SM_SCALES[1]:g}", "head_dim ** -0.5"),
        *_feature_rows("model"),
        (
            "model.attention",
            "latent: the cache holds one vector for each token, which all heads share (MLA)",
            "attention over K and V heads",
        ),
        ("model.kv_lora_rank", f"{either(KV_LORA_RANKS)}; only with latent attention", ""),
        ("model.rope_dim", f"{either(ROPE_DIMS)}; only with latent attention", ""),
        (
            "layers.NAME",
            f"any of {either(rules.MODEL_KEYS)}; replaces the key of model for these layers",
            "one kind of layer",
        ),
        ("serving.page_size", either(rules.PAGE_SIZES), ""),
        ("serving.kv_layout", either(KV_LAYOUTS), KV_LAYOUTS[0]),
        ("serving.max_model_len", f"a multiple of page_size, up to {features.MAX_MODEL_LEN}", ""),
        ("serving.max_num_tokens", f"up to {rules.MAX_TOKENS}", ""),
        ("serving.token_buckets", "ascending; the last one is max_num_tokens", "powers of two"),
        ("serving.max_num_seqs", f"up to {rules.MAX_SEQS}", ""),
        ("serving.prefill_chunk", "up to max_num_tokens; on TPU a multiple of 16", ""),
        ("serving.context_lens", "expected context lengths, ascending", ""),
        ("serving.num_pages", "pages in the cache of one layer", "a full table for each sequence"),
        *_feature_rows("serving"),
        ("parallel.tensor", f"devices that share the heads; tensor times data is at most {rules.MAX_DEVICES}", "1"),
        ("parallel.data", "replicas", "1"),
        ("step", "package.module:function, a function of yours: see [steps](steps.md)", "no whole steps of the model"),
    ]


def _feature_rows(section: features.Section) -> list[tuple[str, str, str]]:
    return [(f"{section}.{one.key}", one.allowed, one.off) for one in features.features_of(section)]


def _keys_of(feature: str) -> set[tuple[str, str]]:
    return {(section, key) for section, keys in FEATURES[feature].items() for key in keys}


def _refusal(*features: str) -> str:
    """The first problem of a spec with these features; empty if it is accepted."""
    try:
        parse_spec(text_of(*(FEATURES[name] for name in features)), "spec.yaml")
    except SpecError as error:
        first = error.problems[0]
        return f"{first.where}: found {first.found}; {first.allowed}; {first.fix}"
    return ""


def text_of(*features: Mapping[str, Mapping[str, object]]) -> str:
    """A spec with some features, as YAML; the keys of a later one win."""
    whole: dict[str, object] = {name: dict(part) if isinstance(part, dict) else part for name, part in BASE.items()}
    for feature in features:
        for section, keys in feature.items():
            part = whole.setdefault(section, {})
            assert isinstance(part, dict)
            part.update(keys)
            for key in [key for key, value in part.items() if value is None]:
                del part[key]
    lines = []
    for name, part in whole.items():
        if isinstance(part, dict):
            lines += [f"{name}:", *(f"  {key}: {value}" for key, value in part.items())]
        else:
            lines.append(f"{name}: {part}")
    return "\n".join(lines) + "\n"
