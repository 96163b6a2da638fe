"""Whatever bytes a client of the example server sends, the server does not fail, and the next client is served."""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import ROOT
from fuzzing import fuzz, mutate_text, mutate_tree

from rpac.batch import Limits

sys.path.insert(0, str(ROOT / "examples"))

LIMITS = Limits(page_size=16, pages_per_seq=8, max_num_seqs=4, num_pages=24, prefill_chunk=16, token_buckets=(8, 32))
BODY = {"model": "small", "prompt": [66, 67, 68], "max_tokens": 4, "temperature": 0.5, "stop": ["xy"], "seed": 3}
CHAT = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "stream": False}
STATUS = re.compile(rb"\AHTTP/1\.[01] (\d{3}) ")


class Steps:
    """A model that always goes on with the same token."""

    limits = LIMITS
    vocabulary = 256

    def new_caches(self) -> None:
        return None

    def __call__(self, step: Any, caches: None, sampling: Any) -> tuple[Any, None]:
        return np.full(LIMITS.max_num_seqs, 97, np.int32), None


def request(
    body: bytes, head: bytes = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
) -> bytes:
    return head + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body


def make(rng: random.Random) -> bytes:
    chat = rng.random() < 0.4
    sound = CHAT if chat else BODY
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
        if chat
        else b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    )
    body = json.dumps(sound).encode()
    match rng.randrange(5):
        case 0:
            return mutate_text(rng, request(body, head))
        case 1:
            return request(mutate_text(rng, body), head)
        case 2:
            first = rng.choice(
                [
                    b"GET /metrics",
                    b"PUT /v1/completions",
                    b"GET /",
                    b"HEAD /health",
                    b"OPTIONS *",
                    b"GET /v1/models/\xff%00",
                ]
            )
            return request(body, first + b" HTTP/1.1\r\nHost: x\r\n")
        case _:
            tree = mutate_tree(rng, {**sound, "stream": rng.random() < 0.5})
            return request(json.dumps(tree).encode("utf-8", "surrogatepass"), head)


def test_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("aiohttp")
    from serve import connections
    from serve.api import make_app
    from serve.connections import ConnectionLimits, Gate, listening
    from serve.generate import Generator
    from serve.text import Text
    from serve.tiny import write_checkpoint
    from serve.worker import Worker

    write_checkpoint(tmp_path / "small")
    text = Text(tmp_path / "small")

    monkeypatch.setattr(connections, "LINGERING_S", 0.05)

    async def run() -> None:
        worker = Worker(Generator(Steps()), 100)  # type: ignore[arg-type]
        worker.start()
        gate = Gate(ConnectionLimits())
        try:
            async with listening(make_app("small", text, worker, gate), gate, "127.0.0.1", 0) as port:
                loop = asyncio.get_running_loop()

                def answered(data: bytes) -> None:
                    found = asyncio.run_coroutine_threadsafe(exchange(port, data), loop).result(30)
                    status = STATUS.match(found)
                    assert not found or status, f"no answer of HTTP: {found[:100]!r}"
                    assert not status or int(status[1]) not in range(500, 600) or status[1] == b"503", found[:300]
                    failed = [
                        one.getMessage() for one in caplog.records if one.exc_info and one.name != "aiohttp.server"
                    ]
                    assert not failed, f"the server logged {failed}"
                    ok = asyncio.run_coroutine_threadsafe(exchange(port, request(json.dumps(BODY).encode())), loop)
                    assert b'"completion_tokens": 4' in ok.result(30), "the next client is not served"

                await asyncio.to_thread(fuzz, "requests", 150, make, answered)
        finally:
            await asyncio.to_thread(worker.stop)

    asyncio.run(run())


async def exchange(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        found = b""
        try:
            found = await asyncio.wait_for(reader.read(1 << 16), 0.2)
        except TimeoutError:
            writer.write_eof()  # the server waits for the rest of a request that is cut short
        return found + await asyncio.wait_for(reader.read(), 20)
    except ConnectionError:
        return b""
    finally:
        writer.close()
