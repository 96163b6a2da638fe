"""The sizes of a model of the Llama family, and how its config.json says them.

`Config` is all that `model` and `weights` know of a model. `read_config` makes one from the config.json of Llama, Mistral,
Qwen2 or Qwen3, with the defaults of their classes in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rpac.spec.parse import HEAD_DIMS
from serve.errors import CheckpointError
from serve.rope import Linear, Llama3, Rope, Yarn

MAX_JSON = 64 << 20  # bytes; a tokenizer's is the longest
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Config:
    """A model. `windows` has an entry a layer: how many tokens a query sees, itself included, or None for all before it.

    `qkv_bias`, `output_bias` and `mlp_bias` say which projections add a bias. `qk_norm` is Qwen3's RMSNorm of every query
    and key head. `tied` means that the embedding is the output projection too. Weights and activations have `dtype`.
    """

    vocabulary: int
    width: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    rope: Rope = field(default_factory=Rope)
    epsilon: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    dtype: str = "bfloat16"

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def kernel_head_dim(self) -> int:
        """The length of a head in attention: the next one that rpac has kernels for, as `rpac init` has it in the spec."""
        return next((size for size in HEAD_DIMS if size >= self.head_dim), self.head_dim)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer, as `rpac init` names them in a spec: all "" unless some have a window and others not."""
        if len(set(self.windows)) == 1:
            return ("",) * self.layers
        return tuple("full" if window is None else "sliding" for window in self.windows)


@dataclass(frozen=True)
class Family:
    """What a model's class does beside its keys. Biases are true, false, or the key that says so.

    `window` is the default of `sliding_window`, or None if no layer has one. With `late`, layers have it only if
    `use_sliding_window` says so, and from `max_window_layers` on. `head_dim` is the default of that key.
    """

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    window: int | None = None
    late: bool = False
    head_dim: int | None = None


FAMILIES: Mapping[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(window=4096),
    "qwen2": Family(qkv_bias=True, window=4096, late=True),
    "qwen3": Family("attention_bias", "attention_bias", qk_norm=True, window=4096, late=True, head_dim=128),
}


