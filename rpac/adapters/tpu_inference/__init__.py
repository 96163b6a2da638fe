"""In place of tpu-inference's attention (vLLM on TPU), version 0.32.0: `install`, and a function for each kernel alone."""

from rpac.adapters.tpu_inference.grouped import (
    batched_ragged_paged_attention,
    ragged_paged_attention,
    ragged_paged_attention_hd64,
)
from rpac.adapters.tpu_inference.install import TESTED, install
from rpac.adapters.tpu_inference.latent import mla_ragged_paged_attention

__all__ = [
    "TESTED",
    "batched_ragged_paged_attention",
    "install",
    "mla_ragged_paged_attention",
    "ragged_paged_attention",
    "ragged_paged_attention_hd64",
]
