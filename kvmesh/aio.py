"""What every service's event loop needs: owned background tasks, an end on a signal, a log."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from kvmesh.errors import MeshError

log = logging.getLogger(__name__)
T = TypeVar("T")

# How long a cancelled task may take to end before it is given up.
CLOSE_S = 5.0


class Tasks:
    """Owner of background tasks. One that fails is logged; none outlives `close`."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, coro: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Runs `coro` in the background. After `close` the task is cancelled before it begins."""
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if self._closed:
            task.cancel()
        return task

    async def drain(self, timeout: float) -> bool:
        """Waits until no task is left, `timeout` seconds at most; whether none is."""
        deadline = time.monotonic() + timeout
        while (running := self._others()) and (left := deadline - time.monotonic()) > 0:
            await asyncio.wait(running, timeout=left)
        return not self._others()

    async def close(self) -> None:
        """Cancels every task and waits for their ends. May be called twice, and by one of the tasks."""
        self._closed = True
        for task in self._others():
            task.cancel()
        if not await self.drain(CLOSE_S):
            names = ", ".join(sorted(t.get_name() for t in self._others()))
            log.error("still running %g s after they were cancelled: %s", CLOSE_S, names)

    def _others(self) -> set[asyncio.Task[Any]]:
        return self._tasks - {asyncio.current_task()}

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, MeshError):
            log.error("%s failed: %s: %s", task.get_name(), type(error).__name__, error)
        else:
            log.error("%s failed", task.get_name(), exc_info=error)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a service until it returns, or SIGINT or SIGTERM cancels it: both are a good end.

    Ends the process with status 1, and one line on standard error, when it raises a MeshError.
    """
    import uvloop

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_signal(main))
    except MeshError as error:
        sys.exit(f"Error: {error}")


async def _until_signal(main: Coroutine[Any, Any, None]) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.create_task(main)
    signalled: list[int] = []

    def end(number: int) -> None:
        # A second signal must not cut the clean-up short.
        if not signalled:
            log.info("%s: stopping", signal.Signals(number).name)
            task.cancel()
        signalled.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end, number)
    try:
        await task
    except asyncio.CancelledError:
        if not signalled:
            raise


def setup_logging(role: str, level: str = "info") -> None:
    """Logs to standard error: time, level, `role`, logger, text. `level` as in kvmesh.config.LEVELS."""
    handler = logging.StreamHandler(sys.stderr)
    role = role.replace("%", "%%")
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {role} %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Their debug output is about themselves, and more than all of ours.
    for name in ("grpc", "asyncio", "opentelemetry"):
        logging.getLogger(name).setLevel(max(logging.INFO, logging.getLevelName(level.upper())))
