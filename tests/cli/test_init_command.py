"""`rpac init` as a command: where it writes, what it does not overwrite, and flags of another server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from command import rpac

from rpac.cli import main
from rpac.spec import load_spec, parse_spec

CONFIG = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 16, "max_position_embeddings": 131072,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "Llama-3.2-1B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["init", *map(str, args)])


def test_it_prints_a_spec_and_the_budget_beside_it(model: Path, tmp_path: Path) -> None:
    done = rpac("init", model, "--max-model-len", 8192, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    spec = parse_spec(done.stdout, "spec.yaml")
    assert (spec.name, spec.serving.max_model_len) == ("llama-3.2-1b", 8192)
    assert all(line.startswith("rpac init: ") for line in done.stderr.splitlines())
    assert "left for caches" in done.stderr
    head = done.stdout.replace("\n#  ", "")  # as before it was wrapped
    assert head.startswith(f"# Made by `rpac init {model} --max-model-len 8192` from config.json (llama).")


def test_it_overwrites_nothing_unless_told_to(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "spec.yaml"
    assert run(model, "-o", out).exit_code == 0
    first = out.read_text()
    assert load_spec(out).model.head_dim == 64
    refused = run(model, "--max-model-len", 4096, "-o", out)
    assert refused.exit_code == 5
    assert "the file exists; nothing was written" in refused.output
    assert out.read_text() == first
    assert run(model, "--max-model-len", 4096, "-o", out, "--force").exit_code == 0
    assert load_spec(out).serving.max_model_len == 4096
    assert [path.name for path in out.parent.iterdir()] == ["spec.yaml"]


def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(model, "-o", tmp_path / "file" / "spec.yaml")
    assert done.exit_code == 5
    assert "cannot be written (Not a directory)" in done.output or "cannot be written (File exists)" in done.output


def test_flags_of_another_server_are_refused(model: Path) -> None:
    done = run(model, "--page-size", 64)
    assert done.exit_code == 2
    assert "--page-size is a flag of SGLang, and --like is vllm; write --block-size, or --like sglang" in done.output
    done = run(model, "--like", "sglang", "-tp", 2)
    assert (
        "--tensor-parallel-size is a flag of vLLM, and --like is sglang; write --tp-size, or --like vllm" in done.output
    )


def test_numbers_may_be_written_as_vllm_takes_them(model: Path) -> None:
    assert "max_model_len: 32768 " in run(model, "--max-model-len", "32K").output
    assert "max_num_tokens: 2000 " in run(model, "--max-num-batched-tokens", "2k").output
    assert "'32x' is not a valid integer" in run(model, "--max-model-len", "32x").output
    assert "is not in the range" in run(model, "--max-model-len", "2M").output


def test_a_refusal_names_file_key_and_fix(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, "head_dim": 512}))
    done = run(model)
    assert done.exit_code == 2
    assert done.output == (
        f"rpac: ModelError: {model / 'config.json'}: head_dim: found 512; must be at most 256, the longest head_dim that "
        "rpac has kernels for; serve this model without rpac\n"
    )
