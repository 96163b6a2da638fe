"""Writes a small checkpoint of a Llama with random weights, for a demo and for tests that download nothing.

    PYTHONPATH=examples python -m serve.tiny build/serve-demo-model

The folder is as model hubs have it. Its tokenizer has a token for each byte, so it takes any text, and answers are noise.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from serve.config import read_config
from serve.weights import Weight, table

SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
BEGIN, END = 256, 257
SETTINGS: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256 + len(SPECIAL),
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "torch_dtype": "float32",
}
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_checkpoint(folder: Path, changed: Mapping[str, Any] | None = None, seed: int = 0) -> None:
    """A checkpoint of `SETTINGS`, of which some may be `changed`. The vocabulary must hold 256 bytes and `SPECIAL`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**SETTINGS, **(changed or {})}
    _write(folder / "config.json", settings)
    _write(folder / "generation_config.json", {"bos_token_id": BEGIN, "eos_token_id": END})
    tokens = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": CHAT}
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **tokens})
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = read_config(folder)
    rng = np.random.default_rng(seed)

    def tensor(weight: Weight) -> np.ndarray:
        if weight.name.endswith("norm.weight"):
            values = np.ones(weight.shape, np.float32)
        else:
            fan_in = 1 if weight.name.endswith("embed_tokens.weight") else weight.shape[0]
            values = rng.standard_normal(weight.shape, np.float32) * fan_in**-0.5
        stored = values.T if weight.is_matrix else values
        return np.ascontiguousarray(stored, dtype=ml_dtypes.bfloat16 if config.dtype == "bfloat16" else np.float32)

    weights = jax.tree.leaves(table(config))
    save_file({one.name: tensor(one) for one in weights}, folder / "model.safetensors", {"format": "pt"})


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, then the special ones. A text starts with the first of these."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {one: index for index, one in enumerate((*characters, *SPECIAL))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], BEGIN)]
    )
    return tokenizer


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]))
