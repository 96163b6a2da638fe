"""Clients of the example server, which runs in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from serve.api import make_app
from serve.connections import ConnectionLimits, Gate, listening
from serve.text import Text
from serve.worker import Worker

MODEL = "small"
PROMPT = [1, 2, 3]
LIMITS = ConnectionLimits()


@asynccontextmanager
async def running(
    worker: Worker, text: Text, limits: ConnectionLimits = LIMITS
) -> AsyncIterator[tuple[aiohttp.ClientSession, int]]:
    """A client of a server on a real socket, and its port."""
    worker.start()
    gate = Gate(limits)
    try:
        async with listening(make_app(MODEL, text, worker, gate), gate, "127.0.0.1", 0) as port:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                yield session, port
            for _ in range(100):
                if not gate.open:
                    break
                await asyncio.sleep(0.01)
            assert not gate.open
    finally:
        await asyncio.to_thread(worker.stop)


def body(prompt: Any = PROMPT, count: int | None = None, **more: Any) -> dict[str, Any]:
    """A request for a greedy completion that says its tokens."""
    found = {"model": MODEL, "prompt": prompt, "temperature": 0, "return_token_ids": True, **more}
    return found if count is None else {**found, "max_tokens": count}


async def completed(session: aiohttp.ClientSession, prompt: Any = PROMPT, count: int = 4, **more: Any) -> Any:
    """The answer in one piece."""
    async with session.post("/v1/completions", json=body(prompt, count, **more)) as response:
        return await response.json()


async def tokens_of(session: aiohttp.ClientSession, prompt: Any = PROMPT, count: int = 4, **more: Any) -> list[int]:
    """The new tokens of an answer in one piece."""
    tokens: list[int] = (await completed(session, prompt, count, **more))["choices"][0]["token_ids"]
    return tokens


async def events(response: aiohttp.ClientResponse) -> list[Any]:
    """The data of all events, of which the last may be [DONE]."""
    assert (response.status, response.content_type) == (200, "text/event-stream")
    data = [line.removeprefix(b"data: ").strip() async for line in response.content]
    return ["[DONE]" if one == b"[DONE]" else json.loads(one) for one in data if one]


async def streamed(session: aiohttp.ClientSession, prompt: Any = PROMPT, count: int = 4, **more: Any) -> list[Any]:
    """The events of an answer that is streamed."""
    async with session.post("/v1/completions", json=body(prompt, count, stream=True, **more)) as response:
        return await events(response)


async def metrics_of(session: aiohttp.ClientSession) -> dict[str, float]:
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


async def until(worker: Worker, **wanted: int) -> None:
    """Waits for a state of the worker."""
    while any(getattr(worker.state, name) != value for name, value in wanted.items()):
        await asyncio.sleep(0.01)
