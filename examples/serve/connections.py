"""How many connections there may be, and how long each may take to send a request.

aiohttp bounds the size of headers and bodies, but not the time that they take: a client that sends nothing, or a byte now and
then, would hold its connection for ever. So would one that does not read its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from aiohttp import web

from serve.answers import error_body

LINGERING_S = 2.0  # for the rest of a body that nobody wants


@dataclass(frozen=True)
class ConnectionLimits:
    """Connections at once. Seconds for the headers of a request, for its body, and for a client to take an event."""

    most: int = 1024
    headers_s: float = 10.0
    body_s: float = 10.0
    event_s: float = 30.0


class Gate:
    """The connections that are open, by transport."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.open: dict[asyncio.BaseTransport, Connection] = {}

    @contextlib.contextmanager
    def busy(self, transport: asyncio.BaseTransport | None) -> Iterator[None]:
        """While a request is answered, its connection waits for no headers."""
        connection = None if transport is None else self.open.get(transport)
        if connection is None:  # the client is gone
            yield
            return
        connection.stop_waiting()
        try:
            yield
        finally:
            connection.wait_for_headers()


class Connection(asyncio.Protocol):
    """Passes all on to aiohttp's protocol, and closes a connection that is one too many or sends no request in time."""

    def __init__(self, gate: Gate, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        self._gate = gate
        self._make_protocol = make_protocol
        self._protocol: asyncio.Protocol | None = None
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if len(self._gate.open) >= self._gate.limits.most:
            transport.write(refusal(f"{self._gate.limits.most} connections are open already; try again later"))
            transport.close()
            return
        self._transport = transport
        self._gate.open[transport] = self
        self._protocol = self._make_protocol()
        self.wait_for_headers()
        self._protocol.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._protocol is not None and self._transport is not None:
            self.stop_waiting()
            del self._gate.open[self._transport]
            self._transport = None
            self._protocol.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._protocol is not None:
            self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        return None if self._protocol is None else self._protocol.eof_received()

    def pause_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        if self._protocol is not None:
            self._protocol.resume_writing()

    def wait_for_headers(self) -> None:
        """From now on a request must come in time."""
        self.stop_waiting()
        if self._transport is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._gate.limits.headers_s, self._transport.abort)

    def stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def refusal(why: str) -> bytes:
    """A whole answer for a client that no handler will see."""
    body = json.dumps(error_body(503, why)).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


@contextlib.asynccontextmanager
async def listening(app: web.Application, gate: Gate, host: str, port: int) -> AsyncIterator[int]:
    """Serves an application on a port, which is yielded: another one than was asked for where that is 0."""
    # A handler ends when its client goes.
    runner = web.AppRunner(
        app, access_log=None, handler_cancellation=True, shutdown_timeout=5, lingering_time=LINGERING_S
    )
    await runner.setup()
    assert runner.server is not None
    make_protocol = runner.server
    server = await asyncio.get_running_loop().create_server(lambda: Connection(gate, make_protocol), host, port)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await runner.cleanup()
