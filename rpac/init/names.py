"""What the config.json of different models call the same thing. The first name that has a value counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

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
    "head_dim", "attention_head_dim", "kv_channels", "attention_head_size", "d_head", "dim_head", "head_size",
)  # fmt: skip
LENGTH: Final = (
    "max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "max_sequence_length", "model_max_length",
    "max_target_positions", "max_decoder_position_embeddings", "max_text_positions",
)  # fmt: skip
ENCODER_LENGTH: Final = ("max_source_positions", "max_encoder_position_embeddings", "max_speech_positions")
SOFT_CAP: Final = ("attn_logit_softcapping", "max_attn_value")
SCALE: Final = ("attention_multiplier", "attn_output_multiplier", "attn_config.softmax_scale", "softmax_scale")
POSITIONS: Final = ("rope_parameters", "rope_scaling")
LATENT: Final = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim")

LAYERS: Final = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "decoder_num_hidden_layers", "num_decoder_layers",
    "layers",
)  # fmt: skip
WINDOW: Final = (
    "sliding_window", "sliding_window_size", "attention_window_size", "window_size", "attn_config.sliding_window_size",
)  # fmt: skip
CHUNK: Final = "attention_chunk_size"
LISTS: Final = ("layer_types", "layers_block_type", "attention_layers", "block_types")
# How many layers there are to a full one, by what the others are.
PERIOD: Final[Mapping[str, tuple[str, ...]]] = {
    "sliding": ("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers"),
    "chunked": ("no_rope_layer_interval",),
}
# What replaces keys of the model in one kind of layers: key of a spec, then its names.
OF_KIND: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "sliding": {
        "q_heads": ("swa_num_attention_heads", "num_sliding_attention_heads"),
        "kv_heads": ("swa_num_key_value_heads",),
        "head_dim": ("swa_head_dim",),
    },
    "full": {"kv_heads": ("num_global_key_value_heads",), "head_dim": ("global_head_dim",)},
    "cross": {
        "q_heads": ("cross_num_attention_heads",),
        "kv_heads": ("cross_num_key_value_heads",),
        "head_dim": ("cross_head_dim",),
    },
}
PER_LAYER: Final = {"num_attention_heads": "q_heads", "num_key_value_heads": "kv_heads", "head_dim": "head_dim"}

# Keys that look like attention and are read elsewhere, or change nothing that a kernel does.
_OTHERS: Final = (
    "_attn_implementation", "alibi", "attention_bias", "attention_dropout", "attn_dropout", "attn_implementation", "attn_pdrop",
    "final_logit_softcapping", "max_window_layers", "num_attention_heads_per_layer", "num_kv_shared_layers",
    "output_attentions", "query_pre_attn_scalar", "scale_attn_weights", "use_sliding_window", "v_head_dim",
)  # fmt: skip


def _all_of(names: Mapping[str, Iterable[str]]) -> Iterable[str]:
    return (name for one in names.values() for name in one)


READ: Final = frozenset((
    *Q_HEADS, *KV_HEADS, *WIDTH, *HEAD_DIM, *LENGTH, *ENCODER_LENGTH, *SOFT_CAP, *SCALE, *POSITIONS, *LATENT, *LAYERS, *WINDOW,
    CHUNK, *LISTS, *_all_of(PERIOD), *(name for one in OF_KIND.values() for name in _all_of(one)), *_OTHERS,
))  # fmt: skip
