"""The HTTP endpoint.

    PYTHONPATH=examples python -m serve.app build/serve-demo.rpac --port 8000
    curl -N localhost:8000/generate -d '{"prompt": [1, 2, 3], "max_new_tokens": 8}'

POST /generate streams one line of JSON for each token, {"token": 17}, and {"done": true} at the end, or {"error": "..."} if
it cannot go on. A refused request gets a 4xx or a 503 with {"error": "..."}. GET /stats says what ran.

A client has 10 s for the headers of a request and 10 s for its body, and 1024 clients can be connected (connections.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is installed to compile, and would look for a TPU

from aiohttp import web

import rpac
from serve import toy as model
from serve.compiled import keep_compiled
from serve.connections import ConnectionLimits, Gate, listening
from serve.generate import Generator
from serve.worker import Busy, Failed, Stream, Worker

MAX_BODY = 1 << 20
WORKER = web.AppKey("worker", Worker)
GATE = web.AppKey("gate", Gate)


def make_app(worker: Worker, gate: Gate) -> web.Application:
    """The application around a worker that is running; its connections come through `gate`."""
    app = web.Application(middlewares=[errors_as_json], client_max_size=MAX_BODY)
    app[WORKER] = worker
    app[GATE] = gate
    app.router.add_post("/generate", generate)
    app.router.add_get("/stats", stats)
    return app


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        with request.app[GATE].busy(request.transport):
            return await handler(request)
    except web.HTTPException as error:
        return web.json_response({"error": error.text or error.reason}, status=error.status, headers=_allowed(error))


async def generate(request: web.Request) -> web.StreamResponse:
    worker = request.app[WORKER]
    prompt, count = parse(await body_of(request), worker.generator.config.vocabulary)
    stream = Stream()
    worker.submit(stream, prompt, count)
    try:
        await stream.get()
        return await send(request, stream)
    except rpac.RpacError as error:
        raise web.HTTPBadRequest(text=str(error)) from error
    except (Busy, Failed) as error:
        raise web.HTTPServiceUnavailable(text=str(error)) from error
    finally:
        worker.cancel(stream)  # also if the client has disconnected, so that its pages become free


async def body_of(request: web.Request) -> bytes:
    """The whole body. Raises HTTPRequestTimeout where it does not come in time."""
    seconds = request.app[GATE].limits.body_s
    try:
        async with asyncio.timeout(seconds):
            return await request.read()
    except TimeoutError as error:
        raise web.HTTPRequestTimeout(text=f"the body did not come within {seconds:g} s; send it at once") from error


async def send(request: web.Request, stream: Stream) -> web.StreamResponse:
    """Streams the tokens as they arrive."""
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    try:
        last = False
        while not last:
            token = await stream.get()
            assert token is not None
            await response.write(line(token=token.token))
            last = token.last
        await response.write(line(done=True))
    except Failed as error:
        await response.write(line(error=str(error)))
    await response.write_eof()
    return response


async def stats(request: web.Request) -> web.Response:
    worker = request.app[WORKER]
    generator = worker.generator
    return web.json_response(
        {
            "totals": vars(generator.totals),
            "programs": {str(variant): vars(count) for variant, count in generator.engine.counts.items()},
            "num_pages": generator.engine.limits.num_pages,
            **worker.state._asdict(),
        }
    )


def parse(body: bytes, vocabulary: int) -> tuple[list[int], int]:
    """The prompt and how many tokens to add. Raises HTTPBadRequest saying what is wrong with which part."""
    try:
        data: Any = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or set(data) - {"prompt", "max_new_tokens"} or "prompt" not in data:
        found = body[:80].decode(errors="replace")
        raise web.HTTPBadRequest(text=f'the body is {found!r}; must be JSON {{"prompt": [...], "max_new_tokens": N}}')
    prompt, count = data["prompt"], data.get("max_new_tokens", 16)
    if not isinstance(prompt, list):
        raise web.HTTPBadRequest(text=f"prompt is a {type(prompt).__name__}; must be a list of token ids")
    for index, token in enumerate(prompt):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise web.HTTPBadRequest(text=f"prompt[{index}] is {token!r:.40}; must be an integer 0 to {vocabulary - 1}")
    if type(count) is not int:
        raise web.HTTPBadRequest(text=f"max_new_tokens is {count!r:.40}; must be an integer")
    return prompt, count


def line(**values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _allowed(error: web.HTTPException) -> dict[str, str]:
    """The header that a 405 must have."""
    return {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}


async def serve(worker: Worker, host: str, port: int, limits: ConnectionLimits) -> None:
    """Serves until the process is told to end."""
    gate = Gate(limits)
    async with listening(make_app(worker, gate), gate, host, port) as found:
        print(f"listening on http://{host}:{found}", flush=True)
        ended = asyncio.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(name, ended.set)
        await ended.wait()
        await asyncio.to_thread(worker.stop)  # before the handlers, so that they can tell their clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--compile-cache", help="folder that keeps what XLA compiled for this machine")
    parser.add_argument("--seed", type=int, default=0, help="seed of the model's weights")
    parser.add_argument(
        "--most-waiting", type=int, default=1024, help="most requests that may wait; further ones are refused"
    )
    parser.add_argument(
        "--most-connections", type=int, default=ConnectionLimits.most, help="most connections; further ones get a 503"
    )
    options = parser.parse_args()
    if options.compile_cache is not None:
        keep_compiled(options.compile_cache)
    config = model.Config()
    try:
        engine = rpac.load(options.bundle, target="cpu")
    except rpac.RpacError as error:
        sys.exit(str(error))
    generator = Generator(engine, config, model.init(config, options.seed))
    generator.warm()
    worker = Worker(generator, options.most_waiting)
    worker.start()
    asyncio.run(serve(worker, options.host, options.port, ConnectionLimits(options.most_connections)))


if __name__ == "__main__":
    main()