def read_config(folder: Path, dtype: str | None = None) -> Config:
    """The model of a checkpoint folder. `dtype` is bfloat16 or float32, by default the one of the checkpoint.

    Raises CheckpointError for a config.json that is missing, broken, or of a model that `model` does not compute.
    """
    values = _Values(folder / "config.json", read_json(folder / "config.json"))
    family = FAMILIES[values.word("model_type", tuple(FAMILIES), "serve a model of one of these families")]
    values.require("quantization_config", None, "serve the checkpoint without quantization")
    values.require("hidden_act", "silu", "serve a model with SwiGLU layers")
    width, q_heads = values.size("hidden_size"), values.size("num_attention_heads")
    return Config(
        vocabulary=values.size("vocab_size"),
        width=width,
        hidden=values.size("intermediate_size"),
        q_heads=q_heads,
        kv_heads=values.size("num_key_value_heads", q_heads),
        head_dim=values.size("head_dim", family.head_dim or width // q_heads),
        windows=_windows(values, family),
        rope=_rope(values),
        epsilon=values.number("rms_norm_eps", 1e-6),
        qkv_bias=values.flag(family.qkv_bias),
        output_bias=values.flag(family.output_bias),
        mlp_bias=values.flag(family.mlp_bias),
        qk_norm=family.qk_norm,
        tied=values.flag("tie_word_embeddings"),
        dtype=dtype
        or values.word(values.name("dtype", "torch_dtype"), DTYPES, f"build the step with DTYPE={DTYPES[0]}"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a file. Raises CheckpointError where the file holds anything else."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(
                path, "", f"{path.stat().st_size} bytes", f"must be at most {MAX_JSON}", "check the file"
            )
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(path, "", "no file", "must exist", "give a folder as model hubs have it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, "", str(error), "must be JSON", "download the file again") from error
    if not isinstance(found, dict):
        raise CheckpointError(path, "", type(found).__name__, "must be a JSON object", "download the file again")
    return found


class _Values:
    """A mapping of config.json. `path` is where in the file it is. A key that is null has no value, and no default."""

    def __init__(self, file: Path, values: Mapping[str, Any], path: str = "") -> None:
        self.file = file
        self.all = values
        self._path = path

    def refuse(self, key: str, allowed: str, fix: str = "check that the file is whole") -> CheckpointError:
        found = json.dumps(self.all[key])[:80] if key in self.all else "no such key"
        return CheckpointError(self.file, self._path + key, found, allowed, fix)

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default if there is none. A key that is null has none."""
        value = self.all.get(key)
        return default if value is None else value

    def name(self, *keys: str) -> str:
        """The first key that has a value, or the first of all."""
        return next((key for key in keys if self.get(key) is not None), keys[0])

    def part(self, key: str) -> _Values:
        found = self.get(key, {})
        if not isinstance(found, dict):
            raise self.refuse(key, "must be a JSON object")
        return _Values(self.file, found, f"{self._path}{key}.")

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise self.refuse(key, "must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e12:
            raise self.refuse(key, "must be a positive number")
        return float(value)

    def flag(self, key: str | bool) -> bool:
        """The value of a key that is true or false, and false if it is missing. A bool stands for itself."""
        value = self.get(key, False) if isinstance(key, str) else key
        if type(value) is not bool:
            raise self.refuse(str(key), "must be true or false")
        return value

    def word(self, key: str, allowed: Collection[str], fix: str) -> str:
        value = self.get(key)
        if not isinstance(value, str) or value not in allowed:
            raise self.refuse(key, f"must be one of {', '.join(allowed)}", fix)
        return value

    def require(self, key: str, value: object, fix: str) -> None:
        """Refuses a key that has another value than this."""
        if self.get(key, value) != value:
            raise self.refuse(key, "must be left out" if value is None else f"must be {json.dumps(value)}", fix)


def _windows(values: _Values, family: Family) -> tuple[int | None, ...]:
    layers = values.size("num_hidden_layers")
    is_off = "sliding_window" in values.all and values.get("sliding_window") is None
    if family.window is None or is_off or (family.late and not values.flag("use_sliding_window")):
        return (None,) * layers
    sizes = {"sliding_attention": values.size("sliding_window", family.window), "full_attention": None}
    first = values.get("max_window_layers", 28) if family.late else 0
    if type(first) is not int:
        raise values.refuse("max_window_layers", "must be an integer")
    kinds = values.get("layer_types") if family.late else None
    if kinds is None:
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in sizes for kind in kinds):
        raise values.refuse("layer_types", f"must be a list of {layers} of {', '.join(sizes)}")
    return tuple(sizes[kind] for kind in kinds)


def _rope(values: _Values) -> Rope:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` as older files have it."""
    part = values.part(values.name("rope_parameters", "rope_scaling"))
    theta = part.number("rope_theta") if part.get("rope_theta") is not None else values.number("rope_theta", 10_000.0)
    for one in (values, part):
        one.require("partial_rotary_factor", 1.0, "serve a model that rotates whole heads")
    kind = part.name("rope_type", "type")
    if part.get(kind, "default") == "default":
        return Rope(theta)
    match part.word(
        kind, ("default", "linear", "llama3", "yarn"), "remove it, if the context that it adds is not needed"
    ):
        case "linear":
            return Rope(theta, Linear(part.number("factor")))
        case "llama3":
            low, high = part.number("low_freq_factor"), part.number("high_freq_factor")
            if low >= high:
                raise part.refuse("low_freq_factor", "must be less than high_freq_factor")
            return Rope(theta, Llama3(part.number("factor"), low, high, part.size("original_max_position_embeddings")))
        case _:
            for key in ("mscale", "mscale_all_dim", "truncate"):
                part.require(key, None, "serve a model without it")
            original = part.size("original_max_position_embeddings", values.get("max_position_embeddings"))
            factor = part.get("attention_factor")
            betas = part.number("beta_fast", 32.0), part.number("beta_slow", 1.0)
            scale = None if factor is None else part.number("attention_factor")
            return Rope(theta, Yarn(part.number("factor"), original, *betas, scale))
