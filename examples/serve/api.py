"""The HTTP endpoints: OpenAI's completions and chat completions, and what an operator asks for.

A client that disconnects cancels its request, even while it waits. Errors have OpenAI's form.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aiohttp import web

import rpac
from serve.answers import DONE, Chat, Completion, error_body, event
from serve.asked import Asked, Invalid, read_chat, read_completion
from serve.connections import Gate
from serve.generate import Token
from serve.metrics import Metrics
from serve.text import ChatError, Decoder, Text
from serve.worker import Busy, Failed, Stopping, Stream, Worker

LOG = logging.getLogger("serve")
MAX_BODY = 1 << 20

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Served:
    """What the handlers answer with. `name` is the model's, for clients."""

    name: str
    text: Text
    worker: Worker
    metrics: Metrics
    gate: Gate
    started: int


class Piece(NamedTuple):
    """Some text of an answer, perhaps none, and its tokens; `reason` says why it is the last, and is empty if more follows."""

    text: str
    reason: str
    ids: tuple[int, ...]


SERVED = web.AppKey("served", Served)


def make_app(name: str, text: Text, worker: Worker, gate: Gate) -> web.Application:
    """The application around a worker that is running; its connections come through `gate`."""
    app = web.Application(middlewares=[answered], client_max_size=MAX_BODY)
    app[SERVED] = Served(name, text, worker, Metrics(worker), gate, int(time.time()))
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/v1/models/{model:.+}", model)
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)
    return app


async def completions(request: web.Request) -> web.StreamResponse:
    return await complete(request, read_completion, Completion)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    return await complete(request, read_chat, Chat)


async def complete(
    request: web.Request, read: Callable[[bytes, str], Asked], form: type[Completion]
) -> web.StreamResponse:
    served = request.app[SERVED]
    start = time.perf_counter()
    asked = read(await body_of(request), served.name)
    if not served.worker.is_serving:
        raise Stopping("the server ends; ask another one")
    # Beside the event loop, because a long prompt takes a while.
    prompt = await asyncio.to_thread(tokens_of, served, asked)
    stream = Stream()
    served.worker.submit(stream, asked.request(prompt, served.text.ends))
    try:
        await stream.get()  # raises if the request is refused
        counted = Counted(stream, served.metrics, start)
        pieces = pieces_of(counted, served.text.decoder(prompt, asked.stops))
        answer = form(served.name, len(prompt), asked.with_ids)
        if asked.is_streamed:
            return await send(request, answer, pieces, asked.with_usage)
        found = [piece async for piece in pieces]
        ids = [token for piece in found for token in piece.ids]
        return web.json_response(answer.whole("".join(piece.text for piece in found), found[-1].reason, ids))
    finally:
        served.worker.cancel(stream)  # also if the client has disconnected, so that its pages become free


def tokens_of(served: Served, asked: Asked) -> Sequence[int]:
    """The tokens of a prompt. Raises Invalid."""
    if asked.messages is not None:
        return served.text.encode_chat(asked.messages)
    prompt = asked.prompt
    if isinstance(prompt, str):
        return served.text.encode(prompt)
    vocabulary = served.worker.generator.steps.vocabulary
    for index, token in enumerate(prompt):
        if not 0 <= token < vocabulary:
            raise Invalid(f"prompt[{index}] is {token}; must be a token from 0 to {vocabulary - 1}", "prompt")
    return prompt


class Counted:
    """The tokens of a stream as they come, timed."""

    def __init__(self, stream: Stream, metrics: Metrics, start: float) -> None:
        self._stream = stream
        self._histogram = metrics.first_token
        self._next = metrics.next_token
        self._last = start

    async def get(self) -> Token:
        token = await self._stream.get()
        assert token is not None
        now = time.perf_counter()
        self._histogram.observe(now - self._last)
        self._histogram, self._last = self._next, now
        return token


