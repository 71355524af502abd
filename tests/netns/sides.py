"""One host of the tests: an engine in a namespace, and a program beside it that calls it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from namespaces import ADDRESSES, Wire

HERE = Path(__file__).parent
START_S = 240.0
KV_TOKENS = 8192


class Failed(Exception):
    """What an engine answered instead of a result."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"{code}: {details}")
        self.code = code
        self.details = details


class Side:
    """One host: an engine, and a program beside it that calls it."""

    def __init__(self, wire: Wire, number: int, model: Path, folder: Path) -> None:
        self._wire = wire
        self._number = number
        self._model = model
        self._folder = folder
        self._log = folder / "engine.log"
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    def start(self) -> None:
        """Starts the engine's process."""
        run_dir = self._folder / "r"
        command = self._wire.command(
            self._number,
            [
                *(sys.executable, "-P", "-m", "kvmesh.cli", "engine", "--model", str(self._model)),
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
        while b"ready" not in (said := self._log.read_bytes()):
            assert self._engine.poll() is None and time.monotonic() < deadline, said[-4000:].decode(errors="replace")
            time.sleep(0.1)
        self.address = (self._folder / "address").read_text().strip()

    async def speak(self) -> None:
        """Starts the program that calls the engine."""
        command = [sys.executable, str(HERE / "speak.py"), json.dumps([self.address])]
        self._speaker = await asyncio.create_subprocess_exec(
            *self._wire.command(self._number, command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=1 << 24,
        )
        self._waiting[0] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read())
        async with asyncio.timeout(30):
            await self._waiting[0]

    async def _read(self) -> None:
        assert self._speaker.stdout is not None
        while line := await self._speaker.stdout.readline():
            answer = json.loads(line)
            future = self._waiting.pop(answer["id"])
            if "code" in answer:
                future.set_exception(Failed(answer["code"], answer["details"]))
            else:
                future.set_result(answer["result"])

    async def ask(self, what: str, **fields: Any) -> Any:
        """One request. Raises Failed."""
        assert self._speaker.stdin is not None
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._speaker.stdin.write(json.dumps({"id": number, "what": what, "at": 0, **fields}).encode() + b"\n")
        async with asyncio.timeout(90):
            return await future

    async def hush(self) -> None:
        """Ends that program."""
        with suppress(ProcessLookupError):
            self._speaker.kill()
        await self._speaker.wait()
        await self._reading

    def stop(self) -> None:
        """Ends the engine, and all it has started."""
        with suppress(ProcessLookupError):
            self._engine.terminate()
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
