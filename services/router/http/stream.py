"""Runs one or more generations for one HTTP request, and ends them with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from kvmesh.errors import Cancelled
from kvmesh.v1.router_pb2 import GenerateRequest, GenerateResponse
from services.router.door import REQUEST_S, Door
from services.router.http.gate import Caller

T = TypeVar("T")
# Messages that wait for a slow client: then the generations wait too.
BACKLOG = 64


@dataclass(slots=True)
class Event:
    """A message of one choice."""

    choice: int
    message: GenerateResponse


async def events(
    door: Door, requests: Sequence[GenerateRequest], metadata: list[tuple[str, str]], caller: Caller | None = None
) -> AsyncGenerator[Event, None]:
    """Messages of all choices as they come; closing it cancels what still runs. Raises the first failure.

    They count against the limit of `caller` from the first message asked for to the end.
    """
    with contextlib.nullcontext() if caller is None else caller.running(len(requests)):
        async with contextlib.aclosing(_events(door, requests, metadata)) as source:
            async for event in source:
                yield event


async def _events(
    door: Door, requests: Sequence[GenerateRequest], metadata: list[tuple[str, str]]
) -> AsyncGenerator[Event, None]:
    backlog: deque[Event] = deque()
    news, room = asyncio.Event(), asyncio.Event()

    async def take(choice: int, message: GenerateResponse) -> None:
        while len(backlog) >= BACKLOG:
            room.clear()
            await room.wait()
        backlog.append(Event(choice, message))
        news.set()

    tasks = [
        asyncio.create_task(door.generate(request, metadata, REQUEST_S, partial(take, choice)))
        for choice, request in enumerate(requests)
    ]
    for task in tasks:
        task.add_done_callback(lambda _: news.set())
    try:
        while True:
            news.clear()
            while backlog:
                event = backlog.popleft()
                room.set()
                yield event
            for task in tasks:
                if task.done():
                    task.result()
            if all(task.done() for task in tasks) and not backlog:
                return
            await news.wait()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_disconnected(http: Request, source: AsyncGenerator[Event, None]) -> list[Event]:
    """All events; raises Cancelled, and ends the generations, when the client goes away first. Raises MeshError."""

    async def collect() -> list[Event]:
        return [event async for event in source]

    try:
        return await while_connected(http, collect())
    finally:
        await source.aclose()


async def while_connected(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; cancels it, and raises Cancelled, when the client goes away first."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("the client went away")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
