"""Which layers of a model attend how: the entries of `layer_types`, or the rule of its family in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rpac.init.config import Config, Found, shown
from rpac.init.families import Family
from rpac.init.names import CHUNK, LAYERS, LISTS, OF_KIND, PER_LAYER, PERIOD, WINDOW

MAX_LAYERS: Final = 4096
NO_WINDOW: Final = (0, -1)  # what some configs write where there is none

# What an entry of a list of layers is; "state" for layers without a cache of keys and values.
WORDS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("full_attention", "attention", "global", "full", "hybrid"), "full"),
    **dict.fromkeys(("sliding_attention", "local", "local_attention", "sliding"), "sliding"),
    "chunked_attention": "chunked",
    **dict.fromkeys(
        ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "mlp", "moe", "gated_deltanet"), "state"
    ),
}


@dataclass(frozen=True)
class Kind:
    """One kind of attention layers. `type`: full, sliding, chunked, cross or self. `own` keys replace those of the model."""

    name: str
    type: str
    count: int
    own: Mapping[str, Found]


@dataclass(frozen=True)
class Layers:
    """All layers. `states` have no cache of keys and values. `why` says where the kinds come from."""

    kinds: tuple[Kind, ...]
    states: int
    count: Found
    why: str


def read_layers(config: Config, family: Family, crossed: bool) -> Layers:
    """The kinds of a model's layers, in the order of their first layers; `crossed`: its decoder attends to an encoder."""
    count = config.integer(*LAYERS, high=MAX_LAYERS)
    if count is None:
        listed = config.entries(*LISTS)
        if listed is None or not listed.value:
            fix = "check that it is a whole config.json, or write the spec by hand"
            config.refuse(LAYERS, f"must be given, or one of {', '.join(LAYERS[1:4])}", fix)
        count = listed.made(len(listed.value))
    types, why = _types(config, family, count.value)
    overrides = _per_layer(config, len(types))
    shared = config.integer("num_kv_shared_layers", low=0, high=len(types))
    first_shared = len(types) - (shared.value if shared else 0)
    found: dict[tuple[Any, ...], list[int]] = {}
    for layer, kind in enumerate(types):
        if kind != "state":
            key = (
                kind,
                layer >= first_shared,
                tuple(sorted((k, v.value) for k, v in overrides.get(layer, {}).items())),
            )
            found.setdefault(key, []).append(layer)
    kinds = []
    for (kind, is_shared, _), layers in found.items():
        keys = {**_of_kind(config, kind), **overrides.get(layers[0], {}), **_mask(config, kind)}
        if kind in family.sinks:
            keys["sinks"] = Found(True, f"its class, {config.model_type}, has a sink for each head")
        if is_shared:
            assert shared is not None
            keys["update_cache"] = shared.made(False, f"{shared.why}: they read the cache of an earlier layer")
        name = f"{kind}-shared" if is_shared else kind
        kinds.append((name, kind, len(layers) * family.attentions, keys))
    if crossed:
        kinds = _with_cross(config, kinds)
    return Layers(_named(kinds), types.count("state"), count, why)


def _types(config: Config, family: Family, count: int) -> tuple[list[str], str]:
    """The type of each layer, and where that comes from."""
    listed = config.entries(*LISTS)
    if listed is not None and listed.value:
        names = listed.value
        if config.name_of(*LISTS) == "block_types":  # it is repeated
            names = (names * count)[:count]
        return [_type(config, word, family) for word in names], listed.why
    for read in (_no_rope, _pattern_of_flags, _periodic_attention, _hybrid_pattern, _linear_config, _interval):
        types = read(config, count)
        if types is not None:
            return types
    return _windows(config, family, count)


