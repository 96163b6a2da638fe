"""What a model's class does that its config.json does not say: a row a family, by `model_type`.

A family that does what its keys say needs no more than its name in `PLAIN`. The scales, sinks, caps and position biases of all
these were searched for in the code of the models in transformers 5.24; that of models which it does not have (such as
Baichuan, ChatGLM, Grok and InternLM) was not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Defaults = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One row.

    defaults      what the class takes for keys that are left out
    sm_scale      a scale that no key gives; `scale_why` says why
    scale_dims    the scale is (head_dim times that) ** -0.5
    alibi_unless  has ALiBi unless a key has a value
    period        of so many layers in a row the last one has no window, where `layer_types` does not say otherwise
    late          only layers from `max_window_layers` on have a window
    attentions    how many a layer has, each with a cache of its own
    sinks         the types of layers that have them
    encoder       sees ahead unless `is_decoder`
    words         what entries of `layer_types` mean, where that differs from `rpac.init.layers`
    missing       what it needs and no kernel of rpac has
    notes         what is left to the caller
    """

    defaults: Defaults = field(default_factory=dict)
    sm_scale: float | None = None
    scale_why: str = ""
    scale_dims: float = 1.0
    alibi_unless: tuple[str, Any] | None = None
    period: int | None = None
    late: bool = False
    attentions: int = 1
    sinks: tuple[str, ...] = ()
    encoder: bool = False
    words: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""
    notes: tuple[str, ...] = ()


def _heads(q_heads: int, kv_heads: int, head_dim: int | None = None, **more: Any) -> dict[str, Any]:
    """The defaults of a class that follows Llama's names."""
    return {
        "num_attention_heads": q_heads,
        "num_key_value_heads": kv_heads,
        **({} if head_dim is None else {"head_dim": head_dim}),
        **more,
    }


def _sizes(width: int, heads: int, layers: int, inner: int, vocab: int, length: int, **more: Any) -> dict[str, Any]:
    """The defaults of a class, in the order of most config.json."""
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": length,
        **more,
    }


_ALL: Final = ("full", "sliding", "chunked")
_STATE: Final = "layers without attention over a cache of keys and values"

_TIED: Final = {"tie_word_embeddings": True}
_GEMMA3: Final = _heads(
    8, 4, 256, hidden_size=2304, num_hidden_layers=26, sliding_window=4096, query_pre_attn_scalar=256,
    max_position_embeddings=131072, vocab_size=262208, intermediate_size=9216, hidden_activation="gelu_pytorch_tanh", **_TIED,
)  # fmt: skip
_GEMMA4: Final = Family(
    _heads(8, 4, 256, hidden_size=2304, num_hidden_layers=30, sliding_window=512, global_head_dim=512),
    1.0, "its class scales no score", period=6,
)  # fmt: skip
_UNGATED: Final = {"hidden_act": "gelu"}

