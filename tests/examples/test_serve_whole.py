"""A bundle that holds the steps of a checkpoint serves them as they are: right tokens, and nothing is compiled."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import ROOT, rpac
from serve.bundle import open_bundle
from serve.checkpoint import load_params
from serve.config import read_config
from serve.demo import metrics_of, server
from serve.generate import Generator, Request
from serve.load import compare, requests, send_all
from serve.scratch import make_scratch
from serve.steps import WholeSteps
from serve.text import Text
from serve.tiny import write_checkpoint
from watching import compiles

from rpac.errors import BatchError

# Layers of two kinds, and heads that are padded.
SETTINGS: dict[str, Any] = {
    "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 160, "head_dim": None,
    "num_attention_heads": 4, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1,
    "max_position_embeddings": 128,
}  # fmt: skip
FLAGS = "--dtype float32 --block-size 16 --max-num-seqs 16 --max-num-batched-tokens 64 --num-gpu-blocks-override 24"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A checkpoint, its spec beside it as `rpac init` writes it, and its bundle, by the commands of docs/example-server.md."""
    folder = tmp_path_factory.mktemp("whole") / "qwen"
    write_checkpoint(folder, SETTINGS)
    spec = folder.with_suffix(".yaml")
    done = rpac("init", folder, *FLAGS.split(), "-o", spec, cache=cache)
    assert done.returncode == 0, done.stderr
    spec.write_text(spec.read_text().replace("serving:", "serving:\n  token_buckets: [64]"))
    more = {"MODEL": str(folder), "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}
    arguments = ("build", spec, "--target", "cpu", "--this-cpu", "--step", "serve.whole:step", "-o", folder.parent)
    done = rpac(*arguments, cache=cache, env=more)
    assert done.returncode == 0, done.stderr
    return folder


def served(generator: Generator, count: int, seed: int) -> list[Any]:
    load = requests(count, generator.steps.vocabulary, np.random.default_rng(seed), rate=1)
    names = {generator.add(Request(one.prompt, one.max_new_tokens)): one for one in load}
    while generator.scheduler.running or generator.scheduler.waiting:
        for token in generator.step():
            names[token.request].tokens.append(token.token)
    return load


def test_the_tokens_are_those_of_dense_attention_and_nothing_is_compiled(folder: Path) -> None:
    steps = open_bundle(str(folder.with_suffix(".rpac")), folder, "cpu")
    assert isinstance(steps, WholeSteps)
    generator = Generator(steps)
    steps.warm()
    with compiles() as seen:
        load = served(generator, 200, seed=1)
    assert seen == []
    assert generator.totals.preemptions > 0
    assert generator.totals.copied_pages > 0
    config = read_config(folder)
    verdict = compare(config, load_params(folder, config), load, 128)
    assert verdict.wrong == ()
    assert verdict.ties <= verdict.tokens / 1000


def test_hundreds_of_requests_over_http_are_answered_as_by_dense_attention(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, whose cache has room for a few of them at once."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    config = read_config(folder)
    load = requests(300, config.vocabulary, np.random.default_rng(3), rate=100)
    with server(str(folder), str(folder.with_suffix(".rpac"))) as url:
        asyncio.run(send_all(url, folder.name, load))
        found = metrics_of(url)
    verdict = compare(config, load_params(folder, config), load, 128, Text(folder).ends)
    assert verdict.wrong == ()
    assert found["serve_preemptions_total"] > 0
    assert found["serve_shared_prompt_tokens_total"] > 0
    assert (found["serve_running"], found["serve_waiting"], found["serve_free_pages"]) == (0, 0, 24)


def test_a_server_without_a_bundle_gives_the_same_tokens(folder: Path) -> None:
    whole = Generator(open_bundle(str(folder.with_suffix(".rpac")), folder, "cpu"))
    scratch = Generator(make_scratch(folder, str(folder.with_suffix(".yaml"))))
    assert [one.tokens for one in served(whole, 12, seed=2)] == [one.tokens for one in served(scratch, 12, seed=2)]


def test_steps_that_were_built_for_other_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "other", {**SETTINGS, "intermediate_size": 96})
    wrong = r"params\['layers'\]\[0\]\['down'\] is float32\[96, 64\]; must be float32\[160, 64\]"
    with pytest.raises(BatchError, match=wrong):
        open_bundle(str(folder.with_suffix(".rpac")), tmp_path / "other", "cpu")