def _type(config: Config, word: Any, family: Family) -> str:
    meaning = family.words.get(str(word)) or WORDS.get(str(word))
    if meaning is None:
        allowed = (
            "must be layers that rpac has kernels for: full, sliding or chunked attention, beside layers with a state"
        )
        config.refuse(
            LISTS, allowed, "serve this model without rpac, which has no kernels for them", f"layers of {shown(word)}"
        )
    return meaning


def _no_rope(config: Config, count: int) -> tuple[list[str], str] | None:
    """Llama 4: a layer with rotary positions sees its chunk, another all."""
    listed = config.entries("no_rope_layers")
    if listed is None or not listed.value or config.get(CHUNK) is None:
        return None
    return ["chunked" if rotary else "full" for rotary in listed.value], listed.why


def _pattern_of_flags(config: Config, count: int) -> tuple[list[str], str] | None:
    """MiMo: 1 for a layer with a window; MiniMax Text: 1 for a layer with softmax attention."""
    for name, meaning in (("hybrid_layer_pattern", ("full", "sliding")), ("attn_type_list", ("state", "full"))):
        listed = config.entries(name)
        if listed is not None and listed.value:
            return [meaning[bool(one)] for one in listed.value], listed.why
    return None


def _periodic_attention(config: Config, count: int) -> tuple[list[str], str] | None:
    """Jamba, Bamba, LFM: some layers attend, the others keep a state."""
    for name in ("attn_layer_indices", "full_attn_idxs", "linear_attn_config.full_attn_layers"):
        listed = config.entries(name)
        if listed is not None:
            first = 1 if name.startswith("linear") else 0  # Kimi counts from 1
            wanted = {one - first for one in listed.value if isinstance(one, int)}
            return ["full" if layer in wanted else "state" for layer in range(count)], listed.why
    period = config.integer("attn_layer_period", high=MAX_LAYERS)
    if period is None:
        return None
    offset = config.integer("attn_layer_offset", low=0, high=MAX_LAYERS)
    start = offset.value if offset else 0
    return ["full" if layer % period.value == start else "state" for layer in range(count)], period.why


def _hybrid_pattern(config: Config, count: int) -> tuple[list[str], str] | None:
    """Nemotron H: a letter a layer, `*` for attention."""
    pattern = config.get("hybrid_override_pattern")
    if pattern is None or not isinstance(pattern.value, str):
        return None
    return ["full" if letter == "*" else "state" for letter in pattern.value[:MAX_LAYERS]], pattern.why


def _linear_config(config: Config, count: int) -> tuple[list[str], str] | None:
    """Bailing: the last of so many layers has softmax attention, under another name."""
    group = config.integer("layer_group_size", high=MAX_LAYERS)
    if group is None:
        return None
    return ["full" if (layer + 1) % group.value == 0 else "state" for layer in range(count)], group.why


def _interval(config: Config, count: int) -> tuple[list[str], str] | None:
    """Qwen3 Next: the last of so many layers has softmax attention."""
    interval = config.integer("full_attention_interval", high=MAX_LAYERS)
    if interval is None:
        return None
    return ["full" if (layer + 1) % interval.value == 0 else "state" for layer in range(count)], interval.why


def _windows(config: Config, family: Family, count: int) -> tuple[list[str], str]:
    """The rule of the family: in which layers a window or a chunk is."""
    local = "chunked" if config.get(CHUNK) is not None else "sliding"
    used = config.flag("use_sliding_window")
    window = config.get(CHUNK) or _window(config)
    if window is None or (local == "sliding" and used is not None and not used.value):
        return ["full"] * count, "no key asks for windows" if window is None else f"{used.why}" if used else ""
    if family.late:
        first = config.integer("max_window_layers", low=0, high=MAX_LAYERS)
        start = first.value if first else 0
        return [local if layer >= start else "full" for layer in range(count)], first.why if first else window.why
    names = PERIOD[local]
    pattern = config.get(*names)
    if pattern is not None and isinstance(pattern.value, str) and pattern.value:  # EXAONE writes LLLG
        letters = pattern.value
        return ["full" if letters[layer % len(letters)] == "G" else local for layer in range(count)], pattern.why
    period = config.integer(*names, high=MAX_LAYERS) if family.period or pattern else None
    every = period.value if period else family.period
    if every is None:
        return [local] * count, window.why
    why = period.why if period else f"its class, {config.model_type}: one layer in {every} is full"
    return ["full" if (layer + 1) % every == 0 else local for layer in range(count)], why


