"""Certificates that are renewed in their files while a service runs: connections made later take the new ones."""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from kvmesh.aio import Tasks
from kvmesh.errors import MeshError
from kvmesh.tls import Tls

log = logging.getLogger(__name__)

# How often the files are looked at.
LOOK_S = 1.0
# Former connections that calls may go on over; they rest when none does.
FORMER = 3


class Files:
    """PEM files of one party: its CA's, its certificate, its key. Raises InvalidArgument. For any thread."""

    def __init__(self, paths: tuple[str, str, str]) -> None:
        self._paths = paths
        self._lock = threading.Lock()
        self._stamps = self._look()
        self._tls = Tls.of(paths)
        self._looked = time.monotonic()
        # What was there when that was told.
        self._refused: list[tuple[int, int, int]] = []

    def now(self) -> Tls:
        """What they hold; while they cannot be read, or key and certificate are not of one another, what they held."""
        if time.monotonic() - self._looked < LOOK_S:
            return self._tls
        with self._lock:
            self._looked = time.monotonic()
            stamps = self._look()
            if stamps != self._stamps:
                self._take(stamps)
            return self._tls

    def _take(self, stamps: list[tuple[int, int, int]]) -> None:
        """What is there now, if it is good, and did not change while it was looked at; else the next time."""
        try:
            tls = Tls.of(self._paths)
            _check(self._paths)
        except (MeshError, OSError, ValueError) as error:
            if stamps != self._refused:
                log.warning("renewed certificates are not taken: %s", error)
            self._refused = stamps
            return
        if stamps == self._look():
            self._stamps, self._tls = stamps, tls
            log.info("renewed certificates are taken: %s", self._paths[1] or self._paths[0])

    def _look(self) -> list[tuple[int, int, int]]:
        found = []
        for path in filter(None, self._paths):
            try:
                stat = Path(path).expanduser().stat()
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        return found

    def server_credentials(self, mutual: bool) -> grpc.ServerCredentials:
        """As Tls.server_credentials; each handshake takes what the files hold then."""
        seen: list[Tls] = [self.now()]

        def configuration(tls: Tls) -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([(tls.key, tls.certificate)], tls.ca if mutual else None)

        def renewed() -> Any:
            tls = self.now()
            if tls is seen[0]:
                return None
            seen[0] = tls
            return configuration(tls)

        return grpc.dynamic_ssl_server_credentials(configuration(seen[0]), renewed, mutual)


def _check(paths: tuple[str, str, str]) -> None:
    """Raises ssl.SSLError, an OSError, when they are no certificates, or do not fit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca, certificate, key = (str(Path(path).expanduser()) for path in paths)
    if paths[0]:
        context.load_verify_locations(ca)
    if paths[1]:
        context.load_cert_chain(certificate, key)


async def keep(context: Callable[[], ssl.SSLContext | None], certificate: str, key: str) -> None:
    """Has a server's context take what the files hold, whenever that changes; ends by being cancelled."""
    files = Files(("", certificate, key))
    held = files.now()
    while True:
        await asyncio.sleep(LOOK_S)
        now = await asyncio.to_thread(files.now)
        if now is not held and (found := context()) is not None:
            try:
                found.load_cert_chain(certificate, key)
                held = now
            except OSError as error:
                log.warning("renewed certificates are not taken: %s", error)


class RenewedChannel(grpc.aio.Channel):
    """A channel that is made anew when the files have changed; calls that run go on over the former one."""

    def __init__(self, make: Callable[[Tls], grpc.aio.Channel], files: Files) -> None:
        self._make = make
        self._files = files
        self._tls = files.now()
        self._channel = make(self._tls)
        self._former: list[grpc.aio.Channel] = []
        self._tasks = Tasks()

    def _now(self) -> grpc.aio.Channel:
        tls = self._files.now()
        if tls is not self._tls:
            self._former.append(self._channel)
            self._tls, self._channel = tls, self._make(tls)
            if len(self._former) > FORMER:
                self._tasks.start(self._former.pop(0).close(None), "close a former channel")
        return self._channel

    def _call(self, kind: str, *args: Any, **more: Any) -> Any:
        of: grpc.aio.Channel | None = None
        made: Any = None

        def call(*request: Any, **options: Any) -> Any:
            nonlocal of, made
            if (channel := self._now()) is not of:
                of, made = channel, getattr(channel, kind)(*args, **more)
            return made(*request, **options)

        return call

    def unary_unary(self, *args: Any, **more: Any) -> Any:
        """As the base; so are the other kinds."""
        return self._call("unary_unary", *args, **more)

    def unary_stream(self, *args: Any, **more: Any) -> Any:
        """As the base."""
        return self._call("unary_stream", *args, **more)

    def stream_unary(self, *args: Any, **more: Any) -> Any:
        """As the base."""
        return self._call("stream_unary", *args, **more)

    def stream_stream(self, *args: Any, **more: Any) -> Any:
        """As the base."""
        return self._call("stream_stream", *args, **more)

    async def close(self, grace: float | None = None) -> None:
        """Former ones end at once."""
        await self._tasks.close()
        for former in self._former:
            await former.close(None)
        await self._channel.close(grace)

    async def __aenter__(self) -> RenewedChannel:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Of the present one."""
        return self._now().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Of the present one."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Of the present one."""
        await self._now().channel_ready()
