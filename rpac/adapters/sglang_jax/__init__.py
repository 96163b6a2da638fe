"""In place of SGLang-JAX's attention: `install` into 0.0.2, and a function for its kernel and for its main branch's alone."""

from rpac.adapters.sglang_jax.grouped import ragged_paged_attention, ragged_paged_attention_v3
from rpac.adapters.sglang_jax.install import TESTED, install

__all__ = ["TESTED", "install", "ragged_paged_attention", "ragged_paged_attention_v3"]
