"""Whether an engine is heard of. When one hangs its connections stay open: the calls on it are told of its silence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# An engine reports at least every BEAT_S; one from which nothing came for so many beats hangs.
BEAT_S, BEATS = 1.0, 5
Told = Callable[[str], None]


class Hearing:
    """Of one engine. Beats are counted, not seconds: while our own event loop stands still, nobody is silent."""

    def __init__(self, name: str) -> None:
        # Why it counts as silent; empty: it does not.
        self.silent = ""
        self._name = name
        self._quiet = 0
        self._calls: set[Told] = set()
        self._timer: asyncio.TimerHandle | None = None

    def heard(self) -> None:
        """Something came."""
        self._quiet, self.silent = 0, ""

    def running(self, call: Told) -> None:
        """`call` is called, with the reason, if the engine is or falls silent before `ended(call)`."""
        self._calls.add(call)
        if self.silent:
            asyncio.get_running_loop().call_soon(self._tell, call)

    def ended(self, call: Told) -> None:
        """The end of one `running`."""
        self._calls.discard(call)

    @contextmanager
    def listening(self, on_silence: Callable[[], object]) -> Iterator[None]:
        """Around the reading of a status stream: calls `on_silence` once, when nothing is `heard` for BEATS."""
        self._quiet = 0
        self._wait(on_silence)
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _wait(self, on_silence: Callable[[], object]) -> None:
        self._timer = asyncio.get_running_loop().call_later(BEAT_S, self._beat, on_silence)

    def _beat(self, on_silence: Callable[[], object]) -> None:
        self._quiet += 1
        if self._quiet <= BEATS:
            self._wait(on_silence)
            return
        self.silent = f"{self._name} hangs: nothing was heard of it for {BEATS * BEAT_S:g} s"
        on_silence()
        for call in list(self._calls):
            self._tell(call)

    def _tell(self, call: Told) -> None:
        if call in self._calls and self.silent:
            call(self.silent)


def cancelled() -> bool:
    """Whether the running task itself is being cancelled, and not just what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
