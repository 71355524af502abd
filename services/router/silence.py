"""The end of a call because an engine that takes part in it hangs."""

from __future__ import annotations

from functools import partial
from typing import Self

from kvmesh.errors import MeshError, Unavailable
from services.router.attempt import Attempt, Cancellable
from services.router.hearing import cancelled
from services.router.link import EngineLink


class Silence:
    """Around a call: cancels it when one of the engines that take part hangs."""

    def __init__(self, attempt: Attempt, call: Cancellable, *links: EngineLink | None) -> None:
        self._attempt, self._call = attempt, call
        self._heard = [(link, partial(self._hang, link)) for link in links if link is not None]
        self._culprit: EngineLink | None = None
        self._reason = ""

    def __enter__(self) -> Self:
        for link, told in self._heard:
            link.hearing.running(told)
        return self

    def __exit__(self, *exc: object) -> None:
        for link, told in self._heard:
            link.hearing.ended(told)

    @property
    def broke(self) -> bool:
        """Whether it is silence that has ended the call, and nobody who left."""
        return self._culprit is not None and not cancelled()

    def failure(self) -> MeshError:
        """What to raise then."""
        assert self._culprit is not None
        return self._attempt.blame(self._culprit, Unavailable(self._reason))

    def _hang(self, link: EngineLink, reason: str) -> None:
        self._culprit, self._reason = link, reason
        self._call.cancel()
