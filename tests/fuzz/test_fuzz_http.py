"""Whatever bytes a client of the example server sends, the server does not fail, and the next client is served."""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from command import ROOT
from fuzzing import fuzz, mutate_text, mutate_tree

from rpac.batch import Limits
from rpac.serving import Scheduler

sys.path.insert(0, str(ROOT / "examples"))

LIMITS = Limits(page_size=16, pages_per_seq=8, max_num_seqs=4, num_pages=24, prefill_chunk=16, token_buckets=(8, 32))
BODY = {"prompt": [1, 2, 3], "max_new_tokens": 4}
STATUS = re.compile(rb"\AHTTP/1\.[01] (\d{3}) ")


class Generator:
    """The example's generator with no model: each new token is 7."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(LIMITS)
        self.totals = SimpleNamespace(steps=0)
        self.config = SimpleNamespace(vocabulary=512)
        self.engine = SimpleNamespace(counts={}, limits=LIMITS)

    def step(self) -> list[Any]:
        from serve.generate import Token

        step = self.scheduler.step()
        if step is None:
            return []
        import numpy as np

        ended = set(self.scheduler.commit(step, np.full(len(step.sampled), 7, np.int32)))
        return [Token(name, 7, name in ended) for name in step.sampled]


def request(
    body: bytes, head: bytes = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
) -> bytes:
    return head + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body


def make(rng: random.Random) -> bytes:
    body = json.dumps(BODY).encode()
    match rng.randrange(4):
        case 0:
            return mutate_text(rng, request(body))
        case 1:
            return request(mutate_text(rng, body))
        case 2:
            head = rng.choice(
                [b"GET /stats", b"PUT /generate", b"GET /", b"HEAD /stats", b"OPTIONS *", b"POST /generate?x=\xff"]
            )
            return request(body, head + b" HTTP/1.1\r\nHost: x\r\n")
        case _:
            return request(json.dumps(mutate_tree(rng, BODY)).encode("utf-8", "surrogatepass"))


def test_requests(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("aiohttp")
    from serve import connections
    from serve.app import make_app
    from serve.connections import ConnectionLimits, Gate, listening
    from serve.worker import Worker

    monkeypatch.setattr(connections, "LINGERING_S", 0.05)

    async def run() -> None:
        worker = Worker(Generator(), 100)  # type: ignore[arg-type]
        worker.start()
        gate = Gate(ConnectionLimits())
        try:
            async with listening(make_app(worker, gate), gate, "127.0.0.1", 0) as port:
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
                    assert ok.result(30).count(b'{"token": 7}') == 4, "the next client is not served"

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
