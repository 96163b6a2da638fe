"""A peer's keyword arguments held against what a bundle has built in: followed, or refused by name with the spec lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rpac.batch import Limits
from rpac.contract.attention import Attention
from rpac.contract.program import Program, Variant
from rpac.devices.placement import Placement
from rpac.errors import BatchError, SelectionError

Result = tuple[jax.Array, ...]

# What SGLang-JAX and ejkernel give masked scores by default; it weighs 0 in a softmax, as any value of its size does.
DEFAULT_MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)


class Programs(Protocol):
    """What an adapter needs of an engine; `rpac.Engine` is one."""

    name: str
    model: Attention
    kv_layout: str
    limits: Limits
    placement: Placement

    @property
    def programs(self) -> Mapping[Variant, Program]: ...

    def __call__(self, *args: Any, **options: Any) -> Result: ...

    def traced(self, *args: Any, **options: Any) -> Result: ...


class Feature(NamedTuple):
    """An argument that no program follows: the values that ask for nothing, and what programs do."""

    neutral: tuple[Any, ...]
    programs: str


_CONTEXT = "programs take whole sequences, not parts of them"
_MASK = "programs mask by position alone"

FEATURES = {
    "attention_scope": Feature(("full",), "programs attend to old and new tokens at once"),
    "cp_group_size": Feature((None,), _CONTEXT),
    "cp_rank": Feature((None,), _CONTEXT),
    "custom_mask": Feature((None,), _MASK),
    "debug_mode": Feature((False,), "programs attend; they print nothing"),
    "kv_layout": Feature((None, "head_along_sublane"), "programs keep head_dim along lanes"),
    "mask_aligned_to_cu_kv": Feature((False,), _MASK),
    "mask_value": Feature((None, DEFAULT_MASK_VALUE), "what programs mask weighs exactly 0"),
    "q_scale": Feature((None,), "programs take queries as they are, not quantized"),
    "skip_kv_mask": Feature((False,), "programs mask what lies past the end of a sequence"),
    "softmax_dtype": Feature((None,), "programs compute softmax in float32"),
    "transpose_kv_cache": Feature((False,), "programs keep the tokens of a page one after the other"),
    "xai_temperature_len": Feature((None,), "programs do not scale scores by position"),
}


# Arguments that must be what the bundle has built in: the key of a spec's model that each is.
BUILT_IN = {
    "causal": "causal",
    "logits_soft_cap": "soft_cap",
    "sliding_window": "sliding_window",
    "soft_cap": "soft_cap",
    "update_kv_cache": "update_cache",
    "use_causal_mask": "causal",
}


@dataclass(frozen=True)
class Arguments:
    """One engine beside the keyword arguments of `peer`, the package that an adapter stands in for."""

    engine: Programs
    peer: str
    validate: bool = True

    @property
    def bundle(self) -> str:
        """The bundle's name, for messages."""
        return f"bundle {self.engine.name}"

    def require_drafts(self, decode_query_size: int) -> None:
        """Raises unless decode rows, which have up to so many new tokens, have one or as many as the bundle's."""
        built = self.engine.limits.decode_len
        if decode_query_size not in (1, built):
            raise SelectionError(
                f"decode_query_size is {decode_query_size}; must be {built}, the decode_len of {self.bundle}; pass that, or "
                "build with this, where a spec allows it" + spec_lines(serving={"decode_len": decode_query_size})
            )

    def require_neutral(self, **given: Any) -> None:
        """Raises SelectionError for the first argument that asks for what no program does."""
        for name, value in given.items():
            neutral, programs = FEATURES[name]
            if not any(_same(value, one) for one in neutral):
                raise SelectionError(
                    f"{name} is {shown(value)}; must be {' or '.join(map(str, neutral))}: {programs}; no line of a "
                    f"spec adds it: run the layers that need it on the kernel of {self.peer}"
                )

    def require_built(self, **given: Any) -> None:
        """Raises for the first argument of `BUILT_IN` that is not the bundle's."""
        for name, value in given.items():
            key = BUILT_IN[name]
            built = getattr(self.engine.model, key)
            if isinstance(value, jax.core.Tracer):
                raise BatchError(f"{name} is traced; must be {built}: {self.bundle} has it built in; pass a number")
            if (value is None) != (built is None) or (value is not None and float(value) != built):
                line = bool(value) if isinstance(built, bool) else value
                build = "with this, where a spec allows it" + spec_lines(model={key: line})
                if value is None:
                    build = f"without model.{key}"
                raise SelectionError(
                    f"{name} is {value}; must be {built}, the {key} of {self.bundle}; pass that, or build {build}"
                )

    def sinks(self, name: str, value: Any) -> dict[str, Any]:
        """The engine's argument for a peer's sinks. Raises SelectionError where one of the two has them alone."""
        if (value is not None) != self.engine.model.sinks:
            has = "takes sinks" if value is None else "has no sinks"
            raise SelectionError(
                f"{name} is {shown(value)}, and {self.bundle} {has}; pass what it takes, or build with"
                + spec_lines(model={"sinks": value is not None})
            )
        return {} if value is None else {"sinks": value}

    def kv_scales(self, k_scale: Any, v_scale: Any) -> dict[str, Any]:
        """The engine's argument for a peer's scales of stored K and V; a scale that is left out is 1, as the peers have it.

        Raises SelectionError for a scale that a bundle without them cannot follow.
        """
        model = self.engine.model
        given = {"k_scale": k_scale, "v_scale": v_scale}
        if model.kv_scale is None:
            for name, value in given.items():
                if value is not None and (isinstance(value, jax.core.Tracer) or float(value) != 1):
                    self._refuse_scale(name, value)
            return {}
        heads = (model.kv_heads,) if model.kv_scale == "head" else ()
        xp: Any = jnp if traced(tuple(given.values())) else np
        scales = [xp.asarray(1 if value is None else value, np.float32) for value in given.values()]
        for name, scale in zip(given, scales, strict=True):
            if scale.shape not in ((), heads):
                each = f" or float32{list(heads)}" if heads else ""
                raise BatchError(
                    f"{name} is float32{list(scale.shape)}; must be a number{each}, as {self.bundle} has it"
                )
        return {"kv_scales": xp.stack([xp.broadcast_to(scale, heads) for scale in scales])}

    def _refuse_scale(self, name: str, value: Any) -> NoReturn:
        found = "traced" if isinstance(value, jax.core.Tracer) else shown(value)
        if self.engine.model.quantized:
            fix = "build with" + spec_lines(model={"kv_scale": "tensor"})
        elif name == "k_scale":
            fix = "multiply sm_scale by it, for scores are linear in K, and build with that"
        else:
            fix = "multiply the output by it, for it is linear in V"
        raise SelectionError(f"{name} is {found}; must be None or 1: {self.bundle} has no scales of K and V; {fix}")

    def require_scale(self, name: str, value: Any) -> None:
        """Raises unless the scale of the scores is the bundle's, to the precision of float32."""
        built = self.engine.model.sm_scale
        if isinstance(value, jax.core.Tracer):
            raise BatchError(f"{name} is traced; must be a number: {self.bundle} has {built} built in; pass a float")
        if not math.isclose(float(value), built, rel_tol=1e-6):
            raise SelectionError(
                f"{name} is {float(value)}; must be {built}, the sm_scale of {self.bundle}; pass that, or build with"
                + spec_lines(model={"sm_scale": float(value)})
            )

    def require_out_dtype(self, out_dtype: Any) -> None:
        """Raises unless the output's dtype is left open or the queries'."""
        built = self.engine.model.q_dtype
        if out_dtype is not None and np.dtype(out_dtype).name != built:
            raise SelectionError(
                f"out_dtype is {np.dtype(out_dtype).name}; must be None or {built}: programs accumulate in float32 and "
                "return the dtype of queries; no line of a spec adds another; convert the output"
            )


