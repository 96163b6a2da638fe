"""What is no model, or asks for what rpac does not do: one sentence with file, key, value and fix, and no traceback."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rpac.errors import ModelError, RpacError
from rpac.init.attention import describe
from rpac.init.config import MAX_CONFIG, Config
from rpac.init.draft import make_draft
from rpac.init.servers import SERVERS, Request, wanted

GOOD: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "intermediate_size": 4096,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}  # fmt: skip
DEEP = "[" * 100_000
REAL = [row["config"] for row in yaml.safe_load(Path(__file__).with_name("models.yaml").read_text())]


def request(
    like: str = "vllm", devices: int | None = None, dtype: str = "auto", kv: str = "auto", **given: Any
) -> Request:
    return Request(SERVERS[like], "tpu7x", devices, given, dtype, kv)


def refusal(folder: Path, asked: Request | None = None, **changes: Any) -> str:
    config = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RpacError) as raised:
        make_draft(folder, asked or request(), "rpac init")
    assert raised.value.exit_code == 2
    text = str(raised.value)
    assert "\n" not in text
    return text.removeprefix(f"{folder / 'config.json'}: ")


def test_the_good_config_of_these_tests_is_good(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert make_draft(tmp_path, request(), "rpac init").budget.num_pages > 0


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "a file that is not JSON"),
        (b"model: llama", "a file that is not JSON"),
        (b"\xff\xfe\x00", "a file that is not JSON"),
        (DEEP.encode(), "a file that is not JSON (nested too deeply)"),
        (b"9" * 5000, "a file that is not JSON"),
        (b"[1, 2]", "JSON that is no mapping"),
        (b"null", "JSON that is no mapping"),
        (b" " * (MAX_CONFIG + 1), f"more than {MAX_CONFIG} bytes"),
    ],
    ids=["empty", "YAML", "binary", "deep", "a long number", "a list", "null", "huge"],
)  # fmt: skip
def test_a_file_that_is_no_config(content: bytes, found: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError) as raised:
        make_draft(tmp_path / "config.json", request(), "rpac init")
    assert raised.value.problems[0].found.startswith(found)


def test_no_file_and_no_config_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="found a file that cannot be read"):
        make_draft(tmp_path / "none", request(), "rpac init")
    with pytest.raises(ModelError, match=r"found a folder without config\.json"):
        make_draft(tmp_path, request(), "rpac init")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": ...},
            "num_attention_heads: found no such key; must be given, as decoder_attention_heads",
        ),
        ({"num_attention_heads": None}, "num_attention_heads: found no such key; must be given"),
        ({"hidden_size": ...}, "head_dim: found no such key; must be given, or one of hidden_size"),
        ({"num_hidden_layers": ...}, "num_hidden_layers: found no such key; must be given"),
        ({"num_attention_heads": float("nan")}, "num_attention_heads: found NaN; must be an integer from 1 to 1024"),
        ({"num_attention_heads": 1e999}, "num_attention_heads: found Infinity; must be an integer"),
        (
            {"num_attention_heads": 10**30},
            "num_attention_heads: found 1000000000000000000000000000000; must be an integer",
        ),
        ({"num_attention_heads": -4}, "num_attention_heads: found -4; must be an integer"),
        ({"num_attention_heads": True}, "num_attention_heads: found true; must be an integer"),
        ({"num_attention_heads": "16"}, "num_attention_heads: found 16; must be an integer"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: found 5; must divide the 16 query heads"),
        ({"hidden_size": 2050}, "hidden_size: found 2050; must be a multiple of the 16 query heads"),
        ({"head_dim": 512}, "head_dim: found 512; must be at most 256"),
        ({"sliding_window": 1.5}, "sliding_window: found 1.5; must be an integer"),
        ({"sliding_window": 8, "layer_types": "full"}, "layer_types: found full; must be a list"),
        (
            {"layer_types": ["full_attention", "odd\x1b[31m"]},
            "layer_types: found layers of 'odd\\x1b[31m'; must be layers",
        ),
        ({"layer_types": ["sliding_attention"]}, "sliding_window: found no such key; must be given where layers"),
        ({"attn_logit_softcapping": float("inf")}, "attn_logit_softcapping: found Infinity; must be a number above 0"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: found 0; must be a number above 0"),
        ({"attention_multiplier": 1e9}, "attention_multiplier (model.sm_scale): found 1000000000.0; must be a number"),
        ({"num_kv_shared_layers": 9}, "num_kv_shared_layers: found 9; must be an integer from 0 to 4"),
        ({"kv_lora_rank": 512}, "qk_rope_head_dim: found no such key; must be given beside kv_lora_rank"),
        ({"relative_attention_num_buckets": 32}, "relative_attention_num_buckets: found 32; asks for learned biases"),
    ],
)
def test_a_value_that_no_spec_can_say(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, **changes).startswith(message)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request(page_size=100), "the command line: --block-size: found 100; must be one of 8, 16, 32"),
        (request("sglang", page_size=1), "the command line: --page-size: found 1; must be one of 8"),
        (request(max_model_len=8192), "the command line: --max-model-len: found 8192; must be at most 4096, the longest"),
        (request(max_num_seqs=512, max_num_tokens=256), "the command line: --max-num-seqs: found 512; must be at most"),
        (request(devices=8, tensor=3), "the command line: --devices: found 8; must be a multiple of 3"),
        (request(devices=8, tensor=2, data=2), "the command line: --devices: found 8; must be 4: --tensor-parallel-size 2"),
        (request(tensor=8, data=8), "the command line: --data-parallel-size: found 8; must be at most 32 devices with"),
        (request(kv="int4"), "the command line: --kv-cache-dtype: found int4; must be auto or one of bfloat16, fp8"),
        (request("sglang", kv="fp8"), "the command line: --kv-cache-dtype: found fp8; must be auto or one of fp8_e4m3"),
        (request(num_pages=3), "serving.num_pages: found 3; must be at least"),
        (request(num_pages=10**6), "serving.num_pages: found 1000000, so that one layer's cache takes"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together(asked: Request, message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, asked).startswith(message)


def test_an_eight_bit_cache_of_latent_attention(tmp_path: Path) -> None:
    latent = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
    text = refusal(tmp_path, request(kv="fp8"), **latent)
    assert text.startswith("the command line: --kv-cache-dtype: found fp8; must be auto with latent attention")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "metadata.total_size: found no such key"),
        ({"metadata": {"total_size": "big"}}, "metadata.total_size: found big"),
        ({"metadata": {"total_size": float("nan")}}, "metadata.total_size: found NaN"),
        ({"metadata": {"total_size": -1}}, "metadata.total_size: found -1"),
        ({"metadata": {"total_size": 1 << 50}}, "HBM of tpu7x: found 0 bytes of HBM left beside the weights"),
    ],
)  # fmt: skip
def test_an_index_of_weights_that_cannot_be_used(index: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refusal(tmp_path)


def test_a_sequence_that_does_not_fit_names_the_devices_and_the_length(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 100 << 30}}))
    assert refusal(tmp_path).endswith("write `--devices 2`, or take a chip with more HBM")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 91_500_000_000}}))
    fix = refusal(tmp_path, max_position_embeddings=1 << 20).rpartition("; ")[2]
    assert fix.startswith("write `--devices 2`, or write `--max-model-len ")


@pytest.mark.parametrize(
    "changes", [{"hidden_act": {}}, {"quantization_config": {"quant_method": []}}, {"torch_dtype": 3}]
)
def test_an_odd_value_that_attention_does_not_follow_from(changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**GOOD, **changes}))
    assert make_draft(tmp_path, request(), "rpac init").spec.model.q_heads == 16


def test_an_unknown_model_type_is_derived_from_its_keys_and_says_so(tmp_path: Path) -> None:
    config = {**GOOD, "model_type": "new\nthing", "sparse_attn_blocks": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = make_draft(tmp_path, request(), "rpac init")
    assert made.spec.model.q_heads == 16
    [note] = [note for note in made.notes if "does not know" in note]
    assert "not read: sparse_attn_blocks" in note
    assert "rpac does not know model_type new thing" in made.text  # on one line, in a comment


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 40) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@given(st.sampled_from(REAL), st.data())
def test_any_value_of_a_real_config_is_read_or_refused(config: dict[str, Any], data: st.DataObject) -> None:
    changed = copy.deepcopy(config)
    part = changed.get("text_config", changed)
    key = data.draw(st.sampled_from(sorted(part)))
    part[key] = data.draw(JSON)
    try:
        wanted(request(), describe(Config("config.json", changed)))
    except ModelError as error:
        assert len(error.problems) == 1
