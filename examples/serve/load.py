"""Requests for the server, some with a common start, and the tokens that are right for each."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import aiohttp
import numpy as np

from serve.config import Config
from serve.dense import dense_logits
from serve.weights import Params

TIE = 1e-4
"""Logits have a standard deviation of 1. Paged and dense attention sum in another order, which moves a logit by some
1e-6; where two logits are closer than this, either of their tokens is a greedy one."""


@dataclass
class Request:
    prompt: list[int]
    max_new_tokens: int
    wait: float = 0.0  # seconds before it is sent
    tokens: list[int] = field(default_factory=list)
    first: float = 0.0  # seconds from sending to the first token
    whole: float = 0.0


def requests(count: int, vocabulary: int, rng: np.random.Generator, rate: float) -> list[Request]:
    """`rate` requests a second on average. Every second one begins with one of two common prefixes of 40 tokens."""
    prefixes = rng.integers(0, vocabulary, (2, 40)).tolist()
    waits = np.cumsum(rng.exponential(1 / rate, count)).tolist()
    made = []
    for wait in waits:
        prefix = prefixes[int(rng.integers(2))] if rng.random() < 0.5 else []
        own = rng.integers(0, vocabulary, rng.integers(1, 50)).tolist()
        made.append(Request([*prefix, *own], int(rng.integers(1, 40)), wait))
    return made


async def send_all(url: str, model: str, load: Sequence[Request]) -> float:
    """Sends each request at its time and reads its tokens. Returns the seconds that all of it took."""
    start = time.perf_counter()
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(600)) as session:
        await asyncio.gather(*(_send(session, model, one) for one in load))
    return time.perf_counter() - start


async def _send(session: aiohttp.ClientSession, model: str, one: Request) -> None:
    await asyncio.sleep(one.wait)
    start = time.perf_counter()
    body = {"model": model, "prompt": one.prompt, "max_tokens": one.max_new_tokens, "temperature": 0}
    async with session.post("/v1/completions", json={**body, "stream": True, "return_token_ids": True}) as response:
        response.raise_for_status()
        async for line in response.content:
            data = line.removeprefix(b"data: ").strip()
            if data in (b"", b"[DONE]"):
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            one.tokens += event["choices"][0]["token_ids"]
            one.first = one.first or time.perf_counter() - start
    one.whole = time.perf_counter() - start


@dataclass(frozen=True)
class Verdict:
    """How many tokens equal the dense model's, how many of those only because of a tie, and the tokens that differ."""

    tokens: int
    ties: int
    wrong: tuple[str, ...]


def compare(
    config: Config,
    params: Params,
    load: Sequence[Request],
    length: int,
    ends: Collection[int] = (),
    tie: float = TIE,
) -> Verdict:
    """Compares every token with dense attention over all tokens before it, for prompts and answers up to `length`.

    The dense model is given the server's own tokens, so one that a tie decided is no error, nor are those behind it. An
    answer may be short if its last token is one of `ends`.
    """
    whole = np.zeros((len(load), length), np.int32)
    for row, one in zip(whole, load, strict=True):
        row[: len(one.prompt) + len(one.tokens)] = one.prompt + one.tokens
    logits = np.asarray(dense_logits(config, params, whole))
    tokens, ties, wrong = 0, 0, []
    for index, one in enumerate(load):
        if len(one.tokens) != one.max_new_tokens and (not one.tokens or one.tokens[-1] not in ends):
            wrong.append(f"request {index}: {len(one.tokens)} tokens of {one.max_new_tokens}")
        for place, token in enumerate(one.tokens):
            row = logits[index, len(one.prompt) + place - 1]
            gap = float(row.max() - row[token])
            tokens += 1
            ties += 0 < gap <= tie
            if gap > tie:
                wrong.append(f"request {index}, token {place}: {token} is {gap:.2g} below {int(row.argmax())}")
    return Verdict(tokens, ties, tuple(wrong))
