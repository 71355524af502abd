"""Virtual time: an event loop whose clock jumps to the next thing that is due."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

# Where the clock begins: some code takes 0 for "never".
BEGIN_S = 1000.0


class Stuck(RuntimeError):
    """Every task waits for something that will never come."""


class _Selector(selectors.DefaultSelector):
    """Waits for nothing: what time it was told to wait is over."""

    def __init__(self) -> None:
        super().__init__()
        self.now = BEGIN_S

    def select(self, timeout: float | None = None) -> list[Any]:
        """No events; the clock moves on."""
        if timeout is None:
            raise Stuck("nothing is left to happen, and somebody still waits")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """No sockets, threads or subprocesses: only tasks, futures and timers."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        """Virtual seconds."""
        return self._virtual.now


@contextmanager
def clock_of(loop: VirtualLoop) -> Iterator[None]:
    """Makes the process's clocks those of the loop, but for perf_counter."""
    saved = (time.monotonic, time.monotonic_ns, time.time, time.time_ns)
    time.monotonic = time.time = loop.time
    time.monotonic_ns = time.time_ns = lambda: int(loop.time() * 1e9)
    try:
        yield
    finally:
        time.monotonic, time.monotonic_ns, time.time, time.time_ns = saved


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` on a virtual clock. Raises what it raises, and Stuck."""
    loop = VirtualLoop()
    with clock_of(loop), asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main)
