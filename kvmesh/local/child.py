"""One process of the local mesh: how to start it, when it is ready, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from kvmesh.local import launch
from kvmesh.local.cleanup import kill_session, send
from kvmesh.local.state import ProcessId

# Seconds that a killed process may take to be gone: one that hangs in a driver must not hang the rest.
KILL_PATIENCE = 10.0


@dataclasses.dataclass(frozen=True)
class Spec:
    """What to run. `ready` waits until the process serves, and returns its address; the supervisor bounds the wait."""

    name: str
    role: str
    command: Sequence[str]
    ready: Callable[[], Awaitable[str]]
    log: Path
    environment: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(os.environ))
    # Seconds between SIGTERM and SIGKILL.
    patience: float = 5

    def open_log(self) -> BinaryIO:
        """The log, to be appended to."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return open(self.log, "ab")


class Child:
    """A running (or ended) process, in a session of its own, that dies with us."""

    def __init__(self, spec: Spec, process: asyncio.subprocess.Process, id: ProcessId) -> None:
        self.spec = spec
        self.id = id
        self.address = ""
        self.started = time.monotonic()
        self.ready_after: float | None = None
        self._process = process

    @staticmethod
    async def start(spec: Spec) -> Child:
        """Starts the process. Call from the main thread: the kernel ties the child's life to the thread."""
        launcher = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid())]
        with spec.open_log() as log:
            process = await asyncio.create_subprocess_exec(
                *launcher,
                *spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(spec.environment),
                start_new_session=True,
            )
        # A process that is gone already left no start time; its number alone is then never signalled.
        return Child(spec, process, ProcessId.of(process.pid) or ProcessId(process.pid, 0.0))

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.returncode

    @property
    def state(self) -> str:
        """'starting', 'ready', or how it ended."""
        code = self.returncode
        if code is None:
            return "starting" if self.ready_after is None else "ready"
        if code >= 0:
            return f"exited with status {code}"
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"

    async def wait(self) -> None:
        """Waits for the end of the process."""
        await self._process.wait()

    async def wait_ready(self) -> None:
        """Waits until it serves, and notes address and time."""
        self.address = await self.spec.ready()
        self.ready_after = time.monotonic() - self.started

    async def stop(self) -> None:
        """SIGTERM, `spec.patience` seconds, then SIGKILL for what is left of its session."""
        if self.returncode is None:
            send(self.id, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), self.spec.patience)
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL for the whole session, at once."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await asyncio.to_thread(kill_session, self.id)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), KILL_PATIENCE)

    def last_lines(self, count: int) -> list[str]:
        """The end of its log, without empty lines."""
        return last_lines(self.spec.log, count)


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines of the last 16 KiB of a file that are not empty."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 16384))
            text = f.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]
