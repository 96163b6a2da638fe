"""Clients of the example server, which runs in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from serve.app import make_app
from serve.connections import ConnectionLimits, Gate, listening
from serve.generate import Generator
from serve.worker import Worker

PROMPT = [1, 2, 3]
LIMITS = ConnectionLimits()


@asynccontextmanager
async def running(
    worker: Worker, limits: ConnectionLimits = LIMITS
) -> AsyncIterator[tuple[aiohttp.ClientSession, int]]:
    """A client of a server on a real socket, and its port."""
    worker.start()
    gate = Gate(limits)
    try:
        async with listening(make_app(worker, gate), gate, "127.0.0.1", 0) as port:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                yield session, port
            for _ in range(100):
                if not gate.open:
                    break
                await asyncio.sleep(0.01)
            assert not gate.open
    finally:
        await asyncio.to_thread(worker.stop)


def against(
    generator: Generator, test: Callable[[aiohttp.ClientSession], Awaitable[None]], most_waiting: int = 100
) -> None:
    async def run() -> None:
        async with running(Worker(generator, most_waiting)) as (session, _):
            await asyncio.wait_for(test(session), 60)

    asyncio.run(run())


async def lines(response: aiohttp.ClientResponse) -> list[Any]:
    return [json.loads(line) async for line in response.content]


async def tokens_of(session: aiohttp.ClientSession, prompt: list[int], count: int) -> list[Any]:
    async with session.post("/generate", json={"prompt": prompt, "max_new_tokens": count}) as response:
        assert (response.status, response.content_type) == (200, "application/x-ndjson")
        return await lines(response)


async def until(session: aiohttp.ClientSession, **wanted: int) -> None:
    while True:
        async with session.get("/stats") as response:
            found = await response.json()
        if all(found[name] == value for name, value in wanted.items()):
            return
        await asyncio.sleep(0.01)
