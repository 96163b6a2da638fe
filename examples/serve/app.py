"""The server.

    PYTHONPATH=examples python -m serve.app models/llama build/llama.rpac --port 8000

serves the checkpoint folder models/llama with the bundle that was built for it. docs/example-server.md says more.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

import rpac
from serve.api import make_app
from serve.bundle import open_bundle
from serve.compiled import keep_compiled
from serve.connections import ConnectionLimits, Gate, listening
from serve.errors import CheckpointError
from serve.generate import Generator
from serve.text import Text
from serve.worker import Worker


async def serve(name: str, text: Text, worker: Worker, options: argparse.Namespace) -> None:
    """Serves until the process is told to end. Requests that run then have `--drain` seconds to finish."""
    gate = Gate(ConnectionLimits(options.most_connections))
    async with listening(make_app(name, text, worker, gate), gate, options.host, options.port) as port:
        print(f"listening on http://{options.host}:{port}", flush=True)
        ended, at_once = asyncio.Event(), asyncio.Event()

        def end() -> None:
            (at_once if ended.is_set() else ended).set()

        for one in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(one, end)
        await ended.wait()
        draining = asyncio.create_task(asyncio.to_thread(worker.drain, options.drain))
        await asyncio.wait([draining, asyncio.create_task(at_once.wait())], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.to_thread(worker.stop)  # before the handlers, so that they can tell their clients


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("bundle", help="what rpac build made of the spec that rpac init wrote for it")
    parser.add_argument("--name", help="of the model, for clients; by default the folder's")
    parser.add_argument("--target", help="of the bundle; by default the one for this machine's device")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--drain", type=float, default=30.0, help="seconds that requests have to finish at the end")
    parser.add_argument("--compile-cache", help="folder that keeps what XLA compiled for this machine")
    parser.add_argument("--most-waiting", type=int, default=1024, help="requests that may wait; more are refused")
    parser.add_argument(
        "--most-connections", type=int, default=ConnectionLimits.most, help="connections; more are refused"
    )
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    for name in ("serve", "rpac"):
        logging.getLogger(name).setLevel(logging.INFO)
    if options.compile_cache is not None:
        keep_compiled(options.compile_cache)
    try:
        text = Text(options.model)
        steps = open_bundle(options.bundle, options.model, options.target)
    except (CheckpointError, rpac.RpacError) as error:
        sys.exit(str(error))
    steps.warm()
    worker = Worker(Generator(steps), options.most_waiting)
    worker.start()
    asyncio.run(serve(options.name or options.model.resolve().name, text, worker, options))


if __name__ == "__main__":
    main()
