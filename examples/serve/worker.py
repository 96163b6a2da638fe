"""The thread that owns a generator: requests and cancellations come in through a queue, tokens go out to streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

from rpac.errors import RpacError
from serve.generate import Generator, Request, StepError, Token

LOG = logging.getLogger("serve")

Event = Token | Exception | None
"""What a stream receives: None when the request is accepted, then its tokens. An exception ends it."""


class Busy(Exception):
    """Too many requests are waiting already."""


class Failed(Exception):
    """The step that computed a request failed."""


class Stopping(Exception):
    """The server ends."""


class Stream:
    """What the handler of one request waits on. It belongs to the handler's event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        """May be called from any thread. If the event loop was closed meanwhile, nobody is waiting any more."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def get(self) -> Token | None:
        """Returns the next event, or raises it if it is an exception."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event


class State(NamedTuple):
    """Requests accepted so far, requests that run and that wait now, and free pages."""

    accepted: int = 0
    running: int = 0
    waiting: int = 0
    free_pages: int = 0


class Worker:
    """Runs steps while there is work, and waits for commands otherwise."""

    def __init__(self, generator: Generator, most_waiting: int) -> None:
        self.generator = generator
        self.state = self._state(0)  # replaced as a whole, for other threads to read
        self._most_waiting = most_waiting
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[int, Stream] = {}
        self._names: dict[Stream, int] = {}
        self._stopped = False
        self._draining = False
        self._drained = threading.Event()
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends every request, then the thread. Later requests are not answered."""
        self._commands.put(self._stop)
        self._thread.join()

    @property
    def is_serving(self) -> bool:
        """Whether new requests are taken."""
        return self._thread.is_alive() and not self._draining

    def drain(self, seconds: float) -> bool:
        """Takes no new requests, and waits for those that it has, but not longer than this. Returns whether all ended."""
        self._commands.put(self._drain)
        return self._drained.wait(seconds)

    def submit(self, stream: Stream, request: Request) -> None:
        """Submits a request, from any thread. The stream says what became of it."""
        self._commands.put(lambda: self._add(stream, request))

    def cancel(self, stream: Stream) -> None:
        """Cancels a request, from any thread. Does nothing if the request has ended."""
        self._commands.put(lambda: self._remove(stream))

    def _run(self) -> None:
        while not self._stopped:
            self._take_commands()
            try:
                for token in self.generator.step():
                    self._deliver(token)
            except Exception as error:
                LOG.exception("a step failed; its requests end, the others go on")
                for name in error.requests if isinstance(error, StepError) else list(self._streams):
                    self._fail(name, Failed("a step failed on the server; try again"))
            self.state = self._state(self.state.accepted)

    def _take_commands(self) -> None:
        scheduler = self.generator.scheduler
        idle = not (scheduler.running or scheduler.waiting)
        if idle and self._draining:
            self._drained.set()
        with contextlib.suppress(queue.Empty):
            while not self._stopped:
                self._commands.get(block=idle)()
                idle = False

    def _add(self, stream: Stream, request: Request) -> None:
        if self._draining:
            stream.put(Stopping("the server ends; ask another one"))
            return
        if len(self.generator.scheduler.waiting) >= self._most_waiting:
            stream.put(Busy(f"{self._most_waiting} requests wait already; try again later"))
            return
        try:
            name = self.generator.add(request)
        except RpacError as error:
            stream.put(error)
            return
        self._streams[name], self._names[stream] = stream, name
        self.state = self._state(self.state.accepted + 1)
        stream.put(None)

    def _remove(self, stream: Stream) -> None:
        name = self._names.get(stream)
        if name is not None:
            self.generator.remove(name)
            self._forget(name)

    def _state(self, accepted: int) -> State:
        scheduler = self.generator.scheduler
        return State(accepted, len(scheduler.running), len(scheduler.waiting), scheduler.tables.num_free)

    def _deliver(self, token: Token) -> None:
        self._streams[token.request].put(token)
        if token.end:
            self._forget(token.request)

    def _fail(self, name: int, why: Exception) -> None:
        self._streams[name].put(why)
        self.generator.remove(name)
        self._forget(name)

    def _forget(self, name: int) -> None:
        del self._names[self._streams.pop(name)]

    def _drain(self) -> None:
        self._draining = True

    def _stop(self) -> None:
        for name in list(self._streams):
            self._fail(name, Stopping("the server ends; ask another one"))
        self._stopped = True
        self._drained.set()  # nobody waits for the rest any more
