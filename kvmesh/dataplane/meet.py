"""How two processes find one another for a link: the receiver listens, the sender connects and names the pair.

The socket that they meet on is the pair's store while torch.distributed connects them. (A TCPStore will not do: its
clients look names up in the DNS on every connection, and wait for it.)
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from kvmesh.dataplane.base import CannotConnect
from kvmesh.errors import Unavailable
from kvmesh.grpcx import join_address, split_address

if TYPE_CHECKING:
    from torch.distributed import Store

HELLO, READY = b"kvmesh pair 1\n", b"\x01"
NAME_BYTES, VALUE_BYTES = 256, 1 << 20
# A caller says which pair it is, and waits for its reception to begin, no longer than this.
CALLER_S = 30.0
CALLERS = 256
_LENGTHS = struct.Struct("!HI")


class MeetingPoint:
    """The receiver's side: one listening socket and a thread."""

    def __init__(self, host: str) -> None:
        try:
            family, _, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
            self._socket = _listening(family, where)
        except OSError as error:
            raise CannotConnect(f"no data port can be opened on {host!r}: {error.strerror or error}") from error
        self.address = join_address(host, self._socket.getsockname()[1])
        self._changed = threading.Condition()
        # Who has called and is not met yet, and until when it waits.
        self._callers: dict[str, tuple[socket.socket, float]] = {}
        self._closed = False
        threading.Thread(target=self._accept, name="kvmesh-meet", daemon=True).start()

    def meet(self, name: str, deadline: float, cancelled: Callable[[], bool]) -> socket.socket:
        """The caller's socket. Raises Unavailable at the deadline, or once `cancelled` after `wake`."""
        with self._changed:
            while name not in self._callers:
                left = deadline - time.monotonic()
                if left <= 0 or self._closed or cancelled():
                    raise Unavailable("the sender did not connect" if left <= 0 else "it was cancelled")
                self._changed.wait(left)
            caller, _ = self._callers.pop(name)
        try:
            caller.sendall(READY)
        except OSError as error:
            caller.close()
            raise Unavailable(f"the sender is gone: {error.strerror}") from error
        return caller

    def wake(self) -> None:
        """Has every `meet` look whether it is cancelled."""
        with self._changed:
            self._changed.notify_all()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                if self._socket.fileno() < 0:
                    return
                # Out of descriptors, say.
                time.sleep(0.1)
                continue
            threading.Thread(target=self._greet, args=(caller,), name="kvmesh-greet", daemon=True).start()

    def _greet(self, caller: socket.socket) -> None:
        try:
            caller.settimeout(CALLER_S)
            size = len(HELLO) + 2
            head = _read(caller, size)
            (length,) = struct.unpack("!H", head[-2:])
            if head[:-2] != HELLO or length > NAME_BYTES:
                raise OSError("not one of us")
            name = _read(caller, length).decode()
        except (OSError, ValueError):
            caller.close()
            return
        now = time.monotonic()
        with self._changed:
            late = [other for other, (_, until) in self._callers.items() if until < now]
            for other in (late + list(self._callers))[: max(len(late), len(self._callers) - CALLERS)]:
                if other in self._callers:
                    self._callers.pop(other)[0].close()
            self._callers[name] = (caller, now + CALLER_S)
            self._changed.notify_all()

    def close(self) -> None:
        """Ends everything that waits here."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for caller, _ in self._callers.values():
                caller.close()
            self._callers.clear()
        with suppress(OSError):
            # Wakes the thread; closing alone does not.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _listening(family: int, where: Any) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.bind(where)
        made.listen(128)
    except OSError:
        made.close()
        raise
    return made


def call(address: str, name: str, deadline: float) -> socket.socket:
    """The sender's side: returns when the receiver is ready for this pair. Raises OSError, by monotonic `deadline`."""
    host, port = split_address(address)
    caller = socket.create_connection((host, port), timeout=max(0.01, deadline - time.monotonic()))
    try:
        raw = name.encode()
        caller.sendall(HELLO + struct.pack("!H", len(raw)) + raw)
        caller.settimeout(max(0.01, deadline - time.monotonic()))
        if _read(caller, 1) != READY:
            raise OSError("the receiver is not one of us")
        return caller
    except BaseException:
        caller.close()
        raise


def _read(where: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = where.recv(count - len(data))
        if not part:
            raise ConnectionResetError("the other side hung up")
        data += part
    return data


def pair_store(where: socket.socket, seconds: float) -> Store:
    """The store of one pair: what one side sets, the other gets. The socket stays its owner's."""
    from torch.distributed import Store

    class PairStore(Store):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._values: dict[str, bytes] = {}
            self._deadline = time.monotonic() + seconds

        def set(self, key: str, value: Any) -> None:
            raw = value.encode() if isinstance(value, str) else bytes(value)
            self._values[key] = raw
            name = key.encode()
            where.settimeout(max(0.01, self._deadline - time.monotonic()))
            where.sendall(_LENGTHS.pack(len(name), len(raw)) + name + raw)

        def get(self, key: str) -> bytes:
            while key not in self._values:
                where.settimeout(max(0.01, self._deadline - time.monotonic()))
                name, value = _LENGTHS.unpack(_read(where, _LENGTHS.size))
                if value > VALUE_BYTES:
                    raise OSError("not one of us")
                other = _read(where, name).decode()
                self._values[other] = _read(where, value)
            return self._values[key]

        def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
            for key in keys:
                self.get(key)

        def check(self, keys: list[str]) -> bool:
            return all(key in self._values for key in keys)

        def delete_key(self, key: str) -> bool:
            return self._values.pop(key, None) is not None

    return PairStore()
