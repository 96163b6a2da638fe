"""Clients that stall hold nothing for long: not a connection, not a request, not the place of another client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from clients import PROMPT, running, tokens_of, until
from serve.answers import error_body
from serve.connections import ConnectionLimits
from serve.generate import Generator
from serve.text import Text
from serve.worker import Worker
from served import NUM_PAGES

SOON = ConnectionLimits(headers_s=0.4, body_s=0.4)
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"

Test = Callable[[aiohttp.ClientSession, int], Awaitable[None]]
Against = Callable[[ConnectionLimits, Test], None]


@pytest.fixture
def against(generator: Generator, text: Text) -> Callable[[ConnectionLimits, Test], None]:
    """Runs a test against a server with some limits."""

    def run(limits: ConnectionLimits, test: Test) -> None:
        async def main() -> None:
            worker = Worker(generator, 100)
            async with running(worker, text, limits) as (session, port):
                await asyncio.wait_for(test(session, port), 60)
                await until(worker, running=0, waiting=0, free_pages=NUM_PAGES)

        asyncio.run(main())

    return run


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
def test_headers_that_do_not_end_close_the_connection(against: Against, parts: tuple[bytes, ...]) -> None:
    async def test(session: aiohttp.ClientSession, port: int) -> None:
        found, seconds = await answer_to(port, *parts)
        assert found == b""
        assert 0.3 < seconds < 5
        assert len(await tokens_of(session, PROMPT, 2)) == 2

    against(SOON, test)


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
def test_a_body_that_does_not_come_is_told_so(against: Against, parts: tuple[bytes, ...]) -> None:
    async def test(session: aiohttp.ClientSession, port: int) -> None:
        found, seconds = await answer_to(port, *parts)
        found = found.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        head, _, body = found.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body) == error_body(408, "the body did not come within 0.4 s; send it at once")
        assert seconds < 5
        assert len(await tokens_of(session, PROMPT, 2)) == 2

    against(SOON, test)


def test_a_body_that_nobody_reads_holds_no_connection(against: Against) -> None:
    async def test(session: aiohttp.ClientSession, port: int) -> None:
        found, seconds = await answer_to(port, b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        assert found.startswith(b"HTTP/1.1 200 OK\r\n")
        assert seconds < 5

    against(SOON, test)


def test_a_connection_that_is_kept_alive_must_be_used(against: Against) -> None:
    async def test(session: aiohttp.ClientSession, port: int) -> None:
        ask = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        found, seconds = await answer_to(port, ask, ask, gap=0.2)
        assert found.count(b"HTTP/1.1 200 OK\r\n") == 2
        assert 0.5 < seconds < 5

    against(SOON, test)


def test_an_answer_may_take_longer_than_a_request(
    against: Against, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = generator.step

    def slow() -> Any:
        if generator.scheduler.running or generator.scheduler.waiting:
            time.sleep(0.05)
        return ran()

    monkeypatch.setattr(generator, "step", slow)

    async def test(session: aiohttp.ClientSession, port: int) -> None:
        start = time.monotonic()
        assert len(await tokens_of(session, PROMPT, 20)) == 20
        assert time.monotonic() - start > 2 * SOON.headers_s

    against(SOON, test)


def test_a_client_that_does_not_read_its_answer_is_disconnected(
    against: Against, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its buffers are taken to be full from the start."""

    async def never(response: web.StreamResponse, data: bytes) -> None:
        await asyncio.Event().wait()

    async def test(session: aiohttp.ClientSession, port: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(web.StreamResponse, "write", never)
            body = json.dumps({"model": "small", "prompt": [1, 2], "max_tokens": 100, "stream": True}).encode()
            found, seconds = await answer_to(port, POST + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b"200 OK" in found
        assert b"data:" not in found
        assert 0.3 < seconds < 5
        assert len(await tokens_of(session, PROMPT, 2)) == 2

    against(ConnectionLimits(event_s=0.4), test)


def test_a_connection_too_many_is_told_so_and_later_ones_are_served(against: Against) -> None:
    async def test(session: aiohttp.ClientSession, port: int) -> None:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        await asyncio.sleep(0.1)
        async with session.get("/health") as response:
            assert response.status == 503
            assert await response.json() == error_body(503, "3 connections are open already; try again later")
        for _, writer in idle:
            writer.close()
        await asyncio.sleep(0.1)
        assert len(await tokens_of(session, PROMPT, 2)) == 2

    against(ConnectionLimits(most=3), test)
