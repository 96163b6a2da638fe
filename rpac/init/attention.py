"""From the keys of a config.json to the attention of a spec, each value with the key that it follows from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from rpac.init.config import TEXT_PARTS, Config, Found, refuse
from rpac.init.families import ABSENT, Family, family_of
from rpac.init.layers import CHUNK, LAYERS, LISTS, OF_KIND, PERIOD, WINDOW, Kind, Layers, read_layers
from rpac.spec.latent import KV_LORA_RANKS, ROPE_DIMS
from rpac.spec.parse import HEAD_DIMS

# What the configs of different models call the same thing; the first that has a value counts.
Q_HEADS: Final = (
    "decoder_attention_heads", "decoder_num_attention_heads", "num_decoder_attention_heads", "num_attention_heads", "n_head",
    "n_heads", "num_heads", "attention_heads", "num_query_heads",
)  # fmt: skip
KV_HEADS: Final = (
    "decoder_num_key_value_heads", "num_key_value_heads", "n_head_kv", "num_kv_heads", "kv_n_heads", "attn_config.kv_n_heads",
    "multi_query_group_num", "num_query_groups", "num_attention_groups",
)  # fmt: skip
WIDTH: Final = ("hidden_size", "n_embd", "d_model", "embed_dim", "emb_dim", "hidden_dim", "dim")
HEAD_DIM: Final = (
    "head_dim",
    "attention_head_dim",
    "kv_channels",
    "attention_head_size",
    "d_head",
    "dim_head",
    "head_size",
)
LENGTH: Final = (
    "max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "max_sequence_length", "model_max_length",
    "max_target_positions", "max_decoder_position_embeddings", "max_text_positions",
)  # fmt: skip
ENCODER_LENGTH: Final = ("max_source_positions", "max_encoder_position_embeddings", "max_speech_positions")
SOFT_CAP: Final = ("attn_logit_softcapping", "max_attn_value")
SCALE: Final = ("attention_multiplier", "attn_output_multiplier", "attn_config.softmax_scale", "softmax_scale")
POSITIONS: Final = ("rope_parameters", "rope_scaling")
LATENT: Final = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim")

_NO_KERNELS: Final = "serve this model without rpac, whose kernels have no such attention"

_READ: Final = frozenset(
    (*Q_HEADS, *KV_HEADS, *WIDTH, *HEAD_DIM, *LENGTH, *ENCODER_LENGTH, *SOFT_CAP, *SCALE, *POSITIONS, *LATENT, *LAYERS, *LISTS,
     *PERIOD, *WINDOW, CHUNK, "query_pre_attn_scalar", "scale_attn_weights", "alibi", "multi_query", "use_sliding_window",
     "max_window_layers", "num_kv_shared_layers", "v_head_dim", "q_lora_rank", "layer_types", "attention_bias",
     "attention_dropout", "output_attentions", "attn_implementation", "_attn_implementation", "attn_dropout", "attn_pdrop",
     "no_rope_layers", "num_attention_heads_per_layer",
     *(name for names in OF_KIND.values() for one in names.values() for name in one))
)  # fmt: skip
_LOOKS_LIKE_ATTENTION: Final = re.compile(r"attn|attention|head|window|softcap|sink|alibi|kv_|sparse", re.IGNORECASE)


@dataclass(frozen=True)
class Description:
    """A model's attention in the words of a spec.

    `keys` are those of the spec's `model`; each kind of layers has some of its own. `length`: tokens of a sequence, and
    `encoder_length` those that cross-attention sees. `notes` are what no line can say.
    """

    config: Config
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
    model_type = _model_type(part) or _model_type(root)
    whole, _ = family_of(_model_type(root))
    if whole.missing:
        _refuse_missing(root, whole)
    family, known = family_of(model_type)
    config = part.with_defaults(model_type, family.defaults)
    notes = list(family.notes)
    if part.path:
        notes.append(
            f"{config.name}: only {part.path} is read: other parts of the model have no cache of keys and values."
        )
    _refuse_absent(config, family)
    if not known:
        notes.append(_unknown(config, model_type))
    crossed = _is_crossed(root, config, family)
    _q_heads(config)  # before all else: without it, it is no model's config
    layers = read_layers(config, family, crossed)
    if not layers.kinds:
        config.refuse(LISTS, "must have layers with attention", "serve this model without rpac")
    latent = config.get("kv_lora_rank") is not None
    keys = dict(_latent(config, layers, notes) if latent else _grouped(config, family, layers, notes))
    if layers.states:
        notes.append(
            f"{layers.states} layers keep a state and no cache of keys and values ({layers.why}): it is not in the budget."
        )
    length = config.integer(*LENGTH)
    encoder = (config.integer(*ENCODER_LENGTH) or length) if crossed else None
    return Description(config, keys, layers.kinds, layers, length, encoder, tuple(notes))


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
    return family_of(_model_type(config))[1]


def _model_type(config: Config) -> str:
    found = config.get("model_type")
    return found.value if found is not None and isinstance(found.value, str) else ""


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
    unread = sorted(key for key in config.given() if _LOOKS_LIKE_ATTENTION.search(key) and key not in _READ)
    name = f"model_type {model_type}" if model_type else "a config without model_type"
    left = f"; not read: {', '.join(unread[:12])}" if unread else ""
    return f"rpac does not know {name}: the lines follow from keys that other models have. Compare with its code{left}."


def _is_crossed(root: Config, config: Config, family: Family) -> bool:
    """Whether the decoder attends to an encoder too."""
    if config.entries("cross_attention_layers") is not None:
        return True
    flag = root.flag("is_encoder_decoder")
    return flag is not None and flag.value and not family.encoder


def _grouped(config: Config, family: Family, layers: Layers, notes: list[str]) -> Iterator[tuple[str, Found]]:
    """Attention over K and V heads."""
    q_heads = _q_heads(config)
    yield "q_heads", q_heads
    yield "kv_heads", _kv_heads(config, q_heads)
    head_dim = _head_dim(config, q_heads.value)
    length, why = head_dim.value, head_dim.why
    value_dim = config.integer("v_head_dim")
    if value_dim is not None and value_dim.value > length:
        length, why = value_dim.value, f"{value_dim.why}, the longer of keys and values"
    padded = _padded(config, HEAD_DIM, length, HEAD_DIMS, "head_dim")
    if padded != length:
        notes.append(
            f"head_dim is {length}, and rpac has kernels for {padded}: pad queries, keys and values with zeros."
        )
        why = f"{why}, padded to a length that rpac has"
    yield "head_dim", Found(padded, why)
    scale = _scale(config, family, head_dim.value)
    if scale.value != padded**-0.5:
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
        why = (
            f"its class, {config.model_type}, is an encoder"
            if family.encoder
            else f"{config.name}: bidirectional attention"
        )
        for kind in layers.kinds:
            if kind.type == "sliding":
                allowed = "must be left out of a model that sees ahead: rpac's windows look back from a query"
                config.refuse(WINDOW, allowed, "serve this model without rpac")
        yield "causal", Found(False, f"{why}: a token sees its whole sequence")


def _q_heads(config: Config) -> Found:
    found = config.integer(*Q_HEADS, high=1024)
    if found is None:
        fix = "check that it is the config.json of a model that writes text, or write the spec by hand"
        refuse(
            config.file,
            config.where("num_attention_heads"),
            "no such key",
            f"must be given, as {_either(Q_HEADS)}",
            fix,
        )
    return found


def _kv_heads(config: Config, q_heads: Found) -> Found:
    multi_query = config.flag("multi_query")
    new = config.flag("new_decoder_architecture")  # Falcon: then multi_query does not count
    if multi_query is not None and multi_query.value and not (new is not None and new.value):
        return Found(1, multi_query.why)
    attn_type = config.get("attn_config.attn_type")
    if attn_type is not None and attn_type.value == "multiquery_attention":
        return Found(1, attn_type.why)
    found = config.integer(*KV_HEADS, high=1024)
    if found is None:
        return Found(q_heads.value, f"as many as query heads, for no key gives fewer ({_either(KV_HEADS[1:3])}, ...)")
    if q_heads.value % found.value:
        allowed = f"must divide the {q_heads.value} query heads ({q_heads.why})"
        config.refuse(KV_HEADS, allowed, "correct the file, or write the spec by hand")
    return found


def _head_dim(config: Config, q_heads: int) -> Found:
    found = config.integer(*HEAD_DIM)
    if found is not None:
        return found
    width = config.integer(*WIDTH)
    if width is None:
        fix = "check that it is a whole config.json, or write the spec by hand"
        refuse(
            config.file, config.where("head_dim"), "no such key", f"must be given, or one of {', '.join(WIDTH)}", fix
        )
    if width.value % q_heads:
        allowed = f"must be a multiple of the {q_heads} query heads where no head_dim is given"
        config.refuse(WIDTH, allowed, "correct the file, or write the spec by hand")
    return Found(width.value // q_heads, f"{width.why} / {q_heads} heads")


def _padded(config: Config, names: tuple[str, ...], value: int, lengths: tuple[int, ...], what: str) -> int:
    """The shortest length of a kernel that holds `value`."""
    padded = next((one for one in lengths if one >= value), None)
    if padded is None:
        allowed = f"must be at most {lengths[-1]} for rpac's {what}"
        fix = "serve this model without rpac, which has no kernels for longer heads"
        config.refuse(names, allowed, fix, str(value))
    return padded


def _scale(config: Config, family: Family, head_dim: int) -> Found:
    if family.sm_scale is not None:
        return Found(family.sm_scale, f"model_type {config.model_type}: {family.scale_why}")
    scalar = config.number("query_pre_attn_scalar")
    if scalar is not None:
        return Found(scalar.value**-0.5, f"{scalar.why} ** -0.5")
    given = config.number(*SCALE)
    if given is not None:
        return Found(float(given.value), given.why)
    by_dim = config.flag("scale_qk_dot_by_d", "mup_scale_qk_dot_by_d")
    if by_dim is not None and by_dim.value:
        return Found(1.0 / head_dim, f"{by_dim.why}: 1 / head_dim")
    weights = config.flag("scale_attn_weights")
    if weights is not None and not weights.value:
        return Found(1.0, weights.why)
    times = "" if family.scale_dims == 1.0 else f" * {family.scale_dims:g}"
    return Found((head_dim * family.scale_dims) ** -0.5, f"({head_dim}{times}) ** -0.5, head_dim before padding")


def _alibi(config: Config, family: Family) -> Found | None:
    flag = config.flag("alibi", "attn_config.alibi")
    if flag is not None:
        return Found(True, flag.why) if flag.value else None
    kind = config.get("position_embedding_type")
    if kind is not None and kind.value == "alibi":
        return Found(True, kind.why)
    if family.alibi_unless is not None:
        key, value = family.alibi_unless
        found = config.get(key)
        if found is not None and found.value != value:
            return Found(
                True, f"model_type {config.model_type}: all but the one with {key} {value} have ALiBi; {found.why}"
            )
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


def _latent(config: Config, layers: Layers, notes: list[str]) -> Iterator[tuple[str, Found]]:
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
    q_heads = _q_heads(config)
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
        padded = _padded(config, (name,), found.value, choices, key)
        why = found.why if padded == found.value else f"{found.why}, padded to a length that rpac has"
        if padded != found.value:
            notes.append(
                f"{name} is {found.value}, and rpac has kernels for {padded}: pad that part of queries and keys."
            )
        yield key, Found(padded, why)
    nope = config.integer("qk_nope_head_dim")
    if nope is None:
        config.refuse(
            "qk_nope_head_dim", "must be given beside kv_lora_rank", "correct the file, or write the spec by hand"
        )
    scale = (nope.value + lengths["rope_dim"]) ** -0.5
    why = f"(qk_nope_head_dim {nope.value} + qk_rope_head_dim {lengths['rope_dim']}) ** -0.5"
    factor, factor_why = _yarn(config)
    yield "sm_scale", Found(scale * factor * factor, why + factor_why)
    notes.append("Latent attention in its absorbed form: the caller absorbs the up-projections (docs/latent.md).")


def _yarn(config: Config) -> tuple[float, str]:
    """What YaRN multiplies the scale by, squared: 0.1 * mscale_all_dim * ln(factor) + 1 (DeepSeek V2 and V3)."""
    for name in POSITIONS:
        part = config.part(name)
        kind = None if part is None else part.get("rope_type", "type")
        if part is None or kind is None or kind.value not in ("yarn", "deepseek_yarn"):
            continue
        of_scale, factor = part.number("mscale_all_dim", low=-1e-9), part.number("factor")
        if of_scale is not None and of_scale.value and factor is not None and factor.value > 1:
            mscale = 0.1 * of_scale.value * math.log(factor.value) + 1.0
            return mscale, f" * ({mscale:.6g}) ** 2, YaRN's mscale ({of_scale.why}, factor {factor.value:g})"
    return 1.0, ""


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