def spec_lines(**sections: Mapping[str, Any]) -> str:
    """The end of a refusal: keys and values of a spec by section, such as `model={"sinks": True}`, each on a line of its own."""
    lines = []
    for section, keys in sections.items():
        values = {key: str(value).lower() if isinstance(value, bool) else value for key, value in keys.items()}
        lines += [f"{section}:", *(f"  {key}: {value}" for key, value in values.items())]
    return "".join(f"\n{line}" for line in lines)


def require_axes(names: Sequence[str], arrays: Sequence[Any], axes: Sequence[int]) -> None:
    """Raises BatchError for the first that is no array of so many axes."""
    for name, array, wanted in zip(names, arrays, axes, strict=True):
        if not hasattr(array, "dtype") or len(array.shape) != wanted:
            raise BatchError(f"{name} is {shown(array)}; must be an array of {wanted} axes; see docs/batch-contract.md")


def traced(arrays: Sequence[Any]) -> bool:
    """Whether the call is inside a trace: jit, shard_map and the like."""
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


def shown(value: Any) -> str:
    """A value of an argument in an error: the dtype and shape of an array, else the value."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return repr(value) if not shape or dtype is None else f"{dtype}{list(shape)}"


def _same(value: Any, neutral: Any) -> bool:
    if neutral is None or not isinstance(value, (bool, int, float, str, np.generic)):
        return value is neutral
    return bool(value == neutral)
