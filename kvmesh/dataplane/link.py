"""What a two-sided transport is made of: a connection of exactly two processes over torch.distributed."""

from __future__ import annotations

import abc
import logging
import threading
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

log = logging.getLogger(__name__)

# Links that are kept open while no write uses them; the one idle for longest goes first.
IDLE_LINKS = 32
RECEIVER, SENDER = 0, 1


class Pending(abc.ABC):
    """A send or receive under way."""

    @abc.abstractmethod
    def wait(self, deadline: float) -> None:
        """Returns when it is complete. Raises Unavailable at monotonic `deadline`, or when the link broke.

        A link of which one wait failed is of no use any more.
        """


class Link(abc.ABC):
    """Both ends of it are one write's at a time; headers and data are received in the order they were sent in."""

    @abc.abstractmethod
    def send_header(self, header: list[int]) -> Pending:
        """Begins to send HEADER whole numbers."""

    @abc.abstractmethod
    def recv_header(self) -> tuple[Pending, torch.Tensor]:
        """Begins to receive a header; the tensor of int64 has it when the wait is over."""

    @abc.abstractmethod
    def send(self, data: torch.Tensor) -> Pending:
        """Begins to send bytes, which must stay as they are until the wait is over."""

    @abc.abstractmethod
    def recv(self, data: torch.Tensor) -> Pending:
        """Begins to receive bytes."""

    def scope(self) -> AbstractContextManager[None]:
        """Copies between pool and frames are made within it."""
        return nullcontext()

    def wait_for(self, fence: object) -> None:  # noqa: B027
        """As Connection.wait_for."""

    def settle(self, deadline: float) -> None:  # noqa: B027
        """Returns when copies that were begun within the scope are done. Raises Unavailable."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Ends it at once, from any thread: every wait on either side fails."""


class Links(abc.ABC):
    """Makes links of one kind."""

    name: ClassVar[str]

    @abc.abstractmethod
    def join(self, store: Store, rank: int, seconds: float) -> Link:
        """Connects the two processes that have joined with this store. Raises when that takes longer than `seconds`."""


class IdleLinks:
    """Links between two writes, by name. For any thread."""

    def __init__(self, limit: int = IDLE_LINKS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._links: OrderedDict[str, Link] = OrderedDict()
        self._closed = False

    def __len__(self) -> int:
        return len(self._links)

    def take(self, name: str) -> Link | None:
        """The link, which is the caller's now; None if it is not there."""
        with self._lock:
            return self._links.pop(name, None)

    def put(self, name: str, link: Link) -> None:
        """Keeps a link."""
        with self._lock:
            self._links[name] = link
            gone = [self._links.popitem(last=False)[1]] if len(self._links) > self._limit or self._closed else []
        for old in gone:
            old.abort()

    def drop(self, prefix: str) -> None:
        """Ends the links whose names begin with `prefix`."""
        with self._lock:
            gone = [self._links.pop(name) for name in list(self._links) if name.startswith(prefix)]
        for link in gone:
            link.abort()

    def close(self) -> None:
        """Ends all, and those that come later."""
        self._closed = True
        self.drop("")
