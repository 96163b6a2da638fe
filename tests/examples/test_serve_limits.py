"""Clients that stall hold nothing for long: not a connection, not a request, not the place of another client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from clients import PROMPT, running, tokens_of, until
from serve.connections import ConnectionLimits
from serve.generate import Generator
from serve.worker import Worker

SOON = ConnectionLimits(headers_s=0.4, body_s=0.4)
POST = b"POST /generate HTTP/1.1\r\nHost: x\r\n"

Test = Callable[[aiohttp.ClientSession, int], Awaitable[None]]


def against(generator: Generator, limits: ConnectionLimits, test: Test) -> None:
    async def run() -> None:
        async with running(Worker(generator, 100), limits) as (session, port):
            await asyncio.wait_for(test(session, port), 60)
            await until(session, running=0, waiting=0, free_pages=24)

    asyncio.run(run())


async def answer_to(port: int, *parts: bytes, gap: float = 0.1) -> tuple[bytes, float]:
    """All that the server says until it closes the connection, to parts sent one by one; and how long that took."""
    start = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def send() -> None:
        for part in parts:
            writer.write(part)
            await asyncio.sleep(gap)

    sending = asyncio.create_task(send())
    try:
        found = await reader.read()
    except ConnectionResetError:
        found = b""
    sending.cancel()
    writer.close()
    return found, time.monotonic() - start


@pytest.mark.parametrize(
    "parts",
    [(), (b"P",), (POST,), (POST, *[b"A: b\r\n"] * 100), (b"\r\n",) * 100],
    ids=["nothing", "a byte", "some headers", "headers without end", "empty lines"],
)
def test_headers_that_do_not_end_close_the_connection(generator: Generator, parts: tuple[bytes, ...]) -> None:
    async def test(session: aiohttp.ClientSession, port: int) -> None:
        found, seconds = await answer_to(port, *parts)
        assert found == b""
        assert 0.3 < seconds < 5
        assert len(await tokens_of(session, PROMPT, 2)) == 3

    against(generator, SOON, test)


@pytest.mark.parametrize(
    "parts",
    [
        (POST + b"Content-Length: 100\r\n\r\n",),
        (POST + b"Content-Length: 100\r\n\r\n", *[b"{"] * 90),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 90),
        (POST + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n",),
    ],
    ids=["none", "a byte now and then", "chunks", "expected"],
)
def test_a_body_that_does_not_come_is_told_so(generator: Generator, parts: tuple[bytes, ...]) -> None:
    async def test(session: aiohttp.ClientSession, port: int) -> None:
        found, seconds = await answer_to(port, *parts)
        found = found.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        head, _, body = found.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body) == {"error": "the body did not come within 0.4 s; send it at once"}
        assert seconds < 5
        assert len(await tokens_of(session, PROMPT, 2)) == 3

    against(generator, SOON, test)


def test_a_body_that_nobody_reads_holds_no_connection(generator: Generator) -> None:
    async def test(session: aiohttp.ClientSession, port: int) -> None:
        found, seconds = await answer_to(port, b"GET /stats HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        assert found.startswith(b"HTTP/1.1 200 OK\r\n")
        assert seconds < 5

    against(generator, SOON, test)


def test_a_connection_that_is_kept_alive_must_be_used(generator: Generator) -> None:
    async def test(session: aiohttp.ClientSession, port: int) -> None:
        ask = b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n"
        found, seconds = await answer_to(port, ask, ask, gap=0.2)
        assert found.count(b"HTTP/1.1 200 OK\r\n") == 2
        assert 0.5 < seconds < 5

    against(generator, SOON, test)


def test_an_answer_may_take_longer_than_a_request(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = generator.step

    def slow() -> Any:
        if generator.scheduler.running or generator.scheduler.waiting:
            time.sleep(0.05)
        return ran()

    monkeypatch.setattr(generator, "step", slow)

    async def test(session: aiohttp.ClientSession, port: int) -> None:
        start = time.monotonic()
        assert len(await tokens_of(session, PROMPT, 20)) == 21
        assert time.monotonic() - start > 2 * SOON.headers_s

    against(generator, SOON, test)


def test_a_connection_too_many_is_told_so_and_later_ones_are_served(generator: Generator) -> None:
    async def test(session: aiohttp.ClientSession, port: int) -> None:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        await asyncio.sleep(0.1)
        async with session.get("/stats") as response:
            assert response.status == 503
            assert await response.json() == {"error": "3 connections are open already; try again later"}
        for _, writer in idle:
            writer.close()
        await asyncio.sleep(0.1)
        assert len(await tokens_of(session, PROMPT, 2)) == 3

    against(generator, ConnectionLimits(most=3), test)
