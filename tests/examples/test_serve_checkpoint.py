"""A checkpoint that cannot be served is refused with the file, the place in it, what was found, and the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from serve.bundle import config_for, open_bundle
from serve.checkpoint import load_params
from serve.config import Config, read_config
from serve.errors import CheckpointError
from serve.rope import Linear, Llama3, Rope, Yarn
from serve.text import Text
from serve.tiny import SETTINGS, write_checkpoint
from served import SMALL

from rpac.bundle import read_manifest

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def change(folder: Path, name: str = "config.json", **changed: Any) -> None:
    """Changes keys of a JSON file. A key that becomes ... is removed."""
    data = {**json.loads((folder / name).read_text()), **changed}
    (folder / name).write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def read(folder: Path, **changed: Any) -> Config:
    change(folder, **changed)
    return read_config(folder)


def test_keys_of_config_json_become_a_model(folder: Path) -> None:
    assert read(folder).windows == (None, None)
    mistral = read(folder, model_type="mistral", sliding_window=96, num_key_value_heads=None, head_dim=None)
    assert (mistral.windows, mistral.kinds) == ((96, 96), ("", ""))
    assert (mistral.kv_heads, mistral.head_dim, mistral.kernel_head_dim) == (8, 16, 64)
    assert read(folder, sliding_window=None).windows == (None, None)
    assert read(folder, sliding_window=...).windows == (4096, 4096)
    qwen2 = read(folder, model_type="qwen2", sliding_window=32, max_window_layers=1)
    assert (qwen2.windows, qwen2.qkv_bias, qwen2.output_bias) == ((None, None), True, False)
    assert read(folder, use_sliding_window=True).kinds == ("full", "sliding")
    assert read(folder, layer_types=["sliding_attention", "full_attention"]).windows == (32, None)
    qwen3 = read(folder, model_type="qwen3", use_sliding_window=False, tie_word_embeddings=True)
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim, qwen3.tied) == (True, False, 128, True)
    llama = read(folder, model_type="llama", attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias, llama.head_dim) == (True, True, True, 16)


def test_the_scaling_of_rotary_positions_is_read_from_old_and_new_keys(folder: Path) -> None:
    assert read(folder).rope == Rope(10_000.0)
    llama3 = read(folder, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    assert llama3.rope == Rope(5e5, Llama3(**LLAMA3))
    assert read(folder, rope_scaling={"type": "linear", "factor": 2}).rope == Rope(5e5, Linear(2.0))
    new = read(
        folder, rope_scaling=..., rope_theta=..., rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, **YARN}
    )
    assert new.rope == Rope(1e6, Yarn(**YARN))
    assert read(folder, rope_parameters={"rope_type": "default", "rope_theta": 7.0}).rope == Rope(7.0)


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, 'model_type: found "gpt2"; must be one of llama, mistral, qwen2, qwen3'),
    ({"model_type": ...}, "model_type: found no such key; must be one of llama"),
    ({"hidden_size": "big"}, 'hidden_size: found "big"; must be a positive integer'),
    ({"num_hidden_layers": ...}, "num_hidden_layers: found no such key; must be a positive integer"),
    ({"rms_norm_eps": 0}, "rms_norm_eps: found 0; must be a positive number"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings: found 1; must be true or false"),
    ({"hidden_act": "gelu"}, 'hidden_act: found "gelu"; must be "silu"; serve a model with SwiGLU layers'),
    ({"quantization_config": {"bits": 4}}, 'quantization_config: found {"bits": 4}; must be left out; serve the'),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5; must be 1.0"),
    ({"rope_scaling": {"type": "longrope"}}, 'rope_scaling.type: found "longrope"; must be one of default, linear, ll'),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: found no such key; must be a positive number"),
    ({"rope_scaling": {"type": "yarn", **YARN, "mscale": 1}}, "rope_scaling.mscale: found 1; must be left out"),
    ({"rope_scaling": [4]}, "rope_scaling: found [4]; must be a JSON object"),
    ({"torch_dtype": "float16"}, 'torch_dtype: found "float16"; must be one of bfloat16, float32'),
    ({"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]}, "must be a list of 2 of"),
]


@pytest.mark.parametrize(
    ("changed", "message"), BAD_CONFIGS, ids=lambda case: "-".join(case) if isinstance(case, dict) else ""
)
def test_a_config_that_is_not_supported_is_refused_by_its_key(
    folder: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError) as found:
        read(folder, **changed)
    assert str(found.value).startswith(f"{folder}/config.json: ")
    assert message in str(found.value)


def test_a_folder_without_its_files_is_refused(folder: Path) -> None:
    config = read_config(folder)
    for name, use in (
        ("model.safetensors", lambda: load_params(folder, config)),
        ("tokenizer.json", lambda: Text(folder)),
        ("config.json", lambda: read_config(folder)),
    ):
        (folder / name).write_text("{")
        with pytest.raises(CheckpointError, match=f"{name}: found .*; must be a?"):
            use()
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=r"must exist|must have one of them"):
            use()


Tensors = dict[str, Any]
FIRST = "model.layers.0."


def _rename(tensors: Tensors) -> None:
    tensors[f"{FIRST}self_attn.q_projection.weight"] = tensors.pop(f"{FIRST}self_attn.q_proj.weight")


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (
        lambda tensors: tensors.pop(f"{FIRST}mlp.up_proj.weight"),
        "model: model.layers.0.mlp.up_proj.weight: found no such tensor (1 are missing); must exist, by config.json",
    ),
    "renamed": (_rename, "found no such tensor, but model.layers.0.self_attn.q_projection.weight (1 are missing)"),
    "extra": (
        lambda tensors: tensors.update({f"{FIRST}self_attn.q_proj.bias": np.zeros(512, np.float32)}),
        "self_attn.q_proj.bias: found a tensor that this model does not have (1 such); must be none, by config.json",
    ),
    "shape": (
        lambda tensors: tensors.update({"lm_head.weight": np.zeros((261, 64), np.float32)}),
        "lm_head.weight: found the shape [261, 64]; must be [261, 128], by config.json; correct config.json",
    ),
    "dtype": (
        lambda tensors: tensors.update({"model.norm.weight": np.zeros(128, np.int8)}),
        "model.norm.weight: found the dtype I8; must be one of BF16, F16, F32; serve a checkpoint without quantization",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_tensor_that_does_not_fit_is_refused_by_its_name(folder: Path, case: str) -> None:
    damage, message = BAD_TENSORS[case]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as found:
        load_params(folder, read_config(folder))
    assert message in str(found.value)


def test_several_files_are_read_by_their_index(folder: Path) -> None:
    config = read_config(folder)
    whole = load_params(folder, config)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    index = {name: f"{at}.safetensors" for at, half in enumerate(halves) for name in half}
    for at, half in enumerate(halves):
        save_file(half, folder / f"{at}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert np.array_equal(load_params(folder, config)["head"], whole["head"])
    save_file(dict(list(halves[1].items())[1:]), folder / "1.safetensors")
    with pytest.raises(CheckpointError, match=r"1.safetensors: .*: found no such tensor; must exist, by model.safet"):
        load_params(folder, config)
    (folder / "1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1.safetensors: found no file; must exist, by model.safetensors.index"):
        load_params(folder, config)
    change(folder, "model.safetensors.index.json", weight_map={"a": "../a.safetensors"})
    with pytest.raises(CheckpointError, match="weight_map: found a path; must be names of files in this folder"):
        load_params(folder, config)


def test_tensors_that_follow_from_others_are_left_out(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), f"{FIRST}self_attn.rotary_emb.inv_freq": np.zeros(32, np.float32)}, path)
    params = load_params(folder, read_config(folder))
    assert params["head"].shape == (128, 261)
    tied = read(folder, tie_word_embeddings=True)
    assert "head" not in load_params(folder, tied)


def test_weights_are_converted_to_the_dtype_of_the_bundle(folder: Path) -> None:
    exact = load_params(folder, read_config(folder))["head"]
    rounded = load_params(folder, read_config(folder, "bfloat16"))["head"]
    assert rounded.dtype == ml_dtypes.bfloat16
    assert np.array_equal(rounded, np.asarray(exact).astype(ml_dtypes.bfloat16))


def test_a_bundle_of_another_model_is_refused(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    def refused(**changed: Any) -> str:
        write_checkpoint(tmp_path / "other", {**SMALL, **changed})
        with pytest.raises(CheckpointError) as found:
            open_bundle(str(bundle), tmp_path / "other", "cpu")
        return str(found.value)

    assert (
        "small.rpac: model.q_heads: found 8; must be 4, by config.json; make the spec of this checkpoint with"
        in refused(num_attention_heads=4)
    )
    assert "model.head_dim: found 64; must be 128" in refused(head_dim=128)
    assert "model.sm_scale: found 0.125; must be 0.176777" in refused(head_dim=32)
    assert "model.sliding_window: found None; must be 8" in refused(model_type="mistral", sliding_window=8)
    qwen2 = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    assert "layers: found one kind; must be full, sliding" in refused(head_dim=64, **qwen2)
    write_checkpoint(tmp_path / "other", {**SMALL, **qwen2, "sliding_window": 128})  # hides nothing of 128 tokens
    assert config_for(str(bundle), read_manifest(bundle), tmp_path / "other").kinds == ("", "")
    assert config_for(str(bundle), read_manifest(bundle), checkpoint).dtype == "float32"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder: Path) -> None:
    change(folder, vocab_size=SETTINGS["vocab_size"] - 1)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: found the token 260; must be below vocab_size, 260"):
        Text(folder)