FAMILIES: Final[Mapping[str, Family]] = {
    # Gemma
    "gemma": Family(_heads(16, 16, 256, hidden_size=3072, max_position_embeddings=8192, **_TIED)),
    **dict.fromkeys(("gemma2", "vaultgemma"), Family(
        _heads(
            8, 4, 256, hidden_size=2304, num_hidden_layers=26, sliding_window=4096, query_pre_attn_scalar=256,
            attn_logit_softcapping=50.0, max_position_embeddings=8192, **_TIED,
        ),
        period=2,
    )),
    **dict.fromkeys(("gemma3", "gemma3_text", "shieldgemma2"), Family(_GEMMA3, period=6)),
    **dict.fromkeys(
        ("gemma3n", "gemma3n_text"),
        Family(
            _heads(
                8, 2, 256, hidden_size=2048, num_hidden_layers=35, sliding_window=512, num_kv_shared_layers=15,
                max_position_embeddings=32768,
            ),
            1.0, "its class scales no score", period=5,
        ),
    ),
    **dict.fromkeys(
        ("gemma4", "gemma4_text", "gemma4_unified_text", "diffusion_gemma_text", "gemma4_assistant"), _GEMMA4
    ),
    # Windows in some layers
    **dict.fromkeys(("cohere2", "cohere2_moe"), Family({"sliding_window": 4096}, period=4)),
    **dict.fromkeys(("exaone4", "exaone_moe", "olmo3"), Family(period=4)),
    "afmoe": Family({"sliding_window": 1024}, period=4),
    "cwm": Family(period=4),
    **dict.fromkeys(
        ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text",
         "qwen2_5_omni_text", "qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_omni_moe_text", "dots1", "smollm3"),
        Family({"use_sliding_window": False, "max_window_layers": 28}, late=True),
    ),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), Family({"full_attention_interval": 4})
    ),
    # Sinks
    "gpt_oss": Family(
        _heads(64, 8, 64, hidden_size=2880, num_hidden_layers=36, sliding_window=128), period=2, sinks=_ALL
    ),
    **dict.fromkeys(("granite_swa", "granitemoe_swa", "flint"), Family(sinks=_ALL)),
    "mimo_v2_flash": Family(
        sinks=("sliding",), notes=("Values are as long as `v_head_dim` says: pad them with zeros, and cut the output.",)
    ),
    # Chunks
    **dict.fromkeys(
        ("llama4", "llama4_text"),
        Family(
            _heads(
                40, 8, 128, hidden_size=5120, num_hidden_layers=48, attention_chunk_size=8192, no_rope_layer_interval=4,
                max_position_embeddings=131072,
            ),
            period=4,
            notes=("The caller scales the queries of full layers by their position (`attn_temperature_tuning`).",),
        ),
    ),
    # Other scales
    "gpt_neo": Family({"window_size": 256, **_UNGATED}, 1.0, "its class scales no score"),
    "dia_decoder": Family(_heads(16, 4, 128), 1.0, "its class scales no score"),
    # Older names
    **dict.fromkeys(
        ("gpt2", "gpt-sw3", "openai-gpt"),
        Family({"n_head": 12, "n_embd": 768, "n_layer": 12, "activation_function": "gelu", **_TIED}),
    ),
    "gpt_bigcode": Family({"multi_query": True, "activation_function": "gelu"}),
    **dict.fromkeys(("gptj", "codegen"), Family({"n_head": 16, "n_embd": 4096, "activation_function": "gelu"})),
    **dict.fromkeys(("falcon", "RefinedWeb", "RefinedWebModel"), Family({"multi_query": True, "activation": "gelu"}, notes=(
        "Where `alibi` is true, its class multiplies the biases by head_dim ** -0.5 too: pass slopes times that.",
    ))),
    "baichuan": Family(alibi_unless=("hidden_size", 4096)),
    **dict.fromkeys(("zamba", "zamba2"), Family(scale_dims=0.5)),
    "jetmoe": Family(
        notes=("Its query heads repeat the KV heads in turn: put those of one KV head side by side before the call.",)
    ),
    "bloom": Family({"alibi": True, **_UNGATED, **_TIED}),
    "mpt": Family({"attn_config.alibi": False, **_UNGATED}),
    "dbrx": Family({"attn_config.kv_n_heads": 1}),
    "jais": Family({"alibi": True, **_UNGATED}),
    # Caches of one vector a token
    "deepseek_v2": Family({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}),
    "longcat_flash": Family(attentions=2),
    # Some layers keep a state
    "jamba": Family({"attn_layer_period": 8, "attn_layer_offset": 4}),
    "recurrent_gemma": Family({"attention_window_size": 2048}, words={"attention": "sliding"}),
    # Encoders
    **dict.fromkeys(
        ("bert", "bert-generation", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "eurobert", "megatron-bert",
         "mpnet", "nomic_bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta",
         "xlm-roberta-xl", "xmod", "big_bird", "modernbert", "albert", "esm"),
        Family({**_UNGATED}, encoder=True),
    ),
    # What rpac has not
    "reformer": Family(missing="attention to tokens in the same hash bucket (LSH)"),
    "xlnet": Family(missing="two streams of queries with relative positions (Transformer-XL)"),
    "xlm": Family({**_UNGATED}, encoder=True),
    "prophetnet": Family(missing="several streams of queries with learned biases of the scores by position"),
    "diffllama": Family(missing="differential attention, the difference of two softmaxes"),
    "doge": Family(missing="masks that follow from the values (dynamic mask attention)"),
    "cpmant": Family(missing="learned biases of the scores by position"),
    "blt": Family(missing="a model of several decoders over patches of bytes"),
    "dory": Family(missing="a cache of keys and values for each pass over the same layers"),
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "codestral_mamba", "rwkv", "rwkv5", "rwkv6", "rwkv7", "xlstm", "retnet"),
        Family(missing=_STATE),
    ),
    **dict.fromkeys(("paligemma", "pi0"), Family(missing="a prefix whose tokens see each other, before causal ones")),
    **dict.fromkeys(
        ("t5gemma2", "t5gemma2_decoder"), Family(missing="one softmax over the tokens of a decoder and of its encoder")
    ),
    "minimax_m3_vl_text": Family(missing="sparse attention to blocks that an indexer chooses"),
}  # fmt: skip