def _window(config: Config) -> Found | None:
    found = config.get(*WINDOW)
    if found is None or (found.value in NO_WINDOW and not isinstance(found.value, bool)):
        return None
    return config.integer(*WINDOW)


def _mask(config: Config, kind: str) -> dict[str, Found]:
    """The key of a spec that a kind of layers is made by."""
    if kind == "sliding":
        window = _window(config)
        if window is None:
            config.refuse(WINDOW, "must be given where layers have windows", "correct the file")
        return {"sliding_window": window}
    if kind == "chunked":
        chunk = config.integer(CHUNK)
        if chunk is None:
            config.refuse(CHUNK, "must be given where layers have chunks", "correct the file")
        return {"attention_chunk": chunk}
    return {}


def _of_kind(config: Config, kind: str) -> dict[str, Found]:
    found = {key: config.integer(*names) for key, names in OF_KIND.get(kind, {}).items()}
    return {key: value for key, value in found.items() if value is not None}


def _per_layer(config: Config, count: int) -> dict[int, dict[str, Found]]:
    """Keys that replace those of the model in single layers."""
    found: dict[int, dict[str, Found]] = {}
    listed = config.entries("num_attention_heads_per_layer")
    if listed is not None and len(set(map(str, listed.value))) > 1:
        for layer, heads in enumerate(listed.value):
            if not isinstance(heads, int) or isinstance(heads, bool):
                config.refuse("num_attention_heads_per_layer", "must be integers", "correct the file")
            found.setdefault(layer, {})["q_heads"] = listed.made(heads)
    part = config.part("per_layer_config")
    for key in part.given() if part is not None else ():
        assert part is not None
        one = part.part(key)
        if one is None or not key.isdecimal() or len(key) > 9:
            continue
        for theirs, ours in PER_LAYER.items():
            value = one.integer(theirs)
            if value is not None:
                found.setdefault(int(key), {})[ours] = value
    return {layer: keys for layer, keys in found.items() if layer < count}


def _with_cross(config: Config, kinds: Sequence[Any]) -> list[Any]:
    """The layers of a decoder beside an encoder: each attends to its own tokens, and then to the encoder's."""
    count = sum(layers for _, _, layers, _ in kinds)
    listed = config.entries("cross_attention_layers")  # Mllama: these attend to the encoder alone
    crossing = len(listed.value) if listed is not None else count
    why = listed.why if listed is not None else f"{config.name}: is_encoder_decoder true"
    keys = {
        **_of_kind(config, "cross"),
        "causal": Found(False, f"{why}: a token sees all that the encoder made"),
        "update_cache": Found(False, "the cache holds the encoder's keys and values, which no step changes"),
    }
    renamed = [("self" if name == "full" else name, kind, layers, own) for name, kind, layers, own in kinds]
    if listed is not None:
        renamed = [(name, kind, layers - crossing, own) for name, kind, layers, own in renamed]
    return [*renamed, ("cross", "cross", crossing, keys)]


def _named(kinds: Sequence[tuple[str, str, int, Mapping[str, Found]]]) -> tuple[Kind, ...]:
    """Kinds with names of their own: a number behind one that was there before."""
    names: dict[str, int] = {}
    named = []
    for name, kind, count, keys in kinds:
        names[name] = names.get(name, 0) + 1
        unique = name if names[name] == 1 else f"{name}-{names[name]}"
        named.append(Kind(unique, kind, count, keys))
    return tuple(named)