async def pieces_of(tokens: Counted, decoder: Decoder) -> AsyncIterator[Piece]:
    """The answer as its tokens come, up to its end or to a stop string. Its text comes when it is certain."""
    reason, ids = "", []
    while not reason:
        token = await tokens.get()
        ids.append(token.token)
        text = "" if token.end == "stop" else decoder.put(token.token)
        reason = "stop" if decoder.is_stopped else token.end
        if reason:
            text += decoder.end()
        if text or reason:
            yield Piece(text, reason, tuple(ids))
            ids = []


async def send(
    request: web.Request, answer: Completion, pieces: AsyncIterator[Piece], with_usage: bool
) -> web.StreamResponse:
    """Sends the pieces as server-sent events. A client that does not read them in time is disconnected."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    seconds = request.app[SERVED].gate.limits.event_s
    try:
        async for data in events_of(answer, pieces, with_usage):
            async with asyncio.timeout(seconds):
                await response.write(data)
        await response.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
    return response


async def events_of(answer: Completion, pieces: AsyncIterator[Piece], with_usage: bool) -> AsyncIterator[bytes]:
    """The events of an answer, of which the last may be an error."""
    count = 0
    try:
        for chunk in answer.first():
            yield event(chunk)
        async for piece in pieces:
            count += len(piece.ids)
            yield event(answer.chunk(*piece))
        if with_usage:
            yield event(answer.usage(count))
        yield DONE
    except (Failed, Stopping) as error:
        yield event(error_body(503, str(error)))


async def models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [about(request.app[SERVED])]})


async def model(request: web.Request) -> web.Response:
    served, name = request.app[SERVED], request.match_info["model"]
    if name != served.name:
        raise Invalid(f"model {name!r:.80} does not exist; must be {served.name!r}", "model", "model_not_found", 404)
    return web.json_response(about(served))


def about(served: Served) -> dict[str, object]:
    longest = served.worker.generator.scheduler.max_tokens
    return {
        "id": served.name,
        "object": "model",
        "created": served.started,
        "owned_by": "rpac",
        "max_model_len": longest,
    }


async def health(request: web.Request) -> web.Response:
    """200 while new requests are taken, else 503."""
    if not request.app[SERVED].worker.is_serving:
        raise Stopping("the server ends")
    return web.json_response({"status": "ok"})


async def metrics(request: web.Request) -> web.Response:
    return web.Response(body=request.app[SERVED].metrics.text(), content_type="text/plain", charset="utf-8")


async def body_of(request: web.Request) -> bytes:
    """The whole body. Raises HTTPRequestTimeout where it does not come in time."""
    seconds = request.app[SERVED].gate.limits.body_s
    try:
        async with asyncio.timeout(seconds):
            return await request.read()
    except TimeoutError as error:
        raise web.HTTPRequestTimeout(text=f"the body did not come within {seconds:g} s; send it at once") from error


@web.middleware
async def answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turns errors into answers, and counts answers."""
    served = request.app[SERVED]
    with served.gate.busy(request.transport):
        response = await _caught(request, handler)
    resource = request.match_info.route.resource
    path = "other" if resource is None else resource.canonical
    served.metrics.requests.labels(path, response.status).inc()
    return response


async def _caught(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Invalid as error:
        return _error(error.status, str(error), error.param, error.code)
    except ChatError as error:
        return _error(400, str(error), "messages")
    except rpac.BatchError as error:
        return _error(400, str(error), None, "context_length_exceeded")
    except (Busy, Failed, Stopping) as error:
        return _error(503, str(error), headers={"Retry-After": "1"})
    except web.HTTPException as error:
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None  # which a 405 must have
        return _error(error.status, error.text or error.reason, headers=headers)
    except Exception:
        LOG.exception("a request failed: %s %s", request.method, request.path)
        return _error(500, "the server failed on this request")


def _error(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> web.Response:
    return web.json_response(error_body(status, message, param, code), status=status, headers=headers)
