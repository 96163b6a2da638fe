"""From the keys of a config.json to the attention of a spec, each value with the key that it follows from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from rpac.init.config import TEXT_PARTS, Config, Found
from rpac.init.families import ABSENT, Family, defaults_of, family_of
from rpac.init.grouped import read_grouped
from rpac.init.heads import read_q_heads
from rpac.init.latent import read_latent, yarn_of
from rpac.init.layers import Kind, Layers, read_layers
from rpac.init.names import ENCODER_LENGTH, LENGTH, LISTS, Q_HEADS, READ

_NO_KERNELS: Final = "serve this model without rpac, whose kernels have no such attention"
_LOOKS_LIKE_ATTENTION: Final = re.compile(r"attn|attention|head|window|softcap|sink|alibi|kv_|sparse", re.IGNORECASE)


@dataclass(frozen=True)
class Description:
    """A model's attention in the words of a spec.

    `config` is the part that describes the decoder, `root` the whole. `keys` are those of the spec's `model`; each kind of
    layers has some of its own. `length`: tokens of a sequence, and `encoder_length` those that cross-attention sees. `notes`
    are what no line can say.
    """

    config: Config
    root: Config
    keys: dict[str, Found]
    kinds: tuple[Kind, ...]
    layers: Layers
    length: Found | None
    encoder_length: Found | None
    notes: tuple[str, ...]

    @property
    def is_latent(self) -> bool:
        return "attention" in self.keys


def describe(root: Config) -> Description:
    """The attention that a config.json says. Raises ModelError for what rpac has no kernels for, by the model's key."""
    part = text_part(root)
    model_type = part.word("model_type") or root.word("model_type")
    whole, _ = family_of(root.word("model_type"))
    if whole.missing:
        _refuse_missing(root, whole)
    family, known = family_of(model_type)
    config = part.with_defaults(model_type, defaults_of(model_type, bool(part.path)))
    notes = list(family.notes)
    if part.path:
        notes.append(
            f"{config.name}: only {part.path} is read: other parts of the model have no cache of keys and values."
        )
    _refuse_absent(config, family)
    if not known:
        notes.append(_unknown(config, model_type))
    crossed = _is_crossed(root, config, family)
    read_q_heads(config)  # before all else: without it, it is no model's config
    layers = read_layers(config, family, crossed)
    if not layers.kinds:
        config.refuse(LISTS, "must have layers with attention", "serve this model without rpac")
    latent = _is_latent(config)
    keys = dict(read_latent(config, layers, notes) if latent else read_grouped(config, family, layers, notes))
    if layers.states:
        notes.append(
            f"{layers.states} layers have no cache of keys and values ({layers.why}); their states are not in the budget."
        )
    length = _length(config)
    encoder = (config.integer(*ENCODER_LENGTH) or length) if crossed else None
    return Description(config, root, keys, layers.kinds, layers, length, encoder, tuple(notes))


def text_part(config: Config) -> Config:
    """The mapping that describes the decoder: the root, or a part of it that a model of several parts has."""
    for name in TEXT_PARTS:
        part = config.part(name)
        if part is not None and (_has_heads(part) or any(part.part(other) for other in TEXT_PARTS) or _is_known(part)):
            return text_part(part)
    return config


def _has_heads(config: Config) -> bool:
    return config.get(*Q_HEADS) is not None


def _is_known(config: Config) -> bool:
    return family_of(config.word("model_type"))[1]


def _refuse_missing(config: Config, family: Family) -> None:
    config.refuse("model_type", f"needs {family.missing}", _NO_KERNELS)


def _refuse_absent(config: Config, family: Family) -> None:
    if family.missing:
        _refuse_missing(config, family)
    for key, what in ABSENT.items():
        name, value = key if isinstance(key, tuple) else (key, None)
        found = config.get(name)
        if found is not None and (found.value == value if value is not None else bool(found.value)):
            config.refuse(name, f"asks for {what}", _NO_KERNELS)


def _unknown(config: Config, model_type: str) -> str:
    """What to say of a model whose family is in no row."""
    unread = sorted(key for key in config.given() if _LOOKS_LIKE_ATTENTION.search(key) and key not in READ)
    name = f"model_type {model_type}" if model_type else "a config without model_type"
    left = f"; not read: {', '.join(unread[:12])}" if unread else ""
    return f"rpac does not know {name}: the lines follow from keys that other models have. Compare with its code{left}."


def _is_latent(config: Config) -> bool:
    """Whether the cache holds one vector a token; small DeepSeek models have the keys and not the attention."""
    used = config.flag("use_mla")
    return config.get("kv_lora_rank") is not None and (used is None or bool(used.value))


def _is_crossed(root: Config, config: Config, family: Family) -> bool:
    """Whether the decoder attends to an encoder too."""
    if config.entries("cross_attention_layers") is not None:
        return True
    flag = root.flag("is_encoder_decoder")
    return flag is not None and flag.value and not family.encoder


def _length(config: Config) -> Found | None:
    """The longest sequence: with YaRN, what it stretches the original length to."""
    length, part = config.integer(*LENGTH), yarn_of(config)
    if length is None or part is None:
        return length
    original, factor = part.integer("original_max_position_embeddings"), part.number("factor")
    if original is None or factor is None or original.value * factor.value <= length.value:
        return length
    return original.made(int(original.value * factor.value), f"{original.why} x factor {factor.value:g}")
