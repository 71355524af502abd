"""A program in a namespace that carries out requests: JSON lines on its standard input, answers on its output."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc.aio
from namespaces import Wire

from kvmesh.errors import MeshError

HERE = Path(__file__).parent
LINE = 1 << 24


class Failed(Exception):
    """What was answered instead of a result."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"{code}: {details}")
        self.code = code
        self.details = details


class Program:
    """`script` of this folder, running on one side of the wire."""

    def __init__(self, wire: Wire, side: int, script: str, *arguments: Any) -> None:
        words = [sys.executable, str(HERE / script), *(json.dumps(argument) for argument in arguments)]
        self._command = wire.command(side, words)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    async def start(self) -> None:
        """Returns when it answers."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LINE
        )
        self._waiting[0] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read())
        async with asyncio.timeout(50):
            await self._waiting[0]

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            answer = json.loads(line)
            future = self._waiting.pop(answer["id"])
            if future.done():
                continue
            if "code" in answer:
                future.set_exception(Failed(answer["code"], answer["details"]))
            else:
                future.set_result(answer["result"])
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Failed("GONE", "the program has ended"))

    async def ask(self, what: str, **fields: Any) -> Any:
        """One request. Raises Failed."""
        assert self._process.stdin is not None
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(json.dumps({"id": number, "what": what, **fields}).encode() + b"\n")
        async with asyncio.timeout(90):
            return await future

    async def kill(self) -> None:
        """Ends it, without a chance to say anything."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        await self._reading


async def serve(do: Callable[..., Awaitable[Any]]) -> None:
    """The program's side: calls `do` with the fields of each request. Answers may come in another order."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print(json.dumps({"id": 0, "result": "ready"}), flush=True)
    tasks: set[asyncio.Task[None]] = set()

    async def one(request: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"id": request.pop("id")}
        try:
            answer["result"] = await do(**request)
        except grpc.aio.AioRpcError as error:
            answer |= {"code": error.code().name, "details": error.details()}
        except MeshError as error:
            answer |= {"code": error.status, "details": str(error)}
        except (Exception, asyncio.CancelledError) as error:
            answer |= {"code": type(error).__name__, "details": str(error)}
        print(json.dumps(answer), flush=True)

    while line := await reader.readline():
        task = asyncio.create_task(one(json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
