"""The endpoint streams tokens, says what is wrong with a request, and outlives clients that go and steps that fail."""

from __future__ import annotations

import asyncio
import io
import os
import sys
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from clients import PROMPT, against, lines, running, tokens_of, until
from serve import toy as model
from serve.app import MAX_BODY
from serve.demo import server
from serve.generate import Generator
from serve.load import compare, requests, send_all
from serve.worker import Worker


def test_tokens_are_streamed_a_line_each(generator: Generator) -> None:
    async def test(session: aiohttp.ClientSession) -> None:
        *tokens, end = await tokens_of(session, PROMPT, 5)
        assert end == {"done": True}
        assert [set(token) for token in tokens] == [{"token"}] * 5
        both = await asyncio.gather(tokens_of(session, PROMPT, 5), tokens_of(session, [7] * 40, 3))
        assert both[0] == [*tokens, end]
        assert len(both[1]) == 4

    against(generator, test)


BAD = [
    (b"x", 400, 'the body is \'x\'; must be JSON {"prompt": [...], "max_new_tokens": N}'),
    (b"[" * 100_000, 400, "must be JSON"),
    (b"\xff", 400, "must be JSON"),
    (b'{"prompt": [1], "n": 2}', 400, "must be JSON"),
    (b'{"prompt": "text"}', 400, "prompt is a str; must be a list of token ids"),
    (b'{"prompt": [1, 512]}', 400, "prompt[1] is 512; must be an integer 0 to 511"),
    (b'{"prompt": [1, true]}', 400, "prompt[1] is True"),
    (b'{"prompt": []}', 400, "tokens are empty; must be one at least"),
    (b'{"prompt": [1], "max_new_tokens": "8"}', 400, "max_new_tokens is '8'; must be an integer"),
    (b'{"prompt": [1], "max_new_tokens": 0}', 400, "max_new_tokens 0; must be 1 or more"),
    (b'{"prompt": [1], "max_new_tokens": 129}', 400, "must be 1 or more new tokens, and at most 129 in all"),
    (b" " * (MAX_BODY + 1), 413, "Maximum request body size 1048576 exceeded"),
]


def test_a_bad_request_is_told_what_is_wrong_and_harms_nobody(generator: Generator) -> None:
    async def test(session: aiohttp.ClientSession) -> None:
        other = asyncio.create_task(tokens_of(session, PROMPT, 30))
        for body, status, message in BAD:
            async with session.post("/generate", data=io.BytesIO(body)) as response:
                assert response.status == status
                assert message in (await response.json())["error"]
        async with session.get("/generate") as response:
            assert (response.status, response.headers["Allow"]) == (405, "POST")
        async with session.get("/nowhere") as response:
            assert (response.status, set(await response.json())) == (404, {"error"})
        assert len(await other) == 31

    against(generator, test)


def test_the_pages_of_a_client_that_goes_are_free_again(generator: Generator) -> None:
    async def test(session: aiohttp.ClientSession) -> None:
        async with session.post("/generate", json={"prompt": PROMPT, "max_new_tokens": 120}) as response:
            await response.content.readline()
            response.close()
        await until(session, running=0, waiting=0, free_pages=24)
        assert len(await tokens_of(session, PROMPT, 2)) == 3

    against(generator, test)


def test_a_client_that_goes_while_it_waits_is_forgotten(generator: Generator) -> None:
    async def test(session: aiohttp.ClientSession) -> None:
        long = [asyncio.create_task(tokens_of(session, [n] * 100, 28)) for n in range(9)]  # 7 pages each, of 24
        await until(session, accepted=9)
        gone = asyncio.create_task(tokens_of(session, [9] * 100, 28))
        await until(session, accepted=10)  # behind six others, for only three run at a time
        gone.cancel()
        assert [len(answer) for answer in await asyncio.gather(*long)] == [29] * 9
        assert generator.totals.tokens == 9 * 28
        await until(session, running=0, waiting=0, free_pages=24)

    against(generator, test)


def test_a_server_with_too_much_to_do_says_so(generator: Generator) -> None:
    async def test(session: aiohttp.ClientSession) -> None:
        refused = 0
        for answer in await asyncio.gather(*(post(session, n) for n in range(30))):
            refused += answer == (503, {"error": "2 requests wait already; try again later"})
            assert answer[0] in (200, 503)
        assert 0 < refused < 30

    async def post(session: aiohttp.ClientSession, n: int) -> tuple[int, Any]:
        async with session.post("/generate", json={"prompt": [n] * 60, "max_new_tokens": 40}) as response:
            return response.status, (await lines(response))[-1]

    against(generator, test, most_waiting=2)


def test_after_a_step_that_failed_the_server_goes_on(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(session: aiohttp.ClientSession) -> None:
        want = await tokens_of(session, PROMPT, 4)
        with monkeypatch.context() as patch:
            patch.setattr(generator, "_run", fail)
            assert await tokens_of(session, PROMPT, 4) == [{"error": "a step failed on the server; try again"}]
        assert await tokens_of(session, PROMPT, 4) == want
        await until(session, running=0, waiting=0, free_pages=24)

    def fail(step: Any) -> Any:
        raise RuntimeError("no device")

    against(generator, test)
    assert "no device" in caplog.text


def test_a_server_that_ends_says_so_to_those_who_wait(generator: Generator) -> None:
    async def run() -> None:
        worker = Worker(generator, most_waiting=100)
        async with running(worker) as (session, _):
            answer = asyncio.create_task(tokens_of(session, PROMPT, 120))
            await until(session, running=1)
            await asyncio.to_thread(worker.stop)
            assert (await answer)[-1] == {"error": "the server stops"}

    asyncio.run(run())
    assert generator.scheduler.tables.num_free == 24


@pytest.mark.slow
def test_hundreds_of_requests_over_http_are_answered_as_by_dense_attention(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, whose cache has room for a few of them at once, so that some are preempted."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    config = model.Config()
    load = requests(300, config.vocabulary, np.random.default_rng(3), rate=100)
    with server(str(small_bundle)) as url:
        asyncio.run(send_all(url, load))

        async def stats() -> Any:
            async with aiohttp.ClientSession(url) as session, session.get("/stats") as response:
                return await response.json()

        found = asyncio.run(stats())
    verdict = compare(config, model.init(config, 0), load, 128)
    assert verdict.wrong == ()
    assert found["totals"]["preemptions"] > 0
    assert found["totals"]["shared_tokens"] > 0
    assert (found["running"], found["waiting"], found["free_pages"]) == (0, 0, 24)
