"""Checkpoints that transformers writes are served token for token as its own models answer; OpenAI's client streams them.

The packages are in an environment of their own, under build/serve. `make test-serve` runs this.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import MODEL, completed, running
from command import ROOT
from serve.bundle import open_bundle
from serve.generate import Generator, Request
from serve.load import requests
from serve.text import Text
from serve.tiny import CHAT, byte_tokenizer
from serve.worker import Worker
from served import NUM_PAGES, spec_of, write_small_bundle

PACKAGES = ["torch==2.13.0", "transformers==5.24.0", "openai==3.57.0"]
PEERS = Path(__file__).with_name("peers")
NAMES = (
    "llama3", "llama-biases-linear", "llama-tied-yarn", "mistral-window", "mistral", "qwen2", "qwen2-two-kinds", "qwen3",
)  # fmt: skip
REQUESTS, SEED = 300, 5
TIE = 1e-4  # logits have a standard deviation of 1.6, and those of the two differ by up to 4e-5 in float32
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python() -> str:
    """The interpreter of the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEWEST_PYTHON", sys.executable)  # this one has wheels of all these
        patch.syspath_prepend(ROOT / "benchmarks")
        from peers import environment

        return environment.ensure(ROOT / "build" / "serve", PACKAGES, PACKAGES)


@pytest.fixture(scope="module")
def load() -> list[Any]:
    return requests(REQUESTS, byte_tokenizer().get_vocab_size(), np.random.default_rng(SEED), rate=1)


@pytest.fixture(scope="module")
def models(python: str, load: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all checkpoints, each with transformers' answers."""
    folder = tmp_path_factory.mktemp("models")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "template.jinja").write_text(CHAT)
    asked = folder / "requests.json"
    asked.write_text(json.dumps([[one.prompt, one.max_new_tokens] for one in load]))
    done = subprocess.run(
        [python, PEERS / "references.py", folder, asked], capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(NAMES)
    return folder


def served(generator: Generator, load: list[Any]) -> dict[int, list[int]]:
    """The tokens of each request by its place; the requests come in one by one between steps."""
    rng = np.random.default_rng(SEED)
    left, places, found = list(enumerate(load)), {}, {}
    while left or generator.scheduler.running or generator.scheduler.waiting:
        while left and (len(places) < 8 or rng.random() < 0.5):
            place, one = left.pop(0)
            name = generator.add(Request(one.prompt, one.max_new_tokens))
            places[name], found[place] = place, []
        for token in generator.step():
            found[places[token.request]].append(token.token)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers(models: Path, load: list[Any], name: str, tmp_path: Path) -> None:
    """Up to a token that was ahead by less than `TIE`, which at most one in a thousand may be."""
    write_small_bundle(tmp_path / "model.rpac", spec_of(models / name))
    generator = Generator(open_bundle(str(tmp_path / "model.rpac"), models / name, "cpu"))
    found = served(generator, load)
    answers = json.loads((models / name / "answers.json").read_text())
    tokens = ties = 0
    for place, (wanted, gaps) in enumerate(zip(answers["tokens"], answers["gaps"], strict=True)):
        until = next((at for at, gap in enumerate(gaps) if gap < TIE), len(gaps))
        ties += until < len(gaps)
        tokens += until
        assert found[place][:until] == wanted[:until], f"request {place}"
        assert len(found[place]) == len(wanted)
    totals = generator.totals
    print(f"{name}: {tokens} tokens equal, {ties} ties; {totals}")
    assert ties <= totals.tokens / 1000
    if not generator.steps.limits.is_local:  # pages before a window are given back, so no sequence grows
        assert totals.preemptions > 0
    assert totals.shared_tokens > 0
    assert generator.scheduler.tables.num_free == NUM_PAGES


def test_a_chat_template_gives_the_tokens_that_transformers_gives(models: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüß Gott <|end|> 中!"}]
    wanted = json.loads((models / "llama3" / "answers.json").read_text())["chat"]
    assert Text(models / "llama3").encode_chat(messages) == wanted


def test_the_client_of_openai_streams(python: str, generator: Generator, text: Text) -> None:
    async def run() -> None:
        async with running(Worker(generator, 100), text) as (session, port):
            command = [python, str(PEERS / "client.py"), f"http://127.0.0.1:{port}", MODEL]
            process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
            output, _ = await asyncio.wait_for(process.communicate(), 120)
            assert process.returncode == 0
            found = json.loads(output)
            [choice] = (await completed(session, "Once", 12))["choices"]
            assert found["completion"] == found["streamed completion"] == choice["text"]
            prompt = text.encode_chat([{"role": "user", "content": "Tell me more"}])
            [choice] = (await completed(session, prompt, 12))["choices"]
            assert found["chat"] == found["streamed chat"] == choice["text"]
            assert found["usage"] == [len(prompt) + 12] * 2
            assert (found["models"], found["role"], found["reasons"]) == ([MODEL], "assistant", ["length", "length"])
            assert found["refused"] == [404, "model_not_found", "model"]

    asyncio.run(run())
