"""The attention of real models, at the pages that serve them: each plans on every target, or is refused by a sentence that
names what the model has and rpac has not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from rpac.devices.chip import TPU_TARGETS
from rpac.errors import RpacError, SpecError
from rpac.plan import plan_spec
from rpac.plan.tuned import TunedTiles
from rpac.spec import parse_spec

ROWS: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text())
TARGETS = (*TPU_TARGETS, "cpu")
ROW_KEYS = {"model", "config", "layers", "serving", "model_lines", "tensor", "refused"}

# What the configurations of different models call the same thing.
Q_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "multi_query_group_num")
WIDTH = ("hidden_size", "n_embd", "d_model")
HEAD_DIM = ("head_dim", "kv_channels")
LENGTH = (
    "max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "max_target_positions", "max_source_positions",
)  # fmt: skip
SCALES = {
    "attention_multiplier": lambda value: value,
    "attn_output_multiplier": lambda value: value,
    "query_pre_attn_scalar": lambda value: value**-0.5,
}
SOFT_CAP = ("attn_logit_softcapping", "max_attn_value")
OTHERS = {
    "multi_query", "sliding_window", "attention_chunk_size", "global_head_dim", "num_global_key_value_heads",
    "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim",
}  # fmt: skip
KNOWN = {*Q_HEADS, *KV_HEADS, *WIDTH, *HEAD_DIM, *LENGTH, *SCALES, *SOFT_CAP, *OTHERS}

SERVING = {
    "page_size": 128,
    "max_model_len": 16384,
    "max_num_tokens": 2048,
    "token_buckets": [64, 2048],
    "max_num_seqs": 64,
    "prefill_chunk": 256,
    "context_lens": [1024, 2048],
    "num_pages": 2048,
}


def first(config: Mapping[str, Any], names: tuple[str, ...], default: Any = None) -> Any:
    return next((config[name] for name in names if name in config), default)


def model_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The lines of `model:` that a model's configuration says."""
    q_heads = first(config, Q_HEADS)
    dtypes = {"q_dtype": "bfloat16", "kv_dtype": "bfloat16"}
    if "kv_lora_rank" in config:
        nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        latent = {"kv_lora_rank": config["kv_lora_rank"], "rope_dim": rope, "sm_scale": (nope + rope) ** -0.5}
        return {"attention": "latent", "q_heads": q_heads, **latent, **dtypes}
    kv_heads = 1 if config.get("multi_query") else first(config, KV_HEADS, q_heads)
    head_dim = first(config, HEAD_DIM) or first(config, WIDTH) // q_heads
    lines = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim, **dtypes}
    for name, scale in SCALES.items():
        if name in config:
            lines["sm_scale"] = scale(config[name])
    soft_cap = first(config, SOFT_CAP)
    return lines if soft_cap is None else {**lines, "soft_cap": soft_cap}


def layer_of(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a kind of layers has beside `model_of`."""
    if kind == "sliding":
        return {"sliding_window": config["sliding_window"]}
    if kind == "chunked":
        return {"attention_chunk": config["attention_chunk_size"]}
    renamed = {"global_head_dim": "head_dim", "num_global_key_value_heads": "kv_heads"}
    return {ours: config[theirs] for theirs, ours in renamed.items() if theirs in config}


def spec_text(row: Mapping[str, Any]) -> str:
    config = row["config"]
    lines = {**model_of(config), **row.get("model_lines", {})}
    kinds = {kind: layer_of(kind, config) for kind in row.get("layers", ["full"])}
    if len(kinds) == 1:
        lines.update(*kinds.values())
    page = row.get("serving", {}).get("page_size", SERVING["page_size"])
    length = min(SERVING["max_model_len"], first(config, LENGTH, 2048)) // page * page
    serving = {**SERVING, "max_model_len": length, **row.get("serving", {})}
    serving["context_lens"] = [one for one in serving["context_lens"] if one <= serving["max_model_len"]]
    spec = {
        "name": row["model"].rpartition("/")[2].lower().replace("_", "-"),
        "model": lines,
        **({"layers": kinds} if len(kinds) > 1 else {}),
        "serving": serving,
        **({"parallel": {"tensor": row["tensor"]}} if "tensor" in row else {}),
        "targets": list(TARGETS),
    }
    return yaml.safe_dump(spec, sort_keys=False)


def label(row: Mapping[str, Any]) -> str:
    return f"{row['model']}-{ROWS.index(row)}"


def cases() -> list[Any]:
    return [
        pytest.param(row, target, id=f"{label(row)}-{target}")
        for row in ROWS
        if "refused" not in row
        for target in TARGETS
    ]


@pytest.mark.parametrize(("row", "target"), cases())
def test_a_model_plans(row: Mapping[str, Any], target: str) -> None:
    spec = parse_spec(spec_text(row), "model.yaml")
    for part in spec.parts:
        kinds = {plan.kind for plan in plan_spec(part, target, tuned=TunedTiles())}
        assert kinds == {"decode", "prefill", "mixed"}


@pytest.mark.parametrize("row", [pytest.param(row, id=label(row)) for row in ROWS if "refused" in row])
def test_a_model_is_refused_by_what_it_has(row: Mapping[str, Any]) -> None:
    with pytest.raises(RpacError) as raised:
        parse_spec(spec_text(row), "model.yaml")
    assert isinstance(raised.value, SpecError)
    problems = [str(problem) for problem in raised.value.problems]
    wanted = row["refused"] if isinstance(row["refused"], list) else [row["refused"]]
    assert len(problems) == len(wanted), problems
    for sentence, problem in zip(wanted, problems, strict=True):
        assert sentence in problem


def test_the_table_is_of_many_models_and_says_no_more_than_is_read() -> None:
    assert len({row["model"] for row in ROWS}) >= 60
    for row in ROWS:
        assert set(row) <= ROW_KEYS, row
        assert set(row["config"]) <= KNOWN, row
        assert set(row.get("layers", [])) <= {"sliding", "chunked", "full"}, row
