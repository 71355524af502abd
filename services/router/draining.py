"""Engines that are being taken out: a setting of the mesh, so that no router gives them new requests."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import aclosing

from kvmesh.aio import Tasks
from kvmesh.errors import Aborted, DeadlineExceeded, Unavailable
from kvmesh.membership import SharedSettings
from kvmesh.v1.registry_pb2 import Setting

log = logging.getLogger(__name__)

KEY = "draining"
TRIES = 10


class Draining(Collection[str]):
    """Follows the setting. Marks end by themselves, so that a router that dies in a drain takes no engine with it."""

    def __init__(self, settings: SharedSettings, clock: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._clock = clock
        # Until when, in seconds since the epoch, by incarnation.
        self._until: dict[str, float] = {}
        self._tasks = Tasks()

    def __contains__(self, incarnation: object) -> bool:
        """Whether that engine gets no new requests."""
        return isinstance(incarnation, str) and self._until.get(incarnation, 0) > self._clock()

    def __iter__(self) -> Iterator[str]:
        now = self._clock()
        return (incarnation for incarnation, until in self._until.items() if until > now)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def start(self) -> None:
        """Begins to follow."""
        self._tasks.start(self._follow(), "follow the drained engines")

    async def mark(self, incarnation: str, seconds: float) -> None:
        """No new requests for so long, on any router. Raises Unavailable."""
        await self._change(lambda until: until.update({incarnation: self._clock() + seconds}))

    async def unmark(self, incarnation: str) -> None:
        """New requests again. Raises Unavailable."""
        await self._change(lambda until: until.pop(incarnation, None))

    async def _change(self, change: Callable[[dict[str, float]], object]) -> None:
        for _ in range(TRIES):
            try:
                setting = await self._settings.get(KEY)
                now = self._clock()
                until = {k: v for k, v in _read(setting).items() if v > now}
                change(until)
                revision = 0 if setting is None else setting.revision
                await self._settings.put(KEY, json.dumps(until, sort_keys=True), revision)
            except Aborted:
                # Another router was first.
                continue
            except DeadlineExceeded as error:
                raise Unavailable(str(error)) from error
            self._until = until
            return
        raise Unavailable(f"setting {KEY} changes too fast")

    async def _follow(self) -> None:
        async with aclosing(self._settings.watch(KEY)) as settings:
            async for setting in settings:
                self._until = _read(setting)

    async def close(self) -> None:
        """Stops following."""
        await self._tasks.close()


def _read(setting: Setting | None) -> dict[str, float]:
    if setting is None:
        return {}
    try:
        return {str(key): float(value) for key, value in json.loads(setting.value).items()}
    except (ValueError, TypeError, AttributeError) as error:
        log.warning("setting %s = %s is not taken: %s", KEY, setting.value[:200], error)
        return {}
