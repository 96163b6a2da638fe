"""Writes checkpoints of small models by transformers, and what its own models answer. Runs in an environment without rpac.

    python references.py FOLDER REQUESTS

REQUESTS is a JSON file of [prompt, number of new tokens] pairs. Each model's folder under FOLDER also gets answers.json:
`tokens`, the greedy tokens for each request; `gaps`, by how much the logit of each was above the second; and `chat`, the
tokens of the conversation `CHAT` by the chat template.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüß Gott <|end|> 中!"}]
SIZES: dict[str, Any] = {
    "vocab_size": 261, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 256,
    "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
MODELS = {
    "llama3": LlamaConfig(**SIZES, head_dim=64, rms_norm_eps=1e-5, rope_parameters=LLAMA3),
    "llama-biases-linear": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR),
    "llama-tied-yarn": LlamaConfig(**SIZES, head_dim=64, tie_word_embeddings=True, rope_parameters=YARN),
    "mistral-window": MistralConfig(**SIZES, head_dim=64, sliding_window=40),
    "mistral": MistralConfig(**SIZES, head_dim=64, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-two-kinds": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=40, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True),
}


def main(folder: Path, requests: Path) -> None:
    torch.set_num_threads(1)  # the models are so small that more threads only wait for each other
    asked = json.loads(requests.read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|begin|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = (folder / "template.jinja").read_text()
    for name, config in MODELS.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        for parameter, values in model.named_parameters():
            if values.ndim == 1:  # norms and biases, which would be ones and zeros
                torch.nn.init.normal_(values, 1.0 if "norm" in parameter else 0.0, 0.2)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        answers = [greedy(model, prompt, count) for prompt, count in asked]
        chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        found = {"tokens": [tokens for tokens, _ in answers], "gaps": [gaps for _, gaps in answers], "chat": chat}
        (folder / name / "answers.json").write_text(json.dumps(found))
        print(name, flush=True)


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """The tokens that `generate` gives, and how far each was ahead."""
    found = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=count,
        do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0,
    )  # fmt: skip
    best = torch.cat(found.logits).float().topk(2).values
    return found.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
