"""A router of several processes on one port: starts them, replaces those that die, and stops them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack

from kvmesh.errors import Unavailable
from kvmesh.grpcx import announce, join_address, split_address
from kvmesh.local import launch
from services.router.cli import RouterConfig
from services.router.tally import Tally
from services.router.worker import Place

log = logging.getLogger(__name__)

# Between a worker's end and its successor's start: the first time, and at most when they end again and again.
BACKOFF_S = (0.1, 10.0)
# A worker that lived so long ended for another reason than the one before.
LIVED_S = 60.0
STOP_S = 10.0


async def serve(config: RouterConfig) -> None:
    """Serves until cancelled. Raises Unavailable when an address is taken, or a worker ends before it was ready."""
    async with AsyncExitStack() as stack:
        listen = stack.enter_context(held(config.listen))
        http = stack.enter_context(held(config.http)) if config.http else ""
        workers = Workers(dataclasses.replace(config, listen=listen, http=http))
        stack.push_async_callback(workers.close)
        await workers.start()
        log.info("%d workers listen on %s", config.workers, listen)
        announce(config.announce, listen)
        if config.announce and http:
            announce(f"{config.announce}.http", http)
        await workers.keep()


@contextlib.contextmanager
def held(listen: str) -> Iterator[str]:
    """`listen` with a port that stays ours: nobody else gets it, and workers may listen there."""
    host, port = split_address(listen)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            s.bind((host, port))
        except OSError as error:
            raise Unavailable(f"cannot listen on {listen}: {error.strerror}") from error
        # Not listening, it gets no connections.
        yield join_address(host, s.getsockname()[1])


class Workers:
    """`config.workers` processes. `start` them, then `keep` them; `close` stops all."""

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._fd = Tally.create(config.workers)
        self._tally = Tally(self._fd, config.workers, 0)
        self._processes: list[asyncio.subprocess.Process | None] = [None] * config.workers

    async def start(self) -> None:
        """Returns when all are ready. Raises Unavailable when one ends before."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._start(i)) for i in range(self._config.workers)]
        if not all(task.result() for task in tasks):
            raise Unavailable("a worker ended before it was ready; its log says why")

    async def keep(self) -> None:
        """Starts each that ends anew, for ever."""
        async with asyncio.TaskGroup() as group:
            for i in range(self._config.workers):
                group.create_task(self._keep(i))

    async def _keep(self, number: int) -> None:
        backoff = BACKOFF_S[0]
        while True:
            process, began = self._processes[number], time.monotonic()
            if process is not None:
                code = await process.wait()
                log.warning("worker %d ended with status %d; starting another", number, code)
            self._tally.clear(number)
            if time.monotonic() - began > LIVED_S:
                backoff = BACKOFF_S[0]
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, BACKOFF_S[1])
            await self._start(number)

    async def _start(self, number: int) -> bool:
        """Starts a worker; whether it came to be ready."""
        launcher = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid())]
        process = await asyncio.create_subprocess_exec(
            *(*launcher, sys.executable, "-P", "-m", "services.router.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[self._fd],
        )
        self._processes[number] = process
        assert process.stdin is not None and process.stdout is not None
        place = Place(self._of(number), number, self._config.workers, self._fd)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(f"{place.dump()}\n".encode())
            await process.stdin.drain()
        return bool(await process.stdout.readline())

    def _of(self, number: int) -> RouterConfig:
        """The settings of one worker: its own name, and its own page of metrics, on the port `number` further."""
        given = self._config
        metrics = given.metrics
        if metrics and (split := split_address(metrics))[1]:
            metrics = join_address(split[0], split[1] + number)
        return dataclasses.replace(
            given,
            name=f"{given.name}-{number}" if given.name else "",
            metrics=metrics,
            announce=f"{given.announce}.{number}" if given.announce else "",
        )

    async def close(self) -> None:
        """SIGTERM to all, and SIGKILL after STOP_S."""
        alive = [p for p in self._processes if p is not None and p.returncode is None]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)
            ends = [asyncio.ensure_future(process.wait()) for process in alive]
            if ends and (await asyncio.wait(ends, timeout=STOP_S))[1]:
                continue
            break
        self._tally.close()
        os.close(self._fd)
