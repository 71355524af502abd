"""Links over gloo: TCP between CPU memories, through torch.distributed's process groups of two.

A process group is used directly, not through init_process_group: nothing global, and as many as there are links.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from typing import TYPE_CHECKING, Any

from kvmesh.dataplane.base import CannotConnect
from kvmesh.dataplane.link import Link, Links, Pending
from kvmesh.errors import Unavailable

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

HEADER_TAG, DATA_TAG, NO_TAG = 0, 1, 2
HEADER_NUMBERS = 3


class GlooLinks(Links):
    """Connections from and to the address `host` of this machine."""

    name = "gloo"

    def __init__(self, host: str) -> None:
        import torch.distributed as dist

        if not dist.is_gloo_available():
            raise CannotConnect("torch was built without gloo")
        try:
            self._device = dist.ProcessGroupGloo.create_device(hostname=host)
        except RuntimeError as error:
            raise CannotConnect(f"gloo cannot use the address {host!r}: {error}") from error

    def join(self, store: Store, rank: int, seconds: float) -> GlooLink:
        """A process group of two."""
        import torch.distributed as dist

        options = dist.ProcessGroupGloo._Options()
        options._timeout = datetime.timedelta(seconds=seconds)
        options._threads = 1
        options._devices = [self._device]
        return GlooLink(dist.ProcessGroupGloo(store, rank, 2, options), 1 - rank)


class GlooPending(Pending):
    """A torch.distributed.Work."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, deadline: float) -> None:
        """As the base says; gloo closes the connection when time is up."""
        # Below a millisecond gloo takes it for no limit at all.
        left = max(0.001, deadline - time.monotonic())
        try:
            self._work.wait(datetime.timedelta(seconds=left))
        except RuntimeError as error:
            reason = str(error).rpartition("] ")[2].partition("\n")[0] if "closed by peer" not in str(error) else ""
            raise Unavailable(reason or "the connection was closed by the peer") from error


class GlooLink(Link):
    """One process group."""

    def __init__(self, group: Any, peer: int) -> None:
        self._group = group
        self._peer = peer

    def send_header(self, header: list[int]) -> GlooPending:
        """On a tag of its own."""
        import torch

        return self._send(torch.tensor(header, dtype=torch.int64), HEADER_TAG)

    def recv_header(self) -> tuple[GlooPending, torch.Tensor]:
        """On a tag of its own."""
        import torch

        header = torch.empty(HEADER_NUMBERS, dtype=torch.int64)
        return self._recv(header, HEADER_TAG), header

    def send(self, data: torch.Tensor) -> GlooPending:
        """As the base says."""
        return self._send(data, DATA_TAG)

    def recv(self, data: torch.Tensor) -> GlooPending:
        """As the base says."""
        return self._recv(data, DATA_TAG)

    def _send(self, data: torch.Tensor, tag: int) -> GlooPending:
        try:
            return GlooPending(self._group.send([data], self._peer, tag))
        except RuntimeError as error:
            raise Unavailable("the connection is closed") from error

    def _recv(self, data: torch.Tensor, tag: int) -> GlooPending:
        try:
            return GlooPending(self._group.recv([data], self._peer, tag))
        except RuntimeError as error:
            raise Unavailable("the connection is closed") from error

    def wait_for(self, fence: object) -> None:
        """A pool on a device is read by way of the host (never run)."""
        if fence is not None:
            fence.synchronize()  # type: ignore[attr-defined]

    def abort(self) -> None:
        """ProcessGroupGloo.abort wakes nobody; a receive whose time is up closes the connection under all others."""
        import torch

        with contextlib.suppress(RuntimeError):
            never = self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, NO_TAG)
            never.wait(datetime.timedelta(milliseconds=1))
