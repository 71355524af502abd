"""One host of the tests: an engine in a namespace, and a program beside it that calls it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from namespaces import ADDRESSES, Wire
from program import Program

START_S = 240.0
KV_TOKENS = 8192


class Side:
    """One host: an engine, and a program beside it that calls it."""

    def __init__(self, wire: Wire, number: int, of: Sequence[str], folder: Path) -> None:
        self._wire = wire
        self._number = number
        # Options that say what engine it is.
        self._of = of
        self._folder = folder
        self._log = folder / "engine.log"

    def start(self) -> None:
        """Starts the engine's process."""
        run_dir = self._folder / "r"
        command = self._wire.command(
            self._number,
            [
                *(sys.executable, "-P", "-m", "kvmesh.cli", "engine", *self._of),
                *("--name", f"engine-{self._number}", "--listen", f"{ADDRESSES[self._number]}:0"),
                *("--announce", str(self._folder / "address"), "--run-dir", str(run_dir)),
                *("--kv-tokens", str(KV_TOKENS), "--trace-ratio", "0"),
            ],
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "KVMESH_HOME": str(self._folder)}
        with open(self._log, "wb") as log:
            self._engine = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def ready(self) -> None:
        """Returns when it serves."""
        deadline = time.monotonic() + START_S
        address = self._folder / "address"
        while b" ready\n" not in (said := self._log.read_bytes()) or not address.exists():
            assert self._engine.poll() is None and time.monotonic() < deadline, said[-4000:].decode(errors="replace")
            time.sleep(0.1)
        self.address = address.read_text().strip()

    async def speak(self) -> None:
        """Starts the program that calls the engine."""
        self._speaker = Program(self._wire, self._number, "speak.py", [self.address])
        await self._speaker.start()

    async def ask(self, what: str, **fields: Any) -> Any:
        """One request. Raises Failed."""
        return await self._speaker.ask(what, **fields)

    async def hush(self) -> None:
        """Ends that program."""
        await self._speaker.kill()

    def terminate(self) -> None:
        """Asks the engine to end."""
        with suppress(ProcessLookupError):
            self._engine.terminate()

    def stop(self) -> None:
        """Ends the engine, and all it has started."""
        self.terminate()
        try:
            self._engine.wait(30)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._engine.pid, signal.SIGKILL)
            self._engine.wait(10)

    @property
    def log(self) -> str:
        """What the engine has written."""
        return self._log.read_text(errors="replace")