# What the classes take for keys that a part of a larger config leaves out: hubs write of such parts only what differs.
_OF_PARTS: Final[Mapping[str, Defaults]] = {
    "llama": _sizes(4096, 32, 32, 11008, 32000, 2048),
    "mistral": _sizes(4096, 32, 32, 14336, 32000, 131072, num_key_value_heads=8, sliding_window=4096),
    "qwen2": _sizes(4096, 32, 32, 22016, 151936, 32768),
    "qwen3": _sizes(4096, 32, 32, 22016, 151936, 32768, num_key_value_heads=32, head_dim=128),
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text"), _sizes(8192, 64, 80, 29568, 152064, 32768, num_key_value_heads=8)
    ),
    "qwen3_vl_text": _sizes(4096, 32, 32, 22016, 151936, 128000, num_key_value_heads=32, head_dim=128),
    "cohere2": _sizes(8192, 64, 40, 22528, 256000, 8192, num_key_value_heads=64, head_dim=128, **_TIED),
    "opt": _sizes(768, 12, 12, 3072, 50272, 2048, activation_function="relu", **_TIED),
}

# These do what their keys say, by the names that most families use.
_NAMES: Final = """
    apertus apertus1p5_text arcee aria_text axk1 bailing_hybrid bailing_moe bamba bart beam bigbird_pegasus biogpt bitnet
    blenderbot blenderbot-small blip_text_model blip_2_qformer canary_decoder chameleon chatglm cohere cohere_asr
    cohere_compass_text cosmos3_edge_text cosmos3_omni_text ctrl deepseek deepseek_ocr2_text deepseek_v3 emu3_text_model
    ernie4_5 ernie4_5_moe ernie4_5_vl_moe_text evolla exaone falcon_h1 flex_olmo florence2 fsmt fuyu git glm glm4 glm46v_text
    glm4_moe glm4_moe_lite glm4v_moe_text glm4v_text glm_ocr_text gpt_neox gpt_neox_japanese granite granitemoe granitemoehybrid
    granitemoeshared grok grok-1 grok-2 helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax idefics internlm internlm2 internlm3
    iquestcoder jais2 kimi_k2 kimi_linear kosmos_2_5_text_model kosmos_2_text_model kyutai_speech_to_text laguna
    lara_mini led lfm2 lfm2_moe lfm3 lfm3_text llama m2m_100 marian mbart mellum minicpm minicpm3 minimax
    minimax_m1 minimax_m2 minimax_text_01 ministral ministral3 mistral mistral4 mixtral mllama_text_model modernbert-decoder
    molmo2_text moonshine moshi musicgen_decoder musicgen_melody_decoder mvp nanochat nemotron nemotron-nas nemotron_h
    nllb-moe olmo olmo2 olmo_hybrid olmoe opt orion paddleocr_vl_text pegasus pegasus_x persimmon phi phi3 phi4_multimodal
    phimoe plbart qwen sarvam_mla sarvam_moe seed_oss solar_open speech_to_text stablelm starcoder2 step3p5 trocr whisper
    xglm youtu yi zaya
    """
PLAIN: Final = frozenset(_NAMES.split())

UNKNOWN: Final = Family()

# Keys that ask for what no kernel of rpac has; a pair of key and value where only that value does.
ABSENT: Final[Mapping[str | tuple[str, Any], str]] = {
    "index_topk": "sparse attention to tokens that an indexer chooses",
    "index_topk_blocks": "sparse attention to blocks that an indexer chooses",
    "indexer_budget": "sparse attention to tokens that an indexer chooses",
    "sparse_config": "sparse attention to blocks that are chosen by their scores",
    "sparse_attention_config": "sparse attention",
    "compress_rates": "attention to compressed tokens",
    "blocksparse_block_size": "block-sparse masks",
    ("attention_type", "block_sparse"): "block-sparse masks",
    "relative_attention_num_buckets": "learned biases of the scores by position",
    "position_bias_num_buckets": "learned biases of the scores by position",
    "d_rel": "learned biases of the scores by position",
    ("position_embedding_type", "relative_key"): "learned biases of the scores by position",
    ("position_embedding_type", "relative_key_query"): "learned biases of the scores by position",
    "dual_chunk_attention_config": "positions that are counted anew in each chunk (dual chunk attention)",
    ("use_cla", True): "keys and values that layers share by a factor (cross-layer attention)",
    ("attn_config.prefix_lm", True): "a prefix whose tokens see each other, before causal ones",
    "block_configs": "heads that differ from layer to layer by block_configs",
}


def family_of(model_type: str) -> tuple[Family, bool]:
    """The row of a model type, and whether rpac knows it."""
    known = FAMILIES.get(model_type)
    return (known or UNKNOWN, known is not None or model_type in PLAIN)


def defaults_of(model_type: str, part: bool) -> Defaults:
    """What a class takes for keys that are left out; `part`: of a config in a larger one."""
    family, _ = family_of(model_type)
    return {**(_OF_PARTS.get(model_type, {}) if part else {}), **family.defaults}
