"""Steps of the Llama family for `rpac predict --step`: the model of the example server, greedy, with the sizes of public models.

Sizes are those of each model's config.json. Weights and caches are bfloat16.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from serve import model, weights
from serve.config import Config
from serve.rope import Llama3, Rope

LLAMA3_8B: Final = Config(128256, 4096, 14336, 32, 8, 128, (None,) * 32, Rope(500_000.0), 1e-5)
"""meta-llama/Meta-Llama-3-8B."""
LLAMA31_8B: Final = Config(
    128256, 4096, 14336, 32, 8, 128, (None,) * 32, Rope(500_000.0, Llama3(8.0, 1.0, 4.0, 8192)), 1e-5
)
"""meta-llama/Llama-3.1-8B."""
LLAMA3_70B: Final = Config(128256, 8192, 28672, 64, 8, 128, (None,) * 80, Rope(500_000.0), 1e-5)
"""meta-llama/Meta-Llama-3-70B."""
QWEN3_8B: Final = Config(151936, 4096, 12288, 32, 8, 128, (None,) * 36, Rope(1_000_000.0), qk_norm=True)
"""Qwen/Qwen3-8B."""
QWEN3_32B: Final = Config(151936, 5120, 25600, 64, 8, 128, (None,) * 64, Rope(1_000_000.0), qk_norm=True)
"""Qwen/Qwen3-32B."""

Pair = tuple[Callable[..., Any], Callable[..., Any]]


def greedy(config: Config) -> Pair:
    """A step that gives the likeliest token after each row of the batch, int32 `[max_num_seqs]`; and its arrays."""

    def step(attend: Any, params: Any, caches: Any, token_ids: Any, positions: Any, batch: Any) -> Any:
        x, caches = model.forward(config, attend, params, caches, token_ids, positions)
        rows = jnp.clip(batch.cu_q_lens[1:] - 1, 0, len(token_ids) - 1)
        return jnp.argmax(model.logits(config, params, x[rows]), axis=-1).astype(jnp.int32), caches

    def step_arrays(kind: str, tokens: int, limits: Any) -> dict[str, Any]:
        params = weights.shapes(config)
        return {"params": params, "caches": list(config.kinds), "shardings": {"params": weights.cuts(config)}}

    return step, step_arrays


MODELS: Final = {
    "llama3_8b": LLAMA3_8B,
    "llama31_8b": LLAMA31_8B,
    "llama3_70b": LLAMA3_70B,
    "qwen3_8b": QWEN3_8B,
    "qwen3_32b": QWEN3_32B,
}


def __getattr__(name: str) -> Callable[..., Any]:
    """`llama3_8b` and `llama3_8b_arrays`, and the like of each model; `llama3_8b_l4` is its first 4 layers."""
    match = re.fullmatch(r"(\w+?)(?:_l(\d+))?(_arrays)?", name)
    if match is None or match[1] not in MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config = MODELS[match[1]]
    if match[2]:
        config = replace(config, windows=config.windows[: int(match[2])])
    step, step_arrays = greedy(config)
    return step_arrays if match[3] else step
