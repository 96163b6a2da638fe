"""What the two servers' flags and defaults make of a model, and the budget of its cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rpac.errors import ModelError
from rpac.init.config import INDEX
from rpac.init.draft import Draft, make_draft
from rpac.init.servers import SERVERS, Request
from rpac.plan.cache_memory import page_bytes

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_hidden_layers": 32, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip
LATENT = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_attention_heads": 128, "num_hidden_layers": 61, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "max_position_embeddings": 16384,
}  # fmt: skip


def made(
    folder: Path,
    like: str = "vllm",
    chip: str = "v6e",
    devices: int | None = None,
    kv: str = "auto",
    dtype: str = "auto",
    per_device: bool = False,
    config: dict[str, Any] = LLAMA,
    **flags: Any,
) -> Draft:
    (folder / "config.json").write_text(json.dumps(config))
    return make_draft(folder, Request(SERVERS[like], chip, devices, flags, dtype, kv, per_device), "rpac init model")


def lines(draft: Draft, section: str = "serving") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(draft.text)[section]
    return found


def test_flags_of_vllm_become_lines(tmp_path: Path) -> None:
    flags = {"max_model_len": 32768, "page_size": 128, "max_num_seqs": 64, "max_num_tokens": 4096, "num_pages": 1500}
    serving = lines(made(tmp_path, devices=8, **flags))
    assert {key: serving[key] for key in flags} == flags
    assert serving["kv_layout"] == "interleaved"


def test_flags_of_sglang_become_lines(tmp_path: Path) -> None:
    flags = {"max_model_len": 32768, "page_size": 64, "max_num_seqs": 64, "max_num_tokens": 2048}
    serving = lines(made(tmp_path, "sglang", devices=8, num_tokens=128000, **flags))
    assert {key: serving[key] for key in flags} == flags
    assert serving["num_pages"] == 2000


@pytest.mark.parametrize(
    ("length", "page"), [(1024, 64), (2048, 128), (4096, 256), (8192, 256), (16384, 32), (65536, 128), (131072, 256)]
)
def test_vllms_default_page_is_the_one_of_its_tpu_backend(length: int, page: int, tmp_path: Path) -> None:
    draft = made(tmp_path, devices=8, max_model_len=length)
    assert lines(draft)["page_size"] == page
    assert lines(draft)["max_num_seqs"] == 256
    assert lines(draft)["max_num_tokens"] == 2048


def test_sglangs_defaults(tmp_path: Path) -> None:
    draft = made(tmp_path, "sglang", devices=8, max_model_len=32768)
    serving = lines(draft)
    assert (serving["page_size"], serving["max_num_seqs"], serving["max_num_tokens"]) == (128, 512, 4096)
    assert "--page-size 128" in draft.notes[-1]
    assert lines(made(tmp_path, "sglang", max_model_len=4096, max_num_tokens=-1))["max_num_tokens"] == 16384


@pytest.mark.parametrize(
    ("like", "chip", "kv", "dtype"),
    [
        ("vllm", "v6e", "fp8", "float8_e5m2"),
        ("vllm", "tpu7x", "fp8", "float8_e4m3fn"),
        ("vllm", "v6e", "fp8_e4m3", "float8_e4m3fn"),
        ("sglang", "v6e", "fp8_e5m2", "float8_e5m2"),
        ("sglang", "v6e", "bf16", "bfloat16"),
    ],
)
def test_the_caches_dtype(like: str, chip: str, kv: str, dtype: str, tmp_path: Path) -> None:
    model = lines(made(tmp_path, like, chip, 8, kv, max_model_len=8192), "model")
    assert model["kv_dtype"] == dtype
    assert ("kv_scale" in model) == dtype.startswith("float8")


def test_eight_bits_of_long_heads_take_the_layout_that_rpac_has(tmp_path: Path) -> None:
    draft = made(tmp_path, kv="fp8", config={**LLAMA, "head_dim": 256}, max_model_len=4096)
    assert lines(draft)["kv_layout"] == "separate"


def test_float32_is_asked_for_by_a_flag_alone(tmp_path: Path) -> None:
    config = {**LLAMA, "torch_dtype": "float32"}
    assert lines(made(tmp_path, config=config, devices=8, max_model_len=4096), "model")["q_dtype"] == "bfloat16"
    assert lines(made(tmp_path, config=config, devices=8, max_model_len=4096, dtype="float32"), "model") == {
        "q_heads": 32, "kv_heads": 8, "head_dim": 128, "q_dtype": "float32", "kv_dtype": "float32",
    }  # fmt: skip


def test_devices_share_the_heads_and_the_rest_are_replicas(tmp_path: Path) -> None:
    assert lines(made(tmp_path, devices=8), "parallel") == {"tensor": 8}
    assert lines(made(tmp_path, devices=8, tensor=4, max_model_len=8192), "parallel") == {"tensor": 4, "data": 2}
    assert lines(made(tmp_path, data=2, max_model_len=8192), "parallel") == {"tensor": 1, "data": 2}
    text = made(tmp_path, devices=16).text
    assert "tensor: 16  # --devices 16; KV heads in 8 parts, 2 copies of each that share its queries" in text
    odd = {**LLAMA, "num_attention_heads": 20, "num_key_value_heads": 5, "head_dim": 128}
    assert (
        "8 copies of each; the copies do the same work"
        in made(tmp_path, devices=8, config=odd, max_model_len=8192).text
    )


def test_latent_attention_has_a_replica_on_each_device(tmp_path: Path) -> None:
    draft = made(tmp_path, devices=16, chip="tpu7x", config=LATENT)
    assert lines(draft, "parallel") == {"tensor": 1, "data": 16}
    assert "kv_layout" not in lines(draft)
    assert lines(draft)["max_num_seqs"] < 256  # as many as fit VMEM
    assert lines(made(tmp_path, devices=8, tensor=8, chip="tpu7x", config=LATENT), "parallel") == {"tensor": 8}


def test_the_cache_takes_what_the_weights_leave(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 16 << 30}}))
    draft = made(tmp_path, devices=4, max_model_len=8192, memory=0.8)
    budget = draft.budget
    assert budget.weights == 4 << 30
    assert budget.page_bytes == 32 * page_bytes(draft.spec)
    left = int(31.25 * 0.8 * (1 << 30)) - (4 << 30)
    assert budget.num_pages == left // budget.page_bytes == lines(draft)["num_pages"]
    assert f"--num-gpu-blocks-override {budget.num_pages}" in draft.notes[-1]
    assert all(line in draft.text.replace("\n#  ", "") for line in budget.lines())


def test_weights_take_the_dtype_that_the_server_computes_in(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 16 << 30}}))
    config = {**LLAMA, "torch_dtype": "float32"}
    assert made(tmp_path, config=config, max_model_len=8192).budget.weights == 8 << 30
    assert made(tmp_path, config=config, max_model_len=8192, dtype="float32").budget.weights == 16 << 30
    quantized = {**config, "quantization_config": {"quant_method": "fp8"}}
    assert made(tmp_path, config=quantized, max_model_len=8192).budget.weights == 16 << 30


def test_the_sizes_of_the_files_stand_in_for_an_index(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(5 << 30)
    assert made(tmp_path, max_model_len=8192).budget.weights == 5 << 30


def test_a_layer_of_two_attentions_has_two_caches(tmp_path: Path) -> None:
    draft = made(
        tmp_path, devices=8, chip="tpu7x", config={**LATENT, "model_type": "longcat_flash", "num_attention_heads": 64}
    )
    assert draft.budget.cached_layers == 2 * 61


def test_layers_that_share_a_cache_take_none(tmp_path: Path) -> None:
    config = {**LLAMA, "num_kv_shared_layers": 16}
    draft = made(tmp_path, devices=8, config=config, max_model_len=8192)
    assert draft.budget.cached_layers == 16
    assert lines(draft, "layers") == {"full": {}, "full-shared": {"update_cache": False}}


def test_a_window_that_hides_nothing_is_left_out(tmp_path: Path) -> None:
    config = {**LLAMA, "model_type": "gemma2", "sliding_window": 4096, "query_pre_attn_scalar": 128}
    short = made(tmp_path, devices=8, config=config, max_model_len=4096)
    assert not short.spec.layers
    assert any("hides nothing at max_model_len 4096" in note for note in short.notes)
    assert len(made(tmp_path, devices=8, config=config, max_model_len=8192).spec.layers) == 2


def test_heads_of_a_length_without_kernels_are_padded(tmp_path: Path) -> None:
    config = {**LLAMA, "head_dim": 72}
    draft = made(tmp_path, devices=8, config=config, max_model_len=4096)
    model = lines(draft, "model")
    assert (model["head_dim"], model["sm_scale"]) == (80, 72**-0.5)
    assert any("pad queries, keys and values with zeros" in note for note in draft.notes)


SHARES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, int]]] = {
    "70B over 8": (
        {**LLAMA, "hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 80},
        {"devices": 8},
        {"q_heads": 8, "kv_heads": 1},
    ),
    "Qwen3 235B over 8": (
        {**LLAMA, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 94},
        {"devices": 8},
        {"q_heads": 8, "kv_heads": 1},
    ),
    "two replicas": (LLAMA, {"devices": 4, "tensor": 2, "max_model_len": 32768}, {"q_heads": 16, "kv_heads": 4}),
    "latent, a replica on each": (LATENT, {"devices": 16, "chip": "tpu7x"}, {"q_heads": 128}),
    "latent, heads shared": (LATENT, {"devices": 8, "tensor": 8, "chip": "tpu7x"}, {"q_heads": 16}),
    "one device": (LLAMA, {"max_model_len": 8192}, {"q_heads": 32, "kv_heads": 8}),
}


@pytest.mark.parametrize("like", ["vllm", "sglang"])
@pytest.mark.parametrize("name", SHARES)
def test_the_share_of_one_device_has_its_heads_and_the_budget_that_each_device_of_all_has(
    name: str, like: str, tmp_path: Path
) -> None:
    config, asked, heads = SHARES[name]
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 14 << 30}}))
    share, whole = (made(tmp_path, like, config=config, per_device=one, **asked) for one in (True, False))
    assert share.spec.mesh.devices == 1
    assert {key: value for key, value in lines(share, "model").items() if key in ("q_heads", "kv_heads")} == heads
    assert share.spec.model == whole.spec.model
    assert share.budget == whole.budget
    assert lines(share) == lines(whole)
    note = f"{SERVERS[like].adapter}.install needs such a bundle."
    assert any(note in one for one in share.notes) == (name != "one device")
    assert any("add --per-device" in one for one in whole.notes) == (name != "one device")


def test_kv_heads_that_several_devices_hold_say_so(tmp_path: Path) -> None:
    text = made(tmp_path, devices=16, per_device=True).text
    assert "q_heads: 2          # config.json: num_attention_heads 32, over 16 devices\n" in text
    assert "kv_heads: 1         # config.json: num_key_value_heads 8, over 16 devices, each on 2 of them\n" in text


def test_layers_of_other_heads_are_shared_too(tmp_path: Path) -> None:
    config = {
        **LLAMA, "model_type": "gemma4_text", "num_key_value_heads": 16, "num_global_key_value_heads": 4, "head_dim": 256,
        "global_head_dim": 256, "sliding_window": 1024, "layer_types": ["sliding_attention", "full_attention"] * 16,
    }  # fmt: skip
    draft = made(tmp_path, devices=8, config=config, max_model_len=8192, chip="tpu7x", per_device=True)
    found = {part.layer: (part.model.q_heads, part.model.kv_heads) for part in draft.spec.parts}
    assert found == {"sliding": (4, 2), "full": (4, 1)}
    with pytest.raises(ModelError, match="write `--devices 1` or `--per-device`"):
        made(tmp_path, devices=8, config=config, max_model_len=8192, chip="tpu7x")


@pytest.mark.parametrize(
    ("heads", "devices", "words"),
    [
        (
            (20, 5),
            8,
            r"num_attention_heads.* must be shared evenly by 8 devices \(--devices 8\), .*take 1, 5, 10 or 20 devices",
        ),
        ((24, 6), 4, r"num_key_value_heads.* must be shared evenly by 4 devices .*take 1, 2, 3, 6, 12 or 24 devices"),
    ],
)
def test_heads_that_no_server_shares_evenly_are_refused(
    heads: tuple[int, int], devices: int, words: str, tmp_path: Path
) -> None:
    config = {**LLAMA, "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "head_dim": 128}
    with pytest.raises(ModelError, match=words):
        made(tmp_path, devices=devices, config=config, max_model_len=8192, per_device=True)
