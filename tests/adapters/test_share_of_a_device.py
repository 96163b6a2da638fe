"""What `rpac init --per-device` writes can be installed into a server; what it writes for all devices cannot, and says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import yaml
from fake import FakeEngine
from fake_server import RPA_V3, serving, serving_sglang

from rpac.adapters import sglang_jax, tpu_inference
from rpac.errors import SelectionError
from rpac.init.draft import Draft, make_draft
from rpac.init.servers import SERVERS, Request

LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 128256, "num_attention_heads": 64,
    "num_key_value_heads": 8, "num_hidden_layers": 80, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_235B = {
    **LLAMA_70B, "model_type": "qwen3_moe", "hidden_size": 4096, "head_dim": 128, "num_key_value_heads": 4,
    "num_hidden_layers": 94, "num_experts": 128, "moe_intermediate_size": 1536, "max_position_embeddings": 40960,
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_attention_heads": 128, "num_hidden_layers": 61, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "max_position_embeddings": 16384,
}  # fmt: skip
MODELS = {"70B": LLAMA_70B, "Qwen3 235B": QWEN3_235B, "DeepSeek": DEEPSEEK}


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests of the process need them


def drafted(folder: Path, name: str, like: str, per_device: bool) -> Draft:
    (folder / "config.json").write_text(json.dumps(MODELS[name]))
    given = {"max_model_len": 8192, "page_size": 128, "memory": 0.9, "max_num_seqs": 64}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 140 << 30}}))
    return make_draft(folder, Request(SERVERS[like], "tpu7x", 8, given, per_device=per_device), "rpac init")


def engine_of(draft: Draft) -> FakeEngine:
    engine = FakeEngine.of(draft.spec)
    engine.placement = SimpleNamespace(mesh=draft.spec.mesh)
    return engine


@pytest.mark.parametrize("name", MODELS)
def test_a_share_is_installed_into_vllm_and_all_devices_are_refused_with_the_lines_of_the_share(
    name: str, tmp_path: Path
) -> None:
    share, whole = (drafted(tmp_path, name, "vllm", per_device) for per_device in (True, False))
    with serving():
        with tpu_inference.install(engine_of(share)) as installed:
            assert installed.replaced
            if name != "DeepSeek":  # the server asks for the pages of one device
                assert sys.modules[RPA_V3].get_kv_cache_shape(7, 128, 1, 128, jnp.bfloat16) == (7, 128, 1, 2, 128)
        with pytest.raises(
            SelectionError, match=r"is for 8 devices; .*write a spec with `rpac init --per-device`"
        ) as raised:
            tpu_inference.install(engine_of(whole))
    written = yaml.safe_load(share.text)
    lines = yaml.safe_load(str(raised.value).partition(" and with\n")[2])
    for section, keys in lines.items():
        assert {key: written[section][key] for key in keys} == keys


@pytest.mark.parametrize("name", ["70B", "Qwen3 235B"])
def test_a_share_is_installed_into_sglang(name: str, tmp_path: Path) -> None:
    with serving_sglang(), sglang_jax.install(engine_of(drafted(tmp_path, name, "sglang", True))) as installed:
        assert installed.replaced
